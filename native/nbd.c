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
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "checked.h"
#include "engine.h"
#include "image.h"
#include "mapping.h"
#include "nbdwire.h"
#include "ob.h"
#include "request.h"
#include "round.h"
#include "status.h"

/* ---- limits ---- */

enum {
	READ_MAX = 32 << 20,           /* longest read: the maximum nbdwire.py announces */
	PARKED_MAX = 128,              /* reads that wait for fetches, of one connection */
	PARKED_BYTES_MAX = 64 << 20,   /* ... and their buffers: two of the longest */
	EXTENTS_MAX = 1024,            /* in one answer to BLOCK_STATUS: 8 KiB */
	RUNS_AT_ONCE = 64,             /* from the image; on the stack */
	SEND_BUFFER = 1 << 20,         /* of a Unix socket: read on while the client still copies */
	BATCH_MAX = 16,                /* replies in one sendmsg() */
	BATCH_BYTES = 64 << 10,        /* ... and payload from which it is not worth waiting */
	INPUT_SIZE = 4096,             /* some 146 requests */
	RETAINED_MAX = 4 << 20,        /* buffers kept for the next read */
	IDLE_SECONDS = 5               /* without a request, after which those are given back */
};

/* How long reads in hand are waited for once the client has said goodbye or half closed. */
static const int64_t LINGER_NS = 30 * 1000000000LL;

/* ---- connection ---- */

/* A request from its arrival to its reply. */
struct slot {
	struct ob_request read;        /* first: read_complete() casts */
	struct ob_nbd *nbd;
	struct slot *next;             /* `spare` or `finished` */
	atomic_int answerable;         /* set by submitter and complete(): the second answers */
	int status;                    /* 0 or -errno */
	int reply;                     /* REPLY_* */
	struct wire_request request;
	uint32_t header_length, payload_length;
	uint8_t header[HEADER_MAX];
	uint8_t *memory;               /* the payload; mapped, so that it goes back when unmapped */
	uint64_t capacity;
};

struct ob_nbd {
	atomic_int references;         /* the handle, and each read between submit and complete */
	struct ob_image *image;
	int fd;
	int wake;                      /* eventfd: `finished` or `closing` has changed */
	ob_nbd_config config;
	pthread_t thread;
	_Atomic(struct slot *) finished;
	atomic_int closing;            /* take no more requests */
	pthread_mutex_t lock;          /* of ended */
	pthread_cond_t at_end;
	bool ended;

	/* the connection's thread only, from here on */
	struct slot *spare;
	uint64_t retained;             /* bytes of memory of the spare slots */
	struct slot *batch[BATCH_MAX];
	uint32_t batch_count;
	uint64_t batch_bytes;
	uint32_t parked;
	uint64_t parked_bytes;
	uint32_t head, tail;           /* unread part of input */
	uint8_t input[INPUT_SIZE];
};

static void nbd_wake(struct ob_nbd *nbd)
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

/* Whoever ends a read later than the connection ends may be the last. */
static void nbd_unref(struct ob_nbd *nbd)
{
	struct slot *slot, *next;

	if (atomic_fetch_sub(&nbd->references, 1) != 1)
		return;
	for (slot = atomic_load(&nbd->finished); slot; slot = next) {
		next = slot->next;
		slot_free(slot);
	}
	nbd_trim(nbd);
	close(nbd->fd);
	close(nbd->wake);
	pthread_cond_destroy(&nbd->at_end);
	pthread_mutex_destroy(&nbd->lock);
	ob_image_close(nbd->image);
	free(nbd);
}

/* ---- slots ---- */

/* NULL when out of memory. */
static struct slot *slot_take(struct ob_nbd *nbd, uint64_t size)
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

static bool nbd_reply(struct ob_nbd *nbd, struct slot *slot)
{
	if (slot->status)
		slot->payload_length = 0;
	slot->header_length = header_build(slot->header, slot->reply, slot->status, slot->payload_length, &slot->request);
	nbd->batch[nbd->batch_count++] = slot;
	nbd->batch_bytes += slot->payload_length;
	return (nbd->batch_count < BATCH_MAX && nbd->batch_bytes < BATCH_BYTES) || nbd_flush(nbd);
}

/* Reply to the reads that work threads have finished. */
static bool nbd_collect(struct ob_nbd *nbd)
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

/* Waits for a wake or for `events` of the socket, whose revents it returns; -1: time is up. */
static int nbd_wait(struct ob_nbd *nbd, short events, int timeout_ms)
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

/* More bytes behind input's tail; replies leave meanwhile. False: there will be no more. */
static bool nbd_receive(struct ob_nbd *nbd)
{
	ssize_t got;

	memmove(nbd->input, nbd->input + nbd->head, nbd->tail - nbd->head);
	nbd->tail -= nbd->head;
	nbd->head = 0;
	for (;;) {
		if (!nbd_collect(nbd) || atomic_load(&nbd->closing))
			return false;
		/* With nothing parked nothing but the socket can wake us: one system call. */
		if (nbd->parked && !nbd_wait(nbd, POLLIN, -1))
			continue;
		got = recv(nbd->fd, nbd->input + nbd->tail, INPUT_SIZE - nbd->tail, nbd->parked ? MSG_DONTWAIT : 0);
		if (got > 0) {
			nbd->tail += (uint32_t)got;
			return true;
		}
		if (got == 0 || (errno != EINTR && errno != EAGAIN))
			return false;
		if (errno == EAGAIN && !nbd->parked) {    /* SO_RCVTIMEO has passed */
			nbd_trim(nbd);
			mapping_trim();
			nbd_wait(nbd, POLLIN, -1);
		}
	}
}

/* Skip the payload of a write. */
static bool nbd_drain(struct ob_nbd *nbd, uint64_t length)
{
	for (;;) {
		uint64_t step = min_u64(length, nbd->tail - nbd->head);

		nbd->head += (uint32_t)step;
		length -= step;
		if (!length)
			return true;
		if (!nbd_receive(nbd))
			return false;
	}
}

/* The next request; false: the client is done, broken or unwanted. */
static bool nbd_next(struct ob_nbd *nbd, struct wire_request *out)
{
	while (nbd->tail - nbd->head < REQUEST_SIZE)
		if (!nbd_receive(nbd))
			return false;
	if (atomic_load(&nbd->closing))
		return false;
	nbd->head += REQUEST_SIZE;
	return request_parse(nbd->input + nbd->head - REQUEST_SIZE, out) && out->type != CMD_DISC;
}

/* ---- commands ---- */

/* A reply without payload. */
static bool answer_status(struct ob_nbd *nbd, const struct wire_request *request, int reply, int status)
{
	struct slot *slot = slot_take(nbd, 0);

	if (!slot)
		return false;
	slot->request = *request;
	slot->reply = reply;
	slot->status = status;
	slot->payload_length = 0;
	return nbd_reply(nbd, slot);
}

static int request_check(const struct ob_nbd *nbd, const struct wire_request *request, uint16_t flags)
{
	if (request->flags & ~flags || !request->length)
		return -EINVAL;
	return range_inside(request->offset, request->length, nbd->image->size) ? 0 : -EINVAL;
}

/* request_submit()'s answer: on this thread inside it, or at any time on another. */
static void read_complete(struct ob_request *request, int status)
{
	struct slot *slot = (struct slot *)request;
	struct ob_nbd *nbd = slot->nbd;

	slot->status = status;
	if (!atomic_exchange(&slot->answerable, 1))
		return;
	slot->next = atomic_load(&nbd->finished);
	while (!atomic_compare_exchange_weak(&nbd->finished, &slot->next, slot))
		;
	nbd_wake(nbd);
	nbd_unref(nbd);
}

/* Wait until another read of that length may be parked. */
static bool nbd_admit(struct ob_nbd *nbd, uint64_t length)
{
	while (nbd->parked && (nbd->parked >= PARKED_MAX || nbd->parked_bytes + length > PARKED_BYTES_MAX)) {
		uint32_t before = nbd->parked;

		/* Their wake may be spent: it is only waited for when there was nothing to collect. */
		if (!nbd_collect(nbd) || (nbd->parked == before && nbd_wait(nbd, 0, -1)))
			return false;
	}
	return true;
}

static bool answer_read(struct ob_nbd *nbd, const struct wire_request *request)
{
	int reply = nbd->config.structured ? REPLY_DATA : REPLY_SIMPLE;
	int status = request_check(nbd, request, nbd->config.structured ? FLAG_DF : 0);
	struct slot *slot;

	if (!status && request->length > READ_MAX)
		status = request->flags & FLAG_DF ? -EOVERFLOW : -EINVAL;
	if (status)
		return answer_status(nbd, request, reply, status);
	if (!nbd_admit(nbd, round_up(request->length, 4096)))
		return false;
	slot = slot_take(nbd, request->length);
	if (!slot)
		return answer_status(nbd, request, reply, -ENOMEM);
	slot->request = *request;
	slot->reply = reply;
	slot->payload_length = request->length;
	slot->read.image = nbd->image;
	slot->read.offset = request->offset;
	slot->read.length = request->length;
	slot->read.buffer = slot->memory;
	slot->read.complete = read_complete;
	atomic_store(&slot->answerable, 0);
	nbd->parked++;
	nbd->parked_bytes += slot->capacity;
	atomic_fetch_add(&nbd->references, 1);
	request_submit(&slot->read);
	if (!atomic_exchange(&slot->answerable, 1))
		return true;
	nbd->parked--;
	nbd->parked_bytes -= slot->capacity;
	nbd_unref(nbd);
	return nbd_reply(nbd, slot);
}

/* Descriptors of [offset, offset + length), at most `max`; -errno. Room is for max + 1. */
static int extents_fill(struct ob_image *image, const struct wire_request *request, uint8_t *extents, uint32_t max)
{
	ob_run runs[RUNS_AT_ONCE];
	uint64_t at = request->offset, end = at + request->length;
	uint32_t count = 0;

	while (at < end) {
		int found = ob_image_runs(image, at, end - at, runs, RUNS_AT_ONCE);

		if (found <= 0)
			return found ? found : -EIO;
		for (int i = 0; i < found; i++) {
			uint32_t state = runs[i].kind == OB_RUN_DATA ? 0 : STATE_HOLE | STATE_ZERO;

			count = extents_add(extents, count, runs[i].length, state);
			if (count > max)
				return (int)max;
		}
		at = runs[found - 1].offset + runs[found - 1].length;
	}
	return (int)count;
}

static bool answer_block_status(struct ob_nbd *nbd, const struct wire_request *request)
{
	int reply = nbd->config.structured ? REPLY_BLOCK_STATUS : REPLY_SIMPLE;
	int status = nbd->config.allocation ? request_check(nbd, request, FLAG_REQ_ONE) : -EINVAL;
	struct slot *slot;
	int count;

	if (status)
		return answer_status(nbd, request, reply, status);
	slot = slot_take(nbd, 4 + 8 * (EXTENTS_MAX + 1));
	if (!slot)
		return answer_status(nbd, request, reply, -ENOMEM);
	put_be(slot->memory, CONTEXT_ALLOCATION, 4);
	count = extents_fill(nbd->image, request, slot->memory + 4, request->flags & FLAG_REQ_ONE ? 1 : EXTENTS_MAX);
	slot->request = *request;
	slot->reply = reply;
	slot->status = count < 0 ? count : 0;
	slot->payload_length = 4 + 8 * (uint32_t)count;
	return nbd_reply(nbd, slot);
}

/* False: hang up. */
static bool nbd_answer(struct ob_nbd *nbd, const struct wire_request *request)
{
	switch (request->type) {
	case CMD_READ:
		return answer_read(nbd, request);
	case CMD_BLOCK_STATUS:
		return answer_block_status(nbd, request);
	case CMD_FLUSH:
		return answer_status(nbd, request, REPLY_SIMPLE, 0);
	case CMD_WRITE:
		return nbd_drain(nbd, request->length) && answer_status(nbd, request, REPLY_SIMPLE, -EPERM);
	case CMD_TRIM:
	case CMD_WRITE_ZEROES:
		return answer_status(nbd, request, REPLY_SIMPLE, -EPERM);
	default:
		return answer_status(nbd, request, REPLY_SIMPLE, -EINVAL);
	}
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
	error = nbd->wake < 0 || nbd->fd < 0 ? -errno : socket_prepare(nbd->fd);
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
