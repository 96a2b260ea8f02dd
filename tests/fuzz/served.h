/* SPDX-License-Identifier: Apache-2.0
 * served.h: the image that the targets of transports serve: data in the cache, data that
 * a thread must fetch first, a zeroed stretch and holes, and an odd number of bytes.
 */
#ifndef OB_SERVED_H
#define OB_SERVED_H

#include <errno.h>
#include <pthread.h>

#include "fuzz.h"

enum {
	SECTOR = 512,
	PRESENT_SIZE = OB_EXTENT_SIZE,                    /* of the blob, in the cache */
	BLOB_SIZE = 3 * OB_EXTENT_SIZE,
	IMAGE_SIZE = 4 * OB_EXTENT_SIZE + 11
};

/* Entries of the one layer, a log: sectors of the image -> sectors of the blob. The third
 * overwrites part of the first with zeros; the second is what must be fetched. */
static const struct {
	uint64_t offset, length, moffset, zeroed;
} mappings[] = {{0, 100, 8, 0}, {130, 200, 150, 0}, {50, 7, 8, 1}};

enum { MAPPINGS = sizeof(mappings) / sizeof(*mappings) };

struct served {
	ob_engine *engine;
	ob_blob *blob;
	ob_image *image;
	uint8_t bytes[IMAGE_SIZE];    /* what it must read as */
};

static struct served served;

/* OB_RUN_*; *moffset is where in the blob the byte is. */
static inline int served_kind(uint64_t offset, uint64_t *moffset)
{
	for (int i = MAPPINGS; i-- > 0;) {
		uint64_t start = mappings[i].offset * SECTOR;

		if (offset < start || offset - start >= mappings[i].length * SECTOR)
			continue;
		*moffset = mappings[i].moffset * SECTOR + (offset - start);
		return mappings[i].zeroed ? OB_RUN_ZERO : OB_RUN_DATA;
	}
	return OB_RUN_HOLE;
}

static void *served_fetch(void *unused)
{
	ob_fetch *fetch;

	for (;;) {
		if (ob_fetch_next(served.engine, OB_BULK, 1000000000, &fetch))
			continue;
		content_fill(fetch->buffer, fetch->offset, fetch->length);
		CHECK(ob_fetch_finish(fetch, ob_fetch_advance(fetch, fetch->length), 0) == 0);
	}
	return unused;
}

/* Once. The engine and its source last as long as the process. */
static inline void served_start(void)
{
	ob_engine_config config = {.work_threads = 1, .fetch_bytes = 16 << 20};
	ob_blob_config blob = {.id = 1, .size = BLOB_SIZE, .table_offset = 4096, .policy = OB_POLICY_HANG};
	ob_layer layer = {.kind = OB_LAYER_LOG, .index_count = MAPPINGS, .data_end = BLOB_SIZE};
	uint64_t table[MAPPINGS][2], moffset;
	uint8_t present[PRESENT_SIZE];
	pthread_t source;
	int data = memory_fd("", 0), map = memory_fd("", 0);

	CHECK(ob_engine_open(&config, &served.engine) == 0);
	CHECK(ob_blob_open_cached(served.engine, data, map, &blob, &served.blob) == 0);
	content_fill(present, 0, sizeof(present));
	CHECK(ob_blob_store(served.blob, 0, present, sizeof(present)) == 1);
	for (uint64_t at = 0; at < IMAGE_SIZE; at++)
		served.bytes[at] = served_kind(at, &moffset) == OB_RUN_DATA ? content_byte(moffset) : 0;
	for (int i = 0; i < MAPPINGS; i++) {
		table[i][0] = mappings[i].offset | mappings[i].length << 50;
		table[i][1] = mappings[i].moffset | mappings[i].zeroed << 55;
	}
	CHECK(ob_file_open_raw(served.blob, 0, BLOB_SIZE, &layer.file) == 0);
	layer.index = memory_file(served.engine, table, sizeof(table));
	CHECK(ob_image_open(served.engine, &layer, 1, IMAGE_SIZE, &served.image) == 0);
	ob_file_close(layer.file);
	ob_file_close(layer.index);
	close(data);
	close(map);
	CHECK(pthread_create(&source, NULL, served_fetch, NULL) == 0);
}

/* Between inputs: what was fetched is missing again, and events are forgotten. */
static inline void served_reset(void)
{
	ob_event event;

	CHECK(ob_blob_drop(served.blob, PRESENT_SIZE, BLOB_SIZE - PRESENT_SIZE) >= 0);
	while (ob_event_next(served.engine, &event) == 1)
		;
}

#endif
