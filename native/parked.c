/* SPDX-License-Identifier: Apache-2.0
 * parked.c: waiting for missing extents, with an end to it.
 */
#include "parked.h"

#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>

#include "cache.h"
#include "engine.h"
#include "status.h"

/* How often the deadlines of those who wait are looked at. */
static const int64_t TICK_NS = 50 * 1000000LL;

/* `parked` needs extents [first, last] of `fetch`. In the lists of both. */
struct waiter {
	struct parked *parked;
	struct fetch *fetch;
	uint64_t first, last;
	LIST_ENTRY(waiter) of_fetch;
	struct waiter *parked_next;
};

static void waiter_end(struct waiter *waiter, int failure)
{
	struct parked *parked = waiter->parked;
	struct waiter **place = &parked->waiters;

	LIST_REMOVE(waiter, of_fetch);
	while (*place != waiter)
		place = &(*place)->parked_next;
	*place = waiter->parked_next;
	if (failure && !parked->failure)
		parked->failure = failure;
	parked->pending--;
	free(waiter);
}

/* Off the clock's list, and onto the list of those to be told. */
static void parked_collect(struct parked *parked, struct parked **ready)
{
	while (parked->waiters)
		waiter_end(parked->waiters, 0);
	if (parked->listed)
		LIST_REMOVE(parked, all);
	parked->listed = 0;
	parked->next = *ready;
	*ready = parked;
}

void parked_ready(struct parked *list)
{
	while (list) {
		struct parked *parked = list;

		list = list->next;
		parked->ready(parked, parked->failure);
	}
}

void parked_begin(struct parked *parked, struct ob_engine *engine)
{
	parked->engine = engine;
	parked->pending = 1;
	parked->failure = 0;
	if (!parked->start_ns)
		parked->start_ns = engine_now();
}

void parked_end(struct parked *parked)
{
	struct fetch_queue *queue = &parked->engine->fetch;
	struct parked *ready = NULL;

	pthread_mutex_lock(&queue->lock);
	if (queue->stopping || (parked->ending && atomic_load(parked->ending)))
		parked->failure = -ESHUTDOWN;
	if (--parked->pending == 0 || parked->failure) {
		parked_collect(parked, &ready);
	} else {
		if (queue->clock_idle)
			pthread_cond_signal(&queue->tick);
		LIST_INSERT_HEAD(&queue->parked, parked, all);
		parked->listed = 1;
	}
	fetch_unlock(queue, ready, NULL);
}

/* One waiter for each pair of parked and fetch; it grows with what is asked. */
void parked_join(struct parked *parked, struct fetch *fetch, uint64_t extent)
{
	struct waiter *waiter = parked->waiters;

	while (waiter && waiter->fetch != fetch)
		waiter = waiter->parked_next;
	if (waiter) {
		waiter->first = extent < waiter->first ? extent : waiter->first;
		waiter->last = extent > waiter->last ? extent : waiter->last;
		return;
	}
	waiter = calloc(1, sizeof(*waiter));
	if (!waiter) {
		parked->failure = -ENOMEM;
		return;
	}
	*waiter = (struct waiter){ .parked = parked, .fetch = fetch, .first = extent, .last = extent,
	                           .parked_next = parked->waiters };
	parked->waiters = waiter;
	LIST_INSERT_HEAD(&fetch->waiters, waiter, of_fetch);
	parked->pending++;
}

static int waiter_served(const struct waiter *waiter)
{
	for (uint64_t extent = waiter->first; extent <= waiter->last; extent++) {
		uint32_t kind = extent_kind(waiter->fetch->blob, extent);

		if (kind == EXTENT_FETCHING || kind == EXTENT_STORING)
			return 0;
	}
	return 1;
}

void parked_settle_fetch(struct fetch *fetch, int failure, struct parked **ready)
{
	struct waiter *waiter, *next;

	for (waiter = LIST_FIRST(&fetch->waiters); waiter; waiter = next) {
		struct parked *parked = waiter->parked;

		next = LIST_NEXT(waiter, of_fetch);
		if (!failure && !waiter_served(waiter))
			continue;
		waiter_end(waiter, failure == -EAGAIN ? 0 : failure);
		/* Not listed: still between begin and end, which will see it. */
		if (parked->listed && (parked->pending == 0 || parked->failure))
			parked_collect(parked, ready);
	}
}

void parked_move(struct fetch *from, struct fetch *to)
{
	struct waiter *waiter;

	while ((waiter = LIST_FIRST(&from->waiters))) {
		LIST_REMOVE(waiter, of_fetch);
		LIST_INSERT_HEAD(&to->waiters, waiter, of_fetch);
		waiter->fetch = to;
	}
}

void parked_settle(struct ob_blob *blob, struct parked **ready)
{
	struct fetch *fetch;

	LIST_FOREACH(fetch, &blob->fetches, of_blob)
		parked_settle_fetch(fetch, 0, ready);
}

void parked_dismiss(struct ob_engine *engine, const atomic_int *ending, struct parked **ready)
{
	struct parked *parked, *next;

	for (parked = LIST_FIRST(&engine->fetch.parked); parked; parked = next) {
		next = LIST_NEXT(parked, all);
		if (ending && parked->ending != ending)
			continue;
		parked->failure = -ESHUTDOWN;
		parked_collect(parked, ready);
	}
}

void parked_end_waits(struct ob_engine *engine, atomic_int *ending)
{
	struct parked *ready = NULL;

	atomic_store(ending, 1);
	pthread_mutex_lock(&engine->fetch.lock);
	parked_dismiss(engine, ending, &ready);
	fetch_unlock(&engine->fetch, ready, NULL);
}

/* ---- blocking callers ---- */

struct sleeper {
	struct parked parked;
	sem_t wake;
	int status;
};

static void sleeper_ready(struct parked *parked, int status)
{
	struct sleeper *sleeper = (struct sleeper *)parked;

	sleeper->status = status;
	sem_post(&sleeper->wake);
}

int parked_wait(struct ob_engine *engine, int (*attempt)(void *argument),
                void (*want)(void *argument, struct parked *parked), void *argument, const atomic_int *ending)
{
	struct sleeper sleeper = { .parked = { .ready = sleeper_ready, .ending = ending } };
	int status = attempt(argument);

	if (status != -EAGAIN)
		return status;
	sem_init(&sleeper.wake, 0, 0);
	while (status == -EAGAIN) {
		parked_begin(&sleeper.parked, engine);
		want(argument, &sleeper.parked);
		parked_end(&sleeper.parked);
		while (sem_wait(&sleeper.wake))
			; /* a signal */
		if (sleeper.status == -ESHUTDOWN)
			status = status_set(ESHUTDOWN, "read: nobody waits any more");
		else if (sleeper.status)
			status = status_set(-sleeper.status, "read: the source did not deliver in time: errno %d", -sleeper.status);
		else
			status = attempt(argument);
	}
	sem_destroy(&sleeper.wake);
	return status;
}

/* ---- the clock ---- */

/* When a request that waits for this blob has waited long enough. */
static int64_t waiter_deadline(const struct waiter *waiter)
{
	const struct ob_blob *blob = waiter->fetch->blob;
	int64_t from = waiter->parked->start_ns;

	if (blob->policy == OB_POLICY_HANG)
		return INT64_MAX;
	if (blob->policy == OB_POLICY_EIO) {
		/* Healthy but slow: as long as bytes arrive, nobody is failed. */
		if (blob->failing_since)
			from = blob->failing_since;
		else if (blob->progress_ns > from)
			from = blob->progress_ns;
	}
	return from > INT64_MAX - blob->policy_ns ? INT64_MAX : from + blob->policy_ns;
}

static void clock_check(struct fetch_queue *queue, struct parked **ready, struct fetch **discarded)
{
	int64_t now = engine_now();
	struct parked *parked, *next;

	for (parked = LIST_FIRST(&queue->parked); parked; parked = next) {
		next = LIST_NEXT(parked, all);
		for (struct waiter *waiter = parked->waiters; waiter; waiter = waiter->parked_next) {
			struct ob_blob *blob = waiter->fetch->blob;

			if (now < waiter_deadline(waiter))
				continue;
			if (fetch_past_policy(blob, now) && !blob->down) {
				/* Changes the list under us: the next tick sees to the others. */
				fetch_go_down(blob, ready, discarded);
				return;
			}
			parked->failure = -EIO;
			parked_collect(parked, ready);
			break;
		}
	}
}

void *parked_clock(void *argument)
{
	struct fetch_queue *queue = &((struct ob_engine *)argument)->fetch;

	pthread_mutex_lock(&queue->lock);
	while (!queue->stopping) {
		struct parked *ready = NULL;
		struct fetch *discarded = NULL;

		if (LIST_EMPTY(&queue->parked)) {
			queue->clock_idle = 1;
			pthread_cond_wait(&queue->tick, &queue->lock);
			queue->clock_idle = 0;
			continue;
		}
		engine_wait_until(&queue->tick, &queue->lock, engine_now() + TICK_NS);
		clock_check(queue, &ready, &discarded);
		fetch_unlock(queue, ready, discarded);
		pthread_mutex_lock(&queue->lock);
	}
	pthread_mutex_unlock(&queue->lock);
	return NULL;
}

