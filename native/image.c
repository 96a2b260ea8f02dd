/* SPDX-License-Identifier: Apache-2.0
 * image.c: the main flow of a read: range -> runs -> layers.
 */
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "status.h"

enum {
	SECTOR = 512,
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

/* One run of a lookup, cut to the bytes that were asked for. */
struct piece {
	uint64_t offset, length;     /* in the image */
	uint64_t file_offset;        /* in the layer's file, for data */
	int kind, layer;
};

static size_t image_pieces(const struct ob_image *image, uint64_t offset, uint64_t length, struct piece *pieces)
{
	struct run runs[RUNS_AT_ONCE];
	uint64_t end = offset + length;
	size_t count = index_lookup(&image->index, offset / SECTOR, (end + SECTOR - 1) / SECTOR, runs, RUNS_AT_ONCE);

	for (size_t i = 0; i < count; i++) {
		uint64_t from = runs[i].offset_sectors * SECTOR;
		uint64_t to = from + runs[i].length_sectors * SECTOR;
		uint64_t skip = from < offset ? offset - from : 0;

		pieces[i] = (struct piece){
			.offset = from + skip,
			.length = (to < end ? to : end) - (from + skip),
			.file_offset = runs[i].moffset_sectors * SECTOR + skip,
			.kind = runs[i].kind,
			.layer = runs[i].layer,
		};
	}
	return count;
}

int image_read(struct ob_image *image, uint64_t offset, uint8_t *buffer, uint64_t length, uint64_t *done)
{
	struct piece pieces[RUNS_AT_ONCE];

	while (*done < length) {
		size_t count = image_pieces(image, offset + *done, length - *done, pieces);

		for (size_t i = 0; i < count; i++) {
			const struct piece *piece = &pieces[i];
			int error = 0;

			if (piece->kind == OB_RUN_DATA)
				error = file_try_read(image->files[piece->layer], piece->file_offset, buffer + *done, piece->length);
			else
				memset(buffer + *done, 0, piece->length);
			if (error)
				return error;
			*done += piece->length;
		}
	}
	return 0;
}

void image_want(struct ob_image *image, uint64_t offset, uint64_t length, struct parked *parked)
{
	struct piece pieces[RUNS_AT_ONCE];
	uint64_t end = offset + length;

	while (offset < end) {
		size_t count = image_pieces(image, offset, end - offset, pieces);

		for (size_t i = 0; i < count; i++) {
			if (pieces[i].kind == OB_RUN_DATA)
				file_want(image->files[pieces[i].layer], pieces[i].file_offset, pieces[i].length, parked);
			offset += pieces[i].length;
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

	if (offset > image->size || length > image->size - offset)
		return status_set(EINVAL, "read image: %llu + %llu: past its end at %llu", (unsigned long long)offset,
		                  (unsigned long long)length, (unsigned long long)image->size);
	return parked_wait(image->engine, image_attempt, image_miss, &call);
}

/* ---- the map ---- */

int ob_image_runs(struct ob_image *image, uint64_t offset, uint64_t length, ob_run *runs, uint32_t max)
{
	struct piece pieces[RUNS_AT_ONCE];
	uint64_t end;
	uint32_t filled = 0;

	if (offset > image->size || length > image->size - offset || max < 1)
		return status_set(EINVAL, "map image: %llu + %llu: past its end at %llu", (unsigned long long)offset,
		                  (unsigned long long)length, (unsigned long long)image->size);
	end = offset + length;
	while (offset < end) {
		size_t count = image_pieces(image, offset, end - offset, pieces);

		for (size_t i = 0; i < count; i++) {
			ob_run *last = filled ? &runs[filled - 1] : NULL;
			int layer = pieces[i].kind == OB_RUN_HOLE ? -1 : pieces[i].layer;

			if (last && last->kind == pieces[i].kind && last->layer == layer) {
				last->length += pieces[i].length;
			} else {
				if (filled == max)
					return (int)filled;
				runs[filled++] = (ob_run){ .offset = pieces[i].offset, .length = pieces[i].length,
				                           .kind = pieces[i].kind, .layer = layer };
			}
			offset += pieces[i].length;
		}
	}
	return (int)filled;
}
