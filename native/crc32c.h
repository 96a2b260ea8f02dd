/* SPDX-License-Identifier: Apache-2.0
 * crc32c.h: the ways this machine has to compute ob_crc32c(): Castagnoli, reflected, no
 * inversion before or after, so ob_crc32c(ob_crc32c(s, a), b) is that of a followed by b.
 */
#ifndef OB_CRC32C_H
#define OB_CRC32C_H

#include <stddef.h>
#include <stdint.h>

typedef uint32_t (*crc32c_way)(uint32_t seed, const void *buffer, size_t length);

/* Best first, the portable one last; all give the same number. Ends with NULL. */
const crc32c_way *crc32c_ways(void);

#endif
