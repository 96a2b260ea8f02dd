/* SPDX-License-Identifier: Apache-2.0
 * fetch.c: the miss queue: single flight, order, deadlines, and the border where
 * bytes arrive.
 */
#include "fetch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cache.h"
#include "engine.h"
#include "list.h"
#include "readahead.h"
#include "status.h"

enum {
	FETCH_EXTENTS_MAX = 32,        /* 2 MiB: long enough that a round trip is paid seldom */
	KEPT_BYTES_MAX = 16 << 20      /* fetched but not cacheable (disk full): kept in memory */
};

/* ---- the queue ---- */

static void queue_push(struct fetch_queue *queue, struct fetch *fetch)
{
	int priority = fetch->lent.priority;

	fetch->next = NULL;
	fetch->prev = queue->tail[priority];
	if (fetch->prev)
		fetch->prev->next = fetch;
	else
		queue->head[priority] = fetch;
	queue->tail[priority] = fetch;
	/* A thread kept for foreground goes first, so that the others stay free for more. */
	pthread_cond_signal(&queue->wake[priority == OB_FOREGROUND && queue->idle[1]]);
}

static void queue_remove(struct fetch_queue *queue, struct fetch *fetch)
{
	int priority = fetch->lent.priority;

	if (fetch->next)
		fetch->next->prev = fetch->prev;
	else
		queue->tail[priority] = fetch->prev;
	if (fetch->prev)
		fetch->prev->next = fetch->next;
	else
		queue->head[priority] = fetch->next;
}

static void queue_promote(struct fetch_queue *queue, struct fetch *fetch, int priority)
{
	if (fetch->phase != FETCH_QUEUED || fetch->lent.priority <= priority)
		return;
	queue_remove(queue, fetch);
	fetch->lent.priority = priority;
	queue_push(queue, fetch);
}

struct fetch *fetch_find(const struct ob_blob *blob, uint64_t extent)
{
	struct fetch *fetch = blob->fetches;

	while (fetch && (extent < fetch->first || extent >= fetch->first + fetch->count))
		fetch = fetch->blob_next;
	return fetch;
}

static struct fetch *fetch_new(struct ob_blob *blob, uint64_t first, uint64_t count, int priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	fetch->blob = blob_hold(blob);
	fetch->queue = &blob->engine->fetch;
	fetch->first = first;
	fetch->count = count;
	fetch->lent.blob_id = blob->id;
	fetch->lent.priority = priority;
	LIST_ADD(blob->fetches, fetch, blob_next, blob_prev);
	for (uint64_t i = 0; i < count; i++)
		extent_set(blob, first + i, EXTENT_FETCHING, 0);
	queue_push(fetch->queue, fetch);
	return fetch;
}

static void fetch_discard(struct fetch *fetch, struct fetch **discarded)
{
	LIST_DEL(fetch->blob->fetches, fetch, blob_next, blob_prev);
	fetch->next = *discarded;
	*discarded = fetch;
}

void fetch_free(struct fetch *discarded)
{
	while (discarded) {
		struct fetch *fetch = discarded;
		struct ob_blob *blob = fetch->blob;

		discarded = fetch->next;
		if (fetch->lent.buffer)
			munmap(fetch->lent.buffer, fetch->lent.length);
		free(fetch);
		blob_release(blob);
	}
}

/* ---- wanting ---- */

/* Room in a queued fetch that ends where `first` begins: its new length, or 0. */
static struct fetch *fetch_extendable(struct ob_blob *blob, uint64_t first, int priority)
{
	struct fetch *fetch = first ? fetch_find(blob, first - 1) : NULL;

	if (fetch && fetch->phase == FETCH_QUEUED && fetch->lent.priority == priority && !fetch->not_before_ns &&
	    fetch->first + fetch->count == first && fetch->count < FETCH_EXTENTS_MAX)
		return fetch;
	return NULL;
}

/* Put absent extents [first, end) on their way, in as few fetches as the ceiling allows. */
static void fetch_absent(struct ob_blob *blob, uint64_t first, uint64_t end, int priority)
{
	while (first < end) {
		struct fetch *fetch = fetch_extendable(blob, first, priority);
		uint64_t room = FETCH_EXTENTS_MAX - (fetch ? fetch->count : 0);
		uint64_t count = end - first < room ? end - first : room;

		if (fetch) {
			for (uint64_t i = 0; i < count; i++)
				extent_set(blob, first + i, EXTENT_FETCHING, 0);
			fetch->count += count;
		} else if (!fetch_new(blob, first, count, priority)) {
			return; /* out of memory: the extents stay absent, waiters find no fetch */
		}
		first += count;
	}
}

void fetch_missing(struct ob_blob *blob, uint64_t first, uint64_t last, int priority)
{
	for (uint64_t extent = first; extent <= last; extent++) {
		uint64_t end = extent;

		while (end <= last && extent_kind(blob, end) == EXTENT_ABSENT)
			end++;
		if (end > extent) {
			fetch_absent(blob, extent, end, priority);
			extent = end;
		}
	}
}

void fetch_want(struct ob_blob *blob, uint64_t first, uint64_t last, int priority, struct parked *parked)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	if (blob->down) {
		if (parked)
			parked->failure = -EIO;
		return;
	}
	if (queue->stopping)
		return;
	fetch_missing(blob, first, last, priority);
	for (uint64_t extent = first; extent <= last && parked; extent++) {
		struct fetch *fetch;

		while (extent_kind(blob, extent) == EXTENT_STORING)
			pthread_cond_wait(&queue->settled, &queue->lock);
		if (extent_kind(blob, extent) != EXTENT_FETCHING)
			continue;
		fetch = fetch_find(blob, extent);
		queue_promote(queue, fetch, priority);
		parked_join(parked, fetch, extent);
	}
	if (parked && priority == OB_FOREGROUND)
		readahead_reached(blob, first, last);
}

/* ---- giving up ---- */

/* What was not published becomes absent again; whoever waits for it gets `failure`. */
static void fetch_abandon(struct fetch *fetch, int failure, struct parked **ready)
{
	parked_settle_fetch(fetch, 0, ready);
	parked_settle_fetch(fetch, failure, ready);
	for (uint64_t i = fetch->published; i < fetch->count; i++) {
		if (extent_kind(fetch->blob, fetch->first + i) == EXTENT_FETCHING)
			extent_set(fetch->blob, fetch->first + i, EXTENT_ABSENT, EXTENT_MARK);
	}
}

/* Queued fetches of a blob, all of them. */
static void fetch_cancel(struct ob_blob *blob, struct parked **ready, struct fetch **discarded)
{
	struct fetch *fetch = blob->fetches, *after;

	for (; fetch; fetch = after) {
		after = fetch->blob_next;
		if (fetch->phase != FETCH_QUEUED)
			continue;
		queue_remove(fetch->queue, fetch);
		fetch_abandon(fetch, -EIO, ready);
		fetch_discard(fetch, discarded);
	}
}

/* The policy has run out: nobody waits for this blob any more, until it is well again. */
void fetch_go_down(struct ob_blob *blob, struct parked **ready, struct fetch **discarded)
{
	blob->down = 1;
	engine_post(blob->engine, OB_EVENT_BLOB_DOWN, 0, blob->id);
	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next)
		parked_settle_fetch(fetch, -EIO, ready);
	fetch_cancel(blob, ready, discarded);
}

int fetch_past_policy(const struct ob_blob *blob, int64_t now)
{
	return blob->policy == OB_POLICY_EIO && blob->failing_since && now - blob->failing_since >= blob->policy_ns;
}

/* ---- the border ---- */

/* Extents at either end that came by another way need not be fetched. 0: nothing is left.
 * (One that is being stored may still fail to be, so it stays.) */
static int fetch_trim(struct fetch *fetch)
{
	while (fetch->count && extent_kind(fetch->blob, fetch->first) == EXTENT_PRESENT) {
		fetch->first++;
		fetch->count--;
	}
	while (fetch->count && extent_kind(fetch->blob, fetch->first + fetch->count - 1) == EXTENT_PRESENT)
		fetch->count--;
	return fetch->count != 0;
}

/* The most urgent fetch that may start now. Lowers *until_ns to when another may. */
static struct fetch *queue_pick(struct fetch_queue *queue, int lowest, uint64_t budget, int64_t *until_ns)
{
	int64_t now = engine_now();

	for (int priority = 0; priority <= lowest; priority++) {
		for (struct fetch *fetch = queue->head[priority]; fetch; fetch = fetch->next) {
			if (fetch->not_before_ns > now) {
				if (fetch->not_before_ns < *until_ns)
					*until_ns = fetch->not_before_ns;
				continue;
			}
			if (queue->lent_bytes && queue->lent_bytes + fetch->count * OB_EXTENT_SIZE > budget)
				return NULL;
			return fetch;
		}
	}
	return NULL;
}

static int fetch_lend(struct fetch *fetch)
{
	uint64_t offset = fetch->first * OB_EXTENT_SIZE;
	uint64_t length = (fetch->count - 1) * OB_EXTENT_SIZE + extent_length(fetch->blob, fetch->first + fetch->count - 1);
	void *buffer = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (buffer == MAP_FAILED)
		return status_set(ENOMEM, "fetch: buffer of %llu bytes: out of memory", (unsigned long long)length);
	queue_remove(fetch->queue, fetch);
	fetch->phase = FETCH_LENT;
	fetch->published = 0;
	fetch->lent.offset = offset;
	fetch->lent.length = length;
	fetch->lent.buffer = buffer;
	fetch->queue->lent_bytes += length;
	fetch->blob->fetch_count++;
	return 0;
}

int ob_fetch_next(struct ob_engine *engine, int lowest, int64_t timeout_ns, ob_fetch **out)
{
	struct fetch_queue *queue = &engine->fetch;
	int64_t until = engine_now() + timeout_ns;
	int kind = lowest == OB_FOREGROUND, status = -EAGAIN;
	struct fetch *discarded = NULL;

	if (lowest < OB_FOREGROUND || lowest > OB_BULK)
		return status_set(EINVAL, "next fetch: priority %d: unknown", lowest);
	pthread_mutex_lock(&queue->lock);
	while (status == -EAGAIN) {
		int64_t wait_until = until;
		struct fetch *fetch;

		if (queue->stopping) {
			status = status_set(ESHUTDOWN, "next fetch: the engine is stopping");
			break;
		}
		fetch = queue_pick(queue, lowest, engine->config.fetch_bytes, &wait_until);
		if (!fetch) {
			if (engine_now() >= until) {
				status = -ETIMEDOUT;
				break;
			}
			queue->idle[kind]++;
			engine_wait_until(&queue->wake[kind], &queue->lock, wait_until);
			queue->idle[kind]--;
		} else if (fetch_trim(fetch)) {
			status = fetch_lend(fetch);
			*out = &fetch->lent;
		} else {
			queue_remove(queue, fetch);
			fetch_discard(fetch, &discarded);
		}
	}
	pthread_mutex_unlock(&queue->lock);
	fetch_free(discarded);
	return status;
}

void fetch_write_failed(struct ob_blob *blob, int error)
{
	if (!blob->write_failed)
		engine_post(blob->engine, OB_EVENT_CACHE_WRITE, error, blob->id);
	blob->write_failed = 1;
}

/* [from, to) of the fetch's extents, all RESIDENT a moment ago, are to be written. */
static void fetch_write(struct fetch *fetch, uint64_t from, uint64_t to)
{
	struct ob_blob *blob = fetch->blob;
	struct fetch_queue *queue = fetch->queue;

	while (from < to) {
		uint64_t end = from, arrived = 0;
		int error = 0;

		pthread_mutex_lock(&queue->lock);
		while (end < to && extent_kind(blob, fetch->first + end) == EXTENT_RESIDENT)
			end++;
		pthread_mutex_unlock(&queue->lock);
		if (end == from) {
			from++;
			continue;
		}
		error = extents_write(blob, fetch->first + from, end - from, (uint8_t *)fetch->lent.buffer + from * OB_EXTENT_SIZE);
		pthread_mutex_lock(&queue->lock);
		for (uint64_t i = from; i < end && !error; i++, arrived++) {
			extent_set(blob, fetch->first + i, EXTENT_PRESENT, 0);
			atomic_fetch_or(&blob->state[fetch->first + i], EXTENT_CHECKED);
		}
		if (error) {
			fetch->keep = 1;
			fetch_write_failed(blob, error);
		} else {
			extents_arrived(blob, arrived);
		}
		pthread_mutex_unlock(&queue->lock);
		from = end;
	}
	pthread_mutex_lock(&queue->lock);
	fetch->writing = 0;
	pthread_cond_broadcast(&queue->settled);
	pthread_mutex_unlock(&queue->lock);
}

int ob_fetch_advance(ob_fetch *lent, uint64_t filled)
{
	struct fetch *fetch = (struct fetch *)lent;
	struct ob_blob *blob = fetch->blob;
	uint64_t from = fetch->published, to;
	struct parked *ready = NULL;

	if (filled > lent->length)
		return status_set(EINVAL, "advance fetch: %llu bytes: more than the %llu lent", (unsigned long long)filled,
		                  (unsigned long long)lent->length);
	to = filled == lent->length ? fetch->count : filled / OB_EXTENT_SIZE;
	pthread_mutex_lock(&fetch->queue->lock);
	blob->failing_since = 0;
	blob->down = 0;
	blob->progress_ns = engine_now();
	for (uint64_t i = from; i < to; i++) {
		if (extent_kind(blob, fetch->first + i) == EXTENT_FETCHING)
			extent_set(blob, fetch->first + i, EXTENT_RESIDENT, 0);
		blob->fetched_bytes += extent_length(blob, fetch->first + i);
	}
	fetch->published = to > from ? to : from;
	/* From here on, not from the write itself: whoever rejects these bytes waits until they
	 * are written, or a later answer could become resident and be overwritten by them. */
	fetch->writing = to > from;
	if (to > from)
		parked_settle(blob, &ready);
	pthread_mutex_unlock(&fetch->queue->lock);
	parked_ready(ready);
	if (to > from)
		fetch_write(fetch, from, to);
	return 0;
}

/* ---- extents that could not be written stay readable from memory, the newest 16 MiB ---- */

static void kept_evict(struct fetch_queue *queue, struct fetch *fetch, struct fetch **discarded)
{
	LIST_DEL(queue->kept, fetch, next, prev);
	queue->kept_bytes -= fetch->lent.length;
	for (uint64_t i = 0; i < fetch->count; i++) {
		if (extent_kind(fetch->blob, fetch->first + i) == EXTENT_RESIDENT)
			extent_set(fetch->blob, fetch->first + i, EXTENT_ABSENT, EXTENT_MARK);
	}
	fetch_discard(fetch, discarded);
}

static void kept_add(struct fetch_queue *queue, struct fetch *fetch, struct fetch **discarded)
{
	fetch->phase = FETCH_KEPT;
	LIST_ADD(queue->kept, fetch, next, prev);
	queue->kept_bytes += fetch->lent.length;
	while (queue->kept_bytes > KEPT_BYTES_MAX && queue->kept->next) {
		struct fetch *oldest = queue->kept;

		while (oldest->next)
			oldest = oldest->next;
		kept_evict(queue, oldest, discarded);
	}
}

void fetch_forget(struct ob_blob *blob)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	struct parked *ready = NULL;
	struct fetch *discarded = NULL, *fetch, *after;

	pthread_mutex_lock(&queue->lock);
	fetch_cancel(blob, &ready, &discarded);
	for (fetch = blob->fetches; fetch; fetch = after) {
		after = fetch->blob_next;
		if (fetch->phase == FETCH_KEPT)
			kept_evict(queue, fetch, &discarded);
	}
	pthread_mutex_unlock(&queue->lock);
	parked_ready(ready);
	fetch_free(discarded);
}

/* The unpublished rest goes back to the queue as a fetch of its own. */
static int fetch_requeue(struct fetch *fetch, int64_t retry_ns)
{
	struct fetch *rest = calloc(1, sizeof(*rest));

	if (!rest)
		return -ENOMEM;
	rest->blob = blob_hold(fetch->blob);
	rest->queue = fetch->queue;
	rest->first = fetch->first + fetch->published;
	rest->count = fetch->count - fetch->published;
	rest->lent.blob_id = fetch->lent.blob_id;
	rest->lent.priority = fetch->lent.priority;
	rest->lent.attempt = fetch->lent.attempt + 1;
	rest->not_before_ns = engine_now() + retry_ns;
	parked_move(fetch, rest);
	fetch->count = fetch->published;
	LIST_ADD(rest->blob->fetches, rest, blob_next, blob_prev);
	queue_push(rest->queue, rest);
	return 0;
}

/* The thread could not deliver: note it for the policy, and try again or give up. */
static void fetch_failed(struct fetch *fetch, int64_t retry_ns, struct parked **ready, struct fetch **discarded)
{
	struct ob_blob *blob = fetch->blob;
	int64_t now = engine_now();

	if (!blob->failing_since) {
		blob->failing_since = now;
		engine_post(blob->engine, OB_EVENT_BLOB_FAILING, 0, blob->id);
	}
	if (fetch_past_policy(blob, now) && !blob->down)
		fetch_go_down(blob, ready, discarded);
	if (retry_ns <= 0 || !fetch->waiters || blob->down || fetch->queue->stopping || fetch_requeue(fetch, retry_ns))
		fetch_abandon(fetch, -EIO, ready);
}

int ob_fetch_finish(ob_fetch *lent, int status, int64_t retry_ns)
{
	struct fetch *fetch = (struct fetch *)lent, *discarded = NULL;
	struct fetch_queue *queue = fetch->queue;
	struct parked *ready = NULL;
	int short_of = 0;

	pthread_mutex_lock(&queue->lock);
	queue->lent_bytes -= fetch->lent.length;
	/* What others stored meanwhile (a whole body in answer to a range) counts as done. */
	for (uint64_t i = fetch->published; i < fetch->count; i++)
		short_of |= extent_kind(fetch->blob, fetch->first + i) == EXTENT_FETCHING;
	if (short_of)
		fetch_failed(fetch, status ? retry_ns : 0, &ready, &discarded);
	else
		parked_settle_fetch(fetch, 0, &ready);
	if (fetch->keep && atomic_load(&fetch->blob->users))
		kept_add(queue, fetch, &discarded);
	else
		fetch_discard(fetch, &discarded);
	pthread_cond_broadcast(&queue->wake[0]);
	pthread_cond_broadcast(&queue->wake[1]);
	pthread_mutex_unlock(&queue->lock);
	parked_ready(ready);
	fetch_free(discarded);
	return 0;
}

/* ---- for cache.c ---- */

const uint8_t *fetch_resident(struct ob_blob *blob, uint64_t extent)
{
	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next) {
		if (extent >= fetch->first && extent < fetch->first + fetch->published && fetch->lent.buffer)
			return (const uint8_t *)fetch->lent.buffer + (extent - fetch->first) * OB_EXTENT_SIZE;
	}
	return NULL;
}

int fetch_writing(struct ob_blob *blob, uint64_t extent)
{
	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next) {
		if (fetch->writing && extent >= fetch->first && extent < fetch->first + fetch->count)
			return 1;
	}
	return 0;
}

uint32_t fetch_owner_kind(const struct ob_blob *blob, uint64_t extent)
{
	for (const struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next) {
		if (fetch->phase != FETCH_KEPT && extent >= fetch->first + fetch->published && extent < fetch->first + fetch->count)
			return EXTENT_FETCHING;
	}
	return EXTENT_ABSENT;
}

/* ---- lifetime ---- */

int fetch_queue_open(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;
	pthread_condattr_t monotonic;

	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_mutex_init(&queue->lock, NULL);
	pthread_cond_init(&queue->wake[0], &monotonic);
	pthread_cond_init(&queue->wake[1], &monotonic);
	pthread_cond_init(&queue->settled, &monotonic);
	pthread_cond_init(&queue->tick, &monotonic);
	pthread_condattr_destroy(&monotonic);
	return engine_thread(&queue->clock, "ob-clock", parked_clock, engine);
}

void fetch_queue_stop(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;
	struct parked *ready = NULL;

	pthread_mutex_lock(&queue->lock);
	queue->stopping = 1;
	parked_dismiss(engine, &ready);
	pthread_cond_broadcast(&queue->wake[0]);
	pthread_cond_broadcast(&queue->wake[1]);
	pthread_cond_broadcast(&queue->settled);
	pthread_cond_broadcast(&queue->tick);
	pthread_mutex_unlock(&queue->lock);
	parked_ready(ready);
	pthread_join(queue->clock, NULL);
}

void fetch_queue_close(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;

	pthread_cond_destroy(&queue->tick);
	pthread_cond_destroy(&queue->settled);
	pthread_cond_destroy(&queue->wake[0]);
	pthread_cond_destroy(&queue->wake[1]);
	pthread_mutex_destroy(&queue->lock);
}
