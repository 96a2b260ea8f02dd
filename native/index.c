/* SPDX-License-Identifier: Apache-2.0
 * index.c: load a layer's table, lay it over the layers below, look ranges up.
 *
 * Laying over: both sides are sorted lists without overlaps; one merge keeps of the
 * lower list what the upper one leaves uncovered. It runs in place: the lower list is
 * moved to the end of the grown array and the result written from the front, so an index
 * never needs twice its memory.
 *
 * A log (RW pair) is chronological instead: the later half of a chunk of it is laid over
 * the earlier one, each made of its halves in the same way.
 */
#include "index.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "file.h"
#include "round.h"
#include "status.h"

/* Upstream's own limit; it bounds what a head can make us read. */
#define SEALED_ENTRIES_MAX 1000000u
/* Of all layers: 80 MB merged, 5 s to merge. The largest image seen has 400,000; without a limit,
 * 255 hostile layers of a few KiB each, compressed, could make 4 GB, or the same 80 MB all over again. */
#define INDEX_ENTRIES_MAX 5000000u
/* Entries read and laid over at one time: at most 20 MB of work space. */
#define CHUNK (256u << 10)
/* Table bytes read at one time, a multiple of an entry's size. */
#define PIECE (1u << 20)
/* Mappings made for a layer without an index; a multiple of any ZFile block (64 KiB). */
#define FLAT_LENGTH (127u * 128)

_Static_assert(FLAT_LENGTH <= LENGTH_MAX, "fits the length field");

/* The part of s in [from, to), which s covers. */
static struct segment seg_part(struct segment s, uint64_t from, uint64_t to)
{
	uint64_t moved = seg_zeroed(s) ? 0 : from - seg_offset(s);

	return (struct segment){from | (to - from) << OFFSET_BITS, s.hi + moved};
}

/* ---- lists ---- */

/* Grows in a buffer its owner has made large enough, or shrinks from the front. */
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

/* Take from the front of `rest` what lies before sector `to`, and append it to `out` unless that is NULL. */
static void list_move(struct list *rest, uint64_t to, struct list *out)
{
	for (; rest->count > 0 && seg_offset(*rest->at) < to; rest->at++, rest->count--) {
		uint64_t end = seg_end(*rest->at);

		if (out)
			list_add(out, seg_part(*rest->at, seg_offset(*rest->at), min_u64(end, to)));
		if (end > to) {
			*rest->at = seg_part(*rest->at, to, end);
			return;
		}
	}
}

/* Both sorted and without overlaps; `lower` is used up. Each upper entry adds itself and at
 * most splits one lower entry: `out` may be in lower's buffer, 2 * upper.count before it. */
static size_t lay(struct segment *out, struct list lower, struct list upper)
{
	struct list list = {out, 0};

	for (size_t i = 0; i < upper.count; i++) {
		list_move(&lower, seg_offset(upper.at[i]), &list);
		list_move(&lower, seg_end(upper.at[i]), NULL);
		list_add(&list, upper.at[i]);
	}
	list_move(&lower, UINT64_MAX, &list);
	return list.count;
}

static int lay_over(struct index *index, struct list upper)
{
	size_t gap = 2 * upper.count + 1;   /* + 1: never zero bytes */
	struct segment *entries = realloc(index->entries, (index->count + gap) * sizeof(*entries));

	if (!entries)
		return status_set(ENOMEM, "index: no memory for %zu entries", index->count + gap);
	memmove(entries + gap, entries, index->count * sizeof(*entries));
	index->count = lay(entries, (struct list){entries + gap, index->count}, upper);
	index->entries = entries;
	if (index->count > INDEX_ENTRIES_MAX)
		return status_set(EBADMSG, "index: %zu entries in all layers so far: more than %u", index->count,
		                  INDEX_ENTRIES_MAX);
	entries = realloc(entries, (index->count + 1) * sizeof(*entries));
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
	bool sorted;                 /* a sealed layer's: each after `end`, none empty */
	uint64_t end;
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
	out->sorted = layer->kind == OB_LAYER_SEALED;
	out->end = 0;
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
		status = ob_file_read(layer->index, offset + done, (uint8_t *)out + done, min_u64(PIECE, length - done));
	for (size_t i = 0; status == 0 && i < count; i++)
		out[i] = (struct segment){le64toh(out[i].lo), le64toh(out[i].hi)};
	return status;
}

/* Check the table's `count` entries, the first being the layer's entry `first`; those that
 * map something move to its front and become `count`. */
static int table_check(struct segment *table, size_t *count, struct bounds *bounds, uint64_t first)
{
	size_t keep = 0;

	for (size_t i = 0; i < *count; i++) {
		struct segment s = table[i];
		unsigned long long n = first + i;

		if (seg_offset(s) == PADDING || (seg_length(s) == 0 && !bounds->sorted))
			continue;
		if (seg_length(s) == 0)
			return status_set(EBADMSG, "index entry %llu: length 0", n);
		if (bounds->sorted && seg_offset(s) < bounds->end)
			return status_set(EBADMSG, "index entry %llu: sector %llu: before the end of the entry before it, %llu", n,
			                  (unsigned long long)seg_offset(s), (unsigned long long)bounds->end);
		bounds->end = seg_end(s);
		int status = entry_check(&s, bounds, n);
		if (status < 0)
			return status;
		table[keep++] = s;
	}
	*count = keep;
	return 0;
}

/* What `count` chronological entries show: sorted, in `out`, at most 2 * count; as much is `spare`. */
static size_t resolve(const struct segment *table, size_t count, struct segment *out, struct segment *spare)
{
	size_t half = count / 2;

	if (half == 0) {
		memcpy(out, table, count * sizeof(*out));
		return count;
	}
	struct list lower = {spare, resolve(table, half, spare, out)};
	struct list upper = {spare + 2 * half, 0};
	upper.count = resolve(table + half, count - half, upper.at, out);
	return lay(out, lower, upper);
}

static int add_table(struct index *index, const ob_layer *layer, struct bounds *bounds)
{
	uint64_t total = layer->index_count, most = bounds->sorted ? SEALED_ENTRIES_MAX : LOG_ENTRIES_MAX;
	size_t room = min_u64(CHUNK, max_u64(total, 1));
	int status = 0;

	if (total > most)
		return status_set(EBADMSG, "index: %llu entries: more than %llu", (unsigned long long)total,
		                  (unsigned long long)most);
	if (bounds->sorted && (index->sealed += total) > INDEX_ENTRIES_MAX)
		return status_set(EBADMSG, "index: %llu entries in all layers so far: more than %u",
		                  (unsigned long long)index->sealed, INDEX_ENTRIES_MAX);
	if (!range_inside(layer->index_offset, total * sizeof(struct segment), ob_file_size(layer->index)))
		return status_set(EBADMSG, "index: %llu entries at %llu: end past the file's %llu bytes",
		                  (unsigned long long)total, (unsigned long long)layer->index_offset,
		                  (unsigned long long)ob_file_size(layer->index));
	struct segment *table = malloc((bounds->sorted ? 1 : 5) * room * sizeof(*table));
	if (!table)
		return status_set(ENOMEM, "index: no memory for %zu entries", room);
	for (uint64_t first = 0; status == 0 && first < total; first += CHUNK) {
		struct list upper = {table, min_u64(CHUNK, total - first)};

		status = table_read(layer, first, upper.count, table);
		if (status == 0)
			status = table_check(table, &upper.count, bounds, first);
		if (status == 0 && !bounds->sorted)
			upper = (struct list){table + room, resolve(table, upper.count, table + room, table + 3 * room)};
		if (status == 0)
			status = lay_over(index, upper);
	}
	free(table);
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
		status = lay_over(index, (struct list){table, filled});
	}
	free(table);
	return status;
}

int index_add_layer(struct index *index, const ob_layer *layer, uint32_t number)
{
	struct bounds bounds = {0};
	int status = bounds_of(layer, number, &bounds);

	if (status < 0)
		return status;
	switch (layer->kind) {
	case OB_LAYER_SEALED:
	case OB_LAYER_LOG:
		return add_table(index, layer, &bounds);
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

size_t index_lookup(const struct index *index, uint64_t offset, uint64_t end, struct run *runs, size_t max)
{
	size_t position = find(index, offset / SECTOR), count = 0;

	for (; offset < end && count < max; offset += runs[count++].length) {
		const struct segment *s = position < index->count ? &index->entries[position] : NULL;
		uint64_t start = s ? seg_offset(*s) * SECTOR : end;

		if (offset < start) {
			runs[count] = (struct run){offset, min_u64(start, end) - offset, 0, OB_RUN_HOLE, -1};
			continue;
		}
		runs[count] = (struct run){offset, min_u64(seg_end(*s) * SECTOR, end) - offset,
		                           seg_moffset(*s) * SECTOR + (offset - start),
		                           seg_zeroed(*s) ? OB_RUN_ZERO : OB_RUN_DATA, seg_layer(*s)};
		position++;
	}
	return count;
}
