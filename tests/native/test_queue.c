/* SPDX-License-Identifier: Apache-2.0
 * test_queue.c: what each host gets of the fetches lent, whatever is asked of it; and waiting for what they write.
 */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cache.h"
#include "check.h"
#include "engine.h"

enum { EXTENT = OB_EXTENT_SIZE, HOST_COUNT = 5, EXTENTS = 2048, READERS = 40 };

static const int64_t PATIENT_NS = 30000000000, LONG_NS = 3600000000000;

/* A blob of each host, with more asked of it than it gets. */
struct bench {
	ob_engine *engine;
	ob_blob *blobs[HOST_COUNT];
	struct parked parked[HOST_COUNT][READERS];
	ob_fetch *lent[FETCH_SLOTS];
	uint32_t count;
};

static void on_ready(struct parked *parked, int status)
{
}

static void bench_open(struct bench *bench)
{
	ob_engine_config config = { .work_threads = 1, .fetch_bytes = 64 << 20 };

	memset(bench, 0, sizeof(*bench));
	CHECK(ob_engine_open(&config, &bench->engine) == 0);
	for (uint32_t host = 0; host < HOST_COUNT; host++) {
		ob_blob_config blob = { .id = host, .size = (uint64_t)EXTENTS * EXTENT, .table_offset = 4096, .policy = OB_POLICY_HANG };
		int data_fd = memfd_create("data", 0), map_fd = memfd_create("map", 0);

		CHECK(ob_blob_open_cached(bench->engine, data_fd, map_fd, &blob, &bench->blobs[host]) == 0);
		ob_blob_set_host(bench->blobs[host], host);
		close(data_fd);
		close(map_fd);
	}
}

/* Far from each other, so that each is a fetch. */
static void want_bulk(struct bench *bench, uint32_t host)
{
	for (uint64_t i = 0; i < READERS; i++)
		CHECK(ob_blob_prefetch(bench->blobs[host], 2 * i * EXTENT, 1, OB_BULK) == 0);
}

static void want_foreground(struct bench *bench, uint32_t host)
{
	for (uint64_t i = 0; i < READERS; i++) {
		struct parked *parked = &bench->parked[host][i];

		parked->ready = on_ready;
		parked_begin(parked, bench->engine);
		blob_want(bench->blobs[host], (1000 + 2 * i) * EXTENT, 1, parked);
		parked_end(parked);
	}
}

/* All that may be lent now; how many more that is. */
static uint32_t take_all(struct bench *bench)
{
	uint32_t before = bench->count;

	while (bench->count < FETCH_SLOTS && ob_fetch_next(bench->engine, OB_BULK, 0, &bench->lent[bench->count]) == 0)
		bench->count++;
	return bench->count - before;
}

static uint32_t lent_of(const struct bench *bench, uint32_t host)
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < bench->count; i++)
		count += bench->lent[i]->blob_id == host;
	return count;
}

/* A fetch of the host, no longer among those lent. */
static ob_fetch *pop(struct bench *bench, uint32_t host)
{
	for (uint32_t i = 0; i < bench->count; i++) {
		ob_fetch *fetch = bench->lent[i];

		if (fetch->blob_id == host) {
			bench->lent[i] = bench->lent[--bench->count];
			return fetch;
		}
	}
	CHECK(!"one is lent");
	return NULL;
}

static void deliver(ob_fetch *fetch)
{
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
	CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
}

static void bench_close(struct bench *bench)
{
	ob_engine_stop(bench->engine);
	while (bench->count)
		CHECK(ob_fetch_finish(bench->lent[--bench->count], -EIO, 0) == 0);
	for (uint32_t host = 0; host < HOST_COUNT; host++)
		ob_blob_close(bench->blobs[host]);
	ob_engine_close(bench->engine);
}

static void test_a_host_gets_its_share_and_leaves_the_rest_to_others(void)
{
	struct bench bench;

	bench_open(&bench);
	want_bulk(&bench, 0);
	CHECK(take_all(&bench) == HOST_FETCHES - 1);
	want_foreground(&bench, 0);
	CHECK(take_all(&bench) == 1);
	want_foreground(&bench, 1);
	CHECK(take_all(&bench) == FETCH_SLOTS - THREADS_KEPT_URGENT - HOST_FETCHES);
	CHECK(lent_of(&bench, 0) == HOST_FETCHES);
	want_bulk(&bench, 2);
	CHECK(take_all(&bench) == HOST_FETCHES_AILING - 1);
	want_foreground(&bench, 3);
	CHECK(take_all(&bench) == 2 && lent_of(&bench, 3) == 2);
	bench_close(&bench);
}

static void test_a_failing_host_gets_few_until_it_delivers(void)
{
	struct bench bench;

	bench_open(&bench);
	want_foreground(&bench, 0);
	CHECK(take_all(&bench) == HOST_FETCHES);
	while (bench.count)
		CHECK(ob_fetch_finish(pop(&bench, 0), -EIO, LONG_NS) == 0);
	CHECK(take_all(&bench) == HOST_FETCHES_AILING);
	want_foreground(&bench, 1);
	CHECK(take_all(&bench) == HOST_FETCHES);
	deliver(pop(&bench, 0));
	take_all(&bench);
	CHECK(lent_of(&bench, 0) == FETCH_SLOTS - THREADS_KEPT_URGENT - HOST_FETCHES);
	bench_close(&bench);
}

static void test_a_host_that_a_probe_found_well_gets_its_share(void)
{
	struct bench bench;

	bench_open(&bench);
	want_foreground(&bench, 0);
	take_all(&bench);
	CHECK(ob_fetch_finish(pop(&bench, 0), -EIO, 0) == 0);
	CHECK(take_all(&bench) == 0);
	ob_blob_healthy(bench.blobs[0]);
	CHECK(take_all(&bench) == 1);
	bench_close(&bench);
}

static void test_a_host_that_nothing_comes_from_gets_few(void)
{
	struct bench bench;
	struct host *host;

	bench_open(&bench);
	host = &bench.engine->fetch.hosts[0];
	for (int i = 0; i < 5; i++) {
		ob_blob_prefetch(bench.blobs[0], (uint64_t)i * 2 * EXTENT, 1, OB_BULK);
		CHECK(take_all(&bench) == 1);
	}
	atomic_fetch_sub(&host->heard_ns, PATIENT_NS);
	want_foreground(&bench, 0);
	CHECK(take_all(&bench) == 0);
	want_foreground(&bench, 1);
	CHECK(take_all(&bench) == HOST_FETCHES);
	CHECK(ob_fetch_advance(bench.lent[0], EXTENT) == 0);
	CHECK(take_all(&bench) > 0);
	bench_close(&bench);
}

static void test_bytes_that_were_not_asked_for_are_heard(void)
{
	struct bench bench;
	uint8_t *bytes = calloc(1, EXTENT);

	bench_open(&bench);
	want_foreground(&bench, 0);
	take_all(&bench);
	deliver(pop(&bench, 0));
	atomic_fetch_sub(&bench.engine->fetch.hosts[0].heard_ns, PATIENT_NS);
	CHECK(take_all(&bench) == 0);
	CHECK(ob_blob_store(bench.blobs[0], (EXTENTS - 1) * (uint64_t)EXTENT, bytes, EXTENT) == 1);
	CHECK(take_all(&bench) == 1);
	bench_close(&bench);
	free(bytes);
}

static void test_a_blob_that_moves_to_another_host_counts_there(void)
{
	struct bench bench;

	bench_open(&bench);
	want_foreground(&bench, 0);
	CHECK(take_all(&bench) == HOST_FETCHES);
	ob_blob_set_host(bench.blobs[0], 1 + HOSTS); /* as 1 */
	CHECK(take_all(&bench) == FETCH_SLOTS - THREADS_KEPT_URGENT - HOST_FETCHES);
	for (int i = 0; i < HOST_FETCHES; i++)
		deliver(pop(&bench, 0));
	CHECK(bench.engine->fetch.hosts[0].lent + bench.engine->fetch.hosts[1].lent == bench.count);
	bench_close(&bench);
}

struct taker {
	ob_engine *engine;
	int lowest, status;
	ob_fetch *fetch;
	pthread_t thread;
};

static void *taker_run(void *argument)
{
	struct taker *taker = argument;

	taker->status = ob_fetch_next(taker->engine, taker->lowest, PATIENT_NS, &taker->fetch);
	return NULL;
}

static void taker_start(struct taker *taker, ob_engine *engine, int lowest)
{
	struct fetch_queue *queue = &engine->fetch;
	int before = 0, after = 0;

	pthread_mutex_lock(&queue->lock);
	before = __builtin_popcount(queue->idle);
	pthread_mutex_unlock(&queue->lock);
	*taker = (struct taker){ .engine = engine, .lowest = lowest };
	pthread_create(&taker->thread, NULL, taker_run, taker);
	while (after <= before) {
		usleep(1000);
		pthread_mutex_lock(&queue->lock);
		after = __builtin_popcount(queue->idle);
		pthread_mutex_unlock(&queue->lock);
	}
}

/* More urgent ones wait too, but their host has its share. */
static void test_a_fetch_given_back_wakes_a_thread_for_the_next_that_may_start(void)
{
	struct bench bench;
	struct taker kept, any;

	bench_open(&bench);
	want_foreground(&bench, 0);
	CHECK(take_all(&bench) == HOST_FETCHES);
	want_bulk(&bench, 1);
	CHECK(take_all(&bench) == FETCH_SLOTS - THREADS_KEPT - HOST_FETCHES);
	taker_start(&kept, bench.engine, OB_FOREGROUND);
	taker_start(&any, bench.engine, OB_BULK);
	deliver(pop(&bench, 1));
	pthread_join(any.thread, NULL);
	CHECK(any.status == 0 && any.fetch->blob_id == 1);
	deliver(pop(&bench, 0));
	pthread_join(kept.thread, NULL);
	CHECK(kept.status == 0 && kept.fetch->blob_id == 0);
	bench.lent[bench.count++] = any.fetch;
	bench.lent[bench.count++] = kept.fetch;
	bench_close(&bench);
}

struct slow {
	struct parked parked;
	atomic_int settling;
};

/* In the fetch thread, between telling its readers and writing the cache. */
static void on_slow_ready(struct parked *parked, int status)
{
	while (!atomic_load(&((struct slow *)parked)->settling))
		usleep(1000);
	usleep(50000);
}

static void *deliverer_run(void *argument)
{
	deliver(argument);
	return NULL;
}

static void test_settling_waits_for_the_write_under_way(void)
{
	struct bench bench;
	struct slow slow = { .parked.ready = on_slow_ready };
	struct parked *parked = &slow.parked;
	ob_blob_stat stat = { 0 };
	pthread_t thread;

	bench_open(&bench);
	parked_begin(parked, bench.engine);
	blob_want(bench.blobs[0], 0, 1, parked);
	parked_end(parked);
	CHECK(take_all(&bench) == 1);
	pthread_create(&thread, NULL, deliverer_run, pop(&bench, 0));
	while (!stat.fetched_bytes)
		ob_blob_get_stat(bench.blobs[0], &stat);
	CHECK(stat.present_bytes == 0);
	atomic_store(&slow.settling, 1);
	ob_blob_settle(bench.blobs[0]);
	ob_blob_get_stat(bench.blobs[0], &stat);
	CHECK(stat.present_bytes == EXTENT);
	pthread_join(thread, NULL);
	bench_close(&bench);
}

int main(void)
{
	test_settling_waits_for_the_write_under_way();
	test_a_host_gets_its_share_and_leaves_the_rest_to_others();
	test_a_failing_host_gets_few_until_it_delivers();
	test_a_host_that_a_probe_found_well_gets_its_share();
	test_a_host_that_nothing_comes_from_gets_few();
	test_bytes_that_were_not_asked_for_are_heard();
	test_a_blob_that_moves_to_another_host_counts_there();
	test_a_fetch_given_back_wakes_a_thread_for_the_next_that_may_start();
	return 0;
}
