/* SPDX-License-Identifier: Apache-2.0
 * fuzz_zfile.c: ZFiles, as they lie in a blob: head, blocks, jump table. What can be read
 * must be what the codec's library makes of the blocks one by one.
 *
 * The head is taken as it stands, without the checks of formats/zfile.py: the engine must
 * not rely on them. Bytes of the head that the format leaves undefined say what is read.
 */
#include <errno.h>
#include <lz4.h>
#include <zstd.h>

#include "fuzz.h"

enum {
	HEAD_SIZE = 512,
	INDEX_CRC_AT = 64,
	BASE_AT = 96,            /* undefined by the format, ours: where in the blob the ZFile is */
	READS_AT = 100,          /* ... and what is read */
	READS = 8,
	READ_MAX = 300000,       /* more than a batch of stored bytes */
	BLOCK_MAX = 65536,
	CRC_SEED = 100007
};

static ob_engine *engine;
static uint8_t got[READ_MAX], expected[READ_MAX];

static ob_zfile_head head_of(const uint8_t *input, size_t length)
{
	uint64_t base = input[BASE_AT], flags = get_le64(input + 32);

	return (ob_zfile_head){
		.base = base,
		.length = length - base + (input[BASE_AT + 1] == 0xff),
		.data_offset = HEAD_SIZE + (uint64_t)get_le32(input + 84),
		.index_offset = get_le64(input + 40),
		.block_count = get_le64(input + 48),
		.plain_size = get_le64(input + 56),
		.block_size = get_le32(input + 72),
		.index_crc = get_le32(input + INDEX_CRC_AT),
		.codec = input[76],
		.block_crc = input[88] != 0,
		.check_index = (flags & 16) != 0,
	};
}

/* ---- the model ---- */

/* A block's plain bytes, at most BLOCK_MAX, into `out`: 0 if it is good. `stored` is what the table says. */
static int model_block(const ob_zfile_head *h, const uint8_t *in, size_t stored, uint8_t *out, size_t plain)
{
	static ZSTD_DCtx *decoder;
	size_t packed = stored - (h->block_crc ? 4 : 0);

	if (h->block_crc && ob_crc32c(CRC_SEED, in, packed) != get_le32(in + packed))
		return -1;
	if (h->codec == OB_CODEC_LZ4)
		return LZ4_decompress_safe((const char *)in, (char *)out, (int)packed, (int)plain) == (int)plain ? 0 : -1;
	if (!decoder)
		CHECK((decoder = ZSTD_createDCtx()));
	if (packed < 4 || get_le32(in) != ZSTD_MAGICNUMBER || ZSTD_findFrameCompressedSize(in, packed) != packed)
		return -1;
	return ZSTD_decompressDCtx(decoder, out, plain, in, packed) == plain ? 0 : -1;
}

/* [offset, offset + length) into `expected`: 0 if every block of it is good. The table is in bounds. */
static int model_read(const ob_zfile_head *h, const uint8_t *blob, uint64_t offset, uint64_t length)
{
	static uint8_t block[BLOCK_MAX];
	const uint8_t *table = blob + h->base + h->index_offset;
	const uint8_t *in = blob + h->base + h->data_offset;
	uint64_t done = 0;

	for (uint64_t i = 0, start = 0; done < length; i++, start += h->block_size) {
		uint64_t plain = h->plain_size - start < h->block_size ? h->plain_size - start : h->block_size;
		size_t stored = get_le32(table + 4 * i);

		if (start + plain > offset + done) {
			uint64_t skip = offset + done - start;
			uint64_t part = plain - skip < length - done ? plain - skip : length - done;

			if (model_block(h, in, stored, block, plain))
				return -1;
			memcpy(expected + done, block + skip, part);
			done += part;
		}
		in += stored;
	}
	return 0;
}

/* ---- one input ---- */

static void check_reads(ob_file *file, const ob_zfile_head *h, const uint8_t *input)
{
	for (int i = 0; i < READS; i++) {
		const uint8_t *wish = input + READS_AT + 8 * i;
		uint64_t offset = h->plain_size ? get_le32(wish) % h->plain_size : 0;
		uint64_t length = get_le32(wish + 4) % READ_MAX;
		int status;

		if (length > h->plain_size - offset)
			length = h->plain_size - offset;
		status = ob_file_read(file, offset, got, length);
		if (model_read(h, input, offset, length) == 0)
			CHECK(status == 0 && memcmp(got, expected, length) == 0);
		else
			CHECK(status == -EBADMSG);
	}
	CHECK(ob_file_read(file, h->plain_size, got, 1) == -EINVAL);
	CHECK(ob_file_size(file) == h->plain_size);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	ob_zfile_head head;
	ob_blob *blob;
	ob_file *file;

	if (length < HEAD_SIZE)
		return 0;
	if (!engine)
		engine = memory_engine();
	head = head_of(input, length);
	blob = memory_blob(engine, input, length);
	if (ob_file_open_zfile(blob, &head, &file) == 0) {
		check_reads(file, &head, input);
		ob_file_close(file);
	}
	ob_blob_close(blob);
	return 0;
}

/* ---- changes that get past the checksums ---- */

static void fix_checksums(uint8_t *input, size_t length)
{
	ob_zfile_head h = head_of(input, length);
	uint64_t size = length - h.base, at = h.data_offset;

	if (h.index_offset > size || h.block_count > (size - h.index_offset) / 4)
		return;
	for (uint64_t i = 0; h.block_crc && i < h.block_count; i++) {
		uint64_t stored = get_le32(input + h.base + h.index_offset + 4 * i);

		if (stored <= 4 || at > size || stored > size - at)
			break;
		put_le32(input + h.base + at + stored - 4, ob_crc32c(CRC_SEED, input + h.base + at, stored - 4));
		at += stored;
	}
	put_le32(input + INDEX_CRC_AT, ob_crc32c(0, input + h.base + h.index_offset, 4 * h.block_count));
}

/* As many blocks as the plain size takes, of which the table is what is left of the file. */
static void fix_shape(uint8_t *input, size_t length)
{
	ob_zfile_head h = head_of(input, length);
	uint64_t count = h.block_size ? h.plain_size / h.block_size + (h.plain_size % h.block_size != 0) : 0;

	for (int i = 0; i < 8; i++)
		input[48 + i] = (uint8_t)(count >> (8 * i));
	if (count <= (length - HEAD_SIZE) / 4 && length - h.base >= HEAD_SIZE + 4 * count)
		for (int i = 0; i < 8; i++)
			input[40 + i] = (uint8_t)((length - h.base - 4 * count) >> (8 * i));
}

size_t LLVMFuzzerCustomMutator(uint8_t *input, size_t length, size_t most, unsigned seed)
{
	length = LLVMFuzzerMutate(input, length, most);
	if (length < HEAD_SIZE || length - input[BASE_AT] < HEAD_SIZE)
		return length;
	if (seed % 16 == 1)
		fix_shape(input, length);
	if (seed % 16)
		fix_checksums(input, length);
	return length;
}
