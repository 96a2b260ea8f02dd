/* SPDX-License-Identifier: Apache-2.0
 * test_telling.c: what fetch threads do for readers they tell of bytes that they have yet to write.
 */
#include <pthread.h>
#include <string.h>

#include "cache.h"
#include "memory.h"
#include "parked.h"

enum { EXTENT = OB_EXTENT_SIZE, TELLERS = 2 };

static ob_engine *engine;
static ob_blob *blob;
static pthread_barrier_t all_tell;

/* Waits for its own extent, and finds that of the other one bad. */
struct reader {
	struct parked parked;        /* first: told() casts */
	uint64_t bad;
	ob_fetch *fetch;
	pthread_t thread;
};

static void told(struct parked *parked, int status)
{
	struct reader *reader = (struct reader *)parked;

	CHECK(status == 0);
	pthread_barrier_wait(&all_tell);
	CHECK(blob_reject(blob, reader->bad * EXTENT, 1) == 1);
	pthread_barrier_wait(&all_tell);
}

static void *deliver(void *argument)
{
	struct reader *reader = argument;

	memset(reader->fetch->buffer, 0, reader->fetch->length);
	CHECK(ob_fetch_advance(reader->fetch, reader->fetch->length) == 0);
	CHECK(ob_fetch_finish(reader->fetch, 0, 0) == 0);
	return NULL;
}

/* Each would wait for a write that comes behind what the other one does for its reader. */
static void readers_that_reject_what_each_other_brought_do_not_stop_those_who_brought_it(void)
{
	ob_blob_config config = {.id = 1, .size = 2 * TELLERS * EXTENT, .table_offset = 4096, .policy = OB_POLICY_HANG};
	int data = memory_fd("", 0), map = memory_fd("", 0);
	struct reader readers[TELLERS] = {{{0}}};
	ob_blob_stat stat;

	engine = memory_engine();
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	pthread_barrier_init(&all_tell, NULL, TELLERS);
	for (uint64_t i = 0; i < TELLERS; i++) {
		readers[i].parked.ready = told;
		readers[i].bad = 2 * ((i + 1) % TELLERS);
		parked_begin(&readers[i].parked, engine);
		blob_want(blob, 2 * i * EXTENT, 1, &readers[i].parked);
		parked_end(&readers[i].parked);
		CHECK(ob_fetch_next(engine, OB_BULK, 0, &readers[i].fetch) == 0);
	}
	for (int i = 0; i < TELLERS; i++)
		CHECK(pthread_create(&readers[i].thread, NULL, deliver, &readers[i]) == 0);
	for (int i = 0; i < TELLERS; i++)
		CHECK(pthread_join(readers[i].thread, NULL) == 0);
	ob_blob_get_stat(blob, &stat);
	CHECK(stat.present_bytes == TELLERS * EXTENT);
	pthread_barrier_destroy(&all_tell);
	ob_blob_close(blob);
	ob_engine_close(engine);
	close(data);
	close(map);
}

int main(void)
{
	readers_that_reject_what_each_other_brought_do_not_stop_those_who_brought_it();
	return 0;
}
