/* SPDX-License-Identifier: Apache-2.0
 * readahead.h: what is asked for before it is missed.
 */
#ifndef OB_READAHEAD_H
#define OB_READAHEAD_H

#include <stdint.h>

struct ob_blob;

/* A foreground reader missed extents [first, last]. The fetch queue's lock is held. */
void readahead_reached(struct ob_blob *blob, uint64_t first, uint64_t last);
/* A hit came to a marked extent. No lock held. */
void readahead_mark(struct ob_blob *blob, uint64_t extent);

#endif
