/* SPDX-License-Identifier: Apache-2.0
 * file.h: the plain content of a layer: a window of a blob, or a ZFile in one.
 *
 * A file is immutable: any thread may read it, and no call takes a lock of its own.
 */
#ifndef OB_FILE_H
#define OB_FILE_H

#include <stdatomic.h>
#include <stdint.h>

#include "cache.h"
#include "ob.h"

struct zfile;

struct ob_file {
	atomic_int references;
	struct ob_blob *blob;
	uint64_t base;         /* of a raw window */
	uint64_t size;         /* plain bytes */
	struct zfile *z;       /* NULL: raw */
};

/* 0, -EAGAIN: something is missing, -EBADMSG: a block is wrong for good, -EINVAL: outside
 * the file, or -errno. Never waits. After -EAGAIN the buffer's content is undefined. */
int file_try_read(struct ob_file *file, uint64_t offset, void *buffer, uint64_t length);
/* Have what the range needs and lacks fetched for `parked`. No I/O; the range lies inside. */
void file_want(struct ob_file *file, uint64_t offset, uint64_t length, struct parked *parked);

struct ob_file *file_ref(struct ob_file *file);

#endif
