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
#include "status.h"

enum {
	FETCH_EXTENTS_MAX = 32,        /* 2 MiB: long enough that a round trip is paid seldom */
	WINDOW_FIRST = 4,              /* extents of the first read-ahead; doubles from there */
	STREAM_SLACK = 2,              /* a reader may skip this many extents and go on */
	KEPT_BYTES_MAX = 16 << 20      /* fetched but not cacheable (disk full): kept in memory */
};

/* How often the deadlines of waiting requests are looked at. */
static const int64_t TICK_NS = 50 * 1000000LL;

struct fetch {
	ob_fetch lent;                 /* first: what the fetch thread sees */
	struct ob_blob *blob;          /* held */
	struct fetch_queue *queue;
	uint64_t first, count;         /* extents */
	uint64_t published;            /* extents whose bytes are right */
	enum { FETCH_QUEUED, FETCH_LENT, FETCH_KEPT } phase;
	int writing;                   /* its thread is writing the cache */
	int keep;                      /* some extent could not be written */
	int64_t not_before_ns;
	struct waiter *waiters;
	struct fetch *next, *prev;             /* priority queue or kept list */
	struct fetch *blob_next, *blob_prev;   /* the blob's fetches */
};

/* `parked` needs extents [first, last] of `fetch`. In both their lists. */
struct waiter {
	struct parked *parked;
	struct fetch *fetch;
	uint64_t first, last;
	struct waiter *fetch_next, *fetch_prev;
	struct waiter *parked_next;
};

#define LIST_ADD(head, item, next_field, prev_field) do { \
	(item)->prev_field = NULL; (item)->next_field = (head); \
	if (head) (head)->prev_field = (item); \
	(head) = (item); } while (0)
#define LIST_DEL(head, item, next_field, prev_field) do { \
	if ((item)->prev_field) (item)->prev_field->next_field = (item)->next_field; else (head) = (item)->next_field; \
	if ((item)->next_field) (item)->next_field->prev_field = (item)->prev_field; } while (0)

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

static struct fetch *fetch_find(const struct ob_blob *blob, uint64_t extent)
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

/* Fetches to be freed once the lock is open: with the last of them a blob may go, and
 * with the blob the engine that owns the lock. Chained by `next`. */
static void fetch_discard(struct fetch *fetch, struct fetch **discarded)
{
	LIST_DEL(fetch->blob->fetches, fetch, blob_next, blob_prev);
	fetch->next = *discarded;
	*discarded = fetch;
}

static void fetch_free(struct fetch *discarded)
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

/* ---- waiting ---- */

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
static void parked_join(struct parked *parked, struct fetch *fetch, uint64_t extent)
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

/* End the waits of a fetch that are over: all of them if it failed. */
static void fetch_settle_one(struct fetch *fetch, int failure, struct parked **ready)
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

struct parked *fetch_settle(struct ob_blob *blob)
{
	struct parked *ready = NULL;

	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next)
		fetch_settle_one(fetch, 0, &ready);
	return ready;
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

int fetch_wait(struct ob_engine *engine, int (*attempt)(void *argument), void (*want)(void *argument, struct parked *parked),
               void *argument)
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

static void fetch_missing(struct ob_blob *blob, uint64_t first, uint64_t last, int priority)
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

/* The stream a reader at [first, last] belongs to, or the one to use for a new reader. */
static struct stream *stream_find(struct ob_blob *blob, uint64_t first)
{
	struct stream *oldest = &blob->streams[0];

	for (int i = 0; i < STREAMS; i++) {
		struct stream *stream = &blob->streams[i];

		if (stream->used && first + stream->window + STREAM_SLACK >= stream->next && first <= stream->next + STREAM_SLACK)
			return stream;
		if (stream->used < oldest->used)
			oldest = stream;
	}
	*oldest = (struct stream){ 0 };
	return oldest;
}

/* Has the reader come to its stream's mark? It is taken away. */
static int stream_marked(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	uint32_t seen = 0;

	for (uint64_t extent = first; extent <= last; extent++) {
		if (atomic_load(&blob->state[extent]) & EXTENT_MARK)
			seen |= atomic_fetch_and(&blob->state[extent], ~(uint32_t)EXTENT_MARK);
	}
	return (seen & EXTENT_MARK) != 0;
}

/* A foreground reader has come to [first, last], missing or marked. */
static void stream_advance(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	struct stream *stream = stream_find(blob, first);
	uint64_t start, window, most = blob->engine->config.readahead_extents;
	int marked = stream_marked(blob, first, last);

	if (!stream->used) {
		*stream = (struct stream){ .next = last + 1, .used = ++blob->stream_clock };
		return;
	}
	stream->used = ++blob->stream_clock;
	if (last + 1 < stream->next && !marked)
		return; /* still inside the last window, and not at its mark */
	window = stream->window ? stream->window * 2 : WINDOW_FIRST;
	window = window < most ? window : most;
	start = last + 1 > stream->next ? last + 1 : stream->next;
	if (start >= blob->extents || !window)
		return;
	if (window > blob->extents - start)
		window = blob->extents - start;
	fetch_missing(blob, start, start + window - 1, OB_PREFETCH);
	atomic_fetch_or(&blob->state[start], EXTENT_MARK);
	stream->next = start + window;
	stream->window = window;
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
		stream_advance(blob, first, last);
}

void fetch_ahead(struct ob_blob *blob, uint64_t extent)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	pthread_mutex_lock(&queue->lock);
	if (!queue->stopping && !blob->down && (atomic_load(&blob->state[extent]) & EXTENT_MARK))
		stream_advance(blob, extent, extent);
	pthread_mutex_unlock(&queue->lock);
}

/* ---- giving up ---- */

/* What was not published becomes absent again; whoever waits for it gets `failure`. */
static void fetch_abandon(struct fetch *fetch, int failure, struct parked **ready)
{
	fetch_settle_one(fetch, 0, ready);
	fetch_settle_one(fetch, failure, ready);
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
static void blob_go_down(struct ob_blob *blob, struct parked **ready, struct fetch **discarded)
{
	blob->down = 1;
	engine_post(blob->engine, OB_EVENT_BLOB_DOWN, 0, blob->id);
	for (struct fetch *fetch = blob->fetches; fetch; fetch = fetch->blob_next)
		fetch_settle_one(fetch, -EIO, ready);
	fetch_cancel(blob, ready, discarded);
}

static int blob_past_policy(const struct ob_blob *blob, int64_t now)
{
	return blob->policy == OB_POLICY_EIO && blob->failing_since && now - blob->failing_since >= blob->policy_ns;
}

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
			if (blob_past_policy(blob, now) && !blob->down) {
				/* Changes the list under us: the next tick sees to the others. */
				blob_go_down(blob, ready, discarded);
				return;
			}
			parked->failure = -EIO;
			parked_collect(parked, ready);
			break;
		}
	}
}

static void cond_wait_ns(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t until_ns)
{
	struct timespec at = { .tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000 };

	pthread_cond_timedwait(cond, lock, &at);
}

static void *clock_run(void *argument)
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
		cond_wait_ns(&queue->tick, &queue->lock, engine_now() + TICK_NS);
		clock_check(queue, &ready, &discarded);
		pthread_mutex_unlock(&queue->lock);
		parked_ready(ready);
		fetch_free(discarded);
		pthread_mutex_lock(&queue->lock);
	}
	pthread_mutex_unlock(&queue->lock);
	return NULL;
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
			if (engine_now() >= until)
				status = -ETIMEDOUT;
			queue->idle[kind]++;
			if (status == -EAGAIN)
				cond_wait_ns(&queue->wake[kind], &queue->lock, wait_until);
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
		fetch->writing = end > from;
		pthread_mutex_unlock(&queue->lock);
		if (end == from) {
			from++;
			continue;
		}
		error = extents_write(blob, fetch->first + from, end - from, (uint8_t *)fetch->lent.buffer + from * OB_EXTENT_SIZE);
		pthread_mutex_lock(&queue->lock);
		fetch->writing = 0;
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
		pthread_cond_broadcast(&queue->settled);
		pthread_mutex_unlock(&queue->lock);
		from = end;
	}
}

int ob_fetch_advance(ob_fetch *lent, uint64_t filled)
{
	struct fetch *fetch = (struct fetch *)lent;
	struct ob_blob *blob = fetch->blob;
	uint64_t from = fetch->published, to;
	struct parked *ready;

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
	ready = to > from ? fetch_settle(blob) : NULL;
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
	struct waiter *waiter = fetch->waiters;

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
	rest->waiters = waiter;
	for (; waiter; waiter = waiter->fetch_next)
		waiter->fetch = rest;
	fetch->waiters = NULL;
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
	if (blob_past_policy(blob, now) && !blob->down)
		blob_go_down(blob, ready, discarded);
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
		fetch_settle_one(fetch, 0, &ready);
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
	return engine_thread(&queue->clock, "ob-clock", clock_run, engine);
}

void fetch_queue_stop(struct ob_engine *engine)
{
	struct fetch_queue *queue = &engine->fetch;
	struct parked *ready = NULL;

	pthread_mutex_lock(&queue->lock);
	queue->stopping = 1;
	while (queue->parked) {
		queue->parked->failure = -ESHUTDOWN;
		parked_collect(queue->parked, &ready);
	}
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
