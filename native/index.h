/* SPDX-License-Identifier: Apache-2.0
 * index.h: which sectors of an image are where: the LSMT tables of all its layers, merged.
 *
 * Built once, layer by layer from the bottom, by one thread; immutable afterwards, so
 * that any number of threads look up without a lock.
 */
#ifndef OB_INDEX_H
#define OB_INDEX_H

#include <stddef.h>
#include <stdint.h>

#include "ob.h"
#include "segment.h"

struct index {
	struct segment *entries;   /* sorted, not overlapping, none empty */
	size_t count;
	uint64_t sealed;           /* entries of all sorted tables so far */
};

/* A piece of an answered lookup. */
struct run {
	uint64_t offset, length;   /* in the image */
	uint64_t file_offset;      /* of OB_RUN_DATA: in the layer's file */
	int kind;                  /* OB_RUN_* */
	int layer;                 /* of OB_RUN_DATA and OB_RUN_ZERO; else -1 */
};

/* Waits. Reads and checks the layer's table and lays it over what the index has, as layer
 * `number`. -EBADMSG names the bad entry, not the layer. After a failure the index may
 * only be freed. A zeroed `struct index` is an empty one. */
int index_add_layer(struct index *index, const ob_layer *layer, uint32_t number);
void index_free(struct index *index);

/* Map the bytes [offset, end) to at most max runs: they start at offset and have no gaps.
 * Returns how many. Never waits. */
size_t index_lookup(const struct index *index, uint64_t offset, uint64_t end, struct run *runs, size_t max);

#endif
