/* SPDX-License-Identifier: Apache-2.0
 * cache.c: blobs: what is on disk, what is not, and what may be believed.
 */
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checked.h"
#include "engine.h"
#include "mapping.h"
#include "readahead.h"
#include "status.h"

enum {
	TABLE_ENTRY = 4,         /* bytes of the presence table for each extent */
	TABLE_CHUNK = 16384,     /* entries read at once when a map is opened */
	READ_FIRST_EXTENTS = 64  /* extents pinned together for one pread */
};

/* A blob of more than this, far more than any layer, is refused: who writes a manifest claims
 * sizes for nothing, and states (64 MiB of address space) and table grow with them. */
static const uint64_t BLOB_SIZE_MAX = (uint64_t)1 << 40;

/* ---- plain I/O ---- */

/* -ENODATA is a disk's EIO: -EIO says that a source has not delivered. */
static int read_fully(int fd, void *buffer, uint64_t length, uint64_t offset)
{
	uint8_t *at = buffer;

	while (length) {
		ssize_t got = pread(fd, at, length < SSIZE_MAX ? length : SSIZE_MAX, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return status_set(errno == EIO ? ENODATA : errno, "read file: offset %llu: errno %d",
			                  (unsigned long long)offset, errno);
		if (got == 0)
			return status_set(ENODATA, "read file: offset %llu: the file ends before its size", (unsigned long long)offset);
		at += got;
		offset += (uint64_t)got;
		length -= (uint64_t)got;
	}
	return 0;
}

static int write_fully(int fd, const void *buffer, uint64_t length, uint64_t offset)
{
	const uint8_t *at = buffer;

	while (length) {
		ssize_t put = pwrite(fd, at, length, (off_t)offset);

		if (put < 0 && errno == EINTR)
			continue;
		if (put <= 0)
			return status_set(put ? errno : EIO, "write cache: offset %llu: errno %d", (unsigned long long)offset, errno);
		at += put;
		offset += (uint64_t)put;
		length -= (uint64_t)put;
	}
	return 0;
}

/* ---- lifetime ---- */

static struct ob_blob *blob_new(struct ob_engine *engine, int data_fd, uint64_t size)
{
	struct ob_blob *blob = calloc(1, sizeof(*blob));

	if (!blob)
		return NULL;
	blob->data_fd = fcntl(data_fd, F_DUPFD_CLOEXEC, 3);
	if (blob->data_fd < 0) {
		free(blob);
		return NULL;
	}
	atomic_init(&blob->references, 1);
	blob->engine = engine_ref(engine);
	blob->size = size;
	blob->map_fd = -1;
	return blob;
}

struct ob_blob *blob_hold(struct ob_blob *blob)
{
	atomic_fetch_add(&blob->references, 1);
	return blob;
}

void blob_release(struct ob_blob *blob)
{
	if (atomic_fetch_sub(&blob->references, 1) != 1)
		return;
	mapping_close(blob);
	close(blob->data_fd);
	if (blob->map_fd >= 0)
		close(blob->map_fd);
	free((void *)blob->state);
	engine_unref(blob->engine);
	free(blob);
}

void ob_blob_close(struct ob_blob *blob)
{
	if (!blob)
		return;
	if (blob->state)
		fetch_end(blob);
	for (uint64_t extent = 0; extent < blob->extents; extent++) {
		while (atomic_load(&blob->state[extent]) >= EXTENT_PIN)
			sched_yield();
	}
	blob_release(blob);
}

int ob_blob_open_local(struct ob_engine *engine, int fd, uint64_t size, struct ob_blob **out)
{
	*out = blob_new(engine, fd, size);
	return *out ? 0 : status_set(errno ? errno : ENOMEM, "open blob: local file: errno %d", errno);
}

static uint64_t table_place(const struct ob_blob *blob, uint64_t extent)
{
	return blob->table_offset + extent * TABLE_ENTRY;
}

/* Entries that are not 0 become PRESENT, not CHECKED. A table that ends early is as if
 * the rest were 0; so is a hole, which is not read. */
static int table_load(struct ob_blob *blob)
{
	uint32_t *entries = malloc(TABLE_CHUNK * TABLE_ENTRY);
	int error = 0;

	if (!entries)
		return status_set(ENOMEM, "open presence map: out of memory");
	for (uint64_t first = 0; first < blob->extents;) {
		off_t data = lseek(blob->map_fd, (off_t)table_place(blob, first), SEEK_DATA);
		uint64_t count;
		ssize_t got;

		if (data < 0 && errno == ENXIO)
			break;
		if (data >= 0)
			first = ((uint64_t)data - blob->table_offset) / TABLE_ENTRY;
		if (first >= blob->extents)
			break;
		count = min_u64(blob->extents - first, TABLE_CHUNK);
		got = data < 0 ? -1 : pread(blob->map_fd, entries, count * TABLE_ENTRY, (off_t)table_place(blob, first));
		if (got < 0) {
			error = status_set(errno, "open presence map: table: errno %d", errno);
			break;
		}
		for (uint64_t i = 0; i < (uint64_t)got / TABLE_ENTRY; i++) {
			if (entries[i]) {
				atomic_init(&blob->state[first + i], EXTENT_PRESENT);
				blob->present++;
			}
		}
		if (got < TABLE_ENTRY)
			break;
		first += (uint64_t)got / TABLE_ENTRY;
	}
	free(entries);
	return error;
}

int ob_blob_open_cached(struct ob_engine *engine, int data_fd, int map_fd, const ob_blob_config *config,
                        struct ob_blob **out)
{
	struct ob_blob *blob;
	int error;

	if (config->size > BLOB_SIZE_MAX)
		return status_set(EFBIG, "open blob: size %llu: more than %llu", (unsigned long long)config->size,
		                  (unsigned long long)BLOB_SIZE_MAX);
	if (config->unit > OB_UNIT_MAX)
		return status_set(EINVAL, "open blob: unit of %u extents: more than %d", config->unit, OB_UNIT_MAX);
	blob = blob_new(engine, data_fd, config->size);
	if (!blob)
		return status_set(errno ? errno : ENOMEM, "open blob: cache file: errno %d", errno);
	blob->id = config->id;
	blob->table_offset = config->table_offset;
	blob->seal_offset = config->seal_offset;
	blob->policy = config->policy;
	blob->policy_ns = (int64_t)config->policy_ns;
	blob->unit = config->unit ? config->unit : 1;
	blob->extents = (config->size + OB_EXTENT_SIZE - 1) / OB_EXTENT_SIZE;
	blob->state = calloc(blob->extents + 1, sizeof(*blob->state));
	blob->map_fd = fcntl(map_fd, F_DUPFD_CLOEXEC, 3);
	if (!blob->state || blob->map_fd < 0)
		error = status_set(errno ? errno : ENOMEM, "open blob: presence map: errno %d", errno);
	else
		error = table_load(blob);
	if (error) {
		blob_release(blob);
		return error;
	}
	mapping_open(blob);
	*out = blob;
	return 0;
}

/* ---- extents ---- */

void extent_set(struct ob_blob *blob, uint64_t extent, uint32_t kind, uint32_t clear)
{
	uint32_t old = atomic_load(&blob->state[extent]);

	while (!atomic_compare_exchange_weak(&blob->state[extent], &old, (old & ~(EXTENT_KIND | clear)) | kind))
		;
}

uint64_t extent_length(const struct ob_blob *blob, uint64_t extent)
{
	uint64_t offset = extent * OB_EXTENT_SIZE;

	return blob->size - offset < OB_EXTENT_SIZE ? blob->size - offset : OB_EXTENT_SIZE;
}

static uint32_t extent_sum(const uint8_t *bytes, uint64_t length)
{
	uint32_t sum = ~ob_crc32c(~0u, bytes, length);

	return sum ? sum : 1;
}

int extents_write(struct ob_blob *blob, uint64_t first, uint64_t count, const uint8_t *bytes)
{
	uint32_t sums[READ_FIRST_EXTENTS];

	if (atomic_load(&blob->sealed))
		return status_set(EROFS, "write cache: the seal of the map cannot be broken");
	while (count) {
		uint64_t now = count < READ_FIRST_EXTENTS ? count : READ_FIRST_EXTENTS, length = 0;
		int error;

		for (uint64_t i = 0; i < now; i++) {
			sums[i] = extent_sum(bytes + length, extent_length(blob, first + i));
			length += extent_length(blob, first + i);
		}
		error = write_fully(blob->data_fd, bytes, length, first * OB_EXTENT_SIZE);
		if (!error)
			error = write_fully(blob->map_fd, sums, now * TABLE_ENTRY, table_place(blob, first));
		if (error)
			return error;
		first += now;
		count -= now;
		bytes += length;
	}
	return 0;
}

void extents_arrived(struct ob_blob *blob, uint64_t count)
{
	blob->present += count;
	blob->write_failed = 0;
	if (count && blob->present == blob->extents)
		engine_post(blob->engine, OB_EVENT_BLOB_COMPLETE, 0, blob->id);
}

void extents_end(struct ob_blob *blob)
{
	for (uint64_t extent = 0; extent < blob->extents; extent++) {
		if (extent_kind(blob, extent) != EXTENT_ABSENT)
			extent_set(blob, extent, EXTENT_ABSENT, EXTENT_CHECKED | EXTENT_MARK);
	}
}

/* Said durably before anything goes. The sync holds the lock, but once in a sealed blob's life. */
static void seal_break(struct ob_blob *blob)
{
	uint32_t seal = 1;

	if (!blob->seal_offset || (pread(blob->map_fd, &seal, sizeof(seal), (off_t)blob->seal_offset) > 0 && !seal))
		return;
	seal = 0;
	atomic_store(&blob->sealed,
	             write_fully(blob->map_fd, &seal, sizeof(seal), blob->seal_offset) || fdatasync(blob->map_fd));
}

/* Under the queue's lock: make a readable extent absent, on disk too. The table is
 * cleared before the bytes may change, and nobody reads them any more when we return. */
static void extent_retire(struct ob_blob *blob, uint64_t extent)
{
	static const uint32_t absent = 0;
	int was_present = extent_kind(blob, extent) == EXTENT_PRESENT;

	blob->retired++;
	seal_break(blob);
	extent_set(blob, extent, EXTENT_ABSENT, EXTENT_CHECKED | EXTENT_MARK);
	if (!was_present)
		return;
	while (atomic_load(&blob->state[extent]) >= EXTENT_PIN)
		sched_yield();
	/* A table that cannot be written still holds the CRC of the bytes that are there:
	 * stale, but not wrong until they are overwritten, and then it no longer matches. */
	write_fully(blob->map_fd, &absent, sizeof(absent), table_place(blob, extent));
	blob->present--;
}

/* First use since open: does the extent hold what its CRC says? Pinned by the caller. */
static int extent_check(struct ob_blob *blob, uint64_t extent)
{
	uint64_t length = extent_length(blob, extent);
	uint8_t *bytes = malloc(length);
	uint32_t sum = 0;
	int error;

	if (!bytes)
		return status_set(ENOMEM, "check cache: out of memory");
	error = read_fully(blob->data_fd, bytes, length, extent * OB_EXTENT_SIZE);
	if (!error)
		error = read_fully(blob->map_fd, &sum, sizeof(sum), table_place(blob, extent));
	if (error || extent_sum(bytes, length) != sum)
		error = -EBADMSG;
	else
		atomic_fetch_or(&blob->state[extent], EXTENT_CHECKED);
	free(bytes);
	return error;
}

/* ---- reading ---- */

static void extents_unpin(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	for (uint64_t extent = first; extent <= last; extent++)
		atomic_fetch_sub(&blob->state[extent], EXTENT_PIN);
}

/* All of [first, last] present, checked and unmarked: pinned, 1. Else nothing is, 0. */
static int extents_pin(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	for (uint64_t extent = first; extent <= last; extent++) {
		uint32_t old = atomic_fetch_add(&blob->state[extent], EXTENT_PIN);

		if ((old & (EXTENT_KIND | EXTENT_CHECKED | EXTENT_MARK)) != (EXTENT_PRESENT | EXTENT_CHECKED)) {
			extents_unpin(blob, first, extent);
			return 0;
		}
	}
	return 1;
}

static void extent_rotted(struct ob_blob *blob, uint64_t extent)
{
	pthread_mutex_lock(&blob->engine->fetch.lock);
	if (extent_kind(blob, extent) == EXTENT_PRESENT && !(atomic_load(&blob->state[extent]) & EXTENT_CHECKED)) {
		atomic_fetch_add(&blob->crc_failures, 1);
		extent_retire(blob, extent);
	}
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
}

/* The disk no longer gives what it took. -EAGAIN: it is fetched again; once, then the disk's error stays. */
static int extent_lost(struct ob_blob *blob, uint64_t extent, uint32_t seen, int error)
{
	if (seen & EXTENT_RETRIED)
		return error;
	pthread_mutex_lock(&blob->engine->fetch.lock);
	if (!(atomic_fetch_or(&blob->state[extent], EXTENT_RETRIED) & EXTENT_RETRIED) &&
	    extent_kind(blob, extent) == EXTENT_PRESENT)
		extent_retire(blob, extent);
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
	return -EAGAIN;
}

/* The slow way, for one extent: wherever it is, until it is nowhere. */
static int extent_read(struct ob_blob *blob, uint64_t extent, uint64_t skip, uint8_t *buffer, uint64_t length)
{
	for (;;) {
		uint32_t state = atomic_fetch_add(&blob->state[extent], EXTENT_PIN);
		int present = (state & EXTENT_KIND) == EXTENT_PRESENT, error = 0;
		int rotted = present && !(state & EXTENT_CHECKED) && extent_check(blob, extent) != 0;
		const uint8_t *bytes;

		if (present && !rotted)
			error = read_fully(blob->data_fd, buffer, length, extent * OB_EXTENT_SIZE + skip);
		atomic_fetch_sub(&blob->state[extent], EXTENT_PIN);
		if (rotted)
			extent_rotted(blob, extent);
		else if (present && (state & EXTENT_MARK))
			readahead_mark(blob, extent);
		if (present && !rotted)
			return error ? extent_lost(blob, extent, state, error) : 0;
		if (rotted || (state & EXTENT_KIND) != EXTENT_RESIDENT)
			return -EAGAIN;
		pthread_mutex_lock(&blob->engine->fetch.lock);
		/* Written meanwhile, it is looked at again. */
		bytes = extent_kind(blob, extent) == EXTENT_RESIDENT ? fetch_resident(blob, extent) : NULL;
		if (bytes)
			memcpy(buffer, bytes + skip, length);
		fetch_unlock(&blob->engine->fetch, NULL, NULL);
		if (bytes)
			return 0;
	}
}

static int extents_read(struct ob_blob *blob, uint64_t offset, uint8_t *buffer, uint64_t length)
{
	while (length) {
		uint64_t extent = offset / OB_EXTENT_SIZE, skip = offset % OB_EXTENT_SIZE;
		uint64_t now = OB_EXTENT_SIZE - skip < length ? OB_EXTENT_SIZE - skip : length;
		int error = extent_read(blob, extent, skip, buffer, now);

		if (error)
			return error;
		offset += now;
		buffer += now;
		length -= now;
	}
	return 0;
}

static int blob_check_range(const struct ob_blob *blob, uint64_t offset, uint64_t length)
{
	return range_inside(offset, length, blob->size) ? 0
	       : status_set(EINVAL, "read blob: %llu + %llu: past its end at %llu", (unsigned long long)offset,
	                    (unsigned long long)length, (unsigned long long)blob->size);
}

int blob_try_read(struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length)
{
	uint64_t first = offset / OB_EXTENT_SIZE, last;
	int error = blob_check_range(blob, offset, length);

	if (error || !length)
		return error;
	if (!blob->state)
		return read_fully(blob->data_fd, buffer, length, offset);
	last = (offset + length - 1) / OB_EXTENT_SIZE;
	if (last - first < READ_FIRST_EXTENTS && extents_pin(blob, first, last)) {
		if (!mapping_read(blob, offset, buffer, length))
			error = read_fully(blob->data_fd, buffer, length, offset);
		extents_unpin(blob, first, last);
		if (error)
			error = extents_read(blob, offset, buffer, length);
	} else {
		error = extents_read(blob, offset, buffer, length);
	}
	if (!error)
		atomic_fetch_add_explicit(&blob->hits, 1, memory_order_relaxed);
	return error;
}

void blob_want(struct ob_blob *blob, uint64_t offset, uint64_t length, struct parked *parked)
{
	if (!blob->state || !length || blob_check_range(blob, offset, length))
		return;
	atomic_fetch_add_explicit(&blob->misses, 1, memory_order_relaxed);
	pthread_mutex_lock(&blob->engine->fetch.lock);
	fetch_want(blob, offset / OB_EXTENT_SIZE, (offset + length - 1) / OB_EXTENT_SIZE, OB_FOREGROUND, parked);
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
}

int ob_blob_prefetch(struct ob_blob *blob, uint64_t offset, uint64_t length, int priority)
{
	uint64_t first = offset / OB_EXTENT_SIZE, last = (offset + length - 1) / OB_EXTENT_SIZE;
	int error = blob_check_range(blob, offset, length);
	struct fetch *discarded = NULL;

	if (error || !length || !blob->state)
		return error;
	if (priority != OB_PREFETCH && priority != OB_BULK)
		return status_set(EINVAL, "prefetch: priority %d: not one of prefetch and bulk", priority);
	pthread_mutex_lock(&blob->engine->fetch.lock);
	if (priority == OB_BULK)
		fetch_drop_kept(blob, first, last, &discarded);
	fetch_want(blob, first, last, priority, NULL);
	fetch_unlock(&blob->engine->fetch, NULL, discarded);
	return 0;
}

/* ---- content that came or goes by other ways ---- */

int blob_reject(struct ob_blob *blob, uint64_t offset, uint64_t length)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	uint64_t first = offset / OB_EXTENT_SIZE, last = length ? (offset + length - 1) / OB_EXTENT_SIZE : first;
	int again = 0, retried = 0, writing;

	atomic_fetch_add(&blob->crc_failures, 1);
	if (!blob->state)
		return 0;
	pthread_mutex_lock(&queue->lock);
	for (uint64_t extent = first; extent <= last; extent++) {
		while ((writing = fetch_writing(blob, extent)) > 0)
			pthread_cond_wait(&queue->settled, &queue->lock);
		uint32_t state = atomic_load(&blob->state[extent]);

		if (writing || ((state & EXTENT_KIND) != EXTENT_PRESENT && (state & EXTENT_KIND) != EXTENT_RESIDENT)) {
			again = 1; /* somebody dropped it before us, or another thread has to wait for its write: look again */
		} else if (state & EXTENT_RETRIED) {
			retried = 1;
		} else {
			extent_retire(blob, extent);
			atomic_fetch_or(&blob->state[extent], EXTENT_RETRIED);
			again = 1;
		}
	}
	fetch_unlock(queue, NULL, NULL);
	return again || !retried;
}

void blob_damaged(struct ob_blob *blob, uint64_t offset)
{
	int known;

	pthread_mutex_lock(&blob->engine->fetch.lock);
	known = blob->damaged && blob->damaged_offset == offset;
	blob->damaged = 1;
	blob->damaged_offset = offset;
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
	if (!known)
		engine_post(blob->engine, OB_EVENT_BLOB_DAMAGED, -EBADMSG, blob->id);
}

/* Under the lock: take [first, ...) of what is missing for ourselves, or (*kept) of what is in memory since it
 * could not be written; returns how many. */
static uint64_t extents_claim(struct ob_blob *blob, uint64_t first, uint64_t end, int *kept)
{
	uint64_t extent = first;

	*kept = fetch_kept(blob, first);

	for (; extent < end && extent - first < READ_FIRST_EXTENTS; extent++) {
		uint32_t kind = extent_kind(blob, extent);

		if (*kept ? !fetch_kept(blob, extent) : kind != EXTENT_ABSENT && kind != EXTENT_FETCHING)
			break;
		extent_set(blob, extent, EXTENT_STORING, 0);
	}
	blob->storing += extent > first;
	return extent - first;
}

static int extents_store(struct ob_blob *blob, uint64_t first, uint64_t count, int kept, const uint8_t *bytes)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	struct parked *ready = NULL;
	int error = extents_write(blob, first, count, bytes);

	pthread_mutex_lock(&queue->lock);
	blob->storing--;
	atomic_store(&queue->hosts[blob->host].heard_ns, engine_now());
	for (uint64_t i = 0; i < count; i++)
		extent_set(blob, first + i, error ? fetch_owner_kind(blob, first + i, kept) : EXTENT_PRESENT | EXTENT_CHECKED, 0);
	if (error)
		fetch_write_failed(blob, error);
	else
		extents_arrived(blob, count);
	parked_settle(blob, &ready);
	pthread_cond_broadcast(&queue->settled);
	fetch_unlock(queue, ready, NULL);
	return error;
}

/* Extents before this one end before `end`, or with the blob. */
static uint64_t whole_end(const struct ob_blob *blob, uint64_t end)
{
	return end == blob->size ? blob->extents : end / OB_EXTENT_SIZE;
}

int64_t ob_blob_store(struct ob_blob *blob, uint64_t offset, const void *buffer, uint64_t length)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	uint64_t first = (offset + OB_EXTENT_SIZE - 1) / OB_EXTENT_SIZE, end = whole_end(blob, offset + length);
	int64_t stored = 0;
	int error = blob_check_range(blob, offset, length);

	if (error || !blob->state)
		return error;
	while (first < end) {
		uint64_t count;
		int kept;

		pthread_mutex_lock(&queue->lock);
		if (atomic_load(&blob->closed))
			error = status_set(EBADF, "store in blob: it has been closed");
		count = error ? 0 : extents_claim(blob, first, end, &kept);
		fetch_unlock(queue, NULL, NULL);
		if (count)
			error = extents_store(blob, first, count, kept, (const uint8_t *)buffer + (first * OB_EXTENT_SIZE - offset));
		if (error)
			return error;
		stored += (int64_t)count;
		first += count ? count : 1;
	}
	return stored;
}

int64_t ob_blob_drop(struct ob_blob *blob, uint64_t offset, uint64_t length)
{
	struct fetch_queue *queue = &blob->engine->fetch;
	uint64_t first = (offset + OB_EXTENT_SIZE - 1) / OB_EXTENT_SIZE, end = whole_end(blob, offset + length);
	int64_t dropped = 0;
	int error = blob_check_range(blob, offset, length);

	if (error || !blob->state)
		return error;
	for (uint64_t extent = first; extent < end; extent++) {
		pthread_mutex_lock(&queue->lock);
		uint32_t state = atomic_load(&blob->state[extent]);

		if ((state & EXTENT_KIND) == EXTENT_PRESENT && state < EXTENT_PIN) {
			extent_retire(blob, extent);
			/* Punched under the lock: a fetch of the extent cannot have begun. */
			fallocate(blob->data_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(extent * OB_EXTENT_SIZE),
			          OB_EXTENT_SIZE);
			dropped++;
		}
		fetch_unlock(queue, NULL, NULL);
	}
	return dropped;
}

/* ---- health and numbers ---- */

int ob_blob_set_policy(struct ob_blob *blob, int policy, uint64_t policy_ns)
{
	if (policy < OB_POLICY_EIO || policy > OB_POLICY_HANG || policy_ns > INT64_MAX)
		return status_set(EINVAL, "set policy: %d: not a policy", policy);
	pthread_mutex_lock(&blob->engine->fetch.lock);
	blob->policy = policy;
	blob->policy_ns = (int64_t)policy_ns;
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
	return 0;
}

void ob_blob_set_host(struct ob_blob *blob, uint32_t host)
{
	pthread_mutex_lock(&blob->engine->fetch.lock);
	blob->host = host % HOSTS;
	queue_call_next(&blob->engine->fetch, blob->engine->config.fetch_bytes);
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
}

void ob_blob_healthy(struct ob_blob *blob)
{
	pthread_mutex_lock(&blob->engine->fetch.lock);
	blob->failing_since = 0;
	blob->down = 0;
	blob->engine->fetch.hosts[blob->host].failing = 0;
	queue_call_next(&blob->engine->fetch, blob->engine->config.fetch_bytes);
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
}

void ob_blob_get_stat(struct ob_blob *blob, ob_blob_stat *out)
{
	*out = (ob_blob_stat){ .size = blob->size, .hits = atomic_load(&blob->hits), .misses = atomic_load(&blob->misses),
	                       .crc_failures = atomic_load(&blob->crc_failures) };
	pthread_mutex_lock(&blob->engine->fetch.lock);
	out->damaged = blob->damaged;
	out->damaged_offset = blob->damaged_offset;
	out->present_bytes = blob->state ? blob->present * OB_EXTENT_SIZE : blob->size;
	if (blob->extents && out->present_bytes && (extent_kind(blob, blob->extents - 1) == EXTENT_PRESENT))
		out->present_bytes -= OB_EXTENT_SIZE - extent_length(blob, blob->extents - 1);
	out->fetched_bytes = blob->fetched_bytes;
	out->fetches = blob->fetch_count;
	out->retired = blob->retired;
	out->write_failures = blob->write_failures;
	out->write_error = blob->write_error;
	out->failing_ns = blob->failing_since ? engine_now() - blob->failing_since : 0;
	out->down = blob->down;
	fetch_unlock(&blob->engine->fetch, NULL, NULL);
}
