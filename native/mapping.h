/* SPDX-License-Identifier: Apache-2.0
 * mapping.h: a cache's data file mapped for reading, so that what the page cache has is
 * copied without a system call (docs/decisions/0008-read-by-mapping.md).
 *
 * Read only, and only to copy from: what cannot be read there (a shortened file, a bad
 * disk) ends the copy, not the process, and pread() then says what is wrong. The mapped
 * pages of all blobs together are bounded; past that, and for blobs that cannot be
 * mapped, readers are sent to pread() too.
 */
#ifndef OB_MAPPING_H
#define OB_MAPPING_H

#include <stdbool.h>
#include <stdint.h>

struct ob_blob;

/* Longer reads say so little about the next that their pages are not worth keeping mapped. */
enum { MAPPING_READ_MAX = 256 << 10 };

void mapping_open(struct ob_blob *blob);
void mapping_close(struct ob_blob *blob);
/* Copy bytes of extents the caller has pinned. False: not by this way. */
bool mapping_read(struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length);
/* Nobody reads at the moment: give all mapped pages back. */
void mapping_trim(void);

#endif
