/* SPDX-License-Identifier: Apache-2.0
 * fetch.c: the life of a miss: single flight, giving up, and the border where bytes
 * arrive.
 */
#include "fetch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cache.h"
#include "engine.h"
#include "readahead.h"
#include "status.h"

enum { KEPT_BYTES_MAX = 16 << 20 };     /* fetched but not cacheable (disk full): kept in memory */

/* So long after a failure it says nothing of the source any more, if nothing was under way since.
 * A pull asks again sooner (STALL in fetch/pull.py). */
static const int64_t LAPSE_NS = 2 * 1000000000LL;

static _Thread_local const struct fetch *telling;   /* what this thread tells readers of before it writes it */

struct fetch *fetch_find(const struct ob_blob *blob, uint64_t extent)
{
	struct fetch *fetch;

	LIST_FOREACH(fetch, &blob->fetches, of_blob) {
		if (fetch->phase != FETCH_KEPT && extent >= fetch->first + fetch->published && extent < fetch->first + fetch->count)
			return fetch;
	}
	return NULL;
}

/* Is a RESIDENT extent so in the buffer of this fetch? */
static int fetch_holds(const struct fetch *fetch, uint64_t extent)
{
	return extent >= fetch->first && extent < fetch->first + fetch->count && fetch->resident >> (extent - fetch->first) & 1;
}

static struct fetch *fetch_holding(const struct ob_blob *blob, uint64_t extent)
{
	struct fetch *fetch;

	LIST_FOREACH(fetch, &blob->fetches, of_blob) {
		if (fetch_holds(fetch, extent))
			return fetch;
	}
	return NULL;
}

/* Is anything of the blob to be brought? */
static int fetch_under_way(const struct ob_blob *blob)
{
	const struct fetch *fetch;

	LIST_FOREACH(fetch, &blob->fetches, of_blob) {
		if (fetch->phase != FETCH_KEPT)
			return 1;
	}
	return 0;
}

/* Something is about to be fetched. A policy runs only while something was, or else the first read after a quiet time
 * would be failed for what happened before it. */
static void failure_lapse(struct ob_blob *blob)
{
	int64_t quiet = engine_now() - blob->failed_ns;

	if (!fetch_under_way(blob) && (quiet >= LAPSE_NS || (blob->policy == OB_POLICY_EIO && quiet >= blob->policy_ns)))
		blob->failing_since = 0;
}

/* Of no extents yet. */
static struct fetch *fetch_new(struct ob_blob *blob, uint64_t first, int priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	failure_lapse(blob);
	fetch->blob = blob_hold(blob);
	fetch->queue = &blob->engine->fetch;
	fetch->first = first;
	fetch->lent.blob_id = blob->id;
	fetch->lent.priority = priority;
	LIST_INSERT_HEAD(&blob->fetches, fetch, of_blob);
	queue_push(fetch->queue, fetch);
	return fetch;
}

static void fetch_discard(struct fetch *fetch, struct fetch **discarded)
{
	LIST_REMOVE(fetch, of_blob);
	fetch->next = *discarded;
	*discarded = fetch;
}

void fetch_unlock(struct fetch_queue *queue, struct parked *ready, struct fetch *discarded)
{
	uint32_t called = queue->called;

	queue->called = 0;
	pthread_mutex_unlock(&queue->lock);
	for (int slot = 0; called; slot++, called >>= 1) {
		if (called & 1)
			pthread_cond_signal(&queue->wake[slot]);
	}
	parked_ready(ready);
	while (discarded) {
		struct fetch *fetch = discarded;
		struct ob_blob *blob = fetch->blob;

		discarded = fetch->next;
		if (fetch->lent.buffer)
			munmap(fetch->lent.buffer, fetch->phase == FETCH_KEPT ? fetch->lent.length : FETCH_BUFFER_SIZE);
		free(fetch);
		blob_release(blob);
	}
}

/* ---- wanting ---- */

/* The first of [start, end) that is of this kind, or (`is` 0) of another; `end` if there is none. */
static uint64_t extent_search(const struct ob_blob *blob, uint64_t start, uint64_t end, uint32_t kind, int is)
{
	while (start < end && (extent_kind(blob, start) == kind) != is)
		start++;
	return start;
}

void fetch_missing(struct ob_blob *blob, uint64_t first, uint64_t last, int priority)
{
	for (uint64_t start = unit_start(blob, first), end; start <= last && !atomic_load(&blob->closed); start = end) {
		struct fetch *fetch;

		end = unit_end(blob, start);
		if (extent_search(blob, start, end, EXTENT_ABSENT, 1) == end)
			continue;
		fetch = start ? fetch_find(blob, start - 1) : NULL;
		/* One that is queued and ends here takes it along, if there is room. */
		if (!fetch || fetch->phase != FETCH_QUEUED || fetch->lent.priority != priority || fetch->not_before_ns ||
		    fetch->first + fetch->count != start || fetch->count + (end - start) > FETCH_EXTENTS_MAX)
			fetch = fetch_new(blob, start, priority);
		if (!fetch)
			return; /* out of memory: the extents stay absent, waiters find no fetch */
		for (uint64_t extent = start; extent < end; extent++) {
			if (extent_kind(blob, extent) == EXTENT_ABSENT)
				extent_set(blob, extent, EXTENT_FETCHING, 0);
		}
		fetch->count += end - start;
	}
}

void fetch_want(struct ob_blob *blob, uint64_t first, uint64_t last, int priority, struct parked *parked)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	if (blob->down || atomic_load(&blob->closed)) {
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
			continue; /* here, or the blob was closed meanwhile */
		fetch = fetch_find(blob, extent);
		if (fetch->phase == FETCH_QUEUED && fetch->lent.priority > priority) {
			queue_remove(queue, fetch);
			fetch->lent.priority = priority;
			queue_push(queue, fetch);
		}
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
	struct fetch *fetch, *after;

	for (fetch = LIST_FIRST(&blob->fetches); fetch; fetch = after) {
		after = LIST_NEXT(fetch, of_blob);
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
	struct fetch *fetch;

	blob->down = 1;
	engine_post(blob->engine, OB_EVENT_BLOB_DOWN, 0, blob->id);
	LIST_FOREACH(fetch, &blob->fetches, of_blob)
		parked_settle_fetch(fetch, -EIO, ready);
	fetch_cancel(blob, ready, discarded);
}

int fetch_past_policy(const struct ob_blob *blob, int64_t now)
{
	return blob->policy == OB_POLICY_EIO && blob->failing_since && now - blob->failing_since >= blob->policy_ns;
}

/* ---- the border ---- */

/* Units at either end that came by another way need not be fetched. 0: nothing is left.
 * (One that is being stored may still fail to be, so it stays.) */
static int fetch_trim(struct fetch *fetch)
{
	const struct ob_blob *blob = fetch->blob;
	uint64_t start = fetch->first, end = start + fetch->count;

	while (start < end) {
		uint64_t edge = min_u64(unit_end(blob, start), end);

		if (extent_search(blob, start, edge, EXTENT_PRESENT, 0) < edge)
			break;
		start = edge;
	}
	while (start < end) {
		uint64_t edge = max_u64(unit_start(blob, end - 1), start);

		if (extent_search(blob, edge, end, EXTENT_PRESENT, 0) < end)
			break;
		end = edge;
	}
	fetch->first = start;
	fetch->count = end - start;
	return fetch->count != 0;
}

static int fetch_lend(struct fetch_queue *queue, struct fetch *fetch)
{
	void *buffer = buffer_take(queue);

	if (!buffer)
		return status_set(ENOMEM, "fetch: buffer of %d bytes: out of memory", FETCH_BUFFER_SIZE);
	fetch->phase = FETCH_LENT;
	fetch->published = 0;
	fetch->lent.offset = fetch->first * OB_EXTENT_SIZE;
	fetch->lent.length = (fetch->count - 1) * OB_EXTENT_SIZE + extent_length(fetch->blob, fetch->first + fetch->count - 1);
	fetch->lent.buffer = buffer;
	fetch->blob->fetch_count++;
	queue_lend(queue, fetch);
	return 0;
}

int ob_fetch_next(struct ob_engine *engine, int lowest, int64_t timeout_ns, ob_fetch **out)
{
	struct fetch_queue *queue = &engine->fetch;
	int64_t until = engine_now() + timeout_ns;
	int status = -EAGAIN;

	if (lowest < OB_FOREGROUND || lowest > OB_BULK)
		return status_set(EINVAL, "next fetch: priority %d: unknown", lowest);
	pthread_mutex_lock(&queue->lock);
	while (status == -EAGAIN) {
		int64_t wait_until = until;
		struct fetch *fetch = queue_pick(queue, lowest, engine->config.fetch_bytes, &wait_until);

		if (queue->stopping) {
			status = status_set(ESHUTDOWN, "next fetch: the engine is stopping");
		} else if (!fetch && engine_now() >= until) {
			buffers_free(queue);
			status = -ETIMEDOUT;
		} else if (!fetch) {
			status = queue_wait(queue, lowest, wait_until);
		} else if (fetch_trim(fetch)) {
			status = fetch_lend(queue, fetch);
			*out = &fetch->lent;
			queue_call_next(queue, engine->config.fetch_bytes);
		} else {
			struct fetch *discarded = NULL;
			struct parked *ready = NULL;

			queue_remove(queue, fetch);
			parked_settle_fetch(fetch, -EAGAIN, &ready);
			fetch_discard(fetch, &discarded);
			fetch_unlock(queue, ready, discarded); /* now: it may be long until there is something else */
			pthread_mutex_lock(&queue->lock);
		}
	}
	fetch_unlock(queue, NULL, NULL);
	if (status == -ETIMEDOUT)
		http_disconnect();
	return status;
}

void fetch_write_failed(struct ob_blob *blob, int error)
{
	if (!blob->write_failed)
		engine_post(blob->engine, OB_EVENT_CACHE_WRITE, error, blob->id);
	blob->write_failed = 1;
	blob->write_error = error;
	blob->write_failures++;
}

/* Those of extents [from, to) that are still to be brought become RESIDENT: a bit for each. Other fetches may cover them
 * too, have brought them before they were taken away, or have those who wait for them. */
static uint32_t fetch_publish(struct fetch *fetch, uint64_t from, uint64_t to, struct parked **ready)
{
	struct ob_blob *blob = fetch->blob;
	uint32_t mine = 0;
	struct fetch *other;

	if (to <= from)
		return 0;
	for (uint64_t i = from; i < to; i++) {
		blob->fetched_bytes += extent_length(blob, fetch->first + i);
		if (extent_kind(blob, fetch->first + i) != EXTENT_FETCHING)
			continue;
		extent_set(blob, fetch->first + i, EXTENT_RESIDENT, 0);
		mine |= (uint32_t)1 << i;
	}
	LIST_FOREACH(other, &blob->fetches, of_blob) {
		if (other->first + other->count <= fetch->first || fetch->first + fetch->count <= other->first)
			continue;
		other->resident &= other->first < fetch->first ? ~(mine << (fetch->first - other->first))
		                                               : ~(mine >> (other->first - fetch->first));
		parked_settle_fetch(other, 0, ready);
	}
	fetch->resident |= mine;
	fetch->published = to;
	return mine;
}

/* Write the extents of these bits, which stay RESIDENT while `writing` is set. */
static void fetch_write(struct fetch *fetch, uint32_t mine)
{
	struct ob_blob *blob = fetch->blob;
	struct fetch_queue *queue = fetch->queue;

	while (mine) {
		uint64_t from = (uint64_t)__builtin_ctz(mine), count = (uint64_t)__builtin_ctzll(~((uint64_t)mine >> from));
		int error = extents_write(blob, fetch->first + from, count, (uint8_t *)fetch->lent.buffer + from * OB_EXTENT_SIZE);

		mine &= mine + ((uint32_t)1 << from);
		pthread_mutex_lock(&queue->lock);
		for (uint64_t i = from; !error && i < from + count; i++)
			extent_set(blob, fetch->first + i, EXTENT_PRESENT | EXTENT_CHECKED, 0);
		if (error) {
			fetch->keep = 1;
			fetch_write_failed(blob, error);
		} else {
			extents_arrived(blob, count);
		}
		fetch->writing = mine != 0;
		if (!mine)
			pthread_cond_broadcast(&queue->settled);
		fetch_unlock(queue, NULL, NULL);
	}
}

int ob_fetch_advance(ob_fetch *lent, uint64_t filled)
{
	struct fetch *fetch = (struct fetch *)lent;
	struct ob_blob *blob = fetch->blob;
	uint64_t from = fetch->published, to;
	struct parked *ready = NULL;
	uint32_t mine;

	if (filled > lent->length)
		return status_set(EINVAL, "advance fetch: %llu bytes: more than the %llu lent", (unsigned long long)filled,
		                  (unsigned long long)lent->length);
	to = filled == lent->length ? fetch->count : filled / OB_EXTENT_SIZE;
	pthread_mutex_lock(&fetch->queue->lock);
	if (atomic_load(&blob->closed)) {
		fetch_unlock(fetch->queue, NULL, NULL);
		return 0;
	}
	blob->failing_since = 0;
	blob->down = 0;
	blob->progress_ns = engine_now();
	fetch_heard(fetch);
	fetch->host->failing = 0;
	mine = fetch_publish(fetch, from, to, &ready);
	/* From here on, not from the write itself: whoever rejects these bytes waits until they
	 * are written, or a later answer could become resident and be overwritten by them. */
	fetch->writing = mine != 0;
	telling = fetch;
	fetch_unlock(fetch->queue, ready, NULL);
	telling = NULL;
	fetch_write(fetch, mine);
	return 0;
}

/* ---- extents that could not be written stay readable from memory, the newest 16 MiB ---- */

static void kept_evict(struct fetch_queue *queue, struct fetch *fetch, struct fetch **discarded)
{
	TAILQ_REMOVE(&queue->kept, fetch, queued);
	queue->kept_bytes -= fetch->lent.length;
	for (uint64_t i = 0; i < fetch->count; i++) {
		if (fetch_holds(fetch, fetch->first + i) && extent_kind(fetch->blob, fetch->first + i) == EXTENT_RESIDENT)
			extent_set(fetch->blob, fetch->first + i, EXTENT_ABSENT, EXTENT_MARK);
	}
	fetch_discard(fetch, discarded);
}

static void kept_add(struct fetch_queue *queue, struct fetch *fetch, struct fetch **discarded)
{
	fetch->phase = FETCH_KEPT;
	mremap(fetch->lent.buffer, FETCH_BUFFER_SIZE, fetch->lent.length, 0);
	TAILQ_INSERT_TAIL(&queue->kept, fetch, queued);
	queue->kept_bytes += fetch->lent.length;
	while (queue->kept_bytes > KEPT_BYTES_MAX && TAILQ_FIRST(&queue->kept) != fetch)
		kept_evict(queue, TAILQ_FIRST(&queue->kept), discarded);
}

void fetch_drop_kept(struct ob_blob *blob, uint64_t first, uint64_t last, struct fetch **discarded)
{
	struct fetch *fetch, *after;

	for (fetch = LIST_FIRST(&blob->fetches); fetch; fetch = after) {
		after = LIST_NEXT(fetch, of_blob);
		if (fetch->phase == FETCH_KEPT && fetch->first <= last && first < fetch->first + fetch->count)
			kept_evict(&blob->engine->fetch, fetch, discarded);
	}
}

static int blob_writing(const struct ob_blob *blob)
{
	struct fetch *fetch;

	LIST_FOREACH(fetch, &blob->fetches, of_blob) {
		if (fetch->writing)
			return 1;
	}
	return blob->storing > 0;
}

void ob_blob_settle(struct ob_blob *blob)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	pthread_mutex_lock(&queue->lock);
	while (blob_writing(blob))
		pthread_cond_wait(&queue->settled, &queue->lock);
	fetch_unlock(queue, NULL, NULL);
}

void fetch_end(struct ob_blob *blob)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	struct parked *ready = NULL;
	struct fetch *discarded = NULL, *fetch;

	pthread_mutex_lock(&queue->lock);
	atomic_store(&blob->closed, 1);
	fetch_cancel(blob, &ready, &discarded);
	fetch_drop_kept(blob, 0, blob->extents, &discarded);
	LIST_FOREACH(fetch, &blob->fetches, of_blob)
		fetch_abandon(fetch, -EIO, &ready);
	while (blob_writing(blob))
		pthread_cond_wait(&queue->settled, &queue->lock);
	extents_end(blob);
	fetch_unlock(queue, ready, discarded);
}

/* The unpublished rest goes back to the queue as a fetch of its own. */
static int fetch_requeue(struct fetch *fetch, int64_t retry_ns)
{
	struct fetch *rest = fetch_new(fetch->blob, fetch->first + fetch->published, fetch->lent.priority);

	if (!rest)
		return -ENOMEM;
	rest->count = fetch->count - fetch->published;
	rest->lent.attempt = fetch->lent.attempt + 1;
	rest->not_before_ns = engine_now() + retry_ns;
	parked_move(fetch, rest);
	fetch->count = fetch->published;
	return 0;
}

/* The thread could not deliver: note it for the policy, and try again or give up. */
static void fetch_failed(struct fetch *fetch, int64_t retry_ns, struct parked **ready, struct fetch **discarded)
{
	struct ob_blob *blob = fetch->blob;
	int64_t now = engine_now();

	fetch->host->failing = 1;
	blob->failed_ns = now;
	if (!blob->failing_since) {
		blob->failing_since = now;
		engine_post(blob->engine, OB_EVENT_BLOB_FAILING, 0, blob->id);
	}
	if (fetch_past_policy(blob, now) && !blob->down)
		fetch_go_down(blob, ready, discarded);
	if (retry_ns <= 0 || LIST_EMPTY(&fetch->waiters) || blob->down || fetch->queue->stopping || fetch_requeue(fetch, retry_ns))
		fetch_abandon(fetch, -EIO, ready);
}

int ob_fetch_finish(ob_fetch *lent, int status, int64_t retry_ns)
{
	struct fetch *fetch = (struct fetch *)lent, *discarded = NULL;
	struct fetch_queue *queue = fetch->queue;
	struct parked *ready = NULL;
	int short_of = 0;

	pthread_mutex_lock(&queue->lock);
	queue_take_back(queue, fetch);
	/* What others stored meanwhile (a whole body in answer to a range) counts as done. */
	for (uint64_t i = fetch->published; i < fetch->count; i++)
		short_of |= extent_kind(fetch->blob, fetch->first + i) == EXTENT_FETCHING;
	if (short_of && status == -ESHUTDOWN)
		fetch_abandon(fetch, -EIO, &ready);
	else if (short_of)
		fetch_failed(fetch, status ? retry_ns : 0, &ready, &discarded);
	else
		parked_settle_fetch(fetch, -EAGAIN, &ready);
	if (fetch->keep && !atomic_load(&fetch->blob->closed)) {
		kept_add(queue, fetch, &discarded);
	} else {
		if (buffer_give(queue, fetch->lent.buffer))
			fetch->lent.buffer = NULL;
		fetch_discard(fetch, &discarded);
	}
	queue_call_next(queue, fetch->blob->engine->config.fetch_bytes);
	fetch_unlock(queue, ready, discarded);
	return 0;
}

/* ---- for cache.c ---- */

const uint8_t *fetch_resident(struct ob_blob *blob, uint64_t extent)
{
	const struct fetch *fetch = fetch_holding(blob, extent);

	return fetch ? (const uint8_t *)fetch->lent.buffer + (extent - fetch->first) * OB_EXTENT_SIZE : NULL;
}

int fetch_kept(const struct ob_blob *blob, uint64_t extent)
{
	const struct fetch *fetch = extent_kind(blob, extent) == EXTENT_RESIDENT ? fetch_holding(blob, extent) : NULL;

	return fetch && fetch->phase == FETCH_KEPT;
}

int fetch_writing(struct ob_blob *blob, uint64_t extent)
{
	const struct fetch *fetch = fetch_holding(blob, extent);

	if (!fetch || !fetch->writing)
		return 0;
	return telling ? -1 : 1;
}

uint32_t fetch_owner_kind(const struct ob_blob *blob, uint64_t extent, int kept)
{
	if (kept && fetch_holding(blob, extent))
		return EXTENT_RESIDENT;
	return fetch_find(blob, extent) && !atomic_load(&blob->closed) ? EXTENT_FETCHING : EXTENT_ABSENT;
}

/* ---- lifetime ---- */

int fetch_queue_open(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;
	pthread_condattr_t monotonic;

	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_mutex_init(&queue->lock, NULL);
	for (int priority = OB_FOREGROUND; priority <= OB_BULK; priority++)
		TAILQ_INIT(&queue->queues[priority]);
	TAILQ_INIT(&queue->kept);
	for (int slot = 0; slot < FETCH_SLOTS; slot++)
		pthread_cond_init(&queue->wake[slot], &monotonic);
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
	parked_dismiss(engine, NULL, &ready);
	queue->called = queue->used;
	pthread_cond_broadcast(&queue->settled);
	pthread_cond_broadcast(&queue->tick);
	fetch_unlock(queue, ready, NULL);
	if (queue->clock)
		pthread_join(queue->clock, NULL);
}

void fetch_queue_close(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;

	pthread_cond_destroy(&queue->tick);
	pthread_cond_destroy(&queue->settled);
	for (int slot = 0; slot < FETCH_SLOTS; slot++)
		pthread_cond_destroy(&queue->wake[slot]);
	buffers_free(queue);
	pthread_mutex_destroy(&queue->lock);
}
