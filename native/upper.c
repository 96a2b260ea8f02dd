/* SPDX-License-Identifier: Apache-2.0
 * upper.c: append, note, flush; and the map of what is where.
 *
 * The map is a flat array of words, one for each sector of the disk, reserved at once and
 * made real by the kernel as it is used: 1/128 of what was ever written. A page of it that
 * was never touched, or only ever zeroed as a whole, is not even that: `pages` says so.
 */
#include "upper.h"

#include <endian.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checked.h"
#include "round.h"
#include "status.h"

/* What a word of the map says, if it is not a place in the data file (>= MOFFSET_MIN). */
enum { BELOW = 0, ZEROS = 1 };
/* Of a page: all words are BELOW, or all are ZEROS whatever they hold, or they count. From WORDS it never goes back. */
enum { PAGE_BELOW = 0, PAGE_ZEROS = 1, PAGE_WORDS = 2 };

#define DATA_SECTORS_MAX UINT32_MAX          /* 2 TiB: what a word can say */
/* 64 TiB, whose map is 512 GiB of address space. */
#define DISK_SECTORS_MAX (1ull << 37)
#define WRITE_SECTORS_MAX 8192u              /* of one record: where overlaybd splits a write */
#define HEAD_SIZE 4096u

/* ---- the map ---- */

static void map_set(struct upper *upper, uint64_t first, uint64_t length, uint32_t place)
{
	uint64_t end = min_u64(first + length, upper->sectors);

	while (first < end) {
		_Atomic uint8_t *page = &upper->pages[first / UPPER_PAGE];
		uint64_t start = first / UPPER_PAGE * UPPER_PAGE, stop = min_u64(end, start + UPPER_PAGE);

		if (place == ZEROS && (*page == PAGE_ZEROS || (*page == PAGE_BELOW && stop - first == UPPER_PAGE))) {
			*page = PAGE_ZEROS;
			first = stop;
			continue;
		}
		for (uint64_t i = start; *page == PAGE_ZEROS && i < min_u64(start + UPPER_PAGE, upper->sectors); i++)
			atomic_store_explicit(&upper->map[i], ZEROS, memory_order_relaxed);
		for (; first < stop; first++) {
			atomic_store_explicit(&upper->map[first], place, memory_order_relaxed);
			place += place != ZEROS;
		}
		*page = PAGE_WORDS;
	}
}

/* A sector's word; *until: the first sector after it that may have an unlike one. */
static uint32_t map_get(const struct upper *upper, uint64_t sector, uint64_t *until)
{
	uint8_t page = upper->pages[sector / UPPER_PAGE];

	if (page == PAGE_WORDS) {
		*until = sector + 1;
		return atomic_load_explicit(&upper->map[sector], memory_order_relaxed);
	}
	*until = min_u64((sector / UPPER_PAGE + 1) * UPPER_PAGE, upper->sectors);
	return page == PAGE_ZEROS ? ZEROS : BELOW;
}

struct run upper_lookup(const struct upper *upper, uint64_t offset, uint64_t end)
{
	uint64_t first = offset / SECTOR, next, until;
	uint32_t place = map_get(upper, first, &next);
	struct run run = { .offset = offset, .kind = place == BELOW ? OB_RUN_HOLE : OB_RUN_ZERO };

	while (next * SECTOR < end
	       && map_get(upper, next, &until) == (place > ZEROS ? place + (uint32_t)(next - first) : place))
		next = until;
	run.length = min_u64(next * SECTOR, end) - offset;
	if (place > ZEROS) {
		run.kind = OB_RUN_DATA;
		run.file_offset = (uint64_t)place * SECTOR + offset % SECTOR;
	}
	return run;
}

/* ---- files ---- */

/* -ENODATA is what its disk did not give or take: -EIO says that a source has not delivered. */
static int file_read(int fd, void *buffer, uint64_t length, uint64_t offset)
{
	for (uint64_t done = 0; done < length;) {
		ssize_t got = pread(fd, (uint8_t *)buffer + done, length - done, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return status_set(ENODATA, "writable layer: reading at %llu: errno %d", (unsigned long long)(offset + done),
			                  got ? errno : 0);
		done += (uint64_t)got;
	}
	return 0;
}

static int file_write(int fd, const void *buffer, uint64_t length, uint64_t offset)
{
	for (uint64_t done = 0; done < length;) {
		ssize_t put = pwrite(fd, (const uint8_t *)buffer + done, length - done, (off_t)(offset + done));

		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0)
			return status_set(errno == ENOSPC || errno == EDQUOT ? ENOSPC : ENODATA, "writable layer: writing: errno %d",
			                  errno);
		done += (uint64_t)put;
	}
	return 0;
}

int upper_read(const struct upper *upper, uint64_t file_offset, void *buffer, uint64_t length)
{
	return file_read(upper->data, buffer, length, file_offset);
}

/* ---- writing ---- */

static int upper_sync(struct upper *upper, int fd)
{
	if (fdatasync(fd) == 0)
		return 0;
	/* The kernel forgets what it could not write, and would say that all is well the next time. */
	upper->failed = 1;
	return status_set(ENODATA, "writable layer: sync: errno %d", errno);
}

int upper_flush(struct upper *upper)
{
	uint64_t length = upper->count * sizeof(*upper->records);
	int status;

	if (upper->failed)
		return status_set(ENODATA, "writable layer: an earlier sync failed");
	if (!upper->count)
		return 0;
	status = upper_sync(upper, upper->data);
	if (!status)
		status = file_write(upper->index, upper->records, length, upper->index_end);
	if (!status)
		status = upper_sync(upper, upper->index);
	if (status)
		return status;
	upper->index_end += length;
	upper->count = 0;
	return 0;
}

/* Room for one more record, and for `sectors` of data. */
static int upper_room(struct upper *upper, uint64_t sectors)
{
	if (upper->failed)
		return status_set(ENODATA, "writable layer: an earlier sync failed");
	if (upper->data_end + sectors > DATA_SECTORS_MAX
	    || upper->index_end / sizeof(*upper->records) + upper->count >= LOG_ENTRIES_MAX)
		return status_set(ENOSPC, "writable layer: it is full");
	return upper->count == UPPER_RECORDS ? upper_flush(upper) : 0;
}

static void upper_note(struct upper *upper, uint64_t first, uint64_t length, uint64_t zeroed)
{
	upper->records[upper->count++] = (struct segment){ htole64(first | length << OFFSET_BITS),
	                                                   htole64(upper->data_end | zeroed) };
}

int upper_write(struct upper *upper, uint64_t offset, const uint8_t *buffer, uint64_t length)
{
	while (length) {
		uint64_t part = min_u64(length, WRITE_SECTORS_MAX * SECTOR), sectors = part / SECTOR;
		int status = upper_room(upper, sectors);

		if (!status)
			status = file_write(upper->data, buffer, part, upper->data_end * SECTOR);
		if (status)
			return status;
		upper_note(upper, offset / SECTOR, sectors, 0);
		map_set(upper, offset / SECTOR, sectors, (uint32_t)upper->data_end);
		upper->data_end += sectors;
		offset += part;
		buffer += part;
		length -= part;
	}
	return 0;
}

int upper_zero(struct upper *upper, uint64_t offset, uint64_t length)
{
	while (length) {
		uint64_t part = min_u64(length, LENGTH_MAX * SECTOR);
		int status = upper_room(upper, 0);

		if (status)
			return status;
		upper_note(upper, offset / SECTOR, part / SECTOR, ZEROED);
		map_set(upper, offset / SECTOR, part / SECTOR, ZEROS);
		offset += part;
		length -= part;
	}
	return 0;
}

/* ---- opening ---- */

/* Entry `number` of the index, as read. */
static int upper_replay(struct upper *upper, struct segment s, uint64_t number)
{
	unsigned long long n = number;
	uint64_t stored = seg_zeroed(s) ? 0 : seg_length(s);

	if (seg_offset(s) == PADDING || seg_length(s) == 0)
		return 0;
	if (seg_end(s) > OFFSET_MASK + 1)
		return status_set(EBADMSG, "index entry %llu: it ends past the last sector there can be", n);
	if (seg_moffset(s) < MOFFSET_MIN || seg_moffset(s) + stored > upper->data_end)
		return status_set(EBADMSG, "index entry %llu: stored sectors %llu + %llu: outside the data area [%d, %llu)", n,
		                  (unsigned long long)seg_moffset(s), (unsigned long long)stored, MOFFSET_MIN,
		                  (unsigned long long)upper->data_end);
	/* Every write has bytes of its own. So the map is bounded by what the files hold, whatever they say. */
	upper->stored += stored;
	if (upper->stored > upper->data_end)
		return status_set(EBADMSG, "index entry %llu: with those before it, more sectors than the data file has", n);
	map_set(upper, seg_offset(s), seg_length(s), seg_zeroed(s) ? ZEROS : (uint32_t)seg_moffset(s));
	return 0;
}

static int upper_load(struct upper *upper)
{
	uint64_t total = (upper->index_end - HEAD_SIZE) / sizeof(*upper->records);
	int status = 0;

	if (total > LOG_ENTRIES_MAX)
		return status_set(EBADMSG, "index: %llu entries: more than %u", (unsigned long long)total, LOG_ENTRIES_MAX);
	for (uint64_t first = 0; !status && first < total; first += UPPER_RECORDS) {
		size_t count = min_u64(UPPER_RECORDS, total - first);

		status = file_read(upper->index, upper->records, count * sizeof(*upper->records),
		                   HEAD_SIZE + first * sizeof(*upper->records));
		for (size_t i = 0; !status && i < count; i++)
			status = upper_replay(upper, (struct segment){ le64toh(upper->records[i].lo), le64toh(upper->records[i].hi) },
			                      first + i);
	}
	return status;
}

static int upper_prepare(struct upper *upper, int data_fd, int index_fd)
{
	struct stat data, index;

	upper->data = fcntl(data_fd, F_DUPFD_CLOEXEC, 0);
	upper->index = fcntl(index_fd, F_DUPFD_CLOEXEC, 0);
	if (upper->data < 0 || upper->index < 0 || fstat(data_fd, &data) || fstat(index_fd, &index))
		return status_set(errno, "open writable layer: descriptors: errno %d", errno);
	if (data.st_size < HEAD_SIZE || index.st_size < HEAD_SIZE)
		return status_set(EBADMSG, "open writable layer: files of %lld and %lld bytes: too short",
		                  (long long)data.st_size, (long long)index.st_size);
	/* A torn last sector, and a torn last record, are written over: nothing points at them. */
	upper->data_end = (uint64_t)data.st_size / SECTOR;
	upper->index_end = HEAD_SIZE + ((uint64_t)index.st_size - HEAD_SIZE) / sizeof(*upper->records) * sizeof(*upper->records);
	if (upper->data_end > DATA_SECTORS_MAX || upper->sectors > DISK_SECTORS_MAX)
		return status_set(EFBIG, "open writable layer: %llu sectors of data for %llu of disk: too large",
		                  (unsigned long long)upper->data_end, (unsigned long long)upper->sectors);
	upper->records = malloc(UPPER_RECORDS * sizeof(*upper->records));
	upper->pages = calloc(upper->sectors / UPPER_PAGE + 1, 1);
	upper->map = mmap(NULL, (upper->sectors + 1) * sizeof(*upper->map), PROT_READ | PROT_WRITE,
	                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!upper->records || !upper->pages || upper->map == MAP_FAILED)
		return status_set(ENOMEM, "open writable layer: no memory for the map of %llu sectors",
		                  (unsigned long long)upper->sectors);
	madvise(upper->map, (upper->sectors + 1) * sizeof(*upper->map), MADV_NOHUGEPAGE);
	return 0;
}

int upper_open(int data_fd, int index_fd, uint64_t size, struct upper **out)
{
	struct upper *upper = calloc(1, sizeof(*upper));
	int status;

	if (!upper)
		return status_set(ENOMEM, "open writable layer: no memory");
	pthread_mutex_init(&upper->lock, NULL);
	upper->sectors = div_up(size, SECTOR);
	upper->data = upper->index = -1;
	upper->map = MAP_FAILED;
	status = upper_prepare(upper, data_fd, index_fd);
	if (!status)
		status = upper_load(upper);
	if (status) {
		upper_free(upper);
		return status;
	}
	*out = upper;
	return 0;
}

void upper_free(struct upper *upper)
{
	if (!upper)
		return;
	if (upper->map != MAP_FAILED)
		munmap(upper->map, (upper->sectors + 1) * sizeof(*upper->map));
	free((void *)upper->pages);
	free(upper->records);
	if (upper->data >= 0)
		close(upper->data);
	if (upper->index >= 0)
		close(upper->index);
	pthread_mutex_destroy(&upper->lock);
	free(upper);
}
