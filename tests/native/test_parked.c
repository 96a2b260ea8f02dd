/* SPDX-License-Identifier: Apache-2.0
 * test_parked.c: waits whose extents change hands, and since when their source has failed. One thread plays all parts, so every
 * order is the one it says.
 */
#include <errno.h>

#include "cache.h"
#include "engine.h"
#include "memory.h"
#include "parked.h"

enum { EXTENT = OB_EXTENT_SIZE, EXTENTS = 3 };

struct wait {
	struct parked parked;        /* first: waited() casts */
	int over, status;
};

static ob_engine *engine;
static ob_blob *blob;

static void waited(struct parked *parked, int status)
{
	struct wait *wait = (struct wait *)parked;

	CHECK(!wait->over);
	wait->over = 1;
	wait->status = status;
}

static void open_blob(void)
{
	ob_blob_config config = {.id = 1, .size = EXTENTS * EXTENT, .table_offset = 4096, .policy = OB_POLICY_HANG};
	int data = memory_fd("", 0), map = memory_fd("", 0);

	engine = memory_engine();
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	close(data);
	close(map);
}

static void close_blob(void)
{
	ob_blob_close(blob);
	ob_engine_close(engine);
}

static void begin(struct wait *wait, uint64_t first, uint64_t count)
{
	*wait = (struct wait){.parked = {.ready = waited}};
	parked_begin(&wait->parked, engine);
	blob_want(blob, first * EXTENT, count * EXTENT, &wait->parked);
	parked_end(&wait->parked);
}

static ob_fetch *next(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == 0);
	return fetch;
}

static void deliver(ob_fetch *fetch)
{
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
}

/* Found by fuzz_presence: the wait stayed on a list of the fetch that was gone. */
static void a_wait_ends_with_its_fetch_though_another_has_part_of_it(void)
{
	struct wait all, one;
	ob_fetch *whole, *again;

	open_blob();
	begin(&all, 0, EXTENTS);
	whole = next();
	CHECK(ob_fetch_advance(whole, 2 * EXTENT) == 0);
	CHECK(blob_reject(blob, EXTENT, EXTENT) == 1);
	begin(&one, 1, 1);
	CHECK(ob_fetch_advance(whole, whole->length) == 0);
	CHECK(ob_fetch_finish(whole, 0, 0) == 0);
	CHECK(all.over && all.status == 0 && !one.over);
	again = next();
	CHECK(again->offset == EXTENT && again->length == EXTENT);
	begin(&all, 0, EXTENTS);
	CHECK(!all.over);
	deliver(again);
	CHECK(all.over && all.status == 0 && one.over && one.status == 0);
	close_blob();
}

/* What a failed fetch leaves is one queued fetch again, and its wait moves with it. */
static void a_wait_moves_with_what_is_tried_again(void)
{
	struct wait all;
	ob_fetch *fetch;

	open_blob();
	begin(&all, 0, EXTENTS);
	fetch = next();
	CHECK(ob_fetch_advance(fetch, EXTENT) == 0);
	CHECK(ob_fetch_finish(fetch, -EIO, 1) == 0);
	CHECK(!all.over);
	CHECK(ob_fetch_next(engine, OB_BULK, 30000000000, &fetch) == 0);
	CHECK(fetch->offset == EXTENT && fetch->length == 2 * EXTENT && fetch->attempt == 1);
	deliver(fetch);
	CHECK(all.over && all.status == 0);
	close_blob();
}

static int64_t failing_ns(void)
{
	ob_blob_stat stat;

	ob_blob_get_stat(blob, &stat);
	CHECK(!stat.down);
	return stat.failing_ns;
}

/* A prefetch of one extent, which nobody waits for. */
static void ask(uint64_t extent)
{
	CHECK(ob_blob_prefetch(blob, extent * EXTENT, EXTENT, OB_PREFETCH) == 0);
}

static void fail(ob_fetch *fetch)
{
	CHECK(ob_fetch_finish(fetch, -EIO, 0) == 0);
}

static void open_failing(int64_t policy_ns)
{
	open_blob();
	CHECK(ob_blob_set_policy(blob, OB_POLICY_EIO, (uint64_t)policy_ns) == 0);
	ask(0);
	fail(next());
	CHECK(failing_ns() > 0);
}

static void a_failure_that_nothing_was_fetched_after_is_not_held_against_the_next_reader(void)
{
	const int64_t policy_ns = 100000000;
	struct wait wait;

	open_failing(policy_ns);
	while (failing_ns() <= 2 * policy_ns)
		usleep(1000);
	begin(&wait, 1, 1);
	CHECK(failing_ns() == 0);
	close_blob();
}

static void a_source_that_fails_whatever_is_asked_of_it_has_failed_since_the_first_time(void)
{
	const int64_t policy_ns = 3600000000000;
	ob_fetch *lent;

	open_failing(policy_ns);
	ask(0);
	CHECK(failing_ns() > 0);
	lent = next();
	CHECK(ob_blob_set_policy(blob, OB_POLICY_EIO, 1) == 0);
	ask(2);
	CHECK(failing_ns() > 0);
	CHECK(ob_blob_set_policy(blob, OB_POLICY_EIO, (uint64_t)policy_ns) == 0);
	fail(lent);
	fail(next());
	CHECK(failing_ns() > 0);
	close_blob();
}

static void what_is_given_up_is_no_failure_of_the_source(void)
{
	ob_event event;
	struct wait wait;

	open_blob();
	begin(&wait, 0, 1);
	CHECK(ob_fetch_finish(next(), -ESHUTDOWN, 1) == 0);
	CHECK(wait.over && wait.status == -EIO);
	CHECK(failing_ns() == 0 && ob_event_next(engine, &event) == 0 && !engine->fetch.hosts[0].failing);
	close_blob();
}

int main(void)
{
	a_wait_ends_with_its_fetch_though_another_has_part_of_it();
	a_wait_moves_with_what_is_tried_again();
	a_failure_that_nothing_was_fetched_after_is_not_held_against_the_next_reader();
	a_source_that_fails_whatever_is_asked_of_it_has_failed_since_the_first_time();
	what_is_given_up_is_no_failure_of_the_source();
	return 0;
}
