/* SPDX-License-Identifier: Apache-2.0
 * random.h: numbers that are the same in every run, and bytes of several textures.
 */
#ifndef OB_RANDOM_H
#define OB_RANDOM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* SplitMix64: every seed is a good one. */
static inline uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += 0x9E3779B97F4A7C15ull;

	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
	z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
	return z ^ (z >> 31);
}

/* 0 ... below - 1. */
static inline uint64_t random_below(uint64_t *state, uint64_t below)
{
	return random_next(state) % below;
}

/* Stretches of zeros, of noise and of repeating text, so that blocks compress to all sizes. */
static inline void random_bytes(uint64_t *state, uint8_t *out, size_t length)
{
	for (size_t done = 0; done < length;) {
		size_t stretch = 1 + random_below(state, 6000);
		uint64_t texture = random_below(state, 3), word = random_next(state);

		for (size_t i = 0; i < stretch && done < length; i++, done++) {
			if (texture == 2)
				word = random_next(state);
			out[done] = texture == 0 ? 0 : (uint8_t)(word >> (8 * (i % 7)));
		}
	}
}

#endif
