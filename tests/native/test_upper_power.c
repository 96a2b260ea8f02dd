/* SPDX-License-Identifier: Apache-2.0
 * test_upper_power.c: the writable layer's files as a power cut leaves them. This program's
 * own pwrite() and fdatasync() note what is on the disk for certain and what only may be, and
 * after some call the power goes: what comes later reaches no disk. Then, of what was not synced each sector of each write is there or not, by lot; then the
 * files end where the last thing there does, or in the middle of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory.h"
#include "random.h"
#include "segment.h"

enum {
	CUTS = 1000,
	OPERATIONS = 60,                   /* in a round, at most */
	CALLS = 90,                        /* of pwrite() and fdatasync() before the power goes, at most */
	DISK_SECTORS = 96,
	HEAD = 4096,
	FILE_MAX = 4 << 20,
	PENDING_MAX = 4096
};

/* A file: what is safe, and what was written since. */
struct disk_file {
	uint8_t safe[FILE_MAX];
	size_t size;                       /* of safe */
	struct { size_t offset, length; uint8_t *bytes; } pending[PENDING_MAX];
	size_t count;
	ino_t inode;
};

static struct disk_file files[2];          /* data, index */
static uint64_t noise = 99;
static uint64_t calls_left;                /* until the power goes */

/* ---- the disk ---- */

/* One more call; has it still the power to do anything? */
static int powered(void)
{
	calls_left -= calls_left > 0;
	return calls_left > 0;
}

static struct disk_file *file_of(int fd)
{
	struct stat found;

	CHECK(fstat(fd, &found) == 0);
	for (int i = 0; i < 2; i++)
		if (files[i].inode == found.st_ino)
			return &files[i];
	return NULL;
}

static void put(struct disk_file *file, size_t offset, const void *bytes, size_t length)
{
	CHECK(offset + length <= FILE_MAX);
	if (offset > file->size)
		memset(file->safe + file->size, 0, offset - file->size);
	memcpy(file->safe + offset, bytes, length);
	file->size = offset + length > file->size ? offset + length : file->size;
}

static void forget(struct disk_file *file)
{
	while (file->count)
		free(file->pending[--file->count].bytes);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
	struct disk_file *file = file_of(fd);

	if (file && powered()) {
		CHECK(file->count < PENDING_MAX);
		file->pending[file->count].offset = (size_t)offset;
		file->pending[file->count].length = length;
		file->pending[file->count].bytes = malloc(length);
		memcpy(file->pending[file->count++].bytes, bytes, length);
	}
	return syscall(SYS_pwrite64, fd, bytes, length, offset);
}

int fdatasync(int fd)
{
	struct disk_file *file = file_of(fd);

	CHECK(file);
	if (!powered())
		return 0;
	for (size_t i = 0; i < file->count; i++)
		put(file, file->pending[i].offset, file->pending[i].bytes, file->pending[i].length);
	forget(file);
	return 0;
}

/* What the cut leaves of a file. */
static void cut(struct disk_file *file, int fd)
{
	size_t safe = file->size;

	for (size_t i = 0; i < file->count; i++) {
		size_t offset = file->pending[i].offset, length = file->pending[i].length, done = 0;
		uint64_t odds = random_below(&noise, 4);

		while (done < length) {
			size_t part = SECTOR - (offset + done) % SECTOR;

			part = part < length - done ? part : length - done;
			if (random_below(&noise, 3) < odds)
				put(file, offset + done, file->pending[i].bytes + done, part);
			done += part;
		}
	}
	forget(file);
	if (file->size > safe && random_below(&noise, 2))
		file->size = safe + random_below(&noise, file->size - safe);
	CHECK(ftruncate(fd, 0) == 0);
	CHECK(syscall(SYS_pwrite64, fd, file->safe, file->size, 0) == (ssize_t)file->size);
}

/* ---- what each sector may hold: what was flushed, and all it was made since ---- */

static uint8_t may[DISK_SECTORS][OPERATIONS + 1];
static int may_count[DISK_SECTORS];

static void allow(uint64_t sector, uint64_t count, uint8_t fill)
{
	for (; count--; sector++)
		may[sector][may_count[sector]++] = fill;
}

static void only_the_last_is_allowed(void)
{
	for (int i = 0; i < DISK_SECTORS; i++) {
		may[i][0] = may[i][may_count[i] - 1];
		may_count[i] = 1;
	}
}

/* Each sector is one of what it may be; which, counts from now on. */
static void check_disk(ob_image *image)
{
	uint8_t sector[SECTOR];

	for (int i = 0; i < DISK_SECTORS; i++) {
		int known = 0;

		CHECK(ob_image_read(image, (uint64_t)i * SECTOR, sector, SECTOR) == 0);
		CHECK(memcmp(sector, sector + 1, SECTOR - 1) == 0);
		for (int k = 0; k < may_count[i] && !known; k++)
			known = may[i][k] == sector[0];
		CHECK(known);
		may[i][0] = sector[0];
		may_count[i] = 1;
	}
}

/* ---- rounds ---- */

static void work(ob_image *image, int fill)
{
	static uint8_t bytes[DISK_SECTORS * SECTOR];
	uint64_t sector = random_below(&noise, DISK_SECTORS), count = 1 + random_below(&noise, 24);

	count = count < DISK_SECTORS - sector ? count : DISK_SECTORS - sector;
	switch (random_below(&noise, 6)) {
	case 0:
		CHECK(ob_image_flush(image) == 0);
		if (calls_left)
			only_the_last_is_allowed();
		return;
	case 1:
		allow(sector, count, 0);
		CHECK(ob_image_zero(image, sector * SECTOR, count * SECTOR) == 0);
		return;
	default:
		allow(sector, count, (uint8_t)(1 + fill % 255));
		memset(bytes, 1 + fill % 255, count * SECTOR);
		CHECK(ob_image_write(image, sector * SECTOR, bytes, count * SECTOR) == 0);
	}
}

static ob_image *open_pair(ob_engine *engine, int data, int index)
{
	ob_image *image;

	CHECK(ob_image_open(engine, NULL, 0, DISK_SECTORS * SECTOR, &image) == 0);
	CHECK(ob_image_open_upper(image, data, index) == 0);
	return image;
}

/* Empty files: enough garbage. */
static void begin_anew(const int fds[2])
{
	for (int i = 0; i < 2; i++) {
		files[i].size = HEAD;
		CHECK(ftruncate(fds[i], HEAD) == 0);
	}
	memset(may_count, 0, sizeof(may_count));
	allow(0, DISK_SECTORS, 0);
}

int main(void)
{
	static const uint8_t head[HEAD];
	int fds[2];
	ob_engine *engine = memory_engine();
	struct stat made;

	for (int i = 0; i < 2; i++) {
		fds[i] = memory_fd(head, HEAD);
		CHECK(fstat(fds[i], &made) == 0);
		put(&files[i], 0, head, HEAD);
		files[i].inode = made.st_ino;
	}
	begin_anew(fds);
	for (int round = 0; round < CUTS; round++) {
		ob_image *image = open_pair(engine, fds[0], fds[1]);
		uint64_t operations = random_below(&noise, OPERATIONS);

		check_disk(image);
		calls_left = 1 + random_below(&noise, CALLS);
		for (uint64_t i = 0; i < operations && calls_left; i++)
			work(image, round + (int)i);
		ob_image_close(image);
		for (int i = 0; i < 2; i++)
			cut(&files[i], fds[i]);
		if (files[0].size > FILE_MAX / 8)
			begin_anew(fds);
	}
	ob_engine_close(engine);
	close(fds[0]);
	close(fds[1]);
	return 0;
}
