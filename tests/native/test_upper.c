/* SPDX-License-Identifier: Apache-2.0
 * test_upper.c: the writable layer against an array of bytes, over a layer below; and what
 * is left of it when it was not flushed, or its files are torn.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "memory.h"
#include "random.h"
#include "segment.h"

enum {
	PAGE = 1024 * SECTOR,              /* of the map */
	DISK = 5 * PAGE + 7 * SECTOR,      /* the last page is a short one */
	LOWER = 3 * PAGE / 2,              /* what the layer below holds; the rest is a hole */
	HEAD = 4096,
	ROUNDS = 3000
};

struct stand {
	ob_engine *engine;
	ob_image *image;
	int data, index;
};

static uint8_t lower[LOWER], model[DISK], found[DISK];

/* Open the pair over the layer below. */
static int stand_open(struct stand *stand)
{
	ob_layer layer = { .kind = OB_LAYER_FLAT };
	int status;

	layer.file = layer.index = memory_file(stand->engine, lower, sizeof(lower));
	CHECK(ob_image_open(stand->engine, &layer, 1, DISK, &stand->image) == 0);
	ob_file_close(layer.file);
	status = ob_image_open_upper(stand->image, stand->data, stand->index);
	if (status)
		ob_image_close(stand->image);
	return status;
}

static void stand_new(struct stand *stand)
{
	static const uint8_t head[HEAD];

	stand->engine = memory_engine();
	stand->data = memory_fd(head, sizeof(head));
	stand->index = memory_fd(head, sizeof(head));
	for (size_t i = 0; i < sizeof(lower); i++)
		lower[i] = (uint8_t)(i * 2654435761u >> 11);
	memset(model, 0, sizeof(model));
	memcpy(model, lower, sizeof(lower));
	CHECK(stand_open(stand) == 0);
}

static void stand_reopen(struct stand *stand)
{
	ob_image_close(stand->image);
	CHECK(stand_open(stand) == 0);
}

static void stand_free(struct stand *stand)
{
	ob_image_close(stand->image);
	ob_engine_close(stand->engine);
	close(stand->data);
	close(stand->index);
}

static void expect_model(struct stand *stand)
{
	CHECK(ob_image_read(stand->image, 0, found, DISK) == 0);
	for (size_t i = 0; i < DISK; i++)
		if (found[i] != model[i])
			fprintf(stderr, "byte %zu: %u, not %u\n", i, found[i], model[i]), exit(1);
}

/* A change anywhere, mostly of whole sectors, now and then of whole pages of the map. */
static void change(struct stand *stand, uint64_t *random, uint8_t fill)
{
	uint64_t unit = random_below(random, 8) == 0 ? PAGE : random_below(random, 6) == 0 ? 1 : SECTOR;
	uint64_t offset = random_below(random, DISK / unit) * unit;
	uint64_t length = (1 + random_below(random, unit == PAGE ? 3 : 40)) * unit;
	static uint8_t buffer[DISK];

	if (length > DISK - offset)
		length = DISK - offset;
	if (random_below(random, 3)) {
		for (uint64_t i = 0; i < length; i++)
			buffer[i] = (uint8_t)(fill + i / 7);
		CHECK(ob_image_write(stand->image, offset, buffer, length) == 0);
		memcpy(model + offset, buffer, length);
	} else {
		CHECK(ob_image_zero(stand->image, offset, length) == 0);
		memset(model + offset, 0, length);
	}
}

static void test_random_changes_equal_an_array(void)
{
	uint64_t random = 7;
	struct stand stand;

	stand_new(&stand);
	for (int i = 0; i < ROUNDS; i++) {
		change(&stand, &random, (uint8_t)i);
		if (i % 300 == 0) {
			expect_model(&stand);
			CHECK(ob_image_flush(stand.image) == 0);
			stand_reopen(&stand);
			expect_model(&stand);
		}
	}
	expect_model(&stand);
	stand_free(&stand);
}

static void test_what_was_not_flushed_is_as_if_never_written(void)
{
	uint8_t sector[SECTOR];
	struct stand stand;

	stand_new(&stand);
	memset(sector, 0xab, sizeof(sector));
	CHECK(ob_image_write(stand.image, 4 * SECTOR, sector, SECTOR) == 0);
	CHECK(ob_image_flush(stand.image) == 0);
	memcpy(model + 4 * SECTOR, sector, SECTOR);
	CHECK(ob_image_write(stand.image, 5 * SECTOR, sector, SECTOR) == 0);
	CHECK(ob_image_zero(stand.image, 0, SECTOR) == 0);
	stand_reopen(&stand);
	expect_model(&stand);
	CHECK(lseek(stand.index, 0, SEEK_END) == HEAD + 16);
	stand_free(&stand);
}

/* More records than are kept in memory. */
static void test_many_records_are_flushed_on_their_way(void)
{
	uint8_t sector[SECTOR] = { 1 };
	struct stand stand;

	stand_new(&stand);
	for (int i = 0; i < 5000; i++)
		CHECK(ob_image_write(stand.image, (uint64_t)(i % 50) * SECTOR, sector, SECTOR) == 0);
	CHECK(lseek(stand.index, 0, SEEK_END) == HEAD + 16 * 4096);
	stand_free(&stand);
}

static void test_torn_tails_cost_only_themselves(void)
{
	uint8_t sector[SECTOR];
	struct stand stand;

	stand_new(&stand);
	memset(sector, 0x5a, sizeof(sector));
	CHECK(ob_image_write(stand.image, 9 * SECTOR, sector, SECTOR) == 0 && ob_image_flush(stand.image) == 0);
	memcpy(model + 9 * SECTOR, sector, SECTOR);
	/* A record of zeros, half a record, and bytes of data that nothing points at. */
	CHECK(pwrite(stand.index, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\5\0\0\0\0\0\4", 23, HEAD + 16) == 23);
	CHECK(pwrite(stand.data, "torn", 4, HEAD + SECTOR) == 4);
	stand_reopen(&stand);
	expect_model(&stand);
	CHECK(ob_image_write(stand.image, 2 * SECTOR, sector, SECTOR) == 0);
	CHECK(ob_image_zero(stand.image, 9 * SECTOR, SECTOR) == 0 && ob_image_flush(stand.image) == 0);
	memcpy(model + 2 * SECTOR, sector, SECTOR);
	memset(model + 9 * SECTOR, 0, SECTOR);
	stand_reopen(&stand);
	expect_model(&stand);
	stand_free(&stand);
}

static void expect_refused(struct stand *stand, uint64_t lo, uint64_t hi)
{
	struct segment entry = { lo, hi };

	CHECK(pwrite(stand->index, &entry, sizeof(entry), HEAD) == sizeof(entry));
	ob_image_close(stand->image);
	CHECK(stand_open(stand) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "index entry 0"));
	CHECK(ftruncate(stand->index, HEAD) == 0);
	CHECK(stand_open(stand) == 0);
}

static void test_entries_that_point_nowhere_are_refused(void)
{
	struct stand stand;

	stand_new(&stand);
	expect_refused(&stand, 0 | 1ull << 50, 7);                       /* into the head */
	expect_refused(&stand, 0 | 1ull << 50, 8);                       /* past the end */
	expect_refused(&stand, 0 | 1ull << 50, 9 | ZEROED);
	expect_refused(&stand, 0 | 1ull << 50, MOFFSET_MASK);
	expect_refused(&stand, (OFFSET_MASK - 1) | 16383ull << 50, 8 | ZEROED);
	stand_free(&stand);
}

static void test_entries_of_more_than_there_is_are_refused(void)
{
	struct segment entries[2] = { { 0 | 1ull << 50, 8 }, { 10 | 9ull << 50, 8 } };
	uint8_t sectors[9 * SECTOR] = { 0 };
	struct stand stand;

	stand_new(&stand);
	CHECK(ob_image_write(stand.image, 0, sectors, sizeof(sectors)) == 0);
	CHECK(pwrite(stand.index, entries, sizeof(entries), HEAD) == sizeof(entries));
	ob_image_close(stand.image);
	CHECK(stand_open(&stand) == 0);                                  /* ten of seventeen, the head's included */
	for (int i = 0; i < 2; i++)
		CHECK(pwrite(stand.index, entries, sizeof(entries), HEAD + (i + 1) * (off_t)sizeof(entries)) == sizeof(entries));
	ob_image_close(stand.image);
	CHECK(stand_open(&stand) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "index entry 3"));
	CHECK(ftruncate(stand.index, HEAD) == 0 && stand_open(&stand) == 0);
	stand_free(&stand);
}

static void test_entries_past_the_disk_are_passed_over(void)
{
	struct segment entry = { (DISK / SECTOR - 1) | 5ull << 50, 8 | ZEROED };
	struct stand stand;

	stand_new(&stand);
	CHECK(pwrite(stand.index, &entry, sizeof(entry), HEAD) == sizeof(entry));
	stand_reopen(&stand);
	expect_model(&stand);
	stand_free(&stand);
}

static void test_writes_are_refused_past_the_end_and_without_a_writable_layer(void)
{
	uint8_t sector[SECTOR] = { 0 };
	struct stand stand;

	stand_new(&stand);
	CHECK(ob_image_write(stand.image, DISK - 1, sector, 2) == -EINVAL);
	CHECK(ob_image_zero(stand.image, UINT64_MAX, 2) == -EINVAL);
	CHECK(ob_image_open_upper(stand.image, stand.data, stand.index) == -EBUSY);
	ob_image_close(stand.image);
	CHECK(ob_image_open(stand.engine, NULL, 0, DISK, &stand.image) == 0);
	CHECK(ob_image_write(stand.image, 0, sector, SECTOR) == -EROFS);
	CHECK(ob_image_zero(stand.image, 0, SECTOR) == -EROFS);
	CHECK(ob_image_flush(stand.image) == 0);
	stand_free(&stand);
}

static void test_a_sync_that_failed_is_not_forgotten(void)
{
	uint8_t sector[SECTOR] = { 0 };
	int pipes[2];
	struct stand stand;

	stand_new(&stand);
	CHECK(ob_image_write(stand.image, 0, sector, SECTOR) == 0);
	CHECK(pipe(pipes) == 0);
	/* The descriptors of the pair are the last two that were opened but for the pipe: a pipe cannot be synced. */
	for (int fd = 3; fd < pipes[0]; fd++)
		if (lseek(fd, 0, SEEK_END) >= HEAD && fd != stand.data && fd != stand.index)
			CHECK(dup2(pipes[1], fd) == fd);
	CHECK(ob_image_flush(stand.image) == -ENODATA);
	CHECK(ob_image_flush(stand.image) == -ENODATA);
	CHECK(ob_image_write(stand.image, 0, sector, SECTOR) == -ENODATA);
	close(pipes[0]);
	close(pipes[1]);
	stand_free(&stand);
}

/* ---- threads ---- */

static struct stand shared;
static atomic_int over;

static void *write_and_flush(void *argument)
{
	uint64_t mine = *(uint64_t *)argument;   /* sectors mine, mine + 2, ... */
	uint8_t sector[SECTOR];

	for (int i = 1; i < 2000; i++) {
		uint64_t at = (mine + 2 * (uint64_t)(i % 1000)) * SECTOR;

		memset(sector, i & 0x7f ? i & 0x7f : 1, sizeof(sector));
		CHECK(ob_image_write(shared.image, at, sector, SECTOR) == 0);
		CHECK(ob_image_read(shared.image, at, sector, SECTOR) == 0 && sector[0] == (i & 0x7f ? i & 0x7f : 1));
		if (i % 100 == 0)
			CHECK(ob_image_flush(shared.image) == 0);
		if (i % 101 == 0)
			CHECK(ob_image_zero(shared.image, at, SECTOR) == 0);
	}
	return NULL;
}

/* A sector is never a mixture of two writes. */
static void *read_on(void *argument)
{
	uint8_t sector[SECTOR];

	for (uint64_t i = 0; !atomic_load(&over); i++) {
		CHECK(ob_image_read(shared.image, 3 * PAGE + i % 1000 * SECTOR, sector, SECTOR) == 0);
		CHECK(memcmp(sector, sector + 1, SECTOR - 1) == 0);
	}
	return argument;
}

static void test_threads_read_and_write_at_once(void)
{
	uint64_t first = 3 * PAGE / SECTOR, second = first + 1;
	pthread_t writers[2], reader;

	stand_new(&shared);
	CHECK(pthread_create(&reader, NULL, read_on, NULL) == 0);
	CHECK(pthread_create(&writers[0], NULL, write_and_flush, &first) == 0);
	CHECK(pthread_create(&writers[1], NULL, write_and_flush, &second) == 0);
	pthread_join(writers[0], NULL);
	pthread_join(writers[1], NULL);
	atomic_store(&over, 1);
	pthread_join(reader, NULL);
	stand_free(&shared);
}

int main(void)
{
	test_random_changes_equal_an_array();
	test_what_was_not_flushed_is_as_if_never_written();
	test_many_records_are_flushed_on_their_way();
	test_torn_tails_cost_only_themselves();
	test_entries_that_point_nowhere_are_refused();
	test_entries_of_more_than_there_is_are_refused();
	test_entries_past_the_disk_are_passed_over();
	test_writes_are_refused_past_the_end_and_without_a_writable_layer();
	test_a_sync_that_failed_is_not_forgotten();
	test_threads_read_and_write_at_once();
	return 0;
}
