/* SPDX-License-Identifier: Apache-2.0
 * test_kept.c: what could not be written is read from memory, and can be written later. This
 * program's own pwrite() can be told that the disk is full.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cache.h"
#include "memory.h"

enum { EXTENT = OB_EXTENT_SIZE, EXTENTS = 6, SIZE = EXTENTS * EXTENT - 77, TABLE = 4096 };

static ob_engine *engine;
static ob_blob *blob;
static int data_fd;
static atomic_int full;
static uint8_t whole[SIZE];

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
	if (atomic_load(&full)) {
		errno = ENOSPC;
		return -1;
	}
	return syscall(SYS_pwrite64, fd, bytes, length, offset);
}

static void want(uint64_t first, uint64_t count, int priority)
{
	uint64_t end = (first + count) * EXTENT;

	CHECK(ob_blob_prefetch(blob, first * EXTENT, (end < SIZE ? end : SIZE) - first * EXTENT, priority) == 0);
}

static void bring(uint64_t first, uint64_t count)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == 0);
	CHECK(fetch->offset == first * EXTENT && (fetch->length + EXTENT - 1) / EXTENT == count);
	memcpy(fetch->buffer, whole + fetch->offset, fetch->length);
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
}

static void no_more(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == -ETIMEDOUT);
}

/* Extents [first, first + count) have come, and the disk has taken none of them. */
static void open_kept(uint64_t first, uint64_t count)
{
	ob_blob_config config = {.id = 1, .size = SIZE, .table_offset = TABLE, .policy = OB_POLICY_HANG};
	int map_fd = memory_fd("", 0);

	for (uint64_t i = 0; i < SIZE; i++)
		whole[i] = (uint8_t)(i * 2654435761u >> 13);
	engine = memory_engine();
	data_fd = memory_fd("", 0);
	CHECK(ftruncate(data_fd, SIZE) == 0);
	CHECK(ob_blob_open_cached(engine, data_fd, map_fd, &config, &blob) == 0);
	close(map_fd);
	atomic_store(&full, 1);
	want(first, count, OB_BULK);
	bring(first, count);
}

static void close_all(void)
{
	ob_blob_close(blob);
	ob_engine_close(engine);
	close(data_fd);
}

static int readable(uint64_t first, uint64_t count)
{
	static uint8_t bytes[SIZE];
	uint64_t length = (first + count) * EXTENT < SIZE ? count * EXTENT : SIZE - first * EXTENT;
	int status = blob_try_read(blob, first * EXTENT, bytes, length);

	CHECK(status || memcmp(bytes, whole + first * EXTENT, length) == 0);
	return status == 0;
}

static ob_blob_stat stat_of(void)
{
	ob_blob_stat stat;

	ob_blob_get_stat(blob, &stat);
	return stat;
}

static void what_was_kept_is_stored_when_there_is_room_again(void)
{
	static uint8_t bytes[SIZE];

	open_kept(1, 3);
	CHECK(readable(1, 3) && stat_of().present_bytes == 0);
	atomic_store(&full, 0);
	CHECK(ob_blob_store(blob, 0, whole, SIZE) == EXTENTS);
	CHECK(stat_of().present_bytes == SIZE && readable(0, EXTENTS));
	CHECK(pread(data_fd, bytes, SIZE, 0) == SIZE && memcmp(bytes, whole, SIZE) == 0);
	no_more();
	close_all();
}

static void what_cannot_be_stored_either_stays_kept(void)
{
	open_kept(1, 3);
	CHECK(ob_blob_store(blob, EXTENT, whole + EXTENT, SIZE - EXTENT) == -ENOSPC);
	CHECK(readable(1, 3) && stat_of().present_bytes == 0);
	no_more();
	CHECK(ob_blob_store(blob, 0, whole, EXTENT) == -ENOSPC);
	CHECK(!readable(0, 1));
	CHECK(stat_of().write_error == -ENOSPC && stat_of().write_failures == 3);
	close_all();
}

static void who_wants_it_on_disk_has_it_asked_for_anew(void)
{
	open_kept(1, 3);
	want(0, 5, OB_PREFETCH);
	bring(0, 1);
	bring(4, 1);
	no_more();
	CHECK(readable(0, 5));
	atomic_store(&full, 0);
	want(2, 1, OB_BULK);
	bring(2, 1);
	CHECK(stat_of().present_bytes == EXTENT && readable(0, 1) && readable(2, 1) && readable(4, 1));
	want(0, EXTENTS, OB_BULK);
	bring(0, 2);
	bring(3, 3);
	no_more();
	CHECK(stat_of().present_bytes == SIZE && readable(0, EXTENTS));
	CHECK(stat_of().write_failures == 3);
	close_all();
}

/* Its extents are in two buffers then, and go with the second alone. */
static void what_was_rejected_of_it_is_not_taken_away_with_it(void)
{
	open_kept(0, 3);
	CHECK(blob_reject(blob, EXTENT, 1) == 1 && !readable(1, 1));
	want(1, 1, OB_PREFETCH);
	bring(1, 1);
	CHECK(readable(0, 3));
	want(2, 1, OB_BULK);
	bring(2, 1);
	CHECK(readable(1, 2) && !readable(0, 1));
	close_all();
}

int main(void)
{
	what_was_kept_is_stored_when_there_is_room_again();
	what_cannot_be_stored_either_stays_kept();
	who_wants_it_on_disk_has_it_asked_for_anew();
	what_was_rejected_of_it_is_not_taken_away_with_it();
	return 0;
}
