/* SPDX-License-Identifier: Apache-2.0
 * image.c: the main flow of a read: range -> runs -> layers.
 */
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "engine.h"
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
	engine_unref(image->engine);
	free(image);
}

int ob_image_open(struct ob_engine *engine, const ob_layer *layers, uint32_t layer_count, uint64_t size,
                  struct ob_image **out)
{
	struct ob_image *image;
	int error = 0;

	if (layer_count < 1 || layer_count > OB_LAYERS_MAX)
		return status_set(EINVAL, "open image: %u layers: 1 to %d can be stacked", layer_count, OB_LAYERS_MAX);
	image = calloc(1, sizeof(*image));
	if (image)
		image->files = calloc(layer_count, sizeof(*image->files));
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

int image_read(struct ob_image *image, uint64_t offset, uint8_t *buffer, uint64_t length, uint64_t *done)
{
	struct run runs[RUNS_AT_ONCE];

	while (*done < length) {
		size_t count = index_lookup(&image->index, offset + *done, offset + length, runs, RUNS_AT_ONCE);

		for (size_t i = 0; i < count; i++) {
			int error = 0;

			if (runs[i].kind == OB_RUN_DATA)
				error = file_try_read(image->files[runs[i].layer], runs[i].file_offset, buffer + *done, runs[i].length);
			else
				memset(buffer + *done, 0, runs[i].length);
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
		size_t count = index_lookup(&image->index, offset, end, runs, RUNS_AT_ONCE);

		for (size_t i = 0; i < count; i++) {
			if (runs[i].kind == OB_RUN_DATA)
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

int ob_image_read(struct ob_image *image, uint64_t offset, void *buffer, uint64_t length)
{
	struct image_read_call call = { .image = image, .offset = offset, .length = length, .buffer = buffer };

	if (!range_inside(offset, length, image->size))
		return status_set(EINVAL, "read image: %llu + %llu: past its end at %llu", (unsigned long long)offset,
		                  (unsigned long long)length, (unsigned long long)image->size);
	return parked_wait(image->engine, image_attempt, image_miss, &call);
}

/* ---- the map ---- */

int ob_image_runs(struct ob_image *image, uint64_t offset, uint64_t length, ob_run *runs, uint32_t max)
{
	struct run found[RUNS_AT_ONCE];
	uint64_t end = offset + length;
	uint32_t filled = 0;

	if (!range_inside(offset, length, image->size) || max < 1)
		return status_set(EINVAL, "map image: %llu + %llu: past its end at %llu", (unsigned long long)offset,
		                  (unsigned long long)length, (unsigned long long)image->size);
	while (offset < end) {
		size_t count = index_lookup(&image->index, offset, end, found, RUNS_AT_ONCE);

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
