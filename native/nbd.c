/* SPDX-License-Identifier: Apache-2.0
 * nbd.c: the transmission phase of NBD, on a socket that has finished negotiation.
 *
 * One thread owns a connection. It alone reads and writes the socket, so replies never
 * interleave and a client that does not read its replies holds nobody but itself. A read
 * that hits is answered at once. One that misses is parked; the work thread that ends it
 * puts it on `finished` and wakes the connection's thread, which replies.
 *
 * Replies that become ready while further requests are already in the input buffer leave
 * in one sendmsg(). Nothing is held back while the thread waits for anything.
 */
#include "nbd.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine.h"
#include "mapping.h"
#include "round.h"
#include "status.h"

/* ---- limits ---- */

enum {
	SEND_BUFFER = 1 << 20,         /* of a Unix socket: read on while the client still copies */
	BATCH_BYTES = 64 << 10,        /* payload of replies from which it is not worth waiting for more */
	RETAINED_MAX = 4 << 20,        /* buffers kept for the next read */
	IDLE_SECONDS = 5               /* without a request, after which those are given back */
};

/* How long reads in hand are waited for once the client has said goodbye or half closed. */
static const int64_t LINGER_NS = 30 * 1000000000LL;

void nbd_wake(struct ob_nbd *nbd)
{
	uint64_t one = 1;

	/* Fails only when the counter is full, and then the thread is awake anyway. */
	if (write(nbd->wake, &one, sizeof(one)) < 0)
		return;
}

static void slot_free(struct slot *slot)
{
	if (slot->memory)
		munmap(slot->memory, slot->capacity);
	free(slot);
}

static void nbd_trim(struct ob_nbd *nbd)
{
	struct slot *slot;

	while ((slot = nbd->spare)) {
		nbd->spare = slot->next;
		slot_free(slot);
	}
	nbd->retained = 0;
}

void nbd_unref(struct ob_nbd *nbd)
{
	struct slot *slot, *next;

	if (atomic_fetch_sub(&nbd->references, 1) != 1)
		return;
	for (slot = atomic_load(&nbd->finished); slot; slot = next) {
		next = slot->next;
		slot_free(slot);
	}
	nbd_trim(nbd);
	if (nbd->writes)
		munmap(nbd->writes, WRITE_PIECE);
	close(nbd->fd);
	close(nbd->wake);
	pthread_cond_destroy(&nbd->at_end);
	pthread_mutex_destroy(&nbd->lock);
	ob_image_close(nbd->image);
	free(nbd);
}

/* ---- slots ---- */

struct slot *nbd_take(struct ob_nbd *nbd, uint64_t size)
{
	struct slot *slot = nbd->spare;

	if (slot) {
		nbd->spare = slot->next;
		nbd->retained -= slot->capacity;
	} else {
		slot = calloc(1, sizeof(*slot));
		if (!slot)
			return NULL;
		slot->nbd = nbd;
	}
	if (slot->capacity < size) {
		void *memory;

		size = round_up(size, 4096);
		memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (memory == MAP_FAILED) {
			slot_free(slot);
			return NULL;
		}
		if (slot->memory)
			munmap(slot->memory, slot->capacity);
		slot->memory = memory;
		slot->capacity = size;
	}
	return slot;
}

static void slot_release(struct ob_nbd *nbd, struct slot *slot)
{
	if (slot->kept)
		return;
	if (nbd->retained + slot->capacity > RETAINED_MAX) {
		slot_free(slot);
		return;
	}
	nbd->retained += slot->capacity;
	slot->next = nbd->spare;
	nbd->spare = slot;
}

/* ---- replies ---- */

static bool send_all(int fd, struct iovec *parts, size_t count)
{
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = count };

	while (message.msg_iovlen) {
		ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (sent < 0) {
			if (errno == EINTR)
				continue;
			return false;
		}
		while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
			sent -= (ssize_t)message.msg_iov->iov_len;
			message.msg_iov++;
			message.msg_iovlen--;
		}
		if (message.msg_iovlen) {
			message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
			message.msg_iov->iov_len -= (size_t)sent;
		}
	}
	return true;
}

/* Blocks while the client does not read. False: the connection is of no more use. */
static bool nbd_flush(struct ob_nbd *nbd)
{
	struct iovec parts[2 * BATCH_MAX];
	size_t count = 0;
	bool sent;

	for (uint32_t i = 0; i < nbd->batch_count; i++) {
		struct slot *slot = nbd->batch[i];

		parts[count++] = (struct iovec){ slot->header, slot->header_length };
		if (slot->payload_length)
			parts[count++] = (struct iovec){ slot->memory, slot->payload_length };
	}
	sent = send_all(nbd->fd, parts, count);
	while (nbd->batch_count)
		slot_release(nbd, nbd->batch[--nbd->batch_count]);
	nbd->batch_bytes = 0;
	return sent;
}

bool nbd_reply(struct ob_nbd *nbd, struct slot *slot)
{
	if (slot->status)
		slot->payload_length = 0;
	slot->header_length = header_build(slot->header, slot->reply, slot->status, slot->payload_length, &slot->request);
	nbd->batch[nbd->batch_count++] = slot;
	nbd->batch_bytes += slot->payload_length;
	return (nbd->batch_count < BATCH_MAX && nbd->batch_bytes < BATCH_BYTES) || nbd_flush(nbd);
}

bool nbd_collect(struct ob_nbd *nbd)
{
	struct slot *slot = atomic_exchange(&nbd->finished, NULL), *next;
	bool good = true;

	for (; slot; slot = next) {
		next = slot->next;
		nbd->parked--;
		nbd->parked_bytes -= slot->capacity;
		if (good)
			good = nbd_reply(nbd, slot);
		else
			slot_release(nbd, slot);
	}
	return good && nbd_flush(nbd);
}

/* ---- input ---- */

int nbd_wait(struct ob_nbd *nbd, short events, int timeout_ms)
{
	struct pollfd fds[2] = { { .fd = nbd->wake, .events = POLLIN }, { .fd = nbd->fd, .events = events } };
	uint64_t count;
	int ready = poll(fds, 2, timeout_ms);

	if (ready == 0)
		return -1;
	if (ready > 0 && fds[0].revents && read(nbd->wake, &count, sizeof(count)) < 0)
		return 0;
	return ready > 0 ? fds[1].revents : 0;
}

/* Bytes from the socket, at most `room`; replies leave meanwhile. 0: there will be no more. */
static uint32_t nbd_receive(struct ob_nbd *nbd, uint8_t *to, uint64_t room)
{
	ssize_t got;

	for (;;) {
		if (!nbd_collect(nbd) || atomic_load(&nbd->closing))
			return 0;
		/* With nothing parked nothing but the socket can wake us: one system call. */
		if (nbd->parked && !nbd_wait(nbd, POLLIN, -1))
			continue;
		got = recv(nbd->fd, to, room, nbd->parked ? MSG_DONTWAIT : 0);
		if (got > 0)
			return (uint32_t)got;
		if (got == 0 || (errno != EINTR && errno != EAGAIN))
			return 0;
		if (errno == EAGAIN && !nbd->parked) {    /* SO_RCVTIMEO has passed */
			nbd_trim(nbd);
			mapping_trim();
			nbd_wait(nbd, POLLIN, -1);
		}
	}
}

/* More bytes behind input's tail. False: there will be no more. */
static bool nbd_fill(struct ob_nbd *nbd)
{
	uint32_t got;

	memmove(nbd->input, nbd->input + nbd->head, nbd->tail - nbd->head);
	nbd->tail -= nbd->head;
	nbd->head = 0;
	got = nbd_receive(nbd, nbd->input + nbd->tail, INPUT_SIZE - nbd->tail);
	nbd->tail += got;
	return got > 0;
}

bool nbd_payload(struct ob_nbd *nbd, uint8_t *buffer, uint64_t length)
{
	while (length) {
		uint32_t step = (uint32_t)min_u64(length, nbd->tail - nbd->head);

		if (buffer && step)
			memcpy(buffer, nbd->input + nbd->head, step);
		nbd->head += step;
		if (!step && buffer)
			step = nbd_receive(nbd, buffer, length);
		else if (!step && nbd_fill(nbd))
			continue;
		if (!step)
			return false;
		length -= step;
		buffer = buffer ? buffer + step : NULL;
	}
	return true;
}

/* The next request; false: the client is done, broken or unwanted. */
static bool nbd_next(struct ob_nbd *nbd, struct wire_request *out)
{
	while (nbd->tail - nbd->head < REQUEST_SIZE)
		if (!nbd_fill(nbd))
			return false;
	if (atomic_load(&nbd->closing))
		return false;
	nbd->head += REQUEST_SIZE;
	return request_parse(nbd->input + nbd->head - REQUEST_SIZE, out) && out->type != CMD_DISC;
}

/* ---- lifetime ---- */

/* Reply to what is parked, while there is somebody to reply to. */
static void nbd_linger(struct ob_nbd *nbd)
{
	int64_t until = engine_now() + LINGER_NS, left = LINGER_NS;

	while (nbd_collect(nbd) && nbd->parked && left > 0) {
		if (nbd_wait(nbd, 0, (int)(left / 1000000) + 1))
			return;
		left = until - engine_now();
	}
}

static void *nbd_run(void *argument)
{
	struct ob_nbd *nbd = argument;
	struct wire_request request;

	while (nbd_next(nbd, &request) && nbd_answer(nbd, &request))
		;
	nbd_linger(nbd);
	shutdown(nbd->fd, SHUT_RDWR);
	/* Closing TCP over unread input would reset it, and lose replies still on their way. */
	for (int i = 0; i < BATCH_MAX && recv(nbd->fd, nbd->input, INPUT_SIZE, MSG_DONTWAIT) > 0; i++)
		;
	engine_post(nbd->image->engine, OB_EVENT_NBD_CLOSED, 0, nbd->config.id);
	pthread_mutex_lock(&nbd->lock);
	nbd->ended = true;
	pthread_cond_signal(&nbd->at_end);
	pthread_mutex_unlock(&nbd->lock);
	return NULL;
}

static int socket_prepare(int fd)
{
	struct timeval idle = { .tv_sec = IDLE_SECONDS };
	int on = 1, buffer = SEND_BUFFER, family = 0, flags = fcntl(fd, F_GETFL);
	socklen_t length = sizeof(family);

	if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0
	    || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof(idle)) < 0
	    || getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &length) < 0)
		return -errno;
	if (family == AF_UNIX)
		return setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)) < 0 ? -errno : 0;
	/* Keep-alive: a client whose machine has gone must not hold its connection for ever. */
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0
	    || setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)) < 0)
		return -errno;
	return 0;
}

/* What writing needs is there before the first write: by then there may be no memory but by writing. */
static int nbd_prepare(struct ob_nbd *nbd)
{
	if (nbd->image->upper) {
		nbd->writes = mmap(NULL, WRITE_PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (nbd->writes == MAP_FAILED) {
			nbd->writes = NULL;
			return -ENOMEM;
		}
	}
	return nbd->wake < 0 || nbd->fd < 0 ? -EMFILE : socket_prepare(nbd->fd);
}

int ob_nbd_start(struct ob_image *image, int fd, const ob_nbd_config *config, struct ob_nbd **out)
{
	struct ob_nbd *nbd = calloc(1, sizeof(*nbd));
	pthread_condattr_t monotonic;
	int error;

	if (!nbd)
		return status_set(ENOMEM, "start NBD: connection %llu: out of memory", (unsigned long long)config->id);
	nbd->image = image_ref(image);
	nbd->config = *config;
	atomic_init(&nbd->references, 1);
	pthread_mutex_init(&nbd->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&nbd->at_end, &monotonic);
	pthread_condattr_destroy(&monotonic);
	nbd->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	nbd->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	error = nbd_prepare(nbd);
	if (error)
		status_set(-error, "start NBD: connection %llu: errno %d", (unsigned long long)config->id, -error);
	else
		error = engine_thread(&nbd->thread, "ob-nbd", nbd_run, nbd);
	if (error) {
		nbd_unref(nbd);
		return error;
	}
	*out = nbd;
	return 0;
}

void ob_nbd_close(struct ob_nbd *nbd, int64_t timeout_ns)
{
	int64_t until = engine_now() + timeout_ns;

	if (!nbd)
		return;
	atomic_store(&nbd->closing, 1);
	shutdown(nbd->fd, SHUT_RD);
	nbd_wake(nbd);
	pthread_mutex_lock(&nbd->lock);
	while (!nbd->ended && engine_now() < until)
		engine_wait_until(&nbd->at_end, &nbd->lock, until);
	pthread_mutex_unlock(&nbd->lock);
	/* Hung up from our side, which ends every wait of the thread as the client's would. */
	shutdown(nbd->fd, SHUT_RDWR);
	pthread_join(nbd->thread, NULL);
	nbd_unref(nbd);
}
