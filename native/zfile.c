/* SPDX-License-Identifier: Apache-2.0
 * zfile.c: the jump table, and reads through it.
 *
 * A read of a range is a read of consecutive blocks, stored one after the other: they
 * are fetched in batches by one blob read each, and each block is checked and decoded
 * straight to where the caller wants it. Only a first or last block of which a part is
 * wanted goes through the thread's scratch; that block is remembered, because the next
 * read of a sequential reader begins in it.
 */
#include "zfile.h"

#include <endian.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "codec.h"
#include "round.h"
#include "status.h"

enum {
	GROUP = 1024,                /* blocks per 64-bit base; offsets inside fit 32 bits */
	PIECE = 256 << 10,           /* table entries read at one time: 1 MiB */
	TABLE_ATTEMPTS = 2           /* a table that came wrong over the network is read again */
};

_Static_assert((uint64_t)GROUP * (2 * CODEC_BLOCK_MAX + 4096) < UINT32_MAX, "offsets in a group fit");
_Static_assert(2 * CODEC_BLOCK_MAX + 4096 <= CODEC_BATCH, "one block fits a batch");

struct zfile {
	ob_zfile_head head;
	uint64_t id;                 /* never used twice in this process: names memoized blocks */
	uint32_t block_shift;
	uint32_t crc_size;           /* of the CRC after each block: 4 or 0 */
	/* Where block i starts, from data_offset: base[i / GROUP] + relative[i]. One more
	 * entry than blocks, so that a block's end is the next one's start. */
	uint64_t *base;
	uint32_t *relative;
};

static atomic_uint_fast64_t last_id;

static uint64_t block_start(const struct zfile *z, uint64_t block)
{
	return z->base[block / GROUP] + z->relative[block];
}

static uint64_t block_end(const struct zfile *z, uint64_t block)
{
	return block_start(z, block + 1);
}

/* Where stored offset 0 is in the blob. */
static uint64_t stored_base(const struct zfile *z)
{
	return z->head.base + z->head.data_offset;
}

/* ---- opening ---- */

static int check_head(const ob_zfile_head *h, uint64_t size)
{
	uint64_t table;

	if (!is_power_of_two(h->block_size) || h->block_size < CODEC_BLOCK_MIN || h->block_size > CODEC_BLOCK_MAX)
		return status_set(EBADMSG, "ZFile head: block size %u: not a power of two from %d to %d", h->block_size,
		                  CODEC_BLOCK_MIN, CODEC_BLOCK_MAX);
	if (!codec_known(h->codec))
		return status_set(EBADMSG, "ZFile head: codec %d: unknown", h->codec);
	if (!range_inside(h->base, h->length, size))
		return status_set(EBADMSG, "ZFile head: %llu + %llu: ends past the blob's %llu bytes",
		                  (unsigned long long)h->base, (unsigned long long)h->length, (unsigned long long)size);
	if (h->block_count != div_up(h->plain_size, h->block_size))
		return status_set(EBADMSG, "ZFile head: %llu blocks: %llu bytes have another number of blocks",
		                  (unsigned long long)h->block_count, (unsigned long long)h->plain_size);
	if (h->data_offset > h->index_offset || !checked_mul(h->block_count, sizeof(uint32_t), &table)
	    || !range_inside(h->index_offset, table, h->length))
		return status_set(EBADMSG, "ZFile head: jump table of %llu entries at %llu: outside the file",
		                  (unsigned long long)h->block_count, (unsigned long long)h->index_offset);
	return 0;
}

/* Take `count` stored lengths, those of the blocks from `first` on; *end is where the
 * block before them ends. */
static int table_add(struct zfile *z, const uint32_t *lengths, uint64_t first, uint64_t count, uint64_t *end)
{
	uint64_t space = z->head.index_offset - z->head.data_offset;
	uint32_t most = codec_stored_max(z->head.block_size);
	uint64_t start = *end;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t block = first + i;
		uint32_t length = le32toh(lengths[i]);

		if (length <= z->crc_size || length > most)
			return status_set(EBADMSG, "jump table: entry %llu: length %u: must be %u to %u",
			                  (unsigned long long)block, length, z->crc_size + 1, most);
		if (length > space - start)
			return status_set(EBADMSG, "jump table: entry %llu: block ends past the data area's %llu bytes",
			                  (unsigned long long)block, (unsigned long long)space);
		if (block % GROUP == 0)
			z->base[block / GROUP] = start;
		z->relative[block] = (uint32_t)(start - z->base[block / GROUP]);
		start += length;
	}
	*end = start;
	return 0;
}

/* Make room for the entries up to `blocks`, and one more. Grows with what has been read,
 * not with what the head promises. */
static int table_grow(struct zfile *z, uint64_t blocks)
{
	uint32_t *relative = realloc(z->relative, (blocks + 1) * sizeof(*relative));
	if (relative)
		z->relative = relative;
	uint64_t *base = realloc(z->base, (blocks / GROUP + 1) * sizeof(*base));
	if (base)
		z->base = base;
	if (relative && base)
		return 0;
	return status_set(ENOMEM, "jump table: no memory for %llu entries", (unsigned long long)blocks);
}

static int table_read(struct zfile *z, struct ob_blob *blob, uint32_t *piece)
{
	const ob_zfile_head *h = &z->head;
	uint64_t end = 0;
	uint32_t crc = 0;
	int status = table_grow(z, 0);

	for (uint64_t first = 0; status == 0 && first < h->block_count; first += PIECE) {
		uint64_t count = min_u64(PIECE, h->block_count - first);
		uint64_t offset = h->base + h->index_offset + first * sizeof(*piece);

		status = ob_blob_read(blob, offset, piece, count * sizeof(*piece));
		if (status == 0)
			status = table_grow(z, first + count);
		if (status == 0)
			status = table_add(z, piece, first, count, &end);
		crc = ob_crc32c(crc, piece, count * sizeof(*piece));
	}
	if (status < 0)
		return status;
	if (h->check_index && crc != h->index_crc)
		return status_set(EBADMSG, "jump table: checksum %08x: must be %08x", crc, h->index_crc);
	if (h->block_count % GROUP == 0)
		z->base[h->block_count / GROUP] = end;
	z->relative[h->block_count] = (uint32_t)(end - z->base[h->block_count / GROUP]);
	return 0;
}

static int table_load(struct zfile *z, struct ob_blob *blob)
{
	const ob_zfile_head *h = &z->head;
	uint32_t *piece = malloc(min_u64(PIECE, max_u64(h->block_count, 1)) * sizeof(*piece));
	int status = -EBADMSG;

	if (!piece)
		return status_set(ENOMEM, "jump table: no memory");
	for (int attempt = 0; status == -EBADMSG && attempt < TABLE_ATTEMPTS; attempt++) {
		status = table_read(z, blob, piece);
		if (status == -EBADMSG && h->block_count > 0
		    && !blob_reject(blob, h->base + h->index_offset, h->block_count * sizeof(*piece)))
			break;
	}
	free(piece);
	return status;
}

int zfile_open(struct ob_blob *blob, const ob_zfile_head *head, struct zfile **out)
{
	int status = check_head(head, blob->size);
	if (status < 0)
		return status;

	struct zfile *z = calloc(1, sizeof(*z));
	if (!z)
		return status_set(ENOMEM, "open ZFile: no memory");
	z->head = *head;
	z->id = atomic_fetch_add(&last_id, 1) + 1;
	z->block_shift = (uint32_t)__builtin_ctz(head->block_size);
	z->crc_size = head->block_crc ? sizeof(uint32_t) : 0;
	status = table_load(z, blob);
	if (status < 0) {
		zfile_free(z);
		return status;
	}
	*out = z;
	return 0;
}

void zfile_free(struct zfile *z)
{
	if (!z)
		return;
	free(z->base);
	free(z->relative);
	free(z);
}

/* ---- reading ---- */

void zfile_stored_range(const struct zfile *z, uint64_t *offset, uint64_t *length)
{
	uint64_t first = *offset >> z->block_shift;
	uint64_t last = (*offset + *length - 1) >> z->block_shift;
	uint64_t start = block_start(z, first);

	*offset = stored_base(z) + start;
	*length = block_end(z, last) - start;
}

static uint32_t plain_length(const struct zfile *z, uint64_t block)
{
	return (uint32_t)min_u64(z->head.block_size, z->head.plain_size - (block << z->block_shift));
}

/* A range being read, and how far it has come. */
struct reading {
	struct zfile *z;
	struct ob_blob *blob;
	struct codec_scratch *scratch;
	uint64_t offset, end;        /* plain bytes still to produce */
	uint8_t *out;                /* where `offset` goes */
};

/* A block that is wrong: have it fetched again if that can help. */
static int reject(struct reading *r, uint64_t block, const char *what)
{
	uint64_t start = block_start(r->z, block);
	uint64_t at = stored_base(r->z) + start;

	if (blob_reject(r->blob, at, block_end(r->z, block) - start))
		return -EAGAIN;
	return status_set(EBADMSG, "ZFile block %llu at offset %llu: %s", (unsigned long long)block,
	                  (unsigned long long)at, what);
}

/* Hand out of a decoded block in scratch what the range wants of it. */
static void take_part(struct reading *r, uint64_t block)
{
	uint64_t plain = block << r->z->block_shift;
	uint64_t from = r->offset - plain;
	uint64_t count = min_u64(r->end - plain, plain_length(r->z, block)) - from;

	memcpy(r->out, r->scratch->block + from, count);
	r->out += count;
	r->offset += count;
}

/* Decode the block that r->offset is in; `stored` holds it, CRC included. */
static int take_block(struct reading *r, uint64_t block, const uint8_t *stored, size_t stored_length)
{
	const struct zfile *z = r->z;
	struct codec_scratch *scratch = r->scratch;
	uint64_t plain = block << z->block_shift;
	uint32_t length = plain_length(z, block);
	size_t packed = stored_length - z->crc_size;

	if (z->crc_size) {
		uint32_t crc;

		memcpy(&crc, stored + packed, sizeof(crc));
		if (ob_crc32c(CODEC_CRC_SEED, stored, packed) != le32toh(crc))
			return reject(r, block, "checksum does not match");
	}
	bool whole = r->offset == plain && r->end - plain >= length;
	if (!whole)
		scratch->zfile = 0;
	int status = codec_decode(scratch, z->head.codec, stored, packed, whole ? r->out : scratch->block, length);
	if (status == -EBADMSG)
		return reject(r, block, "cannot be decoded");
	if (status < 0)
		return status_set(-status, "ZFile block %llu: no memory to decode it", (unsigned long long)block);
	if (whole) {
		r->out += length;
		r->offset += length;
		return 0;
	}
	scratch->zfile = z->id;
	scratch->number = block;
	take_part(r, block);
	return 0;
}

/* Read as many blocks as a batch holds and the range wants, and decode them. */
static int read_batch(struct reading *r)
{
	const struct zfile *z = r->z;
	uint64_t first = r->offset >> z->block_shift;
	uint64_t stop = ((r->end - 1) >> z->block_shift) + 1;
	uint64_t start = block_start(z, first);
	uint64_t past = first + 1;
	uint64_t filled = block_end(z, first) - start;

	while (past < stop && block_end(z, past) - start <= CODEC_BATCH)
		filled = block_end(z, past++) - start;

	int status = blob_try_read(r->blob, stored_base(z) + start, r->scratch->batch, filled);
	const uint8_t *stored = r->scratch->batch;
	for (uint64_t block = first; status == 0 && block < past; block++) {
		size_t stored_length = block_end(z, block) - block_start(z, block);

		status = take_block(r, block, stored, stored_length);
		stored += stored_length;
	}
	return status;
}

int zfile_try_read(struct zfile *z, struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length)
{
	struct codec_scratch *scratch = codec_scratch();
	struct reading reading = {z, blob, scratch, offset, offset + length, buffer};
	int status = 0, looks = 0;

	if (!scratch)
		return status_set(ENOMEM, "read ZFile: no memory");
	while (status == 0 && reading.offset < reading.end) {
		uint64_t block = reading.offset >> z->block_shift;

		if (scratch->zfile == z->id && scratch->number == block)
			take_part(&reading, block);
		else
			status = read_batch(&reading);
		/* What we read may be older than what another reader's rejection brought. */
		if (status == -EBADMSG && looks++ == 0)
			status = 0;
	}
	if (status == -EBADMSG)
		blob_damaged(blob, stored_base(z) + block_start(z, reading.offset >> z->block_shift));
	return status;
}
