/* SPDX-License-Identifier: Apache-2.0
 * image.h: the merged view of a stack of layers, and what is written over it.
 */
#ifndef OB_IMAGE_H
#define OB_IMAGE_H

#include <stdatomic.h>

#include "parked.h"
#include "file.h"
#include "index.h"
#include "ob.h"
#include "upper.h"

struct ob_image {
	atomic_int references;
	struct ob_engine *engine;
	uint64_t size;                  /* bytes */
	struct index index;             /* immutable after open: read without a lock */
	struct ob_file **files;         /* where layer i's data live */
	uint32_t layer_count;
	struct upper *upper;            /* what is written; NULL: the image is read-only */
};

struct ob_image *image_ref(struct ob_image *image);

/* Read on from *done, which counts the bytes of buffer that are right. 0 when all of
 * [offset, offset + length) is, -EAGAIN when something is missing, or -errno. */
int image_read(struct ob_image *image, uint64_t offset, uint8_t *buffer, uint64_t length, uint64_t *done);
/* Have everything that range misses fetched for `parked`. No I/O. */
void image_want(struct ob_image *image, uint64_t offset, uint64_t length, struct parked *parked);
/* As ob_image_write(), or ob_image_zero() if there is no buffer, for who may have to end meanwhile: what the rest of
 * a sector is waited for ends with parked_end_waits(). */
int image_write(struct ob_image *image, uint64_t offset, const void *buffer, uint64_t length, const atomic_int *ending);

#endif
