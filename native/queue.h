/* SPDX-License-Identifier: Apache-2.0
 * queue.h: fetches that wait for a thread, threads that wait for a fetch, and how many
 * of them each host gets.
 *
 * A host that stalls keeps the threads that fetch from it. So that others are served
 * meanwhile, a well one has HOST_FETCHES lent at most, one that fails or that nothing has
 * come from for a while HOST_FETCHES_AILING, and the last free threads are for hosts that
 * have fewer than these. One of a host's share is kept for foreground.
 *
 * Whatever a host may have less for ends with a fetch given back, and whoever gives one back
 * calls the next thread: nobody has to look again by himself.
 */
#ifndef OB_QUEUE_H
#define OB_QUEUE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/queue.h>

#include "ob.h"

struct fetch;
struct parked;

enum {
	FETCH_SLOTS = 32,              /* fetch threads */
	FETCH_SPARES = 16,
	FETCH_EXTENTS_MAX = OB_UNIT_MAX, /* 2 MiB: long enough that a round trip is paid seldom */
	FETCH_BUFFER_SIZE = FETCH_EXTENTS_MAX * OB_EXTENT_SIZE,
	HOSTS = 64,                    /* more than these share their shares */
	HOST_FETCHES = 16,             /* 32 MiB in flight: what 1 Gbit/s and 250 ms hold */
	HOST_FETCHES_AILING = 3,
	THREADS_KEPT = 8,              /* for hosts with few fetches ... */
	THREADS_KEPT_URGENT = 4        /* ... from the foreground fetches of others */
};

/* Whose failures are the failures of all its blobs. */
struct host {
	uint32_t lent;                 /* fetches */
	int failing;                   /* the last that was heard is a failure */
	_Atomic int64_t heard_ns;      /* when bytes last came, or it was first asked */
};

struct fetch_queue {
	pthread_mutex_t lock;
	/* Fetch threads that wait, each in a slot: a bit of these masks. The first free slot is
	 * taken, and the first waiting one called, so that under little load it is one thread
	 * that works, with warm caches and an open connection. */
	pthread_cond_t wake[FETCH_SLOTS];
	uint32_t used, idle;            /* idle: waits, and has not been called */
	uint32_t foreground;            /* takes foreground only */
	uint32_t called;                /* to be signalled by fetch_unlock(), once the lock is free */
	pthread_cond_t settled;         /* a cache write has ended */
	pthread_cond_t tick;            /* the clock: somebody began to wait */
	int clock_idle;                 /* ... and it waits for that */
	pthread_t clock;
	TAILQ_HEAD(fetches, fetch) queues[OB_BULK + 1];
	struct fetches kept;            /* with bytes that could not be written, oldest first */
	LIST_HEAD(, parked) parked;
	uint32_t lent;                  /* fetches */
	uint64_t lent_bytes;
	struct host hosts[HOSTS];
	void *spare[FETCH_SPARES];      /* buffers given back, until it is quiet */
	uint32_t spares;
	uint64_t kept_bytes;
	int stopping;
};

/* ---- the queue's lock is held ---- */

void queue_push(struct fetch_queue *queue, struct fetch *fetch);
void queue_remove(struct fetch_queue *queue, struct fetch *fetch);
/* The most urgent fetch that may start now, of priority `lowest` or better, with `budget` bytes lent
 * in all. Lowers *until_ns to when another may. */
struct fetch *queue_pick(struct fetch_queue *queue, int lowest, uint64_t budget, int64_t *until_ns);
/* Somebody more should look, if anything is left that may start. */
void queue_call_next(struct fetch_queue *queue, uint64_t budget);
/* In a slot, until called or until then: -EAGAIN. */
int queue_wait(struct fetch_queue *queue, int lowest, int64_t until_ns);

/* From the queue into its host's share, and out of that. */
void queue_lend(struct fetch_queue *queue, struct fetch *fetch);
void queue_take_back(struct fetch_queue *queue, struct fetch *fetch);

/* FETCH_BUFFER_SIZE bytes, or NULL. */
void *buffer_take(struct fetch_queue *queue);
/* Whether it is kept for the next; else it is still the caller's. */
int buffer_give(struct fetch_queue *queue, void *buffer);
void buffers_free(struct fetch_queue *queue);

#endif
