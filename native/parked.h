/* SPDX-License-Identifier: Apache-2.0
 * parked.h: somebody who waits for missing extents, and the clock that ends long waits.
 *
 * All of it is guarded by the fetch queue's lock.
 */
#ifndef OB_PARKED_H
#define OB_PARKED_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/queue.h>

struct fetch;
struct ob_blob;
struct ob_engine;
struct waiter;

/* Somebody waiting for extents. Lives in what waits; zeroed before first use. */
struct parked {
	/* Called once per parked_begin(), with no lock held, on whatever thread ended the
	 * wait (maybe inside parked_end()). status 0: try again; else -errno, final. */
	void (*ready)(struct parked *parked, int status);
	const atomic_int *ending;       /* NULL, or once it is set no wait begins, and parked_end_waits() ends them: ESHUTDOWN */
	struct ob_engine *engine;

	/* private to parked.c, guarded by the queue's lock */
	struct waiter *waiters;         /* one for each fetch waited for */
	uint32_t pending;               /* waiters, + 1 until parked_end() */
	int failure;                    /* first -errno */
	int64_t start_ns;               /* when the first wait began; kept over several */
	LIST_ENTRY(parked) all;         /* that wait, for the clock */
	int listed;
	struct parked *next;            /* to be told */
};

void parked_begin(struct parked *parked, struct ob_engine *engine);
/* The caller must not touch `parked` afterwards: ready() may have freed it. */
void parked_end(struct parked *parked);

/* Blocking form for callers that own a thread: attempt() until it no longer says
 * -EAGAIN; want() names what it misses. Returns what attempt() or the wait returned. */
int parked_wait(struct ob_engine *engine, int (*attempt)(void *argument),
                void (*want)(void *argument, struct parked *parked), void *argument, const atomic_int *ending);
/* Sets it, and ends the waits that name it. */
void parked_end_waits(struct ob_engine *engine, atomic_int *ending);

/* ---- the queue's lock is held ---- */

/* `parked`, between begin and end, needs `extent`, which is in `fetch`. */
void parked_join(struct parked *parked, struct fetch *fetch, uint64_t extent);
/* What waits for `from` waits for `to`, which has no waiters yet, from now on. */
void parked_move(struct fetch *from, struct fetch *to);
/* Extents became readable: end the waits that are over, and put those who now have all
 * they asked for on `ready`. */
void parked_settle(struct ob_blob *blob, struct parked **ready);
/* The same for one fetch; with a failure, every wait on it ends with that -errno, and with
 * -EAGAIN well: what is still missing is in another fetch by now, or on its way to disk. */
void parked_settle_fetch(struct fetch *fetch, int failure, struct parked **ready);
/* Waits end with ESHUTDOWN: those that name `ending`, or with NULL, when the engine stops, all. */
void parked_dismiss(struct ob_engine *engine, const atomic_int *ending, struct parked **ready);

/* ---- no lock held ---- */

/* Tell everybody on the list that the wait is over. */
void parked_ready(struct parked *ready);
/* The clock thread: fails those whose policy has run out. Ends when the queue stops. */
void *parked_clock(void *engine);

#endif
