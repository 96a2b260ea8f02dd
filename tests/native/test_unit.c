/* SPDX-License-Identifier: Apache-2.0
 * test_unit.c: blobs whose extents are fetched in units: what is asked for, and what is
 * asked for again. One thread plays all parts.
 */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "memory.h"

enum { EXTENT = OB_EXTENT_SIZE, UNIT = 4, EXTENTS = 10, SHORT = 100, SIZE = (EXTENTS - 1) * EXTENT + SHORT };

static ob_engine *engine;
static ob_blob *blob;
static int map;              /* stays open, to be looked at */

static void open_blob(uint32_t readahead)
{
	ob_engine_config threads = {.work_threads = 1, .readahead_extents = readahead, .fetch_bytes = 16 << 20};
	ob_blob_config config = {.id = 1, .size = SIZE, .table_offset = 4096, .policy = OB_POLICY_HANG, .unit = UNIT};
	int data = memory_fd("", 0);

	map = memory_fd("", 0);
	CHECK(ob_engine_open(&threads, &engine) == 0);
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	close(data);
}

static void close_blob(void)
{
	ob_engine_stop(engine);
	ob_blob_close(blob);
	ob_engine_close(engine);
	close(map);
}

static void want(uint64_t first, uint64_t count)
{
	uint64_t end = (first + count) * EXTENT;

	CHECK(ob_blob_prefetch(blob, first * EXTENT, (end < SIZE ? end : SIZE) - first * EXTENT, OB_PREFETCH) == 0);
}

/* The next fetch, which is of extents [first, end), all of `byte`. */
static ob_fetch *next(uint64_t first, uint64_t end, int byte)
{
	uint64_t stop = end * EXTENT < SIZE ? end * EXTENT : SIZE;
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 30000000000, &fetch) == 0);
	CHECK(fetch->offset == first * EXTENT && fetch->length == stop - first * EXTENT);
	memset(fetch->buffer, byte, fetch->length);
	return fetch;
}

static void deliver(ob_fetch *fetch)
{
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
}

static void no_more(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == -ETIMEDOUT);
}

static void store(uint64_t first, uint64_t count, int byte)
{
	static uint8_t bytes[EXTENTS * EXTENT];
	uint64_t end = (first + count) * EXTENT;

	memset(bytes, byte, sizeof(bytes));
	CHECK(ob_blob_store(blob, first * EXTENT, bytes, (end < SIZE ? end : SIZE) - first * EXTENT) == (int64_t)count);
}

static int byte_at(uint64_t extent)
{
	uint8_t byte;

	CHECK(ob_blob_read(blob, extent * EXTENT + SHORT - 1, &byte, 1) == 0);
	return byte;
}

static void what_is_missing_is_asked_for_in_whole_units(void)
{
	open_blob(0);
	want(5, 1);
	deliver(next(4, 8, 1));
	want(9, 1);
	deliver(next(8, 10, 1));
	want(3, 6);
	deliver(next(0, 4, 1));
	no_more();
	close_blob();
}

static void neighbouring_units_travel_together_and_are_asked_for_once(void)
{
	ob_fetch *fetch;

	open_blob(0);
	want(3, 2);
	want(0, 1);
	want(8, 1);
	want(6, 2);
	fetch = next(0, 10, 1);
	want(0, 10);
	no_more();
	deliver(fetch);
	close_blob();
}

static void a_unit_that_is_partly_here_is_asked_for_as_a_whole_and_what_is_here_stays(void)
{
	open_blob(0);
	store(1, 2, 7);
	want(0, 1);
	deliver(next(0, 4, 1));
	CHECK(byte_at(0) == 1 && byte_at(1) == 7 && byte_at(2) == 7 && byte_at(3) == 1);
	CHECK(ob_blob_drop(blob, 2 * EXTENT, EXTENT) == 1);
	want(2, 1);
	deliver(next(0, 4, 2));
	CHECK(byte_at(0) == 1 && byte_at(2) == 2);
	close_blob();
}

static void only_whole_units_at_the_ends_are_let_go(void)
{
	open_blob(0);
	want(0, 10);
	store(0, 5, 7);
	store(9, 1, 7);
	deliver(next(4, 10, 1));
	CHECK(byte_at(4) == 7 && byte_at(5) == 1 && byte_at(9) == 7);
	CHECK(ob_blob_drop(blob, 0, SIZE) == EXTENTS);
	want(0, 10);
	store(8, 2, 7);
	deliver(next(0, 8, 1));
	CHECK(ob_blob_drop(blob, 0, SIZE) == EXTENTS);
	want(0, 10);
	store(0, 10, 7);
	no_more();
	close_blob();
}

/* A wait, so that what failed is tried again: a read of the whole blob by another thread. */
static void *read_whole(void *argument)
{
	static uint8_t bytes[SIZE];

	(void)argument;
	CHECK(ob_blob_read(blob, 0, bytes, SIZE) == 0);
	return NULL;
}

static void what_is_tried_again_begins_with_a_unit(void)
{
	ob_fetch *fetch;
	pthread_t reader;

	open_blob(0);
	CHECK(pthread_create(&reader, NULL, read_whole, NULL) == 0);
	fetch = next(0, 10, 1);
	CHECK(ob_fetch_advance(fetch, UNIT * EXTENT) == 0 && ob_fetch_finish(fetch, -EIO, 1) == 0);
	deliver(next(4, 10, 1));
	CHECK(pthread_join(reader, NULL) == 0);
	close_blob();
}

static void *read_on(void *argument)
{
	(void)argument;
	for (uint64_t extent = 0; extent < EXTENTS; extent++)
		CHECK(byte_at(extent) == 1);
	return NULL;
}

static void a_sequential_reader_gets_ahead_by_units(void)
{
	pthread_t reader;

	open_blob(2);
	CHECK(pthread_create(&reader, NULL, read_on, NULL) == 0);
	deliver(next(0, 4, 1));
	deliver(next(4, 8, 1));
	deliver(next(8, 10, 1));
	CHECK(pthread_join(reader, NULL) == 0);
	no_more();
	close_blob();
}

static void entry(uint64_t extent, uint32_t *out)
{
	*out = 0;
	CHECK(pread(map, out, sizeof(*out), (off_t)(4096 + extent * sizeof(*out))) >= 0);
}

/* Somebody else may have opened the entry, and looked at all that is in it. */
static void nothing_is_written_of_a_blob_that_nobody_uses_any_more(void)
{
	uint32_t before, after;
	ob_fetch *fetch;

	open_blob(0);
	want(0, 8);
	fetch = next(0, 8, 1);
	CHECK(ob_fetch_advance(fetch, UNIT * EXTENT) == 0);
	ob_blob_close(blob);
	blob = NULL;
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
	entry(0, &before);
	entry(UNIT, &after);
	CHECK(before && !after);
	close_blob();
}

static void *read_and_close(void *argument)
{
	CHECK(byte_at(*(uint64_t *)argument) == 1);
	ob_blob_close(blob);
	return NULL;
}

/* It is told before its bytes are written, and can be faster than the write. */
static void what_a_reader_was_given_is_kept_though_he_closes_at_once(void)
{
	for (int round = 0; round < 300; round++) {
		uint64_t extent = 0;
		pthread_t reader;
		uint32_t kept;

		open_blob(0);
		CHECK(pthread_create(&reader, NULL, read_and_close, &extent) == 0);
		deliver(next(0, UNIT, 1));
		CHECK(pthread_join(reader, NULL) == 0);
		blob = NULL;
		entry(extent, &kept);
		CHECK(kept);
		close_blob();
	}
}

static void a_unit_that_is_too_large_is_refused(void)
{
	ob_blob_config config = {.id = 1, .size = SIZE, .table_offset = 4096, .unit = OB_UNIT_MAX + 1};
	int file = memory_fd("", 0);
	ob_blob *none = NULL;

	engine = memory_engine();
	CHECK(ob_blob_open_cached(engine, file, file, &config, &none) == -EINVAL && !none);
	close(file);
	ob_engine_close(engine);
}

int main(void)
{
	what_is_missing_is_asked_for_in_whole_units();
	neighbouring_units_travel_together_and_are_asked_for_once();
	a_unit_that_is_partly_here_is_asked_for_as_a_whole_and_what_is_here_stays();
	only_whole_units_at_the_ends_are_let_go();
	what_is_tried_again_begins_with_a_unit();
	a_sequential_reader_gets_ahead_by_units();
	nothing_is_written_of_a_blob_that_nobody_uses_any_more();
	what_a_reader_was_given_is_kept_though_he_closes_at_once();
	a_unit_that_is_too_large_is_refused();
	return 0;
}
