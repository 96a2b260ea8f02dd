/* SPDX-License-Identifier: Apache-2.0
 * memory.h: an engine, and blobs and files that hold given bytes.
 */
#ifndef OB_MEMORY_H
#define OB_MEMORY_H

#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

static inline ob_engine *memory_engine(void)
{
	ob_engine_config config = {.work_threads = 1, .readahead_extents = 0, .fetch_bytes = 16 << 20};
	ob_engine *engine;

	CHECK(ob_engine_open(&config, &engine) == 0);
	return engine;
}

static inline int memory_fd(const void *bytes, size_t length)
{
	int fd = memfd_create("ob-test", MFD_CLOEXEC);

	CHECK(fd >= 0);
	for (size_t done = 0; done < length;) {
		ssize_t count = pwrite(fd, (const char *)bytes + done, length - done, (off_t)done);

		CHECK(count > 0);
		done += (size_t)count;
	}
	return fd;
}

static inline ob_blob *memory_blob(ob_engine *engine, const void *bytes, size_t length)
{
	int fd = memory_fd(bytes, length);
	ob_blob *blob;

	CHECK(ob_blob_open_local(engine, fd, length, &blob) == 0);
	close(fd);
	return blob;
}

/* A raw file of these bytes, its blob closed: the file keeps it. */
static inline ob_file *memory_file(ob_engine *engine, const void *bytes, size_t length)
{
	ob_blob *blob = memory_blob(engine, bytes, length);
	ob_file *file;

	CHECK(ob_file_open_raw(blob, 0, length, &file) == 0);
	ob_blob_close(blob);
	return file;
}

#endif
