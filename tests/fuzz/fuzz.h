/* SPDX-License-Identifier: Apache-2.0
 * fuzz.h: what a fuzz target of the engine needs: its entry points, and numbers taken
 * from the front of an input.
 *
 * A target is one file fuzz_NAME.c that defines LLVMFuzzerTestOneInput(). It is linked
 * with libFuzzer (tools/fuzz), or with replay.c, which runs kept inputs in every build of
 * the C tests. A target compares with a model of its own wherever there is one, so that
 * wrong answers are found, not only wrong memory accesses.
 */
#ifndef OB_FUZZ_H
#define OB_FUZZ_H

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "check.h"
#include "memory.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length);
/* Only where changed bytes must be made to fit together again; weak in replay.c. */
size_t LLVMFuzzerCustomMutator(uint8_t *input, size_t length, size_t most, unsigned seed);
/* libFuzzer's own changes, or replay.c's. */
size_t LLVMFuzzerMutate(uint8_t *input, size_t length, size_t most);

struct tape {
	const uint8_t *at;
	size_t left;
};

/* The next little-endian number; what is past the end counts as zeros. */
static inline uint64_t take(struct tape *tape, size_t bytes)
{
	uint64_t value = 0;

	for (size_t i = 0; i < bytes && tape->left; i++, tape->left--)
		value |= (uint64_t)*tape->at++ << (8 * i);
	return value;
}

static inline uint32_t get_le32(const uint8_t *from)
{
	return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static inline uint64_t get_le64(const uint8_t *from)
{
	return get_le32(from) | (uint64_t)get_le32(from + 4) << 32;
}

static inline void put_le32(uint8_t *to, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		to[i] = (uint8_t)(value >> (8 * i));
}

/* What any source holds in these tests: every byte from its offset. */
static inline uint8_t content_byte(uint64_t offset)
{
	return (uint8_t)((offset * 2654435761u) >> 13);
}

static inline void content_fill(uint8_t *to, uint64_t offset, size_t length)
{
	for (size_t i = 0; i < length; i++)
		to[i] = content_byte(offset + i);
}

/* What the descriptor is ready for, of `events`; fails the target if it takes too long. */
static inline int await(int fd, int events)
{
	struct pollfd wait = {.fd = fd, .events = (short)events};
	int count;

	do    /* libFuzzer's own clock is a signal */
		count = poll(&wait, 1, 30000);
	while (count < 0 && errno == EINTR);
	CHECK(count == 1);
	return wait.revents;
}

#endif
