/* SPDX-License-Identifier: Apache-2.0
 * codec.c: LZ4 blocks and zstd frames, both ways.
 */
#include "codec.h"

#include <endian.h>
#include <lz4.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "checked.h"
#include "round.h"
#include "status.h"

/* What upstream writes whatever level its header names. */
#define ZSTD_LEVEL 3

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static int key_error;
static _Thread_local struct codec_scratch *mine;

static void scratch_free(void *pointer)
{
	struct codec_scratch *scratch = pointer;

	ZSTD_freeDCtx(scratch->decoder);
	ZSTD_freeCCtx(scratch->encoder);
	free(scratch);
	mine = NULL;
}

static void make_key(void)
{
	key_error = pthread_key_create(&key, scratch_free);
}

struct codec_scratch *codec_scratch(void)
{
	if (mine)
		return mine;
	pthread_once(&once, make_key);
	if (key_error)
		return NULL;

	struct codec_scratch *scratch = malloc(sizeof(*scratch));
	if (!scratch)
		return NULL;
	scratch->zfile = 0;
	scratch->decoder = NULL;
	scratch->encoder = NULL;
	if (pthread_setspecific(key, scratch)) {
		free(scratch);
		return NULL;
	}
	return mine = scratch;
}

bool codec_known(int codec)
{
	return codec == OB_CODEC_LZ4 || codec == OB_CODEC_ZSTD;
}

static int decode_zstd(struct codec_scratch *scratch, const uint8_t *in, size_t in_length,
                       uint8_t *out, size_t out_length)
{
	uint32_t magic;

	if (!scratch->decoder && !(scratch->decoder = ZSTD_createDCtx()))
		return -ENOMEM;
	/* One standard frame and nothing else: the decoders of pre-1.0 formats and
	 * skippable frames are no part of ZFile. */
	if (in_length < sizeof(magic))
		return -EBADMSG;
	memcpy(&magic, in, sizeof(magic));
	if (le32toh(magic) != ZSTD_MAGICNUMBER || ZSTD_findFrameCompressedSize(in, in_length) != in_length)
		return -EBADMSG;
	/* An error code is larger than any block. */
	return ZSTD_decompressDCtx(scratch->decoder, out, out_length, in, in_length) == out_length ? 0 : -EBADMSG;
}

int codec_decode(struct codec_scratch *scratch, int codec, const uint8_t *in, size_t in_length,
                 uint8_t *out, size_t out_length)
{
	if (codec == OB_CODEC_ZSTD)
		return decode_zstd(scratch, in, in_length, out, out_length);
	int count = LZ4_decompress_safe((const char *)in, (char *)out, (int)in_length, (int)out_length);
	return count == (int)out_length ? 0 : -EBADMSG;
}

/* ---- the way back, for builders ---- */

static bool block_size_good(uint32_t block_size)
{
	return is_power_of_two(block_size) && block_size >= CODEC_BLOCK_MIN && block_size <= CODEC_BLOCK_MAX;
}

/* Stored length of one encoded block, without CRC; 0 = it does not fit or no memory. */
static size_t encode(struct codec_scratch *scratch, int codec, const uint8_t *in, size_t in_length,
                     uint8_t *out, size_t out_size)
{
	if (codec == OB_CODEC_ZSTD) {
		size_t count = ZSTD_compressCCtx(scratch->encoder, out, out_size, in, in_length, ZSTD_LEVEL);
		return ZSTD_isError(count) ? 0 : count;
	}
	if (out_size > CODEC_BATCH)
		out_size = CODEC_BATCH; /* LZ4 takes an int */
	return (size_t)LZ4_compress_default((const char *)in, (char *)out, (int)in_length, (int)out_size);
}

int64_t ob_zfile_compress(int codec, uint32_t block_size, int block_crc, const void *buffer, uint64_t length,
                          void *out, uint64_t out_size, uint32_t *lengths)
{
	const uint8_t *in = buffer;
	uint8_t *to = out, *end = to + out_size;
	uint64_t crc_size = block_crc ? sizeof(uint32_t) : 0;
	struct codec_scratch *scratch = codec_scratch();

	if (!codec_known(codec) || !block_size_good(block_size))
		return status_set(EINVAL, "compress: codec %d, block size %u: not supported", codec, block_size);
	if (!scratch)
		return status_set(ENOMEM, "compress: no memory");
	if (codec == OB_CODEC_ZSTD && !scratch->encoder && !(scratch->encoder = ZSTD_createCCtx()))
		return status_set(ENOMEM, "compress: no memory for zstd");

	for (uint64_t done = 0; done < length; done += block_size) {
		size_t piece = min_u64(block_size, length - done);
		uint64_t room = (uint64_t)(end - to);
		size_t count = room > crc_size ? encode(scratch, codec, in + done, piece, to, room - crc_size) : 0;

		if (count == 0)
			return status_set(ENOSPC, "compress: block at %llu: does not fit into %llu bytes",
			                  (unsigned long long)done, (unsigned long long)room);
		if (block_crc) {
			uint32_t crc = htole32(ob_crc32c(CODEC_CRC_SEED, to, count));
			memcpy(to + count, &crc, sizeof(crc));
		}
		to += count + crc_size;
		*lengths++ = (uint32_t)(count + crc_size);
	}
	return to - (uint8_t *)out;
}

uint64_t ob_zfile_bound(int codec, uint32_t block_size, uint64_t length)
{
	uint64_t bound;

	if (!codec_known(codec) || !block_size_good(block_size))
		return 0;
	uint64_t one = codec == OB_CODEC_ZSTD ? ZSTD_compressBound(block_size)
	                                      : (uint64_t)LZ4_compressBound((int)block_size);
	return checked_mul(div_up(length, block_size), one + sizeof(uint32_t), &bound) ? bound : UINT64_MAX;
}
