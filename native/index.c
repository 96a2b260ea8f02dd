/* SPDX-License-Identifier: Apache-2.0
 *
 * index.c: load a layer's table, lay it over the layers below, look ranges up.
 *
 * Laying over: both sides are sorted lists without overlaps; one merge keeps of the
 * lower list what the upper one leaves uncovered. It runs in place: the lower list is
 * moved to the end of the grown array and the result written from the front, so an index
 * never needs twice its memory.
 *
 * A log (RW pair) is chronological instead: each chunk of it is made into a sorted list
 * and laid over what came before.
 */
#include "index.h"

#include <endian.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "file.h"
#include "round.h"
#include "status.h"

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

/* Upstream's own limits (overlaybd.md 1.3, 1.6); they bound what a head can make us read. */
#define SEALED_ENTRIES_MAX 1000000u
#define LOG_ENTRIES_MAX 128000000u
/* Of all layers merged: 160 MB. The largest image seen has 400,000; without a limit, 255
 * hostile layers of a few KiB each, compressed, could make 4 GB. */
#define INDEX_ENTRIES_MAX 10000000u
/* Entries of a log or a flat layer laid over at one time: at most 28 MB of work space. */
#define CHUNK (512u << 10)
/* Table bytes read at one time, a multiple of an entry's size. */
#define PIECE (1u << 20)
/* Mappings made for a layer without an index; a multiple of any ZFile block (64 KiB). */
#define FLAT_LENGTH (127u * 128)

_Static_assert(FLAT_LENGTH <= LENGTH_MAX, "fits the length field");

static uint64_t seg_offset(struct segment s) { return s.lo & OFFSET_MASK; }
static uint64_t seg_length(struct segment s) { return s.lo >> OFFSET_BITS; }
static uint64_t seg_end(struct segment s) { return seg_offset(s) + seg_length(s); }
static uint64_t seg_moffset(struct segment s) { return s.hi & MOFFSET_MASK; }
static bool seg_zeroed(struct segment s) { return s.hi & ZEROED; }
static int seg_layer(struct segment s) { return (int)(s.hi >> LAYER_SHIFT); }

/* The part of s in [from, to), which s covers. */
static struct segment seg_part(struct segment s, uint64_t from, uint64_t to)
{
	uint64_t moved = seg_zeroed(s) ? 0 : from - seg_offset(s);

	return (struct segment){from | (to - from) << OFFSET_BITS, s.hi + moved};
}

/* ---- lists ---- */

/* A growing list in a buffer its owner has made large enough. */
struct list {
	struct segment *at;
	size_t count;
};

/* Append, joining neighbours that continue each other both in the image and in the layer. */
static void list_add(struct list *list, struct segment s)
{
	struct segment *last = list->count > 0 ? &list->at[list->count - 1] : NULL;

	if (last && seg_end(*last) == seg_offset(s) && seg_length(*last) + seg_length(s) <= LENGTH_MAX
	    && last->hi + (seg_zeroed(*last) ? 0 : seg_length(*last)) == s.hi)
		last->lo += seg_length(s) << OFFSET_BITS;
	else
		list->at[list->count++] = s;
}

/* The list being covered, from the front. */
struct rest {
	const struct segment *at, *end;
	struct segment head;         /* what is left of *at, if at < end */
};

static void rest_next(struct rest *rest)
{
	if (++rest->at < rest->end)
		rest->head = *rest->at;
}

/* Copy what lies before sector `to`. */
static void rest_keep(struct rest *rest, uint64_t to, struct list *out)
{
	while (rest->at < rest->end && seg_offset(rest->head) < to) {
		uint64_t end = seg_end(rest->head);

		if (end > to) {
			list_add(out, seg_part(rest->head, seg_offset(rest->head), to));
			rest->head = seg_part(rest->head, to, end);
			return;
		}
		list_add(out, rest->head);
		rest_next(rest);
	}
}

/* Forget what lies before sector `to`. */
static void rest_cut(struct rest *rest, uint64_t to)
{
	while (rest->at < rest->end && seg_end(rest->head) <= to)
		rest_next(rest);
	if (rest->at < rest->end && seg_offset(rest->head) < to)
		rest->head = seg_part(rest->head, to, seg_end(rest->head));
}

/* Lay `upper`, sorted and without overlaps, over the index. */
static int lay_over(struct index *index, const struct segment *upper, size_t count)
{
	/* Each upper entry adds itself and at most splits one lower entry: the output stays
	 * behind the input if the input starts 2 * count further on (+ 1: never zero bytes). */
	size_t gap = 2 * count + 1;
	struct segment *entries = realloc(index->entries, (index->count + gap) * sizeof(*entries));

	if (!entries)
		return status_set(ENOMEM, "index: no memory for %zu entries", index->count + gap);
	memmove(entries + gap, entries, index->count * sizeof(*entries));

	struct list out = {entries, 0};
	struct rest rest = {entries + gap - 1, entries + gap + index->count, {0, 0}};
	rest_next(&rest);
	for (size_t i = 0; i < count; i++) {
		rest_keep(&rest, seg_offset(upper[i]), &out);
		rest_cut(&rest, seg_end(upper[i]));
		list_add(&out, upper[i]);
	}
	rest_keep(&rest, UINT64_MAX, &out);

	index->entries = entries;
	index->count = out.count;
	if (out.count > INDEX_ENTRIES_MAX)
		return status_set(EBADMSG, "index: %zu entries in all layers so far: more than %u", out.count,
		                  INDEX_ENTRIES_MAX);
	entries = realloc(index->entries, (out.count + 1) * sizeof(*entries));
	if (entries)
		index->entries = entries;
	return 0;
}

/* ---- tables ---- */

/* What the entries of a layer may say. */
struct bounds {
	uint64_t data_end;           /* sectors of the file that hold data */
	uint64_t limit;              /* first sector no entry may reach past */
	uint64_t tag;                /* the layer's number, in place */
};

static int bounds_of(const ob_layer *layer, uint32_t number, struct bounds *out)
{
	uint64_t size = ob_file_size(layer->file);

	if (number >= OB_LAYERS_MAX)
		return status_set(EINVAL, "index: layer %u: more than %d layers", number, OB_LAYERS_MAX);
	if (layer->data_end > size)
		return status_set(EBADMSG, "data area: ends at %llu: the file has %llu bytes",
		                  (unsigned long long)layer->data_end, (unsigned long long)size);
	out->data_end = layer->data_end / SECTOR;
	out->limit = layer->extent_limit ? layer->extent_limit / SECTOR : OFFSET_MASK + 1;
	/* An end past 2^50 has no 50-bit number once the front is trimmed to it. */
	out->limit = min_u64(out->limit, OFFSET_MASK + 1);
	out->tag = (uint64_t)number << LAYER_SHIFT;
	return 0;
}

/* Check an entry as read and put the layer's number into it. */
static int entry_check(struct segment *s, const struct bounds *bounds, uint64_t position)
{
	unsigned long long n = position;
	uint64_t moffset = seg_moffset(*s);
	uint64_t stored = seg_zeroed(*s) ? 0 : seg_length(*s);

	if (seg_end(*s) > bounds->limit)
		return status_set(EBADMSG, "index entry %llu: sectors %llu + %llu: end past the disk's %llu", n,
		                  (unsigned long long)seg_offset(*s), (unsigned long long)seg_length(*s),
		                  (unsigned long long)bounds->limit);
	if (moffset < MOFFSET_MIN || moffset + stored > bounds->data_end)
		return status_set(EBADMSG, "index entry %llu: stored sectors %llu + %llu: outside the data area [%d, %llu)", n,
		                  (unsigned long long)moffset, (unsigned long long)stored, MOFFSET_MIN,
		                  (unsigned long long)bounds->data_end);
	/* Where a zeroed mapping points means nothing: forgotten, so that neighbours join. */
	s->hi = bounds->tag | (seg_zeroed(*s) ? ZEROED : moffset);
	return 0;
}

/* Read entries [first, first + count) as they are. */
static int table_read(const ob_layer *layer, uint64_t first, size_t count, struct segment *out)
{
	uint64_t offset = layer->index_offset + first * sizeof(*out);
	uint64_t length = count * sizeof(*out);
	int status = 0;

	for (uint64_t done = 0; status == 0 && done < length; done += PIECE)
		status = file_read(layer->index, offset + done, (uint8_t *)out + done, min_u64(PIECE, length - done));
	for (size_t i = 0; status == 0 && i < count; i++)
		out[i] = (struct segment){le64toh(out[i].lo), le64toh(out[i].hi)};
	return status;
}

static int table_check(const ob_layer *layer, uint64_t most)
{
	uint64_t size = ob_file_size(layer->index);

	if (layer->index_count > most)
		return status_set(EBADMSG, "index: %llu entries: more than %llu", (unsigned long long)layer->index_count,
		                  (unsigned long long)most);
	if (!range_inside(layer->index_offset, layer->index_count * sizeof(struct segment), size))
		return status_set(EBADMSG, "index: %llu entries at %llu: end past the file's %llu bytes",
		                  (unsigned long long)layer->index_count, (unsigned long long)layer->index_offset,
		                  (unsigned long long)size);
	return 0;
}

/* ---- sealed: sorted by offset ---- */

/* Check the table's `count` entries and move those that count to its front. */
static int sealed_check(struct segment *table, size_t count, const struct bounds *bounds, size_t *kept)
{
	uint64_t end = 0;
	size_t keep = 0;

	for (size_t i = 0; i < count; i++) {
		struct segment s = table[i];

		if (seg_offset(s) == PADDING)
			continue;
		if (seg_length(s) == 0)
			return status_set(EBADMSG, "index entry %zu: length 0", i);
		if (seg_offset(s) < end)
			return status_set(EBADMSG, "index entry %zu: sector %llu: before the end of the entry before it, %llu", i,
			                  (unsigned long long)seg_offset(s), (unsigned long long)end);
		end = seg_end(s);
		int status = entry_check(&s, bounds, i);
		if (status < 0)
			return status;
		table[keep++] = s;
	}
	*kept = keep;
	return 0;
}

static int add_sealed(struct index *index, const ob_layer *layer, const struct bounds *bounds)
{
	size_t kept = 0;
	int status = table_check(layer, SEALED_ENTRIES_MAX);
	if (status < 0)
		return status;

	struct segment *table = malloc(max_u64(layer->index_count, 1) * sizeof(*table));
	if (!table)
		return status_set(ENOMEM, "index: no memory for %llu entries", (unsigned long long)layer->index_count);
	status = table_read(layer, 0, layer->index_count, table);
	if (status == 0)
		status = sealed_check(table, layer->index_count, bounds, &kept);
	if (status == 0)
		status = lay_over(index, table, kept);
	free(table);
	return status;
}

/* ---- log: chronological, later entries win ---- */

struct chunk {
	struct segment *table;       /* as read: position is age */
	size_t count;
	uint32_t *order;             /* of table, by offset */
	uint32_t *heap;              /* positions that may cover the sweep, newest on top */
	size_t heap_count;
	struct list out;             /* at most 2 * count pieces are visible */
};

static int by_offset(const void *a, const void *b, void *table)
{
	const struct segment *s = table;
	uint64_t left = seg_offset(s[*(const uint32_t *)a]), right = seg_offset(s[*(const uint32_t *)b]);

	return (left > right) - (left < right);
}

static void heap_push(struct chunk *c, uint32_t position)
{
	size_t child = c->heap_count++;

	for (; child > 0 && c->heap[(child - 1) / 2] < position; child = (child - 1) / 2)
		c->heap[child] = c->heap[(child - 1) / 2];
	c->heap[child] = position;
}

static void heap_pop(struct chunk *c)
{
	uint32_t last = c->heap[--c->heap_count];
	size_t parent = 0;

	for (size_t child = 1; child < c->heap_count; child = 2 * parent + 1) {
		if (child + 1 < c->heap_count && c->heap[child + 1] > c->heap[child])
			child++;
		if (c->heap[child] <= last)
			break;
		c->heap[parent] = c->heap[child];
		parent = child;
	}
	c->heap[parent] = last;
}

/* Put out what the newest mappings show from sector *from on: up to where entry `next`
 * starts to cover them, or as far as they go up to sector `to`. */
static void sweep(struct chunk *c, uint64_t *from, uint64_t to, uint32_t next)
{
	while (c->heap_count > 0) {
		struct segment top = c->table[c->heap[0]];
		uint64_t end = seg_end(top);

		if (end > to && next < c->heap[0])
			return;
		uint64_t stop = min_u64(end, to);
		if (*from < stop) {
			list_add(&c->out, seg_part(top, *from, stop));
			*from = stop;
		}
		if (end > to)
			return;
		heap_pop(c);
	}
	*from = max_u64(*from, to);
}

/* Make c->out, sorted and without overlaps, of c->table. */
static void chunk_resolve(struct chunk *c)
{
	uint64_t from = 0;

	c->heap_count = 0;
	c->out.count = 0;
	for (size_t i = 0; i < c->count; i++)
		c->order[i] = (uint32_t)i;
	qsort_r(c->order, c->count, sizeof(*c->order), by_offset, c->table);
	for (size_t i = 0; i < c->count; i++) {
		sweep(c, &from, seg_offset(c->table[c->order[i]]), c->order[i]);
		heap_push(c, c->order[i]);
	}
	sweep(c, &from, OFFSET_MASK + 1, UINT32_MAX);
}

/* Check a chunk whose first entry is the log's entry `first`; drop what maps nothing. */
static int chunk_check(struct chunk *c, const struct bounds *bounds, uint64_t first)
{
	size_t keep = 0;

	for (size_t i = 0; i < c->count; i++) {
		struct segment s = c->table[i];

		if (seg_offset(s) == PADDING || seg_length(s) == 0)
			continue;
		int status = entry_check(&s, bounds, first + i);
		if (status < 0)
			return status;
		c->table[keep++] = s;
	}
	c->count = keep;
	return 0;
}

static int add_chunks(struct index *index, const ob_layer *layer, const struct bounds *bounds, struct chunk *c)
{
	int status = 0;

	for (uint64_t first = 0; status == 0 && first < layer->index_count; first += CHUNK) {
		c->count = min_u64(CHUNK, layer->index_count - first);
		status = table_read(layer, first, c->count, c->table);
		if (status == 0)
			status = chunk_check(c, bounds, first);
		if (status < 0)
			break;
		chunk_resolve(c);
		status = lay_over(index, c->out.at, c->out.count);
	}
	return status;
}

static int add_log(struct index *index, const ob_layer *layer, const struct bounds *bounds)
{
	int status = table_check(layer, LOG_ENTRIES_MAX);
	if (status < 0)
		return status;

	size_t room = min_u64(CHUNK, max_u64(layer->index_count, 1));
	struct chunk chunk = {.table = malloc(room * sizeof(*chunk.table)),
	                      .order = malloc(room * sizeof(*chunk.order)),
	                      .heap = malloc(room * sizeof(*chunk.heap)),
	                      .out = {malloc(2 * room * sizeof(*chunk.out.at)), 0}};
	if (chunk.table && chunk.order && chunk.heap && chunk.out.at)
		status = add_chunks(index, layer, bounds, &chunk);
	else
		status = status_set(ENOMEM, "index: no memory for %zu log entries", room);
	free(chunk.table);
	free(chunk.order);
	free(chunk.heap);
	free(chunk.out.at);
	return status;
}

/* ---- flat: the file is the disk ---- */

static int add_flat(struct index *index, const ob_layer *layer, const struct bounds *bounds)
{
	uint64_t sectors = div_up(ob_file_size(layer->file), SECTOR);
	uint64_t count = div_up(sectors, FLAT_LENGTH);
	int status = 0;

	if (count > INDEX_ENTRIES_MAX || sectors > bounds->limit)
		return status_set(EBADMSG, "flat layer: %llu sectors: too large", (unsigned long long)sectors);
	struct segment *table = malloc(min_u64(CHUNK, max_u64(count, 1)) * sizeof(*table));
	if (!table)
		return status_set(ENOMEM, "index: no memory for %llu entries", (unsigned long long)count);
	for (uint64_t offset = 0; status == 0 && offset < sectors;) {
		size_t filled = 0;

		for (; offset < sectors && filled < CHUNK; filled++) {
			uint64_t length = min_u64(FLAT_LENGTH, sectors - offset);

			table[filled] = (struct segment){offset | length << OFFSET_BITS, bounds->tag | offset};
			offset += length;
		}
		status = lay_over(index, table, filled);
	}
	free(table);
	return status;
}

int index_add_layer(struct index *index, const ob_layer *layer, uint32_t number)
{
	struct bounds bounds;
	int status = bounds_of(layer, number, &bounds);

	if (status < 0)
		return status;
	switch (layer->kind) {
	case OB_LAYER_SEALED:
		return add_sealed(index, layer, &bounds);
	case OB_LAYER_LOG:
		return add_log(index, layer, &bounds);
	case OB_LAYER_FLAT:
		return add_flat(index, layer, &bounds);
	default:
		return status_set(EINVAL, "index: layer kind %d: unknown", layer->kind);
	}
}

void index_free(struct index *index)
{
	free(index->entries);
	index->entries = NULL;
	index->count = 0;
}

/* ---- lookup ---- */

/* Position of the first entry that ends past `sector`. */
static size_t find(const struct index *index, uint64_t sector)
{
	const struct segment *entries = index->entries;
	size_t position = 0;

	for (size_t count = index->count; count > 0;) {
		size_t half = count / 2;
		bool before = seg_end(entries[position + half]) <= sector;

		position = before ? position + half + 1 : position;
		count = before ? count - half - 1 : half;
	}
	return position;
}

size_t index_lookup(const struct index *index, uint64_t first_sector, uint64_t end_sector,
                    struct run *runs, size_t max)
{
	uint64_t at = first_sector;
	size_t position = find(index, first_sector);
	size_t count = 0;

	while (at < end_sector && count < max) {
		bool some = position < index->count;
		struct segment s = some ? index->entries[position] : (struct segment){0, 0};
		uint64_t start = some ? min_u64(seg_offset(s), end_sector) : end_sector;

		if (at < start) {
			runs[count++] = (struct run){at, start - at, 0, OB_RUN_HOLE, -1};
			at = start;
			continue;
		}
		uint64_t end = min_u64(seg_end(s), end_sector);
		uint64_t moffset = seg_zeroed(s) ? 0 : seg_moffset(s) + (at - seg_offset(s));
		runs[count++] = (struct run){at, end - at, moffset, seg_zeroed(s) ? OB_RUN_ZERO : OB_RUN_DATA, seg_layer(s)};
		at = end;
		position++;
	}
	return count;
}
