/* SPDX-License-Identifier: Apache-2.0
 * fuse.c: an image as the one file of a FUSE mount, spoken directly to /dev/fuse.
 *
 * The mount has no directory: its root is the file (rootmode of a regular file), so
 * the mount point is a file too. Whatever a session negotiated or read stands in the
 * memfd (fuse.h), for a later server to go on with.
 *
 * config.threads threads read the descriptor. A hit is answered by the thread that read
 * it; a parked request keeps its slot and is answered by a work thread.
 */
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "mapping.h"
#include "status.h"

enum {
	THREADS_MAX = 64,
	SLOTS_MAX = 1024,                 /* 1 GiB of address space for buffers */
	IDLE_MS = 1000,                   /* unused this long, buffers go back to the system */
	CROWDED_MS = 1000                 /* how often a session without free slots looks for its end */
};

static const char SESSION_MAGIC[8] = "obfuse\0\1";   /* the last byte is the layout's version */

static size_t memfd_size(const struct ob_fuse *fuse)
{
	return SESSION_SIZE + (size_t)fuse->config.slots * fuse->record_size;
}

/* ---- slots ---- */

static void fuse_free(struct ob_fuse *fuse)
{
	for (uint32_t i = 0; fuse->readers && i < fuse->config.threads; i++)
		if (fuse->readers[i].epoll >= 0)
			close(fuse->readers[i].epoll);
	if (fuse->session != MAP_FAILED)
		munmap(fuse->session, memfd_size(fuse));
	if (fuse->buffers != MAP_FAILED)
		munmap(fuse->buffers, (size_t)fuse->config.slots * READ_MAX);
	if (fuse->stop_fd >= 0)
		close(fuse->stop_fd);
	if (fuse->fd >= 0)
		close(fuse->fd);
	pthread_cond_destroy(&fuse->freed);
	pthread_mutex_destroy(&fuse->lock);
	free(fuse->readers);
	free(fuse->slots);
	ob_image_close(fuse->image);
	free(fuse);
}

/* Has the kernel let go of the connection? Asks without taking a request. */
static int fuse_gone(struct ob_fuse *fuse)
{
	struct pollfd descriptor = { .fd = fuse->fd };

	return poll(&descriptor, 1, 0) > 0;
}

/* One that has not been used yet, or NULL. The lock is held. */
static struct slot *slot_new(struct ob_fuse *fuse)
{
	struct slot *slot = &fuse->slots[fuse->used];

	if (fuse->used == fuse->config.slots)
		return NULL;
	slot->fuse = fuse;
	slot->record = (void *)((uint8_t *)fuse->session + SESSION_SIZE + (size_t)fuse->used * fuse->record_size);
	slot->buffer = fuse->image->upper ? (uint8_t *)slot->record + RECORD_SIZE : fuse->buffers + (size_t)fuse->used * READ_MAX;
	fuse->used++;
	return slot;
}

/* Waits for a free slot; NULL when the session is over. */
static struct slot *slot_take(struct ob_fuse *fuse)
{
	struct slot *slot;
	struct timespec until;

	pthread_mutex_lock(&fuse->lock);
	while (!fuse->free && !fuse->over) {
		fuse->free = slot_new(fuse);
		if (fuse->free)
			break;
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += CROWDED_MS / 1000;
		if (pthread_cond_timedwait(&fuse->freed, &fuse->lock, &until) == ETIMEDOUT)
			fuse->over |= fuse_gone(fuse);
	}
	slot = fuse->over ? NULL : fuse->free;
	if (slot) {
		fuse->free = slot->next;
		fuse->in_hand++;
	}
	pthread_mutex_unlock(&fuse->lock);
	if (slot) {
		((struct fuse_in_header *)slot->record->request)->unique = 0;
		atomic_store(&slot->record->state, RECORD_BUSY);
	}
	return slot;
}

void slot_give(struct slot *slot)
{
	struct ob_fuse *fuse = slot->fuse;
	int last;

	atomic_store(&slot->record->state, RECORD_FREE);
	pthread_mutex_lock(&fuse->lock);
	slot->next = fuse->free;
	fuse->free = slot;
	last = --fuse->in_hand == 0 && fuse->closed;
	pthread_cond_signal(&fuse->freed);
	pthread_mutex_unlock(&fuse->lock);
	if (last)
		fuse_free(fuse);
}

static void slot_trim(struct slot *slot)
{
	if (slot->touched && slot->fuse->buffers != MAP_FAILED)
		madvise(slot->buffer, READ_MAX, MADV_DONTNEED);
	slot->touched = 0;
}

/* Nothing arrived for a while: keep no memory for it. */
static void fuse_trim(struct ob_fuse *fuse, struct slot *mine)
{
	slot_trim(mine);
	atomic_store(&fuse->dirty, 0);
	pthread_mutex_lock(&fuse->lock);
	for (struct slot *slot = fuse->free; slot; slot = slot->next)
		slot_trim(slot);
	pthread_mutex_unlock(&fuse->lock);
	mapping_trim();
}

/* ---- threads ---- */

/* Sleep until something may be there. -ECANCELED when the session is to stop. */
static int slot_wait(struct slot *slot, int epoll)
{
	struct ob_fuse *fuse = slot->fuse;
	int keeps = slot->touched || atomic_load(&fuse->dirty);
	struct epoll_event event;
	int count = epoll_wait(epoll, &event, 1, keeps ? IDLE_MS : -1);

	if (count == 0)
		fuse_trim(fuse, slot);
	return count > 0 && event.data.fd == fuse->stop_fd ? -ECANCELED : 0;
}

/* Read one request into the slot; -errno when there will be no more. */
static int slot_receive(struct slot *slot, int epoll)
{
	struct fuse_in_header *in = (void *)slot->record->request;

	for (;;) {
		ssize_t got = read(slot->fuse->fd, slot->record->request, slot->fuse->request_max);
		int error = got < 0 ? errno : 0;

		if (got >= (ssize_t)sizeof(*in) && in->len == got)
			return 0;
		if (got >= 0)
			return -EPROTO;
		if (error == EAGAIN)
			error = -slot_wait(slot, epoll);
		else if (error == EINTR || error == ENOENT)   /* ENOENT: interrupted before it was read */
			error = 0;
		if (error)
			return -error;
	}
}

static void reader_end(struct ob_fuse *fuse, int error)
{
	int last;

	pthread_mutex_lock(&fuse->lock);
	fuse->over = 1;
	if (error && error != -ENODEV && error != -ECONNABORTED && error != -ECANCELED)
		fuse->status = error;
	last = --fuse->running == 0 && !fuse->closing;
	pthread_cond_broadcast(&fuse->freed);
	pthread_mutex_unlock(&fuse->lock);
	parked_end_waits(fuse->image->engine, &fuse->ending);
	if (last)
		engine_post(fuse->image->engine, OB_EVENT_FUSE_CLOSED, fuse->status, fuse->config.id);
}

static void *reader_run(void *argument)
{
	struct reader *reader = argument;
	struct slot *slot;
	int error = 0;

	while (!error && (slot = slot_take(reader->fuse))) {
		error = slot_receive(slot, reader->epoll);
		if (error)
			slot_give(slot);
		else {
			atomic_fetch_add_explicit(&reader->fuse->requests, 1, memory_order_relaxed);
			slot_serve(slot);
		}
	}
	reader_end(reader->fuse, error);
	return NULL;
}

static int reader_start(struct ob_fuse *fuse, struct reader *reader)
{
	/* EXCLUSIVE: a request wakes one thread, not all. */
	struct epoll_event requests = { .events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = fuse->fd };
	struct epoll_event stop = { .events = EPOLLIN, .data.fd = fuse->stop_fd };

	reader->fuse = fuse;
	reader->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (reader->epoll < 0 || epoll_ctl(reader->epoll, EPOLL_CTL_ADD, fuse->fd, &requests) ||
	    epoll_ctl(reader->epoll, EPOLL_CTL_ADD, fuse->stop_fd, &stop))
		return status_set(errno, "serve FUSE file: epoll: %s", strerror(errno));
	return engine_thread(&reader->thread, "ob-fuse", reader_run, reader);
}

/* ---- lifetime ---- */

/* Buffers for reads: memory as they need it. A writable image's lie in the records, and are there from the start:
 * by the time of a write there may be no memory but by writing. */
static int fuse_map_buffers(struct ob_fuse *fuse, int memfd)
{
	size_t buffers = (size_t)fuse->config.slots * READ_MAX;

	if (fuse->image->upper) {
		int error = posix_fallocate(memfd, 0, (off_t)memfd_size(fuse));

		return error ? status_set(error, "serve FUSE file: memory for writes: %s", strerror(error)) : 0;
	}
	fuse->buffers = mmap(NULL, buffers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (fuse->buffers == MAP_FAILED)
		return status_set(errno, "serve FUSE file: map buffers: %s", strerror(errno));
	madvise(fuse->buffers, buffers, MADV_NOHUGEPAGE);   /* a 4 KiB read shall not cost 2 MiB */
	return 0;
}

static int fuse_map(struct ob_fuse *fuse, int memfd)
{
	int populate = fuse->image->upper ? MAP_POPULATE : 0, error;

	if (ftruncate(memfd, (off_t)memfd_size(fuse)))
		return status_set(errno, "serve FUSE file: size memfd: %s", strerror(errno));
	error = fuse_map_buffers(fuse, memfd);
	if (error)
		return error;
	fuse->session = mmap(NULL, memfd_size(fuse), PROT_READ | PROT_WRITE, MAP_SHARED | populate, memfd, 0);
	if (fuse->session == MAP_FAILED)
		return status_set(errno, "serve FUSE file: map slots: %s", strerror(errno));
	memcpy(fuse->session->magic, SESSION_MAGIC, sizeof(SESSION_MAGIC));
	fuse->session->slots = fuse->config.slots;
	fuse->session->record_size = fuse->record_size;
	return 0;
}

static int fuse_open(struct ob_fuse *fuse, int fuse_fd, int memfd)
{
	int flags;

	fuse->fd = fcntl(fuse_fd, F_DUPFD_CLOEXEC, 0);
	fuse->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fuse->fd < 0 || fuse->stop_fd < 0)
		return status_set(errno, "serve FUSE file: descriptors: %s", strerror(errno));
	flags = fcntl(fuse->fd, F_GETFL);
	if (flags < 0 || fcntl(fuse->fd, F_SETFL, flags | O_NONBLOCK))
		return status_set(errno, "serve FUSE file: descriptor %d: %s", fuse_fd, strerror(errno));
	return fuse_map(fuse, memfd);
}

static struct ob_fuse *fuse_new(struct ob_image *image, const ob_fuse_config *config)
{
	struct ob_fuse *fuse = calloc(1, sizeof(*fuse));
	pthread_condattr_t monotonic;

	if (!fuse)
		return NULL;
	fuse->slots = calloc(config->slots, sizeof(*fuse->slots));
	fuse->readers = calloc(config->threads, sizeof(*fuse->readers));
	if (!fuse->slots || !fuse->readers) {
		free(fuse->slots);
		free(fuse->readers);
		free(fuse);
		return NULL;
	}
	for (uint32_t i = 0; i < config->threads; i++)
		fuse->readers[i].epoll = -1;
	fuse->config = *config;
	fuse->fd = fuse->stop_fd = -1;
	fuse->session = MAP_FAILED;
	fuse->buffers = MAP_FAILED;
	fuse->image = image_ref(image);
	fuse->record_size = RECORD_SIZE + (image->upper ? WRITE_MAX : 0);
	fuse->request_max = REQUEST_MAX + (image->upper ? WRITE_MAX : 0);
	pthread_mutex_init(&fuse->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&fuse->freed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	return fuse;
}

int ob_fuse_start(struct ob_image *image, int fuse_fd, int memfd, const ob_fuse_config *config, struct ob_fuse **out)
{
	struct ob_fuse *fuse;
	int error;

	if (config->threads < 1 || config->threads > THREADS_MAX)
		return status_set(EINVAL, "serve FUSE file: %u threads: 1 to %d can be", config->threads, THREADS_MAX);
	if (config->slots < config->threads || config->slots > SLOTS_MAX)
		return status_set(EINVAL, "serve FUSE file: %u slots: one for each thread to %d can be", config->slots,
		                  SLOTS_MAX);
	fuse = fuse_new(image, config);
	if (!fuse)
		return status_set(ENOMEM, "serve FUSE file: out of memory");
	error = fuse_open(fuse, fuse_fd, memfd);
	fuse->running = config->threads;
	while (!error && fuse->reader_count < config->threads) {
		error = reader_start(fuse, &fuse->readers[fuse->reader_count]);
		fuse->reader_count += !error;
	}
	if (error) {
		ob_fuse_close(fuse);
		return error;
	}
	*out = fuse;
	return 0;
}

void ob_fuse_get_stat(struct ob_fuse *fuse, ob_fuse_stat *out)
{
	out->requests = atomic_load(&fuse->requests);
	out->read_bytes = atomic_load(&fuse->read_bytes);
}

void ob_fuse_close(struct ob_fuse *fuse)
{
	uint64_t one = 1;
	int last;

	if (!fuse)
		return;
	pthread_mutex_lock(&fuse->lock);
	fuse->over = fuse->closing = 1;
	pthread_cond_broadcast(&fuse->freed);
	pthread_mutex_unlock(&fuse->lock);
	parked_end_waits(fuse->image->engine, &fuse->ending);
	if (write(fuse->stop_fd, &one, sizeof(one)) < 0 && fuse->reader_count)
		abort();   /* cannot be: the eventfd is fresh; the joins below would wait for ever */
	while (fuse->reader_count)
		pthread_join(fuse->readers[--fuse->reader_count].thread, NULL);
	/* Requests still parked keep the session until they are completed, but not the
	 * connection: their answers go to the eventfd, which refuses or forgets them. */
	dup3(fuse->stop_fd, fuse->fd, O_CLOEXEC);
	pthread_mutex_lock(&fuse->lock);
	fuse->closed = 1;
	last = fuse->in_hand == 0;
	pthread_mutex_unlock(&fuse->lock);
	if (last)
		fuse_free(fuse);
}
