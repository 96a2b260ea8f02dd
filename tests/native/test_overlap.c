/* SPDX-License-Identifier: Apache-2.0
 * test_overlap.c: fetches that cover the same extents. Each extent is written and counted by one of them, and nobody who
 * reads gets anything but what the source has.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>

#include "cache.h"
#include "memory.h"
#include "parked.h"
#include "random.h"

enum { EXTENT = OB_EXTENT_SIZE, EXTENTS = 8, SIZE = EXTENTS * EXTENT, TABLE = 4096 };

static ob_engine *engine;
static ob_blob *blob;
static int data, map;
static uint8_t content[SIZE];

static void open_blob(uint32_t unit)
{
	ob_blob_config config = {.id = 1, .size = SIZE, .table_offset = TABLE, .policy = OB_POLICY_HANG, .unit = unit};

	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
}

static void open_all(uint32_t unit)
{
	engine = memory_engine();
	data = memory_fd("", 0);
	map = memory_fd("", 0);
	open_blob(unit);
}

static void close_all(void)
{
	ob_engine_stop(engine);
	ob_blob_close(blob);
	ob_engine_close(engine);
	close(data);
	close(map);
}

static uint64_t present_bytes(void)
{
	ob_blob_stat stat;

	ob_blob_get_stat(blob, &stat);
	return stat.present_bytes;
}

static void deliver(ob_fetch *fetch)
{
	memcpy(fetch->buffer, content + fetch->offset, fetch->length);
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
}

/* ---- one thread plays all parts ---- */

struct wait {
	struct parked parked;        /* first: waited() casts */
	ob_fetch *meanwhile;         /* delivered by another thread, before what the reader was told of is written */
	int over;
};

static void *deliver_run(void *argument)
{
	deliver(argument);
	return NULL;
}

static void waited(struct parked *parked, int status)
{
	struct wait *wait = (struct wait *)parked;
	pthread_t other;

	CHECK(status == 0 && !wait->over);
	wait->over = 1;
	if (!wait->meanwhile)
		return;
	CHECK(pthread_create(&other, NULL, deliver_run, wait->meanwhile) == 0);
	CHECK(pthread_join(other, NULL) == 0);
}

static void begin(struct wait *wait, uint64_t extent)
{
	*wait = (struct wait){.parked = {.ready = waited}};
	parked_begin(&wait->parked, engine);
	blob_want(blob, extent * EXTENT, 1, &wait->parked);
	parked_end(&wait->parked);
}

static ob_fetch *next(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == 0);
	CHECK(fetch->offset == 0 && fetch->length == 2 * EXTENT);
	return fetch;
}

/* Extents 0 and 1, a unit, are here; then one after the other is taken away, and waited for. */
static void lose_two(struct wait *first, ob_fetch **lent, struct wait *second)
{
	CHECK(ob_blob_store(blob, 0, content, 2 * EXTENT) == 2);
	CHECK(ob_blob_drop(blob, 0, EXTENT) == 1);
	begin(first, 0);
	*lent = next();
	CHECK(ob_blob_drop(blob, EXTENT, EXTENT) == 1);
	begin(second, 1);
}

static void what_two_fetches_bring_is_counted_once(void)
{
	struct wait first, second;
	ob_fetch *lent;

	open_all(2);
	lose_two(&first, &lent, &second);
	first.meanwhile = next();
	deliver(lent);
	CHECK(first.over && second.over && present_bytes() == 2 * EXTENT);
	close_all();
}

static void who_waits_is_told_whichever_fetch_brings_it(void)
{
	struct wait first, second;
	ob_fetch *lent;

	open_all(2);
	lose_two(&first, &lent, &second);
	deliver(lent);
	CHECK(first.over && second.over);
	CHECK(ob_fetch_next(engine, OB_BULK, 0, &lent) == -ETIMEDOUT);
	close_all();
}

/* ---- all at one time ---- */

enum { FETCHERS = 4, READERS = 3, READS = 3000, WITHIN = 4096 };

static atomic_int readers_left;

static void *fetcher_run(void *argument)
{
	uint64_t state = *(uint64_t *)argument;
	ob_fetch *fetch;
	int status;

	while ((status = ob_fetch_next(engine, OB_BULK, 20000000, &fetch)) != -ESHUTDOWN) {
		if (status)
			continue;
		memcpy(fetch->buffer, content + fetch->offset, fetch->length);
		for (uint64_t turns = random_below(&state, 8); turns; turns--)
			sched_yield();
		CHECK(ob_fetch_advance(fetch, random_below(&state, fetch->length)) == 0);
		if (random_below(&state, 4)) {
			CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
			CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
		} else {
			CHECK(ob_fetch_finish(fetch, -EIO, 1) == 0);
		}
	}
	return NULL;
}

static void *reader_run(void *argument)
{
	uint64_t state = *(uint64_t *)argument;
	uint8_t got[WITHIN];

	for (int i = 0; i < READS; i++) {
		uint64_t offset = random_below(&state, SIZE - WITHIN);

		CHECK(ob_blob_read(blob, offset, got, WITHIN) == 0);
		CHECK(memcmp(got, content + offset, WITHIN) == 0);
		if (random_below(&state, 4) == 0)
			CHECK(ob_blob_drop(blob, offset / EXTENT * EXTENT, EXTENT) >= 0);
		else if (random_below(&state, 8) == 0)
			blob_reject(blob, offset, WITHIN);
	}
	atomic_fetch_sub(&readers_left, 1);
	return NULL;
}

static void *dropper_run(void *argument)
{
	uint64_t state = *(uint64_t *)argument;

	while (atomic_load(&readers_left)) {
		CHECK(ob_blob_drop(blob, random_below(&state, EXTENTS) * EXTENT, EXTENT) >= 0);
		sched_yield();
	}
	return NULL;
}

/* A disk that is full now and then, for the second half of the file. */
static void *storer_run(void *argument)
{
	uint64_t state = *(uint64_t *)argument;
	struct rlimit all, half;

	CHECK(getrlimit(RLIMIT_FSIZE, &all) == 0);
	half = all;
	half.rlim_cur = SIZE / 2;
	while (atomic_load(&readers_left)) {
		uint64_t first = random_below(&state, EXTENTS);

		CHECK(setrlimit(RLIMIT_FSIZE, random_below(&state, 8) ? &all : &half) == 0);
		ob_blob_store(blob, first * EXTENT, content + first * EXTENT, EXTENT);
		sched_yield();
	}
	CHECK(setrlimit(RLIMIT_FSIZE, &all) == 0);
	return NULL;
}

static void start(pthread_t *thread, uint64_t *seed, void *(*run)(void *))
{
	static uint64_t seeds;

	*seed = ++seeds * 7919;
	CHECK(pthread_create(thread, NULL, run, seed) == 0);
}

static void check_counts(void)
{
	uint64_t count = 0;

	ob_blob_settle(blob);
	for (uint64_t extent = 0; extent < EXTENTS; extent++)
		count += extent_kind(blob, extent) == EXTENT_PRESENT;
	CHECK(present_bytes() == count * EXTENT);
}

static void readers_get_what_the_source_has_whatever_comes_and_goes(uint32_t unit)
{
	enum { THREADS = FETCHERS + READERS + 2 };
	pthread_t threads[THREADS];
	uint64_t seeds[THREADS];
	uint8_t got[EXTENT];

	open_all(unit);
	atomic_store(&readers_left, READERS);
	for (int i = 0; i < FETCHERS; i++)
		start(&threads[i], &seeds[i], fetcher_run);
	for (int i = FETCHERS; i < FETCHERS + READERS; i++)
		start(&threads[i], &seeds[i], reader_run);
	start(&threads[THREADS - 2], &seeds[THREADS - 2], dropper_run);
	start(&threads[THREADS - 1], &seeds[THREADS - 1], storer_run);
	for (int i = FETCHERS; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	for (uint64_t extent = 0; extent < EXTENTS; extent++)
		CHECK(ob_blob_read(blob, extent * EXTENT, got, EXTENT) == 0 && !memcmp(got, content + extent * EXTENT, EXTENT));
	check_counts();
	ob_blob_close(blob);
	open_blob(unit);
	for (uint64_t extent = 0; extent < EXTENTS; extent++)
		CHECK(ob_blob_read(blob, extent * EXTENT, got, EXTENT) == 0 && !memcmp(got, content + extent * EXTENT, EXTENT));
	ob_engine_stop(engine);
	for (int i = 0; i < FETCHERS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	close_all();
}

int main(void)
{
	uint64_t state = 1;

	signal(SIGXFSZ, SIG_IGN);
	for (uint64_t i = 0; i < SIZE; i++)
		content[i] = (uint8_t)(1 + random_below(&state, 255));
	what_two_fetches_bring_is_counted_once();
	who_waits_is_told_whichever_fetch_brings_it();
	for (uint32_t unit = 1; unit <= 4; unit *= 2)
		readers_get_what_the_source_has_whatever_comes_and_goes(unit);
	return 0;
}
