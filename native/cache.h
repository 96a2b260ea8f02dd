/* SPDX-License-Identifier: Apache-2.0
 * cache.h: a blob: a local file, or a sparse cache file that fills extent by extent.
 *
 * State of a cached extent, one 32-bit word:
 *
 *   ABSENT --want--> FETCHING --advance--> RESIDENT --written--> PRESENT
 *      |                                      | (cache full)         |
 *      +--store--> STORING --written--> PRESENT                      |
 *      ^--------------------- dropped, rejected, rotted -------------+
 *
 * RESIDENT: readable from the lent buffer of its fetch. Transitions are made under the
 * fetch queue's lock; a reader of a PRESENT extent takes none: it pins the word (adds
 * PIN), looks at the kind again, reads, unpins. Whoever takes an extent out of PRESENT
 * waits until its pins are gone before the bytes may change.
 *
 * Closed, a blob is at its end, whoever holds it still: all is ABSENT, and nothing is wanted,
 * advanced or stored. So its files are neither read nor written, and may be another opening's.
 *
 * On disk: docs/formats/presence-map.md. Extents found there are PRESENT but not
 * CHECKED: their first reader compares the CRC, and drops what does not match.
 */
#ifndef OB_CACHE_H
#define OB_CACHE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "fetch.h"
#include "ob.h"
#include "round.h"

enum {
	EXTENT_ABSENT = 0, EXTENT_FETCHING = 1, EXTENT_RESIDENT = 2, EXTENT_STORING = 3, EXTENT_PRESENT = 4,
	EXTENT_KIND = 7,
	EXTENT_CHECKED = 0x08,   /* CRC seen to be right since the blob was opened */
	EXTENT_MARK = 0x10,      /* a reader that comes here asks for the next window */
	EXTENT_RETRIED = 0x20,   /* dropped once for bad content: the next time is final */
	EXTENT_MAPPED = 0x40,    /* mapping.c's: some of it has been read through the mapping */
	EXTENT_PIN = 0x100
};

/* A sequential reader, as seen from its misses. */
struct stream {
	uint64_t at;             /* the extent it came to last */
	uint64_t next;           /* first extent not asked for yet */
	uint64_t window;         /* extents asked for last time ... */
	int64_t asked_ns;        /* ... and when */
	uint64_t used;           /* age, for replacement */
};

enum { STREAMS = 8 };        /* nbdcopy keeps 4 connections; twice that */

struct ob_blob {
	atomic_int references;   /* the handle, files and fetches */
	atomic_int closed;       /* the handle is; set under the fetch queue's lock */
	struct ob_engine *engine;
	uint64_t id, size;
	int data_fd, map_fd;     /* map_fd -1: a local file, complete by definition */

	/* cached blobs only */
	uint64_t table_offset, seal_offset;
	uint64_t extents;
	uint64_t unit;           /* extents fetched together; >= 1 */
	_Atomic uint32_t *state;
	const uint8_t *bytes;    /* the data file, mapped, or NULL: mapping.c */
	struct ob_blob *next_mapped;
	/* guarded by the fetch queue's lock */
	LIST_HEAD(, fetch) fetches;   /* all that touch this blob */
	uint64_t present;        /* extents */
	uint32_t storing;        /* threads that write what is STORING */
	struct stream streams[STREAMS];
	uint64_t stream_clock;
	int policy;
	int64_t policy_ns;
	uint32_t host;           /* of the queue's */
	int64_t failing_since;   /* 0: healthy */
	int64_t failed_ns;       /* when a fetch failed last */
	int64_t progress_ns;     /* when bytes last arrived */
	int down;
	int write_failed;        /* said once, until a write succeeds */
	int write_error;         /* the last */
	int damaged;             /* a block of it is wrong for good ... */
	uint64_t damaged_offset; /* ... the last that was found */
	uint64_t fetched_bytes, fetch_count, retired, write_failures;
	atomic_int sealed;       /* the seal could not be broken: nothing may be written */
	_Atomic uint64_t hits, misses, crc_failures;
};

/* Keeps the blob's memory; a cached one ends with its handle all the same. */
struct ob_blob *blob_hold(struct ob_blob *blob);
void blob_release(struct ob_blob *blob);

/* 0, -EAGAIN: some extent is missing, -EINVAL: outside the blob, or -errno. Never waits. */
int blob_try_read(struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length);
/* Have every missing extent of the range fetched for `parked`, between its begin and end. */
void blob_want(struct ob_blob *blob, uint64_t offset, uint64_t length, struct parked *parked);
/* Content in the range failed its check. 1: dropped, read again; 0: that was the last try. */
int blob_reject(struct ob_blob *blob, uint64_t offset, uint64_t length);

/* What is at this offset is wrong for good: the user is told, if he was not told of that place last. */
void blob_damaged(struct ob_blob *blob, uint64_t offset);

/* ---- for fetch.c ---- */

static inline uint32_t extent_kind(const struct ob_blob *blob, uint64_t extent)
{
	return atomic_load_explicit(&blob->state[extent], memory_order_acquire) & EXTENT_KIND;
}

/* The unit an extent is in: its first one, and the first one behind it. */
static inline uint64_t unit_start(const struct ob_blob *blob, uint64_t extent)
{
	return extent - extent % blob->unit;
}

static inline uint64_t unit_end(const struct ob_blob *blob, uint64_t extent)
{
	return min_u64(unit_start(blob, extent) + blob->unit, blob->extents);
}

/* Under the queue's lock. Keeps the pins and the flags but those in `clear`. */
void extent_set(struct ob_blob *blob, uint64_t extent, uint32_t kind, uint32_t clear);
/* Bytes of an extent: the last may be short. */
uint64_t extent_length(const struct ob_blob *blob, uint64_t extent);
/* Extents [first, first + count) hold `bytes`: data file, then table. No lock held. */
int extents_write(struct ob_blob *blob, uint64_t first, uint64_t count, const uint8_t *bytes);
/* Under the lock: count extents as present; posts completion. */
void extents_arrived(struct ob_blob *blob, uint64_t count);
/* Under the lock: of a blob that is closed. None is readable any more; the disk stays as it is. */
void extents_end(struct ob_blob *blob);

#endif
