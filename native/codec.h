/* SPDX-License-Identifier: Apache-2.0
 * codec.h: one compressed block to bytes, and what a thread keeps for doing so.
 *
 * Any thread may call anything here. Input is untrusted: nothing is read or written
 * outside the given buffers, and memory does not depend on the input.
 */
#ifndef OB_CODEC_H
#define OB_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ob.h"

enum {
	CODEC_BLOCK_MIN = 512,       /* upstream: 4096; smaller ones cost nothing to allow */
	CODEC_BLOCK_MAX = 65536,
	/* Stored bytes read at one time: fits a CPU's second level cache, and any one block. */
	CODEC_BATCH = 256 << 10
};

/* Largest stored block, CRC included, that is believed. LZ4 and zstd expand by less than
 * 1 % and a few bytes; twice the block is generous to other encoders. */
static inline uint32_t codec_stored_max(uint32_t block_size)
{
	return 2 * block_size + 4096;
}

/* What a thread keeps between reads; freed when the thread ends. */
struct codec_scratch {
	uint8_t batch[CODEC_BATCH];        /* stored bytes */
	uint8_t block[CODEC_BLOCK_MAX];    /* a block of which only a part was wanted: */
	uint64_t zfile;                    /* ... whose it is, 0 = nobody's */
	uint64_t number;                   /* ... and which */
	struct ZSTD_DCtx_s *decoder;       /* made at first use */
	struct ZSTD_CCtx_s *encoder;
};

/* The calling thread's; NULL: no memory. */
struct codec_scratch *codec_scratch(void);

/* Does `codec` name one of OB_CODEC_*? */
bool codec_known(int codec);
/* Decode one block to exactly out_length bytes: 0, -EBADMSG (the block is wrong; no text
 * set), or -ENOMEM. On failure `out` holds rubbish. */
int codec_decode(struct codec_scratch *scratch, int codec, const uint8_t *in, size_t in_length,
                 uint8_t *out, size_t out_length);

/* Seed of the CRC that follows a stored block (overlaybd.md 2.3). */
enum { CODEC_CRC_SEED = 100007 };

#endif
