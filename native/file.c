/* SPDX-License-Identifier: Apache-2.0
 * file.c: ob_file: from plain offsets to blob ranges, by window or by ZFile.
 */
#include "file.h"

#include <stdlib.h>

#include "checked.h"
#include "fetch.h"
#include "status.h"
#include "zfile.h"

/* Takes over z. */
static int file_new(struct ob_blob *blob, uint64_t base, uint64_t size, struct zfile *z, ob_file **out)
{
	struct ob_file *file = malloc(sizeof(*file));

	if (!file) {
		zfile_free(z);
		return status_set(ENOMEM, "open file: no memory");
	}
	atomic_init(&file->references, 1);
	file->blob = blob_hold(blob);
	file->base = base;
	file->size = size;
	file->z = z;
	*out = file;
	return 0;
}

int ob_file_open_raw(ob_blob *blob, uint64_t base, uint64_t length, ob_file **out)
{
	if (!range_inside(base, length, blob->size))
		return status_set(EINVAL, "open raw file: %llu + %llu: ends past the blob's %llu bytes",
		                  (unsigned long long)base, (unsigned long long)length,
		                  (unsigned long long)blob->size);
	return file_new(blob, base, length, NULL, out);
}

int ob_file_open_zfile(ob_blob *blob, const ob_zfile_head *head, ob_file **out)
{
	struct zfile *z;
	int status = zfile_open(blob, head, &z);

	return status < 0 ? status : file_new(blob, head->base, head->plain_size, z, out);
}

struct ob_file *file_ref(struct ob_file *file)
{
	atomic_fetch_add_explicit(&file->references, 1, memory_order_relaxed);
	return file;
}

void ob_file_close(struct ob_file *file)
{
	if (!file || atomic_fetch_sub_explicit(&file->references, 1, memory_order_acq_rel) != 1)
		return;
	zfile_free(file->z);
	blob_release(file->blob);
	free(file);
}

uint64_t ob_file_size(ob_file *file)
{
	return file->size;
}

int file_try_read(struct ob_file *file, uint64_t offset, void *buffer, uint64_t length)
{
	if (!range_inside(offset, length, file->size))
		return status_set(EINVAL, "read file: %llu + %llu: ends past its %llu bytes", (unsigned long long)offset,
		                  (unsigned long long)length, (unsigned long long)file->size);
	if (length == 0)
		return 0;
	if (file->z)
		return zfile_try_read(file->z, file->blob, offset, buffer, length);
	return blob_try_read(file->blob, file->base + offset, buffer, length);
}

void file_want(struct ob_file *file, uint64_t offset, uint64_t length, struct parked *parked)
{
	if (length == 0)
		return;
	if (file->z)
		zfile_stored_range(file->z, &offset, &length);
	else
		offset += file->base;
	blob_want(file->blob, offset, length, parked);
}

struct reading {
	struct ob_file *file;
	uint64_t offset, length;
	void *buffer;
};

static int reading_attempt(void *argument)
{
	struct reading *r = argument;

	return file_try_read(r->file, r->offset, r->buffer, r->length);
}

static void reading_want(void *argument, struct parked *parked)
{
	struct reading *r = argument;

	file_want(r->file, r->offset, r->length, parked);
}

int ob_file_read(struct ob_file *file, uint64_t offset, void *buffer, uint64_t length)
{
	struct reading reading = {file, offset, length, buffer};

	return parked_wait(file->blob->engine, reading_attempt, reading_want, &reading, NULL);
}

int ob_blob_read(struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length)
{
	struct ob_file whole = { .blob = blob, .size = blob->size };

	return ob_file_read(&whole, offset, buffer, length);
}
