/* SPDX-License-Identifier: Apache-2.0
 * fuzz_upper.c: any index file of a writable layer, then writes, trims, flushes and openings
 * anew. It is refused exactly where a slow replay refuses it, and reads as that says.
 *
 * Input: size of the data file, entries, then what is done.
 */
#include "fuzz.h"
#include "segment.h"

enum {
	DISK_SECTORS = 1024 + 300,     /* a whole page of the map, and part of one */
	DATA_SECTORS_MAX = 64,
	HEAD = 4096,
	ENTRIES_MAX = 40,
	STEPS_MAX = 40
};

static ob_engine *engine;
static uint8_t disk[DISK_SECTORS * SECTOR], found[DISK_SECTORS * SECTOR], data[(8 + DATA_SECTORS_MAX) * SECTOR];
static struct segment entries[ENTRIES_MAX];

/* Mostly what could be. */
static struct segment take_entry(struct tape *tape)
{
	uint64_t how = take(tape, 1), hi = 8 + take(tape, 1) % DATA_SECTORS_MAX;

	if (how >= 250)
		return (struct segment){ take(tape, 8), take(tape, 8) };
	if (how & 1)
		hi |= ZEROED;
	return (struct segment){ take(tape, 2) % (DISK_SECTORS + 20) | (take(tape, how & 2 ? 2 : 1) % LENGTH_MAX) << OFFSET_BITS,
	                         hi };
}

/* The first bad entry, or -1. */
static int replay(int count, uint64_t data_sectors)
{
	uint64_t sum = 0;

	for (int i = 0; i < count; i++) {
		struct segment s = entries[i];
		uint64_t stored = seg_zeroed(s) ? 0 : seg_length(s);

		if (seg_offset(s) == PADDING || !seg_length(s))
			continue;
		sum += stored;
		if (seg_end(s) > OFFSET_MASK + 1 || seg_moffset(s) < 8 || seg_moffset(s) + stored > data_sectors
		    || sum > data_sectors)
			return i;
		for (uint64_t at = seg_offset(s); at < seg_end(s) && at < DISK_SECTORS; at++) {
			if (seg_zeroed(s))
				memset(disk + at * SECTOR, 0, SECTOR);
			else
				memcpy(disk + at * SECTOR, data + (seg_moffset(s) + at - seg_offset(s)) * SECTOR, SECTOR);
		}
	}
	return -1;
}

static ob_image *open_pair(int data_fd, int index_fd, int *status)
{
	ob_image *image;

	CHECK(ob_image_open(engine, NULL, 0, sizeof(disk), &image) == 0);
	*status = ob_image_open_upper(image, data_fd, index_fd);
	return image;
}

static void step(struct tape *tape, ob_image *image)
{
	uint64_t how = take(tape, 1), offset = take(tape, 3) % sizeof(disk), length = take(tape, how & 8 ? 2 : 1) * (how & 16 ? SECTOR : 1);

	offset = how & 16 ? offset / SECTOR * SECTOR : offset;
	length = length < sizeof(disk) - offset ? length : sizeof(disk) - offset;
	if (how & 1) {
		CHECK(ob_image_zero(image, offset, length) == 0);
		memset(disk + offset, 0, length);
	} else {
		memset(disk + offset, (int)how, length);
		CHECK(ob_image_write(image, offset, disk + offset, length) == 0);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = { input, length };
	uint64_t data_size = HEAD + take(&tape, 2) % (DATA_SECTORS_MAX * SECTOR + 1);
	int count = (int)(take(&tape, 1) % (ENTRIES_MAX + 1)), steps = (int)(take(&tape, 1) % STEPS_MAX), status, bad;
	int data_fd, index_fd;
	ob_image *image;

	if (!engine)
		engine = memory_engine();
	memset(disk, 0, sizeof(disk));
	content_fill(data, 0, sizeof(data));
	for (int i = 0; i < count; i++)
		entries[i] = take_entry(&tape);
	bad = replay(count, data_size / SECTOR);
	data_fd = memory_fd(data, data_size);
	index_fd = memory_fd(data, HEAD);
	CHECK(pwrite(index_fd, entries, (size_t)count * sizeof(*entries), HEAD) == count * (ssize_t)sizeof(*entries));
	image = open_pair(data_fd, index_fd, &status);
	CHECK(status == (bad < 0 ? 0 : -EBADMSG));
	for (int i = 0; !status && i < steps; i++) {
		step(&tape, image);
		if (i % 8 == 7) {
			CHECK(ob_image_flush(image) == 0);
			ob_image_close(image);
			image = open_pair(data_fd, index_fd, &status);
		}
	}
	if (bad < 0) {
		CHECK(status == 0 && ob_image_read(image, 0, found, sizeof(found)) == 0);
		CHECK(memcmp(found, disk, sizeof(disk)) == 0);
	}
	ob_image_close(image);
	close(data_fd);
	close(index_fd);
	return 0;
}
