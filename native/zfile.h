/* SPDX-License-Identifier: Apache-2.0
 * zfile.h: a ZFile: blocks of equal plain size, compressed one by one, found by a table
 * of their stored lengths (overlaybd.md 2.3, 2.4).
 *
 * Assumes the head was parsed elsewhere (formats/zfile.py) but not that it is right.
 * Immutable once open. The blob is its owner's (struct ob_file).
 */
#ifndef OB_ZFILE_H
#define OB_ZFILE_H

#include <stdint.h>

#include "cache.h"
#include "ob.h"

struct zfile;

/* Waits: reads and checks the jump table. -EBADMSG names what is wrong with it. */
int zfile_open(struct ob_blob *blob, const ob_zfile_head *head, struct zfile **out);
void zfile_free(struct zfile *z);

/* As file_try_read(); the range is inside the plain size and not empty. */
int zfile_try_read(struct zfile *z, struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length);
/* Turn a plain range (as above) into the range of the blob that holds its blocks. */
void zfile_stored_range(const struct zfile *z, uint64_t *offset, uint64_t *length);

#endif
