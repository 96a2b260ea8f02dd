/* SPDX-License-Identifier: Apache-2.0
 * fetch.h: misses: who waits for which extents, and what becomes of them.
 *
 * One mutex guards the queue, every extent's slow transitions and all waiting. A hit
 * takes no lock (cache.h).
 *
 * Life of a miss
 *   blob_try_read() says -EAGAIN. The reader calls parked_begin(), blob_want() for each
 *   range it needs, parked_end(). blob_want() joins the fetch that has yet to bring an extent,
 *   or makes one; a fetch covers neighbouring extents of one blob, and of a unit also what other
 *   fetches cover: whichever brings an extent first has it to write. A fetch thread takes
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
#include <sys/queue.h>

#include "ob.h"
#include "parked.h"
#include "queue.h"

struct ob_blob;
struct ob_engine;
struct waiter;

/* A contiguous missing range on its way. Guarded by the queue's lock but for what the
 * fetch thread does to the lent buffer. */
struct fetch {
	ob_fetch lent;                 /* first: what the fetch thread sees */
	struct ob_blob *blob;          /* held */
	struct fetch_queue *queue;
	uint64_t first, count;         /* extents */
	uint64_t published;            /* extents whose bytes are right */
	uint32_t resident;             /* bit i: extent first + i became RESIDENT by this fetch, and by no other since */
	enum { FETCH_QUEUED, FETCH_LENT, FETCH_KEPT } phase;
	int writing;                   /* its thread has yet to write the cache */
	int keep;                      /* some extent could not be written */
	int64_t not_before_ns;
	struct host *host;             /* of a lent one: in whose share it is */
	LIST_HEAD(, waiter) waiters;
	TAILQ_ENTRY(fetch) queued;     /* priority queue or kept list */
	LIST_ENTRY(fetch) of_blob;
	struct fetch *next;            /* discarded ones */
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
/* The same, for read-ahead: extents [first, last] that nobody waits for yet. Whole units, of
 * which it takes along what is there already: a unit can only be checked as a whole. */
void fetch_missing(struct ob_blob *blob, uint64_t first, uint64_t last, int priority);
/* The fetch that has yet to bring an extent, or NULL. */
struct fetch *fetch_find(const struct ob_blob *blob, uint64_t extent);
/* Where a resident extent's bytes are. */
const uint8_t *fetch_resident(struct ob_blob *blob, uint64_t extent);
/* Not 0: the fetch that holds a resident extent is writing it, it may not change. -1: nor may this thread wait for
 * that, since it has bytes of its own to write, for which the writer may wait. */
int fetch_writing(struct ob_blob *blob, uint64_t extent);
/* Whether an extent is resident because it could not be written. */
int fetch_kept(const struct ob_blob *blob, uint64_t extent);
/* Let go of all that is kept of the blob and touches extents [first, last]. */
void fetch_drop_kept(struct ob_blob *blob, uint64_t first, uint64_t last, struct fetch **discarded);
/* What a claimed extent goes back to: RESIDENT if it was `kept` and still is in memory, FETCHING if a fetch
 * still brings it, else ABSENT. */
uint32_t fetch_owner_kind(const struct ob_blob *blob, uint64_t extent, int kept);
/* The cache could not be written: said once, until a write succeeds again. */
void fetch_write_failed(struct ob_blob *blob, int error);

/* The blob's policy has run out: nobody waits for it any more, until it is well again.
 * `discarded` is for fetch_unlock(). */
void fetch_go_down(struct ob_blob *blob, struct parked **ready, struct fetch **discarded);
int fetch_past_policy(const struct ob_blob *blob, int64_t now);

/* Frees the lock, wakes fetch threads, tells `ready`, and frees what was taken off every
 * list: with the last fetch a blob may go, and with the blob the engine and its lock. */
void fetch_unlock(struct fetch_queue *queue, struct parked *ready, struct fetch *discarded);

/* ---- no lock held ---- */

/* Bytes of a lent fetch arrive, right or wrong: its host is not stuck. */
void fetch_heard(struct fetch *fetch);
/* The blob is closed. Whoever waits for it gets EIO; what is lent goes nowhere. Waits for the writes of
 * its cache that are under way, and none comes later: whoever opens the entry next may believe what he has
 * seen of it. */
void fetch_end(struct ob_blob *blob);

/* http.c: close the connections that ob_fetch_http() keeps for this thread. */
void http_disconnect(void);

#endif
