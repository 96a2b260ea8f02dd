/* SPDX-License-Identifier: Apache-2.0
 * test_codec.c: blocks there and back; rubbish in is an error out, never a stray byte.
 */
#include "codec.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <zstd.h>

#include "check.h"
#include "random.h"

static const int codecs[] = {OB_CODEC_LZ4, OB_CODEC_ZSTD};

static void blocks_come_back_as_they_were(int codec, uint32_t block_size, int block_crc)
{
	size_t length = 3 * block_size + 77;
	uint32_t lengths[4];
	uint8_t *plain = malloc(length), *back = malloc(block_size);
	uint64_t bound = ob_zfile_bound(codec, block_size, length);
	uint8_t *stored = malloc(bound), *at = stored;
	uint64_t state = block_size + (uint64_t)codec;

	random_bytes(&state, plain, length);
	int64_t total = ob_zfile_compress(codec, block_size, block_crc, plain, length, stored, bound, lengths);
	CHECK(total > 0 && (uint64_t)total <= bound);
	for (int i = 0; i < 4; i++) {
		size_t packed = lengths[i] - (block_crc ? 4 : 0);
		size_t piece = i < 3 ? block_size : 77;

		CHECK(lengths[i] <= codec_stored_max(block_size));
		CHECK(codec_decode(codec_scratch(), codec, at, packed, back, piece) == 0);
		CHECK(memcmp(back, plain + (size_t)i * block_size, piece) == 0);
		if (block_crc) {
			uint32_t crc = ob_crc32c(CODEC_CRC_SEED, at, packed);
			CHECK(memcmp(&crc, at + packed, 4) == 0);
		}
		at += lengths[i];
	}
	CHECK(at == stored + total);
	/* a byte too few anywhere is said, not written */
	bound = (uint64_t)total - 1;
	CHECK(ob_zfile_compress(codec, block_size, block_crc, plain, length, stored, bound, lengths) == -ENOSPC);
	free(plain);
	free(back);
	free(stored);
}

static void a_block_of_another_length_is_refused(int codec)
{
	uint8_t plain[4096], stored[8192], back[4097];
	uint32_t lengths[1];
	uint64_t state = 3;

	random_bytes(&state, plain, sizeof(plain));
	int64_t total = ob_zfile_compress(codec, 4096, 0, plain, sizeof(plain), stored, sizeof(stored), lengths);
	CHECK(codec_decode(codec_scratch(), codec, stored, (size_t)total, back, 4096) == 0);
	CHECK(codec_decode(codec_scratch(), codec, stored, (size_t)total, back, 4095) == -EBADMSG);
	CHECK(codec_decode(codec_scratch(), codec, stored, (size_t)total, back, 4097) == -EBADMSG);
	for (int64_t shorter = 0; shorter < total; shorter++)
		CHECK(codec_decode(codec_scratch(), codec, stored, (size_t)shorter, back, 4096) == -EBADMSG);
	stored[total] = 0;
	CHECK(codec_decode(codec_scratch(), codec, stored, (size_t)total + 1, back, 4096) == -EBADMSG);
}

/* Exact-sized heap buffers: the sanitizer build sees a byte too far. */
static void rubbish_stays_inside_the_buffers(int codec)
{
	uint64_t state = 4;
	uint8_t plain[2048], stored[8192];
	uint32_t lengths[1];

	for (int round = 0; round < 4000; round++) {
		random_bytes(&state, plain, sizeof(plain));
		int64_t total = ob_zfile_compress(codec, 2048, 0, plain, sizeof(plain), stored, sizeof(stored), lengths);
		size_t length = round % 2 ? (size_t)total : 1 + random_below(&state, (uint64_t)total);
		uint8_t *in = malloc(length), *out = malloc(sizeof(plain));

		memcpy(in, stored, length);
		for (uint64_t n = 1 + random_below(&state, 8); n > 0; n--)
			in[random_below(&state, length)] = (uint8_t)random_next(&state);
		int status = codec_decode(codec_scratch(), codec, in, length, out, sizeof(plain));
		CHECK(status == 0 || status == -EBADMSG);
		free(in);
		free(out);
	}
}

static void only_one_standard_frame_is_zstd(void)
{
	static const uint8_t skippable[] = {0x50, 0x2A, 0x4D, 0x18, 0, 0, 0, 0};
	uint8_t plain[100] = {1, 2, 3}, stored[600], back[200];
	size_t count = ZSTD_compress(stored, sizeof(stored), plain, sizeof(plain), 3);
	struct codec_scratch *scratch = codec_scratch();

	CHECK(codec_decode(scratch, OB_CODEC_ZSTD, stored, count, back, 100) == 0);
	memcpy(stored + count, skippable, sizeof(skippable));
	CHECK(codec_decode(scratch, OB_CODEC_ZSTD, stored, count + sizeof(skippable), back, 100) == -EBADMSG);
	memmove(stored + count, stored, count);
	CHECK(codec_decode(scratch, OB_CODEC_ZSTD, stored, 2 * count, back, 200) == -EBADMSG);
	memmove(stored + sizeof(skippable), stored, count);
	memcpy(stored, skippable, sizeof(skippable));
	CHECK(codec_decode(scratch, OB_CODEC_ZSTD, stored, count + sizeof(skippable), back, 100) == -EBADMSG);
	memcpy(stored, "\x27\xB5\x2F\xFD", 4); /* zstd 0.7 */
	CHECK(codec_decode(scratch, OB_CODEC_ZSTD, stored, count, back, 100) == -EBADMSG);
}

static void what_cannot_be_written_is_refused(void)
{
	uint8_t byte = 0, out[5000];
	uint32_t length;

	CHECK(ob_zfile_compress(3, 4096, 1, &byte, 1, out, sizeof(out), &length) == -EINVAL);
	CHECK(ob_zfile_compress(OB_CODEC_LZ4, 4095, 1, &byte, 1, out, sizeof(out), &length) == -EINVAL);
	CHECK(ob_zfile_compress(OB_CODEC_LZ4, 131072, 1, &byte, 1, out, sizeof(out), &length) == -EINVAL);
	CHECK(ob_zfile_compress(OB_CODEC_LZ4, 0, 1, &byte, 1, out, sizeof(out), &length) == -EINVAL);
	CHECK(ob_zfile_compress(OB_CODEC_LZ4, 4096, 1, &byte, 0, out, sizeof(out), &length) == 0);
	CHECK(ob_zfile_bound(0, 4096, 1) == 0 && ob_zfile_bound(OB_CODEC_ZSTD, 0, 1) == 0);
	CHECK(ob_zfile_bound(OB_CODEC_LZ4, 512, UINT64_MAX) == UINT64_MAX);
}

static void *compress_in_a_thread(void *argument)
{
	blocks_come_back_as_they_were(OB_CODEC_ZSTD, 4096, 1);
	blocks_come_back_as_they_were(OB_CODEC_LZ4, 16384, 0);
	return NULL;
}

static void threads_do_not_share_scratch(void)
{
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, compress_in_a_thread, NULL) == 0);
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

int main(void)
{
	for (int i = 0; i < 2; i++) {
		for (uint32_t block_size = CODEC_BLOCK_MIN; block_size <= CODEC_BLOCK_MAX; block_size *= 2)
			for (int block_crc = 0; block_crc <= 1; block_crc++)
				blocks_come_back_as_they_were(codecs[i], block_size, block_crc);
		a_block_of_another_length_is_refused(codecs[i]);
		rubbish_stays_inside_the_buffers(codecs[i]);
	}
	only_one_standard_frame_is_zstd();
	what_cannot_be_written_is_refused();
	threads_do_not_share_scratch();
	return 0;
}
