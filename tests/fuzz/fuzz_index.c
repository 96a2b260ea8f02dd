/* SPDX-License-Identifier: Apache-2.0
 * fuzz_index.c: stacks of layers with hostile tables. What opens must read as the layers
 * say when they are asked one sector at a time, the top one first.
 *
 * Input: layers, size of the image, then for each layer its kind, bounds and entries.
 */
#include "fuzz.h"

enum {
	SECTOR = 512,
	LAYERS = 5,
	ENTRIES = 1024,          /* of one layer */
	DATA_SECTORS = 3000,     /* of the file behind all layers */
	STEPS = 512,             /* runs of a map that are compared */
	RUNS = 7                 /* taken at one time */
};

static const uint64_t PADDING = ((uint64_t)1 << 50) - 1;

struct entry {
	uint64_t lo, hi;
};

struct model {
	int kind;
	uint32_t count;
	struct entry entries[ENTRIES];
};

struct place {
	int kind, layer;
	uint64_t moffset;
};

static ob_engine *engine;
static ob_file *data;
static struct model models[LAYERS];

static void start(void)
{
	static uint8_t sectors[DATA_SECTORS * SECTOR];

	engine = memory_engine();
	content_fill(sectors, 0, sizeof(sectors));
	data = memory_file(engine, sectors, sizeof(sectors));
}

/* Mostly an entry that a writer could have written after the one before; else any bytes. */
static struct entry take_entry(struct tape *tape, int kind, uint64_t *end)
{
	uint64_t how = take(tape, 1), offset, length, moffset;

	if (how >= 240)
		return (struct entry){take(tape, 8), take(tape, 8)};
	if (how >= 232)
		return (struct entry){PADDING, take(tape, 1)};
	offset = kind == OB_LAYER_LOG ? take(tape, how & 2 ? 2 : 1) : *end + take(tape, how & 2 ? 2 : 1);
	length = take(tape, how & 4 ? 2 : 1) & 16383;
	moffset = 8 + take(tape, how & 8 ? 2 : 1);
	*end = offset + length;
	return (struct entry){(offset & PADDING) | length << 50, moffset | (how & 1) << 55 | (how >> 4) << 56};
}

/* Returns what the layer's table file must be closed with. */
static ob_file *take_layer(struct tape *tape, struct model *model, ob_layer *layer)
{
	uint64_t how = take(tape, 1), end = 0;
	ob_file *table;

	model->kind = how % 4;
	model->count = (uint32_t)take(tape, how & 16 ? 2 : 1) % ENTRIES;
	for (uint32_t i = 0; i < model->count; i++)
		model->entries[i] = take_entry(tape, model->kind, &end);
	table = memory_file(engine, model->entries, model->count * sizeof(struct entry));
	*layer = (ob_layer){.kind = model->kind, .file = data, .index = table, .index_count = model->count,
	                    .data_end = DATA_SECTORS * SECTOR};
	if (how & 4)
		layer->data_end = take(tape, 3);
	if (how & 8)
		layer->extent_limit = take(tape, 4) * SECTOR;
	if (how & 32)
		layer->index_offset = take(tape, 8);
	if (how & 64)
		layer->index_count = take(tape, 8);
	return table;
}

static struct place ask_layer(const struct model *model, int number, uint64_t sector)
{
	if (model->kind == OB_LAYER_FLAT)
		return (struct place){sector < DATA_SECTORS ? OB_RUN_DATA : OB_RUN_HOLE, number, sector};
	for (uint32_t i = model->count; i-- > 0;) {
		struct entry e = model->entries[i];
		uint64_t offset = e.lo & PADDING, moffset = e.hi & (((uint64_t)1 << 55) - 1);

		if (offset == PADDING || sector < offset || sector - offset >= e.lo >> 50)
			continue;
		if (e.hi >> 55 & 1)
			return (struct place){OB_RUN_ZERO, number, 0};
		return (struct place){OB_RUN_DATA, number, moffset + (sector - offset)};
	}
	return (struct place){OB_RUN_HOLE, -1, 0};
}

static struct place ask(uint32_t layers, uint64_t sector)
{
	struct place place = {OB_RUN_HOLE, -1, 0};

	for (uint32_t i = layers; place.kind == OB_RUN_HOLE && i-- > 0;)
		place = ask_layer(&models[i], (int)i, sector);
	if (place.kind == OB_RUN_HOLE)
		place.layer = -1;
	return place;
}

/* The bytes [offset, offset + length), which lie in one sector. */
static void check_bytes(ob_image *image, uint32_t layers, uint64_t offset, uint64_t length)
{
	struct place place = ask(layers, offset / SECTOR);
	uint8_t got[SECTOR], expected[SECTOR] = {0};

	CHECK(ob_image_read(image, offset, got, length) == 0);
	if (place.kind == OB_RUN_DATA)
		content_fill(expected, place.moffset * SECTOR + offset % SECTOR, length);
	CHECK(memcmp(got, expected, length) == 0);
}

static void check_run(ob_image *image, uint32_t layers, const ob_run *run)
{
	uint64_t end = run->offset + run->length, places[] = {run->offset, (end - 1) / SECTOR * SECTOR};

	for (int i = 0; i < 2; i++) {
		uint64_t from = places[i] < run->offset ? run->offset : places[i];
		struct place place = ask(layers, from / SECTOR);

		CHECK(place.kind == run->kind && place.layer == run->layer);
		check_bytes(image, layers, from, end - from < SECTOR - from % SECTOR ? end - from : SECTOR - from % SECTOR);
	}
}

static void check_image(ob_image *image, uint32_t layers, uint64_t from)
{
	uint64_t size = ob_image_size(image), at = size ? from % size : 0;
	ob_run runs[RUNS];

	for (int step = 0; at < size && step < STEPS; step++) {
		int count = ob_image_runs(image, at, size - at, runs, 1 + (uint32_t)step % RUNS);

		CHECK(count >= 1 && count <= RUNS);
		for (int i = 0; i < count; i++) {
			CHECK(runs[i].offset == at && runs[i].length > 0);
			check_run(image, layers, &runs[i]);
			at += runs[i].length;
		}
		CHECK(at <= size);
	}
	CHECK(ob_image_read(image, size, NULL, 0) == 0);
	CHECK(ob_image_runs(image, size, 1, runs, RUNS) < 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = {input, length};
	uint64_t how = take(&tape, 1), size = take(&tape, how & 8 ? 7 : 3), from = take(&tape, how & 16 ? 7 : 0);
	uint32_t count = 1 + how % LAYERS;
	ob_file *tables[LAYERS];
	ob_layer layers[LAYERS];
	ob_image *image;

	if (!engine)
		start();
	for (uint32_t i = 0; i < count; i++)
		tables[i] = take_layer(&tape, &models[i], &layers[i]);
	if (ob_image_open(engine, layers, count, size, &image) == 0) {
		/* A table that was asked for elsewhere than it is is only read, not judged. */
		uint64_t judged = 1;

		for (uint32_t i = 0; i < count; i++)
			judged &= layers[i].kind == OB_LAYER_FLAT
			          || (layers[i].index_offset == 0 && layers[i].index_count == models[i].count);
		if (judged)
			check_image(image, count, from);
		ob_image_close(image);
	}
	for (uint32_t i = 0; i < count; i++)
		ob_file_close(tables[i]);
	return 0;
}
