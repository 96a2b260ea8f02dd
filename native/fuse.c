/* SPDX-License-Identifier: Apache-2.0
 * fuse.c: an image as the one file of a FUSE mount, spoken directly to /dev/fuse.
 *
 * The mount has no directory: its root is the file (rootmode of a regular file), so
 * the mount point is a file too. The image never changes, hence attributes and pages
 * are the kernel's to keep for ever, and opens carry no state here: whatever this
 * session negotiated or read stands in the memfd, for a later server to go on with.
 *
 * The memfd, native byte order:
 *   0      struct session_record, in a page of its own
 *   4096   config.slots records of RECORD_SIZE bytes: struct slot_record
 * A record is BUSY from before its read() until after its answer was written, and
 * the unique field of its request is zero until read() filled it. So a BUSY record with
 * a unique number holds a request that may still want its answer; to answer one twice is
 * harmless (the kernel says ENOENT). Nobody may answer on a cloned descriptor: the
 * kernel keeps requests by the descriptor they were read from.
 *
 * config.threads threads read the descriptor. A hit is answered by the thread that read
 * it; a parked request keeps its slot and is answered by a work thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "image.h"
#include "request.h"
#include "round.h"
#include "status.h"

enum {
	READ_MAX = 1 << 20,               /* the kernel's own ceiling: 256 pages of 4 KiB */
	REQUEST_MAX = FUSE_MIN_READ_BUFFER, /* read() with less fails; no request we take is longer */
	SESSION_SIZE = 4096,
	RECORD_SIZE = 12288,              /* whole pages: most requests touch the first only */
	THREADS_MAX = 64,
	SLOTS_MAX = 1024,                 /* 1 GiB of address space for buffers */
	OLDEST_MINOR = 28,                /* Linux 4.20, the first that reads 1 MiB at a time */
	IDLE_MS = 1000,                   /* unused this long, buffers go back to the system */
	CROWDED_MS = 1000,                /* how often a session without free slots looks for its end */
	RUNS_AT_ONCE = 64,
	FILE_MODE = S_IFREG | 0444,
	BLOCK_SIZE = 4096,
	NAME_MAX_LENGTH = 255
};

/* How long the kernel may believe our attributes: the image never changes. */
static const uint64_t FOREVER_SECONDS = 365 * 86400;

static const char SESSION_MAGIC[8] = "obfuse\0\1";   /* the last byte is the layout's version */

struct session_record {
	char magic[8];
	uint32_t slots;
	uint32_t record_size;
	uint32_t minor;                 /* of the protocol as negotiated; 0 = INIT not answered yet */
	uint32_t read_max;              /* longest READ the kernel will send */
};

enum { RECORD_FREE = 0, RECORD_BUSY = 1 };

struct slot_record {
	_Atomic uint32_t state;         /* RECORD_* */
	uint32_t reserved[15];
	_Alignas(8) uint8_t request[REQUEST_MAX];
};

_Static_assert(sizeof(struct slot_record) <= RECORD_SIZE, "a record holds a whole request");

/* One request in hand: owned by the thread that took it, then by its ob_request. */
struct slot {
	struct ob_request request;      /* first: complete() casts back */
	struct ob_fuse *fuse;
	struct slot_record *record;
	uint8_t *buffer;                /* READ_MAX bytes, resident once used */
	int touched;                    /* some of it may be resident */
	struct slot *next;              /* free list, last used first */
};

struct reader {
	struct ob_fuse *fuse;
	pthread_t thread;
	int epoll;                      /* one each: a shared one would wake them all */
};

struct ob_fuse {
	struct ob_image *image;
	ob_fuse_config config;
	int fd;
	int stop_fd;                    /* eventfd, readable once the threads are to end */
	struct session_record *session; /* the memfd */
	uint8_t *buffers;
	struct slot *slots;
	struct reader *readers;
	uint32_t reader_count;
	atomic_int dirty;               /* some buffer may be resident */
	_Atomic uint64_t requests, read_bytes;

	pthread_mutex_t lock;           /* innermost; guards what follows */
	pthread_cond_t freed;           /* a slot was, or `over` is set; monotonic clock */
	struct slot *free;
	uint32_t in_hand;               /* slots not on the free list */
	uint32_t running;               /* threads that have not ended */
	int over;                       /* the threads end */
	int status;                     /* -errno that ended them, if not a plain unmount */
	int closing;                    /* by ob_fuse_close(): no event */
	int closed;                     /* no threads left: freed with the last slot */
};

static size_t memfd_size(const struct ob_fuse *fuse)
{
	return SESSION_SIZE + (size_t)fuse->config.slots * RECORD_SIZE;
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
	image_unref(fuse->image);
	free(fuse);
}

/* Has the kernel let go of the connection? Asks without taking a request. */
static int fuse_gone(struct ob_fuse *fuse)
{
	struct pollfd descriptor = { .fd = fuse->fd };

	return poll(&descriptor, 1, 0) > 0;
}

/* Waits for a free slot; NULL when the session is over. */
static struct slot *slot_take(struct ob_fuse *fuse)
{
	struct slot *slot;
	struct timespec until;

	pthread_mutex_lock(&fuse->lock);
	while (!fuse->free && !fuse->over) {
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

/* The last slot of a closed session takes the session along. */
static void slot_give(struct slot *slot)
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
	if (slot->touched)
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
}

/* ---- answers ---- */

/* Errors of writing are the kernel's last word: ENOENT, the request was interrupted;
 * ENODEV or EPERM, the file is no longer mounted. */
static ssize_t slot_write(struct slot *slot, int error, const void *payload, size_t length)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;
	struct fuse_out_header out = { .len = sizeof(out) + length, .error = error, .unique = in->unique };
	struct iovec parts[2] = { { &out, sizeof(out) }, { (void *)payload, length } };

	return writev(slot->fuse->fd, parts, length ? 2 : 1);
}

/* Answer and give the slot back. error is 0 or -errno. */
static void slot_answer(struct slot *slot, int error, const void *payload, size_t length)
{
	/* An answer the kernel cannot take (no memory to copy it) must not leave the reader hanging. */
	if (slot_write(slot, error, payload, length) < 0 && length && errno != ENOENT)
		slot_write(slot, -EIO, NULL, 0);
	slot_give(slot);
}

/* The request's argument, or NULL if the request is shorter than that. */
static const void *slot_argument(const struct slot *slot, size_t length)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;

	return in->len < sizeof(*in) + length ? NULL : in + 1;
}

static void serve_init(struct slot *slot)
{
	const struct fuse_init_in *in = slot_argument(slot, offsetof(struct fuse_init_in, flags2));
	struct ob_fuse *fuse = slot->fuse;
	struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION };

	if (!in || in->major < FUSE_KERNEL_VERSION || (in->major == FUSE_KERNEL_VERSION && in->minor < OLDEST_MINOR)) {
		slot_answer(slot, -EPROTO, NULL, 0);
		return;
	}
	if (in->major == FUSE_KERNEL_VERSION) {   /* a newer one asks again after our answer */
		out.minor = min_u64(in->minor, FUSE_KERNEL_MINOR_VERSION);
		out.max_readahead = min_u64(in->max_readahead, READ_MAX);
		out.flags = in->flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES);
		out.max_background = fuse->config.slots;
		out.congestion_threshold = fuse->config.slots;
		out.max_write = BLOCK_SIZE;
		out.time_gran = 1;
		out.max_pages = READ_MAX / sysconf(_SC_PAGESIZE);
		fuse->session->minor = out.minor;
		fuse->session->read_max = READ_MAX;
	}
	slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_getattr(struct slot *slot)
{
	uint64_t size = slot->fuse->image->size;
	struct fuse_attr_out out = {
		.attr_valid = FOREVER_SECONDS,
		.attr = {
			.ino = FUSE_ROOT_ID,
			.size = size,
			.blocks = div_up(size, 512),
			.mode = FILE_MODE,
			.nlink = 1,
			.uid = geteuid(),
			.gid = getegid(),
			.blksize = BLOCK_SIZE,
		},
	};

	slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_open(struct slot *slot)
{
	const struct fuse_open_in *in = slot_argument(slot, sizeof(*in));
	/* NOFLUSH: close() of a file whose server is stopped must not wait for it. */
	struct fuse_open_out out = { .open_flags = FOPEN_KEEP_CACHE | FOPEN_NOFLUSH };

	if (!in || (in->flags & O_ACCMODE) != O_RDONLY)
		slot_answer(slot, in ? -EROFS : -EINVAL, NULL, 0);
	else
		slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_statfs(struct slot *slot)
{
	struct fuse_statfs_out out = {
		.st = {
			.blocks = div_up(slot->fuse->image->size, BLOCK_SIZE),
			.files = 1,
			.bsize = BLOCK_SIZE,
			.frsize = BLOCK_SIZE,
			.namelen = NAME_MAX_LENGTH,
		},
	};

	slot_answer(slot, 0, &out, sizeof(out));
}

/* The first byte at or after offset that is data, or that is not; or -errno. */
static int64_t file_seek(struct ob_image *image, uint64_t offset, int data)
{
	ob_run runs[RUNS_AT_ONCE];

	if (offset >= image->size)
		return -ENXIO;
	while (offset < image->size) {
		int count = ob_image_runs(image, offset, image->size - offset, runs, RUNS_AT_ONCE);

		if (count <= 0)
			return -EIO;
		for (int i = 0; i < count; i++) {
			if ((runs[i].kind == OB_RUN_DATA) == data)
				return (int64_t)runs[i].offset;
			offset = runs[i].offset + runs[i].length;
		}
	}
	return data ? -ENXIO : (int64_t)image->size;
}

static void serve_lseek(struct slot *slot)
{
	const struct fuse_lseek_in *in = slot_argument(slot, sizeof(*in));
	struct fuse_lseek_out out;
	int64_t place = -EINVAL;

	if (in && (in->whence == SEEK_DATA || in->whence == SEEK_HOLE))
		place = file_seek(slot->fuse->image, in->offset, in->whence == SEEK_DATA);
	out.offset = (uint64_t)place;
	slot_answer(slot, place < 0 ? (int)place : 0, &out, place < 0 ? 0 : sizeof(out));
}

static void read_complete(struct ob_request *request, int status)
{
	struct slot *slot = (struct slot *)request;

	if (status) {
		slot_answer(slot, -EIO, NULL, 0);
		return;
	}
	atomic_fetch_add_explicit(&slot->fuse->read_bytes, request->length, memory_order_relaxed);
	slot_answer(slot, 0, request->buffer, request->length);
}

static void serve_read(struct slot *slot)
{
	const struct fuse_read_in *in = slot_argument(slot, sizeof(*in));
	struct ob_image *image = slot->fuse->image;
	uint64_t length;

	if (!in || in->size > READ_MAX) {
		slot_answer(slot, -EINVAL, NULL, 0);
		return;
	}
	length = in->offset < image->size ? min_u64(in->size, image->size - in->offset) : 0;
	if (!length) {
		slot_answer(slot, 0, NULL, 0);
		return;
	}
	slot->touched = 1;
	atomic_store_explicit(&slot->fuse->dirty, 1, memory_order_relaxed);
	slot->request.image = image;
	slot->request.offset = in->offset;
	slot->request.length = length;
	slot->request.buffer = slot->buffer;
	slot->request.complete = read_complete;
	request_submit(&slot->request);
}

/* Whatever happens in here, the slot is answered and given back, now or later. */
static void slot_serve(struct slot *slot)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;

	switch (in->opcode) {
	case FUSE_READ:
		serve_read(slot);
		break;
	case FUSE_INIT:
		serve_init(slot);
		break;
	case FUSE_GETATTR:
		serve_getattr(slot);
		break;
	case FUSE_OPEN:
		serve_open(slot);
		break;
	case FUSE_STATFS:
		serve_statfs(slot);
		break;
	case FUSE_LSEEK:
		serve_lseek(slot);
		break;
	case FUSE_RELEASE:
	case FUSE_DESTROY:
		slot_answer(slot, 0, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:             /* take no answer */
		slot_give(slot);
		break;
	case FUSE_SETATTR:
	case FUSE_WRITE:
	case FUSE_FALLOCATE:
		slot_answer(slot, -EROFS, NULL, 0);
		break;
	case FUSE_IOCTL:
		slot_answer(slot, -ENOTTY, NULL, 0);
		break;
	default:
		/* For the kernel this means "never ask again", INTERRUPT, FLUSH, ACCESS and
		 * the extended attributes included. */
		slot_answer(slot, -ENOSYS, NULL, 0);
	}
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
		ssize_t got = read(slot->fuse->fd, slot->record->request, REQUEST_MAX);
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

static int fuse_map(struct ob_fuse *fuse, int memfd)
{
	size_t buffers = (size_t)fuse->config.slots * READ_MAX;

	if (ftruncate(memfd, (off_t)memfd_size(fuse)))
		return status_set(errno, "serve FUSE file: size memfd: %s", strerror(errno));
	fuse->session = mmap(NULL, memfd_size(fuse), PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	fuse->buffers = mmap(NULL, buffers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (fuse->session == MAP_FAILED || fuse->buffers == MAP_FAILED)
		return status_set(errno, "serve FUSE file: map slots: %s", strerror(errno));
	madvise(fuse->buffers, buffers, MADV_NOHUGEPAGE);   /* a 4 KiB read shall not cost 2 MiB */
	memcpy(fuse->session->magic, SESSION_MAGIC, sizeof(SESSION_MAGIC));
	fuse->session->slots = fuse->config.slots;
	fuse->session->record_size = RECORD_SIZE;
	for (uint32_t i = 0; i < fuse->config.slots; i++) {
		struct slot *slot = &fuse->slots[i];

		slot->fuse = fuse;
		slot->record = (void *)((uint8_t *)fuse->session + SESSION_SIZE + (size_t)i * RECORD_SIZE);
		slot->buffer = fuse->buffers + (size_t)i * READ_MAX;
		slot->next = fuse->free;
		fuse->free = slot;
	}
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
	if (write(fuse->stop_fd, &one, sizeof(one)) < 0 && fuse->reader_count)
		abort();   /* cannot be: the eventfd is fresh; the joins below would wait for ever */
	while (fuse->reader_count)
		pthread_join(fuse->readers[--fuse->reader_count].thread, NULL);
	/* Requests still parked keep the session until they are completed. */
	pthread_mutex_lock(&fuse->lock);
	fuse->closed = 1;
	last = fuse->in_hand == 0;
	pthread_mutex_unlock(&fuse->lock);
	if (last)
		fuse_free(fuse);
}
