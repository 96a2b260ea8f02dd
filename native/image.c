/* SPDX-License-Identifier: Apache-2.0
 * image.c: the main flow of a read: range -> runs -> layers; and that of a write, to the upper one.
 */
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "engine.h"
#include "round.h"
#include "status.h"

enum {
	RUNS_AT_ONCE = 32   /* of one lookup; a longer answer continues with the next */
};

/* ---- lifetime ---- */

static void image_free(struct ob_image *image)
{
	for (uint32_t i = 0; i < image->layer_count; i++)
		ob_file_close(image->files[i]);
	free(image->files);
	index_free(&image->index);
	upper_free(image->upper);
	engine_unref(image->engine);
	free(image);
}

int ob_image_open(struct ob_engine *engine, const ob_layer *layers, uint32_t layer_count, uint64_t size,
                  struct ob_image **out)
{
	struct ob_image *image;
	int error = 0;

	if (layer_count > OB_LAYERS_MAX)
		return status_set(EINVAL, "open image: %u layers: at most %d can be stacked", layer_count, OB_LAYERS_MAX);
	image = calloc(1, sizeof(*image));
	if (image)
		image->files = calloc(layer_count + 1, sizeof(*image->files));   /* + 1: never zero bytes */
	if (!image || !image->files) {
		free(image);
		return status_set(ENOMEM, "open image: out of memory");
	}
	atomic_init(&image->references, 1);
	image->engine = engine_ref(engine);
	image->size = size;
	for (uint32_t i = 0; i < layer_count && !error; i++) {
		image->files[i] = file_ref(layers[i].file);
		image->layer_count++;
		error = index_add_layer(&image->index, &layers[i], i);
	}
	if (error) {
		image_free(image);
		return error;
	}
	*out = image;
	return 0;
}

int ob_image_open_upper(struct ob_image *image, int data_fd, int index_fd)
{
	if (image->upper)
		return status_set(EBUSY, "open writable layer: the image has one");
	if (image->size % SECTOR)
		return status_set(EINVAL, "open writable layer: a disk of %llu bytes: not whole sectors",
		                  (unsigned long long)image->size);
	return upper_open(data_fd, index_fd, image->size, &image->upper);
}

struct ob_image *image_ref(struct ob_image *image)
{
	atomic_fetch_add(&image->references, 1);
	return image;
}

void ob_image_close(struct ob_image *image)
{
	if (image && atomic_fetch_sub(&image->references, 1) == 1)
		image_free(image);
}

uint64_t ob_image_size(struct ob_image *image)
{
	return image->size;
}

/* ---- reading ---- */

/* As index_lookup(); runs of the writable layer have the place above all others. */
static size_t image_lookup(const struct ob_image *image, uint64_t offset, uint64_t end, struct run *runs, size_t max)
{
	size_t count = 0;

	if (!image->upper)
		return index_lookup(&image->index, offset, end, runs, max);
	while (offset < end && count < max) {
		struct run run = upper_lookup(image->upper, offset, end);

		if (run.kind == OB_RUN_HOLE) {
			count += index_lookup(&image->index, offset, offset + run.length, runs + count, max - count);
		} else {
			run.layer = (int)image->layer_count;
			runs[count++] = run;
		}
		offset = runs[count - 1].offset + runs[count - 1].length;
	}
	return count;
}

static int image_read_run(struct ob_image *image, const struct run *run, uint8_t *buffer)
{
	if (run->kind != OB_RUN_DATA) {
		memset(buffer, 0, run->length);
		return 0;
	}
	if ((uint32_t)run->layer == image->layer_count)
		return upper_read(image->upper, run->file_offset, buffer, run->length);
	return file_try_read(image->files[run->layer], run->file_offset, buffer, run->length);
}

int image_read(struct ob_image *image, uint64_t offset, uint8_t *buffer, uint64_t length, uint64_t *done)
{
	struct run runs[RUNS_AT_ONCE];

	while (*done < length) {
		size_t count = image_lookup(image, offset + *done, offset + length, runs, RUNS_AT_ONCE);

		for (size_t i = 0; i < count; i++) {
			int error = image_read_run(image, &runs[i], buffer + *done);

			if (error)
				return error;
			*done += runs[i].length;
		}
	}
	return 0;
}

void image_want(struct ob_image *image, uint64_t offset, uint64_t length, struct parked *parked)
{
	struct run runs[RUNS_AT_ONCE];
	uint64_t end = offset + length;

	while (offset < end) {
		size_t count = image_lookup(image, offset, end, runs, RUNS_AT_ONCE);

		for (size_t i = 0; i < count; i++) {
			if (runs[i].kind == OB_RUN_DATA && (uint32_t)runs[i].layer < image->layer_count)
				file_want(image->files[runs[i].layer], runs[i].file_offset, runs[i].length, parked);
			offset += runs[i].length;
		}
	}
}

struct image_read_call {
	struct ob_image *image;
	uint64_t offset, length, done;
	uint8_t *buffer;
};

static int image_attempt(void *argument)
{
	struct image_read_call *call = argument;

	return image_read(call->image, call->offset, call->buffer, call->length, &call->done);
}

static void image_miss(void *argument, struct parked *parked)
{
	struct image_read_call *call = argument;

	image_want(call->image, call->offset + call->done, call->length - call->done, parked);
}

static int image_check(const struct ob_image *image, const char *what, uint64_t offset, uint64_t length)
{
	if (range_inside(offset, length, image->size))
		return 0;
	return status_set(EINVAL, "%s: %llu + %llu: past its end at %llu", what, (unsigned long long)offset,
	                  (unsigned long long)length, (unsigned long long)image->size);
}

int ob_image_read(struct ob_image *image, uint64_t offset, void *buffer, uint64_t length)
{
	struct image_read_call call = { .image = image, .offset = offset, .length = length, .buffer = buffer };
	int status = image_check(image, "read image", offset, length);

	if (status)
		return status;
	return parked_wait(image->engine, image_attempt, image_miss, &call, NULL);
}

/* ---- writing ---- */

/* Change `length` bytes inside one sector; NULL: to zeros. Waits for what the sector holds, without
 * the lock: what it waits for may take long. */
static int image_patch(struct ob_image *image, uint64_t offset, const uint8_t *bytes, uint64_t length,
                       const atomic_int *ending)
{
	uint64_t start = offset / SECTOR * SECTOR, done;
	uint8_t sector[SECTOR];
	struct image_read_call call = { .image = image, .offset = start, .length = SECTOR, .buffer = sector };
	int status;

	for (;;) {
		done = 0;
		pthread_mutex_lock(&image->upper->lock);
		status = image_read(image, start, sector, SECTOR, &done);
		if (!status) {
			if (bytes)
				memcpy(sector + (offset - start), bytes, length);
			else
				memset(sector + (offset - start), 0, length);
			status = upper_write(image->upper, start, sector, SECTOR);
		}
		pthread_mutex_unlock(&image->upper->lock);
		if (status != -EAGAIN)
			return status;
		call.done = 0;
		status = parked_wait(image->engine, image_attempt, image_miss, &call, ending);
		if (status)
			return status;
	}
}

/* Write, or zero where there are no bytes to write: the whole sectors at once, the edges by themselves. */
static int image_change(struct ob_image *image, uint64_t offset, const uint8_t *bytes, uint64_t length,
                        const atomic_int *ending)
{
	while (length) {
		uint64_t inside = offset % SECTOR, part = length / SECTOR * SECTOR;
		int status;

		if (inside || !part) {
			part = min_u64(length, SECTOR - inside);
			status = image_patch(image, offset, bytes, part, ending);
		} else {
			pthread_mutex_lock(&image->upper->lock);
			status = bytes ? upper_write(image->upper, offset, bytes, part) : upper_zero(image->upper, offset, part);
			pthread_mutex_unlock(&image->upper->lock);
		}
		if (status)
			return status;
		offset += part;
		bytes = bytes ? bytes + part : NULL;
		length -= part;
	}
	return 0;
}

static int image_check_write(const struct ob_image *image, uint64_t offset, uint64_t length)
{
	if (!image->upper)
		return status_set(EROFS, "write image: it is read-only");
	return image_check(image, "write image", offset, length);
}

int image_write(struct ob_image *image, uint64_t offset, const void *buffer, uint64_t length, const atomic_int *ending)
{
	int status = image_check_write(image, offset, length);

	return status ? status : image_change(image, offset, buffer, length, ending);
}

int ob_image_write(struct ob_image *image, uint64_t offset, const void *buffer, uint64_t length)
{
	return image_write(image, offset, buffer, length, NULL);
}

int ob_image_zero(struct ob_image *image, uint64_t offset, uint64_t length)
{
	return image_write(image, offset, NULL, length, NULL);
}

int ob_image_flush(struct ob_image *image)
{
	int status;

	if (!image->upper)
		return 0;
	pthread_mutex_lock(&image->upper->lock);
	status = upper_flush(image->upper);
	pthread_mutex_unlock(&image->upper->lock);
	return status;
}

/* ---- the map ---- */

int ob_image_runs(struct ob_image *image, uint64_t offset, uint64_t length, ob_run *runs, uint32_t max)
{
	struct run found[RUNS_AT_ONCE];
	uint64_t end = offset + length;
	uint32_t filled = 0;

	if (max < 1)
		return status_set(EINVAL, "map image: no room for runs");
	if (image_check(image, "map image", offset, length))
		return -EINVAL;
	while (offset < end) {
		size_t count = image_lookup(image, offset, end, found, RUNS_AT_ONCE);

		for (size_t i = 0; i < count; offset += found[i++].length) {
			ob_run *last = filled ? &runs[filled - 1] : NULL;

			if (last && last->kind == found[i].kind && last->layer == found[i].layer)
				last->length += found[i].length;
			else if (filled == max)
				return (int)filled;
			else
				runs[filled++] = (ob_run){ .offset = found[i].offset, .length = found[i].length,
				                           .kind = found[i].kind, .layer = found[i].layer };
		}
	}
	return (int)filled;
}
