/* SPDX-License-Identifier: Apache-2.0
 * fuse.h: a FUSE session and its requests: fuse.c owns them, fuse_serve.c answers them.
 *
 * The memfd of a session, native byte order:
 *   0      struct session_record, in a page of its own
 *   4096   config.slots records of session_record.record_size bytes: struct slot_record,
 *          and if the image is writable, room for the rest of a WRITE
 * A record is BUSY from before its read() until after its answer was written, and
 * the unique field of its request is zero until read() filled it. So a BUSY record with
 * a unique number holds a request that may still want its answer; to answer one twice is
 * harmless (the kernel says ENOENT). Nobody may answer on a cloned descriptor: the
 * kernel keeps requests by the descriptor they were read from.
 */
#ifndef OB_FUSE_H
#define OB_FUSE_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "image.h"
#include "ob.h"
#include "request.h"

enum {
	READ_MAX = 1 << 20,                 /* the kernel's own ceiling: 256 pages of 4 KiB */
	WRITE_MAX = 256 << 10,              /* of a writable image, and of its reads: their memory is taken at start */
	REQUEST_MAX = FUSE_MIN_READ_BUFFER, /* read() with less fails; no request we take is longer */
	SESSION_SIZE = 4096,
	RECORD_SIZE = 12288                 /* whole pages: most requests touch the first only */
};

struct session_record {
	char magic[8];
	uint32_t slots;
	uint32_t record_size;
	_Atomic uint32_t minor;                /* of the protocol as negotiated; 0 = INIT not answered yet */
	_Atomic uint32_t read_max;              /* longest READ the kernel will send */
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
	uint8_t *buffer;                /* of READ_MAX bytes, resident once used; of WRITE_MAX in the record */
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
	uint32_t record_size, request_max;
	uint8_t *buffers;               /* none if the image is writable */
	struct slot *slots;
	struct reader *readers;
	uint32_t reader_count;
	atomic_int dirty;               /* some buffer may be resident */
	atomic_int ending;              /* no thread may wait for a source any more */
	_Atomic uint64_t requests, read_bytes;

	pthread_mutex_t lock;           /* innermost; guards what follows */
	pthread_cond_t freed;           /* a slot was, or `over` is set; monotonic clock */
	struct slot *free;
	uint32_t used;                  /* slots that ever were: the others take no memory */
	uint32_t in_hand;               /* slots that were taken and not given back */
	uint32_t running;               /* threads that have not ended */
	int over;                       /* the threads end */
	int status;                     /* -errno that ended them, if not a plain unmount */
	int closing;                    /* by ob_fuse_close(): no event */
	int closed;                     /* no threads left: freed with the last slot */
};

/* Longest READ, and length of a slot's buffer. */
static inline uint64_t fuse_read_max(const struct ob_fuse *fuse)
{
	return fuse->image->upper ? WRITE_MAX : READ_MAX;
}

/* Answer the slot's request, now or once its bytes are there, and give the slot back. */
void slot_serve(struct slot *slot);
/* The caller's last use of the slot and, if the session is closed, of the session. */
void slot_give(struct slot *slot);

#endif
