/* SPDX-License-Identifier: Apache-2.0
 * upper.h: the writable layer of an image: an append-only pair of files (docs/formats/lsmt.md).
 *
 * A write appends its bytes to the data file and keeps its index record in memory; a flush
 * puts first the data, then the records on the disk. So no record on the disk points at
 * data that is not there, and what was not flushed when the power or the process went is
 * as if it had not been written.
 *
 * Readers take no lock: a sector's place is one word of the map, which changes only when
 * its data can be read. Writers and flushes hold `lock`. Nothing is allocated after
 * upper_open() but pages of the map, at their first use, which are the kernel's to find.
 */
#ifndef OB_UPPER_H
#define OB_UPPER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "index.h"

enum {
	UPPER_RECORDS = 4096,                /* in memory at most: 64 KiB; then they are flushed */
	UPPER_PAGE = 1024                    /* sectors of a page of the map */
};

struct upper {
	pthread_mutex_t lock;            /* of all but the map */
	int data, index;                 /* files */
	uint64_t data_end;               /* sectors: where the next bytes go */
	uint64_t index_end;              /* bytes: where the next records go */
	uint64_t stored;                 /* sectors in all entries, at opening */
	struct segment *records;         /* not in the index file yet, as on disk */
	uint32_t count;                  /* of them */
	int failed;                      /* a sync failed: what is on the disk is not known any more */

	uint64_t sectors;                /* of the disk */
	_Atomic uint8_t *pages;          /* what is known of each page of the map */
	_Atomic uint32_t *map;           /* each sector's place in the data file, or how it reads else */
};

/* Waits for the disk. Reads the index of a pair whose heads the caller has checked, for a
 * disk of `size` bytes. Descriptors are duplicated. -EBADMSG names the bad entry. */
int upper_open(int data_fd, int index_fd, uint64_t size, struct upper **out);
/* What was not flushed is lost. */
void upper_free(struct upper *upper);

/* The first run of the bytes [offset, end): data, zeros, or a hole, which the layers below
 * fill. Never waits. */
struct run upper_lookup(const struct upper *upper, uint64_t offset, uint64_t end);
/* Read stored bytes. 0 or -errno. */
int upper_read(const struct upper *upper, uint64_t file_offset, void *buffer, uint64_t length);

/* ---- the lock is held; whole sectors inside the disk; 0 or -errno ---- */

int upper_write(struct upper *upper, uint64_t offset, const uint8_t *buffer, uint64_t length);
int upper_zero(struct upper *upper, uint64_t offset, uint64_t length);
/* Everything written so far is on the disk when this returns 0. -ENOSPC may be tried again. */
int upper_flush(struct upper *upper);

#endif
