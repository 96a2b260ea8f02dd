/* SPDX-License-Identifier: Apache-2.0
 * parked.c: waiting for missing extents, with an end to it.
 */
#include "parked.h"

#include <errno.h>
#include <stdlib.h>

#include "cache.h"
#include "engine.h"
#include "list.h"
#include "status.h"

/* How often the deadlines of those who wait are looked at. */
static const int64_t TICK_NS = 50 * 1000000LL;

/* `parked` needs extents [first, last] of `fetch`. In the lists of both. */
struct waiter {
	struct parked *parked;
	struct fetch *fetch;
	uint64_t first, last;
	struct waiter *fetch_next, *fetch_prev;
	struct waiter *parked_next;
};

static void waiter_end(struct waiter *waiter, int failure)
{
	struct parked *parked = waiter->parked;
	struct waiter **place = &parked->waiters;

	LIST_DEL(waiter->fetch->waiters, waiter, fetch_next, fetch_prev);
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
		LIST_DEL(parked->engine->fetch.parked, parked, next, prev);
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
	if (queue->stopping)
		parked->failure = -ESHUTDOWN;
	if (--parked->pending == 0 || parked->failure) {
		parked_collect(parked, &ready);
	} else {
		if (!queue->parked)
			pthread_cond_signal(&queue->tick);
		LIST_ADD(queue->parked, parked, next, prev);
		parked->listed = 1;
	}
	pthread_mutex_unlock(&queue->lock);
	parked_ready(ready);
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
	LIST_ADD(fetch->waiters, waiter, fetch_next, fetch_prev);
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
	struct waiter *waiter = fetch->waiters, *next;

	for (; waiter; waiter = next) {
		struct parked *parked = waiter->parked;

		next = waiter->fetch_next;
		if (!failure && !waiter_served(waiter))
			continue;
		waiter_end(waiter, failure);
		/* Not listed: still between begin and end, which will see it. */
		if (parked->listed && (parked->pending == 0 || parked->failure))
			parked_collect(parked, ready);
	}
}

void parked_move(struct fetch *from, struct fetch *to)
{
	for (struct waiter *waiter = from->waiters; waiter; waiter = waiter->fetch_next)
		waiter->fetch = to;
	to->waiters = from->waiters;
	from->waiters = NULL;
}

void parked_settle(struct ob_blob *blob, struct parked **ready)
{
	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next)
		parked_settle_fetch(fetch, 0, ready);
}

void parked_dismiss(struct ob_engine *engine, struct parked **ready)
{
	struct fetch_queue *queue = &engine->fetch;

	while (queue->parked) {
		queue->parked->failure = -ESHUTDOWN;
		parked_collect(queue->parked, ready);
	}
}

/* ---- blocking callers ---- */

struct sleeper {
	struct parked parked;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	int done, status;
};

static void sleeper_ready(struct parked *parked, int status)
{
	struct sleeper *sleeper = (struct sleeper *)parked;

	pthread_mutex_lock(&sleeper->lock);
	sleeper->done = 1;
	sleeper->status = status;
	pthread_cond_signal(&sleeper->wake);
	pthread_mutex_unlock(&sleeper->lock);
}

int parked_wait(struct ob_engine *engine, int (*attempt)(void *argument),
                void (*want)(void *argument, struct parked *parked), void *argument)
{
	struct sleeper sleeper = { .parked = { .ready = sleeper_ready } };
	int status = attempt(argument);

	if (status != -EAGAIN)
		return status;
	pthread_mutex_init(&sleeper.lock, NULL);
	pthread_cond_init(&sleeper.wake, NULL);
	while (status == -EAGAIN) {
		sleeper.done = 0;
		parked_begin(&sleeper.parked, engine);
		want(argument, &sleeper.parked);
		parked_end(&sleeper.parked);
		pthread_mutex_lock(&sleeper.lock);
		while (!sleeper.done)
			pthread_cond_wait(&sleeper.wake, &sleeper.lock);
		pthread_mutex_unlock(&sleeper.lock);
		if (sleeper.status == -ESHUTDOWN)
			status = status_set(ESHUTDOWN, "read: the engine is stopping");
		else if (sleeper.status)
			status = status_set(-sleeper.status, "read: the source did not deliver in time: errno %d", -sleeper.status);
		else
			status = attempt(argument);
	}
	pthread_cond_destroy(&sleeper.wake);
	pthread_mutex_destroy(&sleeper.lock);
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
	struct parked *parked = queue->parked, *next;

	for (; parked; parked = next) {
		next = parked->next;
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

		if (!queue->parked) {
			pthread_cond_wait(&queue->tick, &queue->lock);
			continue;
		}
		engine_wait_until(&queue->tick, &queue->lock, engine_now() + TICK_NS);
		clock_check(queue, &ready, &discarded);
		pthread_mutex_unlock(&queue->lock);
		parked_ready(ready);
		fetch_free(discarded);
		pthread_mutex_lock(&queue->lock);
	}
	pthread_mutex_unlock(&queue->lock);
	return NULL;
}

