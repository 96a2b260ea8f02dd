/* SPDX-License-Identifier: Apache-2.0
 * fetch.h: misses: who waits for which extents, and in what order they are fetched.
 *
 * One mutex guards the queue, every extent's slow transitions and all waiting. A hit
 * takes no lock (cache.h).
 *
 * Life of a miss
 *   blob_try_read() says -EAGAIN. The reader calls parked_begin(), blob_want() for each
 *   range it needs, parked_end(). blob_want() joins the fetch an extent is already in,
 *   or makes one; a fetch covers neighbouring extents of one blob. A fetch thread takes
 *   it (ob_fetch_next), delivers (ob_fetch_advance: extents become readable from the
 *   lent buffer at once, then from the cache) and gives it back (ob_fetch_finish).
 *   When all extents a parked reader asked for are readable, or its time is up, its
 *   ready() runs, once.
 */
#ifndef OB_FETCH_H
#define OB_FETCH_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "ob.h"

struct ob_blob;
struct ob_engine;
struct waiter;

/* Somebody waiting for extents. Lives in what waits; zeroed before first use. */
struct parked {
	/* Called once per parked_begin(), with no lock held, on whatever thread ended the
	 * wait (maybe inside parked_end()). status 0: try again; else -errno, final. */
	void (*ready)(struct parked *parked, int status);
	struct ob_engine *engine;

	/* private to fetch.c, guarded by the queue's lock */
	struct waiter *waiters;         /* one for each fetch waited for */
	uint32_t pending;               /* waiters, + 1 until parked_end() */
	int failure;                    /* first -errno */
	int64_t start_ns;               /* when the first wait began; kept over several */
	struct parked *next, *prev;     /* all that wait, for the clock */
	int listed;
};

void parked_begin(struct parked *parked, struct ob_engine *engine);
/* The caller must not touch `parked` afterwards: ready() may have freed it. */
void parked_end(struct parked *parked);

/* Blocking form for callers that own a thread: attempt() until it no longer says
 * -EAGAIN; want() names what it misses. Returns what attempt() or the wait returned. */
int fetch_wait(struct ob_engine *engine, int (*attempt)(void *argument), void (*want)(void *argument, struct parked *parked),
               void *argument);

struct fetch_queue {
	pthread_mutex_t lock;
	pthread_cond_t wake[2];         /* fetch threads: [1] those that take foreground only */
	uint32_t idle[2];               /* ... and how many of each wait */
	pthread_cond_t settled;         /* a cache write has ended */
	pthread_cond_t tick;            /* the clock: somebody began to wait */
	pthread_t clock;
	struct fetch *head[OB_BULK + 1], *tail[OB_BULK + 1];
	struct parked *parked;
	uint64_t lent_bytes;
	struct fetch *kept;             /* buffers that could not be written, newest first */
	uint64_t kept_bytes;
	int stopping;
};

int fetch_queue_open(struct ob_engine *engine);
/* Everybody waiting gets ESHUTDOWN; fetch threads are sent home. Idempotent. */
void fetch_queue_stop(struct ob_engine *engine);
/* After stop, with no fetch lent any more. */
void fetch_queue_close(struct ob_engine *engine);

/* ---- for cache.c; the queue's lock is held ---- */

/* Have what is missing of extents [first, last] fetched, on behalf of `parked` (NULL:
 * nobody waits). Sequential foreground readers get read-ahead. */
void fetch_want(struct ob_blob *blob, uint64_t first, uint64_t last, int priority, struct parked *parked);
/* Where a resident extent's bytes are. */
const uint8_t *fetch_resident(struct ob_blob *blob, uint64_t extent);
/* The fetch that holds a resident extent is writing it: the extent may not change. */
int fetch_writing(struct ob_blob *blob, uint64_t extent);
/* Extents of the blob became readable: collect whose wait is over. */
struct parked *fetch_settle(struct ob_blob *blob);
/* What a claimed extent goes back to: FETCHING if a fetch still covers it, else ABSENT. */
uint32_t fetch_owner_kind(const struct ob_blob *blob, uint64_t extent);
/* The cache could not be written: said once, until a write succeeds again. */
void fetch_write_failed(struct ob_blob *blob, int error);

/* ---- no lock held ---- */

/* A reader has come to a marked extent: ask for its stream's next window. */
void fetch_ahead(struct ob_blob *blob, uint64_t extent);
/* Nobody uses the blob any more: forget what is queued for it. */
void fetch_forget(struct ob_blob *blob);
void parked_ready(struct parked *list);

#endif
