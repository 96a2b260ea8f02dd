/* SPDX-License-Identifier: Apache-2.0
 * test_cache.c: cached blobs under fetch threads of our own: single flight, waking,
 * policy, rot, rejection, full disks, and reopening.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cache.h"
#include "check.h"
#include "crc32c.h"
#include "engine.h"
#include "random.h"

enum { EXTENT = OB_EXTENT_SIZE, SEAL = 508, TABLE = 4096, SOURCES = 3 };

static const uint64_t PATIENT_NS = 30000000000, SHORT_NS = 300000000;

/* The content of the source: any byte from its offset. */
static uint8_t source_byte(uint64_t offset)
{
	return (uint8_t)((offset * 2654435761u) >> 13);
}

struct source {
	ob_engine *engine;
	uint64_t size;
	_Atomic uint32_t *asked;      /* how often each extent was requested */
	atomic_int fail;              /* errno to answer with, while not 0 */
	atomic_int hold;              /* take fetches, answer none */
	atomic_int corrupt;           /* wrong bytes in that many answers */
	atomic_int fetches;
	atomic_int piecewise;
	int64_t retry_ns;
	pthread_t threads[SOURCES];
};

static void source_answer(struct source *source, ob_fetch *fetch)
{
	uint8_t *buffer = fetch->buffer;
	int bad = atomic_load(&source->corrupt) > 0 && atomic_fetch_sub(&source->corrupt, 1) > 0;

	atomic_fetch_add(&source->fetches, 1);
	for (uint64_t i = 0; i * EXTENT < fetch->length; i++)
		atomic_fetch_add(&source->asked[fetch->offset / EXTENT + i], 1);
	for (uint64_t i = 0; i < fetch->length; i++)
		buffer[i] = (uint8_t)(source_byte(fetch->offset + i) ^ bad);
	for (uint64_t filled = 0; atomic_load(&source->piecewise) && filled < fetch->length; filled += 40000)
		CHECK(ob_fetch_advance(fetch, filled) == 0);
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
	CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
}

static void *source_run(void *argument)
{
	struct source *source = argument;

	for (;;) {
		ob_fetch *fetch;
		int status = ob_fetch_next(source->engine, OB_BULK, 20000000, &fetch);

		if (status == -ESHUTDOWN)
			return NULL;
		if (status == -ETIMEDOUT)
			continue;
		CHECK(status == 0);
		while (atomic_load(&source->hold))
			usleep(1000);
		if (atomic_load(&source->fail))
			CHECK(ob_fetch_finish(fetch, -atomic_load(&source->fail), source->retry_ns) == 0);
		else
			source_answer(source, fetch);
	}
}

struct bench {
	struct source source;
	ob_blob *blob;
	int data_fd, map_fd;
	ob_blob_config config;
};

static void bench_open(struct bench *bench, uint64_t size, uint32_t readahead)
{
	ob_engine_config config = { .work_threads = 2, .readahead_extents = readahead, .fetch_bytes = 8 << 20 };
	struct source *source = &bench->source;

	memset(bench, 0, sizeof(*bench));
	bench->data_fd = memfd_create("data", 0);
	bench->map_fd = memfd_create("map", 0);
	CHECK(ftruncate(bench->data_fd, (off_t)size) == 0);
	CHECK(ob_engine_open(&config, &source->engine) == 0);
	source->size = size;
	source->asked = calloc(size / EXTENT + 1, sizeof(*source->asked));
	bench->config = (ob_blob_config){ .id = 7, .size = size, .table_offset = TABLE, .seal_offset = SEAL,
	                                  .policy = OB_POLICY_EIO, .policy_ns = PATIENT_NS };
	CHECK(ob_blob_open_cached(source->engine, bench->data_fd, bench->map_fd, &bench->config, &bench->blob) == 0);
	for (int i = 0; i < SOURCES; i++)
		pthread_create(&source->threads[i], NULL, source_run, source);
}

static void bench_reopen_blob(struct bench *bench)
{
	ob_blob_close(bench->blob);
	CHECK(ob_blob_open_cached(bench->source.engine, bench->data_fd, bench->map_fd, &bench->config, &bench->blob) == 0);
}

static void bench_close(struct bench *bench)
{
	atomic_store(&bench->source.hold, 0);
	ob_engine_stop(bench->source.engine);
	for (int i = 0; i < SOURCES; i++)
		pthread_join(bench->source.threads[i], NULL);
	ob_blob_close(bench->blob);
	ob_engine_close(bench->source.engine);
	free((void *)bench->source.asked);
	close(bench->data_fd);
	close(bench->map_fd);
}

static void check_read(ob_blob *blob, uint64_t offset, uint64_t length)
{
	uint8_t *buffer = malloc(length);

	CHECK(ob_blob_read(blob, offset, buffer, length) == 0);
	for (uint64_t i = 0; i < length; i++)
		CHECK(buffer[i] == source_byte(offset + i));
	free(buffer);
}

static ob_event next_event(ob_engine *engine, int kind)
{
	ob_event event = { 0 };

	for (int tries = 0; tries < 5000; tries++) {
		if (ob_event_next(engine, &event) == 1 && event.kind == kind)
			return event;
		usleep(1000);
	}
	CHECK(!"the event came");
	return event;
}

static void test_fills_and_stays(void)
{
	struct bench bench;
	ob_blob_stat stat;
	uint64_t size = 5 * EXTENT + 123;

	bench_open(&bench, size, 0);
	check_read(bench.blob, EXTENT - 10, 20);
	check_read(bench.blob, size - 5, 5);
	check_read(bench.blob, 0, size);
	CHECK(next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE).id == 7);
	ob_blob_get_stat(bench.blob, &stat);
	CHECK(stat.present_bytes == size && stat.fetched_bytes == size);
	for (int i = 0; i < 6; i++)
		CHECK(bench.source.asked[i] == 1);
	bench_reopen_blob(&bench);
	check_read(bench.blob, 0, size);
	for (int i = 0; i < 6; i++)
		CHECK(bench.source.asked[i] == 1);
	CHECK(ob_blob_read(bench.blob, size, &stat, 1) == -EINVAL);
	bench_close(&bench);
}

struct reader {
	struct bench *bench;
	uint32_t seed;
	_Atomic uint8_t *touched;     /* by random readers: extents */
};

static void *reader_run(void *argument)
{
	struct reader *reader = argument;

	for (int i = 0; i < 200; i++) {
		reader->seed = reader->seed * 1664525 + 1013904223;
		uint64_t length = 1 + (reader->seed >> 8) % 200000;
		uint64_t offset = (reader->seed >> 4) % (reader->bench->source.size - length);

		check_read(reader->bench->blob, offset, length);
	}
	return NULL;
}

static void test_single_flight(void)
{
	enum { READERS = 16 };
	struct bench bench;
	struct reader readers[READERS];
	pthread_t threads[READERS];

	bench_open(&bench, 300 * EXTENT + 1, 16);
	atomic_store(&bench.source.piecewise, 1);
	for (int i = 0; i < READERS; i++) {
		readers[i] = (struct reader){ &bench, (uint32_t)i * 77777 + 1, NULL };
		pthread_create(&threads[i], NULL, reader_run, &readers[i]);
	}
	for (int i = 0; i < READERS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i <= 300; i++)
		CHECK(bench.source.asked[i] <= 1);
	bench_close(&bench);
}

static void *random_run(void *argument)
{
	struct reader *reader = argument;
	uint64_t state = reader->seed, extents = reader->bench->source.size / EXTENT;

	for (int i = 0; i < 40; i++) {
		uint64_t extent = random_below(&state, extents);

		atomic_store(&reader->touched[extent], 1);
		check_read(reader->bench->blob, extent * EXTENT + random_below(&state, EXTENT - 4096), 4096);
	}
	return NULL;
}

static void test_many_random_readers_ask_for_each_extent_once_and_for_no_other(void)
{
	enum { READERS = 64, EXTENTS = 400 };
	static _Atomic uint8_t touched[EXTENTS];
	struct bench bench;
	struct reader readers[READERS];
	pthread_t threads[READERS];
	int distinct = 0;

	bench_open(&bench, EXTENTS * (uint64_t)EXTENT, 0);
	for (int i = 0; i < READERS; i++) {
		readers[i] = (struct reader){ &bench, (uint32_t)i, touched };
		pthread_create(&threads[i], NULL, random_run, &readers[i]);
	}
	for (int i = 0; i < READERS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < EXTENTS; i++) {
		CHECK(bench.source.asked[i] == touched[i]);
		distinct += touched[i];
	}
	CHECK(bench.source.fetches <= distinct);
	bench_close(&bench);
}

static void *sequence_run(void *argument)
{
	struct reader *reader = argument;
	uint64_t piece = 40000 + reader->seed * 9000;

	for (uint64_t offset = 0; offset + piece <= reader->bench->source.size; offset += piece)
		check_read(reader->bench->blob, offset, piece);
	return NULL;
}

static void test_a_pull_and_two_readers_ask_for_each_extent_once(void)
{
	enum { READERS = 2, EXTENTS = 150 };
	struct bench bench;
	struct reader readers[READERS];
	pthread_t threads[READERS];
	uint64_t size = EXTENTS * (uint64_t)EXTENT - 5;

	bench_open(&bench, size, 512);
	atomic_store(&bench.source.piecewise, 1);
	for (int i = 0; i < READERS; i++) {
		readers[i] = (struct reader){ &bench, (uint32_t)i, NULL };
		pthread_create(&threads[i], NULL, sequence_run, &readers[i]);
	}
	CHECK(ob_blob_prefetch(bench.blob, 0, size, OB_BULK) == 0);
	for (int i = 0; i < READERS; i++)
		pthread_join(threads[i], NULL);
	CHECK(next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE).id == 7);
	for (int i = 0; i < EXTENTS; i++)
		CHECK(bench.source.asked[i] == 1);
	bench_close(&bench);
}

static void test_sequential_reader_gets_large_fetches(void)
{
	struct bench bench;

	bench_open(&bench, 1024 * EXTENT, 64);
	for (uint64_t offset = 0; offset < 1024 * (uint64_t)EXTENT; offset += EXTENT / 2)
		check_read(bench.blob, offset, EXTENT / 2);
	CHECK(bench.source.fetches <= 80);
	bench_close(&bench);
}

static void test_random_reader_gets_no_more_than_it_asked(void)
{
	struct bench bench;
	uint32_t seed = 5, asked = 0;

	bench_open(&bench, 1024 * EXTENT, 64);
	for (int i = 0; i < 50; i++) {
		seed = seed * 1664525 + 1013904223;
		check_read(bench.blob, (uint64_t)((seed >> 8) % 100 * 10) * EXTENT, 4096);
	}
	for (int i = 0; i < 1024; i++) {
		CHECK(i % 10 == 0 || bench.source.asked[i] == 0);
		asked += bench.source.asked[i];
	}
	CHECK(asked <= 50);
	bench_close(&bench);
}

static void *first_byte_run(void *argument)
{
	struct bench *bench = argument;

	check_read(bench->blob, 0, 1);
	return NULL;
}

static void test_an_extent_missed_by_two_readers_is_no_stream(void)
{
	struct bench bench;
	ob_blob_stat stat = { 0 };
	pthread_t threads[2];

	bench_open(&bench, 64 * EXTENT, 64);
	atomic_store(&bench.source.hold, 1);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, first_byte_run, &bench);
	while (stat.misses < 2) {
		usleep(1000);
		ob_blob_get_stat(bench.blob, &stat);
	}
	atomic_store(&bench.source.hold, 0);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	ob_blob_get_stat(bench.blob, &stat);
	CHECK(stat.fetches == 1 && stat.fetched_bytes == EXTENT);
	bench_close(&bench);
}

static void test_rot_on_disk_is_found_and_fetched_again(void)
{
	struct bench bench;
	uint8_t byte;

	bench_open(&bench, 4 * EXTENT, 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE);
	ob_blob_close(bench.blob);
	CHECK(pread(bench.data_fd, &byte, 1, EXTENT + 77) == 1);
	byte ^= 4;
	CHECK(pwrite(bench.data_fd, &byte, 1, EXTENT + 77) == 1);
	CHECK(ob_blob_open_cached(bench.source.engine, bench.data_fd, bench.map_fd, &bench.config, &bench.blob) == 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	CHECK(bench.source.asked[0] == 1 && bench.source.asked[1] == 2 && bench.source.asked[2] == 1);
	bench_close(&bench);
}

static void test_what_the_disk_lost_is_fetched_again(void)
{
	struct bench bench;

	bench_open(&bench, 3 * EXTENT, 0);
	check_read(bench.blob, 0, 3 * EXTENT);
	next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE); /* from here on it is read from the disk */
	CHECK(ftruncate(bench.data_fd, EXTENT) == 0);
	check_read(bench.blob, 0, 3 * EXTENT);
	CHECK(atomic_load(&bench.source.asked[0]) == 1);
	CHECK(atomic_load(&bench.source.asked[1]) == 2);
	CHECK(atomic_load(&bench.source.asked[2]) == 2);
	bench_close(&bench);
}

static void seal(const struct bench *bench)
{
	const uint32_t word = 0x5ea1ed;

	CHECK(pwrite(bench->map_fd, &word, sizeof(word), SEAL) == sizeof(word));
}

static uint32_t seal_of(const struct bench *bench)
{
	uint32_t word;

	CHECK(pread(bench->map_fd, &word, sizeof(word), SEAL) == sizeof(word));
	return word;
}

static uint64_t retired(const struct bench *bench)
{
	ob_blob_stat stat;

	ob_blob_get_stat(bench->blob, &stat);
	return stat.retired;
}

static void test_whatever_takes_an_extent_away_breaks_the_seal_first(void)
{
	struct bench bench;
	uint8_t byte = 0xff;

	bench_open(&bench, 4 * EXTENT, 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE);
	seal(&bench);
	check_read(bench.blob, 0, 4 * EXTENT);
	CHECK(seal_of(&bench) && retired(&bench) == 0);
	CHECK(ob_blob_drop(bench.blob, EXTENT, EXTENT) == 1);
	CHECK(!seal_of(&bench) && retired(&bench) == 1);
	check_read(bench.blob, 0, 4 * EXTENT);
	seal(&bench);
	CHECK(blob_reject(bench.blob, 10, 1) == 1);
	CHECK(!seal_of(&bench) && retired(&bench) == 2);
	check_read(bench.blob, 0, 4 * EXTENT);
	next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE);
	seal(&bench);
	ob_blob_close(bench.blob);
	CHECK(pwrite(bench.data_fd, &byte, 1, 2 * EXTENT + 77) == 1);
	CHECK(ob_blob_open_cached(bench.source.engine, bench.data_fd, bench.map_fd, &bench.config, &bench.blob) == 0);
	check_read(bench.blob, 0, EXTENT);
	CHECK(seal_of(&bench) && retired(&bench) == 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	CHECK(!seal_of(&bench) && retired(&bench) == 1);
	bench_close(&bench);
}

static void test_a_seal_that_cannot_be_broken_keeps_the_cache_as_it_is(void)
{
	struct bench bench;
	char path[64];
	uint8_t before[EXTENT], after[EXTENT], byte = 0xff;
	int writable;

	bench_open(&bench, 4 * EXTENT, 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	next_event(bench.source.engine, OB_EVENT_BLOB_COMPLETE);
	seal(&bench);
	ob_blob_close(bench.blob);
	CHECK(pwrite(bench.data_fd, &byte, 1, 77) == 1 && pread(bench.data_fd, before, EXTENT, 0) == EXTENT);
	writable = bench.map_fd;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", writable);
	bench.map_fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(bench.map_fd >= 0);
	CHECK(ob_blob_open_cached(bench.source.engine, bench.data_fd, bench.map_fd, &bench.config, &bench.blob) == 0);
	check_read(bench.blob, 0, 4 * EXTENT);
	check_read(bench.blob, 0, EXTENT);
	CHECK(next_event(bench.source.engine, OB_EVENT_CACHE_WRITE).status == -EROFS);
	CHECK(seal_of(&bench) && retired(&bench) == 1);
	CHECK(pread(bench.data_fd, after, EXTENT, 0) == EXTENT && memcmp(before, after, EXTENT) == 0);
	bench_close(&bench);
	close(writable);
}

/* /dev/null takes the zero, and refuses the sync. */
static void test_a_broken_seal_has_to_be_synced(void)
{
	struct bench bench;
	uint8_t *whole = malloc(2 * EXTENT);
	int map_fd;

	for (uint64_t i = 0; i < 2 * EXTENT; i++)
		whole[i] = source_byte(i);
	bench_open(&bench, 2 * EXTENT, 0);
	ob_blob_close(bench.blob);
	map_fd = bench.map_fd;
	bench.map_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	CHECK(ob_blob_open_cached(bench.source.engine, bench.data_fd, bench.map_fd, &bench.config, &bench.blob) == 0);
	CHECK(ob_blob_store(bench.blob, 0, whole, EXTENT) == 1);
	CHECK(ob_blob_drop(bench.blob, 0, EXTENT) == 1);
	CHECK(ob_blob_store(bench.blob, 0, whole, EXTENT) == -EROFS);
	CHECK(ob_blob_store(bench.blob, EXTENT, whole + EXTENT, EXTENT) == -EROFS);
	check_read(bench.blob, 0, 2 * EXTENT);
	bench_close(&bench);
	close(map_fd);
	free(whole);
}

static void test_rejected_content_is_fetched_once_more(void)
{
	struct bench bench;
	uint8_t byte;

	bench_open(&bench, 4 * EXTENT, 0);
	atomic_store(&bench.source.corrupt, 1);
	CHECK(ob_blob_read(bench.blob, 10, &byte, 1) == 0 && byte != source_byte(10));
	CHECK(blob_reject(bench.blob, 10, 1) == 1);
	check_read(bench.blob, 10, 100);
	CHECK(bench.source.asked[0] == 2);
	CHECK(blob_reject(bench.blob, 10, 1) == 0);
	CHECK(bench.source.asked[0] == 2);
	bench_close(&bench);
}

static void test_eio_policy_runs_from_first_failure_then_fails_at_once(void)
{
	struct bench bench;
	uint8_t byte;
	int64_t start = engine_now();

	bench_open(&bench, 16 * EXTENT, 0);
	bench.source.retry_ns = 10000000;
	CHECK(ob_blob_set_policy(bench.blob, OB_POLICY_EIO, SHORT_NS) == 0);
	check_read(bench.blob, 0, 10);
	atomic_store(&bench.source.fail, EIO);
	CHECK(ob_blob_read(bench.blob, 5 * EXTENT, &byte, 1) == -EIO);
	CHECK(engine_now() - start >= 290000000);
	next_event(bench.source.engine, OB_EVENT_BLOB_DOWN);
	start = engine_now();
	for (int i = 0; i < 100; i++)
		CHECK(ob_blob_read(bench.blob, 6 * EXTENT, &byte, 1) == -EIO);
	CHECK(engine_now() - start < 200000000);
	check_read(bench.blob, 0, 10);
	atomic_store(&bench.source.fail, 0);
	ob_blob_healthy(bench.blob);
	check_read(bench.blob, 5 * EXTENT, 10);
	bench_close(&bench);
}

static void test_a_stuck_source_cannot_stall_a_reader(void)
{
	struct bench bench;
	uint8_t byte;
	int64_t start = engine_now();

	bench_open(&bench, 16 * EXTENT, 0);
	CHECK(ob_blob_set_policy(bench.blob, OB_POLICY_EIO, SHORT_NS) == 0);
	atomic_store(&bench.source.hold, 1);
	CHECK(ob_blob_read(bench.blob, 0, &byte, 1) == -EIO);
	CHECK(engine_now() - start < 3000000000);
	bench_close(&bench);
}

static void test_failures_within_the_policy_are_not_seen(void)
{
	struct bench bench;

	bench_open(&bench, 16 * EXTENT, 0);
	bench.source.retry_ns = 5000000;
	CHECK(ob_blob_set_policy(bench.blob, OB_POLICY_HANG, 0) == 0);
	atomic_store(&bench.source.fail, EIO);
	pthread_t thread;
	struct reader reader = { &bench, 3 };
	pthread_create(&thread, NULL, reader_run, &reader);
	next_event(bench.source.engine, OB_EVENT_BLOB_FAILING);
	atomic_store(&bench.source.fail, 0);
	pthread_join(thread, NULL);
	bench_close(&bench);
}

/* A pipe cannot be written at an offset: each cache write fails, as on a full disk. */
static void test_reads_go_on_when_the_cache_cannot_be_written(void)
{
	struct bench bench;
	int pipes[2];

	bench_open(&bench, 40 * EXTENT, 4);
	ob_blob_close(bench.blob);
	CHECK(pipe(pipes) == 0);
	CHECK(ob_blob_open_cached(bench.source.engine, pipes[1], bench.map_fd, &bench.config, &bench.blob) == 0);
	check_read(bench.blob, 0, 40 * EXTENT);
	check_read(bench.blob, 0, 100);
	CHECK(next_event(bench.source.engine, OB_EVENT_CACHE_WRITE).status < 0);
	bench_close(&bench);
	close(pipes[0]);
	close(pipes[1]);
}

static void test_store_wakes_waiters_and_fills_the_cache(void)
{
	struct bench bench;
	uint8_t *whole = malloc(8 * EXTENT);

	for (uint64_t i = 0; i < 8 * EXTENT; i++)
		whole[i] = source_byte(i);
	bench_open(&bench, 8 * EXTENT, 0);
	atomic_store(&bench.source.hold, 1);
	pthread_t thread;
	struct reader reader = { &bench, 3 };
	pthread_create(&thread, NULL, reader_run, &reader);
	CHECK(ob_blob_store(bench.blob, 5, whole + 5, 8 * EXTENT - 5) == 7);
	CHECK(ob_blob_store(bench.blob, 0, whole, EXTENT) == 1);
	pthread_join(thread, NULL);
	CHECK(bench.source.fetches == 0);
	CHECK(ob_blob_drop(bench.blob, EXTENT, 2 * EXTENT + 5) == 2);
	atomic_store(&bench.source.hold, 0);
	check_read(bench.blob, 0, 8 * EXTENT);
	CHECK(bench.source.asked[1] >= 1 && bench.source.asked[3] <= 1);
	free(whole);
	bench_close(&bench);
}

static void test_stop_sends_everybody_home(void)
{
	struct bench bench;
	uint8_t byte;

	bench_open(&bench, 8 * EXTENT, 0);
	ob_engine_stop(bench.source.engine);
	CHECK(ob_blob_read(bench.blob, 0, &byte, 1) == -ESHUTDOWN);
	bench_close(&bench);
}

int main(void)
{
	test_fills_and_stays();
	test_single_flight();
	test_many_random_readers_ask_for_each_extent_once_and_for_no_other();
	test_a_pull_and_two_readers_ask_for_each_extent_once();
	test_sequential_reader_gets_large_fetches();
	test_random_reader_gets_no_more_than_it_asked();
	test_an_extent_missed_by_two_readers_is_no_stream();
	test_rot_on_disk_is_found_and_fetched_again();
	test_what_the_disk_lost_is_fetched_again();
	test_whatever_takes_an_extent_away_breaks_the_seal_first();
	test_a_seal_that_cannot_be_broken_keeps_the_cache_as_it_is();
	test_a_broken_seal_has_to_be_synced();
	test_rejected_content_is_fetched_once_more();
	test_eio_policy_runs_from_first_failure_then_fails_at_once();
	test_a_stuck_source_cannot_stall_a_reader();
	test_failures_within_the_policy_are_not_seen();
	test_reads_go_on_when_the_cache_cannot_be_written();
	test_store_wakes_waiters_and_fills_the_cache();
	test_stop_sends_everybody_home();
	return 0;
}
