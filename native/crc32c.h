/* SPDX-License-Identifier: Apache-2.0
 *
 * crc32c.h: CRC32C (Castagnoli, reflected) as the formats use it: no inversion before or
 * after, so crc32c(crc32c(s, a), b) is the CRC of a followed by b.
 */
#ifndef OB_CRC32C_H
#define OB_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t crc32c(uint32_t seed, const void *buffer, size_t length);

/* The ways this machine has to compute it, best first, the portable one last; all give
 * the same number. Ends with a NULL function. For tests and benchmarks. */
struct crc32c_way {
	const char *name;
	uint32_t (*function)(uint32_t seed, const void *buffer, size_t length);
};
const struct crc32c_way *crc32c_ways(void);

#endif
