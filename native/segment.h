/* SPDX-License-Identifier: Apache-2.0
 * segment.h: one mapping, packed as on disk (docs/formats/lsmt.md): sectors of the image
 * -> sectors of a file.
 *     lo = offset | length << 50   hi = moffset | zeroed << 55 | tag << 56
 * In the engine the tag is the layer's position in the stack, and moffset of a zeroed
 * mapping is 0.
 */
#ifndef OB_SEGMENT_H
#define OB_SEGMENT_H

#include <stdbool.h>
#include <stdint.h>

#define SECTOR 512u
#define OFFSET_BITS 50
#define MOFFSET_BITS 55
#define OFFSET_MASK ((1ull << OFFSET_BITS) - 1)
#define MOFFSET_MASK ((1ull << MOFFSET_BITS) - 1)
#define ZEROED (1ull << MOFFSET_BITS)
#define LAYER_SHIFT 56
#define PADDING OFFSET_MASK          /* an entry with this offset is none */
#define LENGTH_MAX 16383u            /* of one entry: 14 bits */
#define MOFFSET_MIN 8                /* the first 4096 bytes of a layer file are its header */
/* Upstream's own limit of a read-write pair; it bounds what a file can make us read. */
#define LOG_ENTRIES_MAX 128000000u

struct segment {
	uint64_t lo, hi;
};

static inline uint64_t seg_offset(struct segment s) { return s.lo & OFFSET_MASK; }
static inline uint64_t seg_length(struct segment s) { return s.lo >> OFFSET_BITS; }
static inline uint64_t seg_end(struct segment s) { return seg_offset(s) + seg_length(s); }
static inline uint64_t seg_moffset(struct segment s) { return s.hi & MOFFSET_MASK; }
static inline bool seg_zeroed(struct segment s) { return s.hi & ZEROED; }
static inline int seg_layer(struct segment s) { return (int)(s.hi >> LAYER_SHIFT); }

#endif
