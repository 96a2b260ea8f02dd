/* SPDX-License-Identifier: Apache-2.0
 * test_index.c: the merged index against a model that keeps one value for each sector.
 */
#include "index.h"

#include <errno.h>
#include <string.h>

#include "check.h"
#include "memory.h"
#include "random.h"

enum {
	DISK = 700,           /* sectors of the model's disk */
	DATA_SECTORS = 8000,  /* of each model layer's file */
	ROOM = 64             /* runs taken at one time */
};

static const struct segment padding = {(1ull << 50) - 1, 0};

static struct segment segment(uint64_t offset, uint64_t length, uint64_t moffset, int zeroed)
{
	return (struct segment){offset | length << 50, moffset | (uint64_t)zeroed << 55};
}

/* A table, and a layer that has it in a file of its own. */
struct table {
	struct segment *at;
	size_t count;
};

static void table_add(struct table *table, struct segment s)
{
	if ((table->count & (table->count - 1)) == 0)
		CHECK((table->at = realloc(table->at, (2 * table->count + 1) * sizeof(s))));
	table->at[table->count++] = s;
}

static ob_file *no_data;      /* DATA_SECTORS long; never read */
static ob_engine *engine;

static int add_layer(struct index *index, int kind, const struct table *table, uint64_t limit, uint32_t number)
{
	ob_file *file = memory_file(engine, table->at, table->count * sizeof(*table->at));
	ob_layer layer = {.kind = kind, .file = no_data, .index = file, .index_offset = 0, .index_count = table->count,
	                  .data_end = ob_file_size(no_data), .extent_limit = limit};
	int status = index_add_layer(index, &layer, number);

	ob_file_close(file);
	return status;
}

/* ---- against the model ---- */

struct place {
	int kind, layer;
	uint64_t moffset;
};

static void model_put(struct place *model, struct segment s, int layer)
{
	uint64_t offset = s.lo & ((1ull << 50) - 1), moffset = s.hi & ((1ull << 55) - 1);
	int zeroed = (int)(s.hi >> 55 & 1);

	for (uint64_t i = 0; i < s.lo >> 50; i++)
		model[offset + i] = (struct place){zeroed ? OB_RUN_ZERO : OB_RUN_DATA, layer, zeroed ? 0 : moffset + i};
}

/* Entries of one layer, with padding and tags that must not matter. */
static struct table random_layer(uint64_t *state, int kind, struct place *model, int number)
{
	struct table table = {0};
	uint64_t count = random_below(state, 40), at = 0;
	uint64_t reach = 1 + random_below(state, 60);

	for (uint64_t i = 0; i < count; i++) {
		uint64_t length = 1 + random_below(state, reach);
		uint64_t offset = kind == OB_LAYER_LOG ? random_below(state, DISK) : at + random_below(state, reach) * (i % 2);
		struct segment s = segment(offset, length, 8 + random_below(state, 4000), random_below(state, 4) == 0);

		/* often where the entry before it ends, in the layer too: to be joined */
		if (table.count > 0 && table.at[table.count - 1].lo >> 50 > 0 && random_below(state, 3) == 0)
			s.hi = (table.at[table.count - 1].hi & ~(0xffull << 56)) + (table.at[table.count - 1].lo >> 50);
		if (random_below(state, 8) == 0)
			table_add(&table, padding);
		if (kind == OB_LAYER_LOG && random_below(state, 8) == 0)
			table_add(&table, segment(offset, 0, 0, 0));
		if (offset + length > DISK)
			continue;
		at = offset + length;
		model_put(model, s, number);
		s.hi |= random_next(state) << 56;
		table_add(&table, s);
	}
	return table;
}

/* index_lookup() in sectors, as the tables count. */
struct sectors {
	uint64_t offset_sectors, length_sectors, moffset_sectors;
	int kind, layer;
};

static size_t lookup(const struct index *index, uint64_t first, uint64_t end, struct sectors *out, size_t max)
{
	struct run runs[ROOM];
	size_t count = index_lookup(index, first * 512, end * 512, runs, max);

	for (size_t i = 0; i < count; i++)
		out[i] = (struct sectors){runs[i].offset / 512, runs[i].length / 512, runs[i].file_offset / 512, runs[i].kind,
		                          runs[i].layer};
	return count;
}

static void check_lookup(const struct index *index, const struct place *model, uint64_t first, uint64_t end,
                         size_t max)
{
	struct sectors runs[ROOM];

	for (uint64_t at = first; at < end;) {
		size_t count = lookup(index, at, end, runs, max);

		CHECK(count >= 1 && count <= max);
		for (size_t i = 0; i < count; i++) {
			CHECK(runs[i].offset_sectors == at && runs[i].length_sectors > 0);
			for (uint64_t k = 0; k < runs[i].length_sectors; k++, at++) {
				CHECK(at < end);
				CHECK(runs[i].kind == model[at].kind && runs[i].layer == model[at].layer);
				CHECK(runs[i].kind != OB_RUN_DATA || runs[i].moffset_sectors + k == model[at].moffset);
			}
		}
		CHECK(count == max || at == end);
	}
}

static void check_sorted(const struct index *index)
{
	for (size_t i = 0; i < index->count; i++) {
		uint64_t offset = index->entries[i].lo & ((1ull << 50) - 1), length = index->entries[i].lo >> 50;

		CHECK(length > 0);
		CHECK(i + 1 == index->count || offset + length <= (index->entries[i + 1].lo & ((1ull << 50) - 1)));
	}
}

static void random_stacks_equal_the_model(void)
{
	uint64_t state = 1;

	for (int round = 0; round < 3000; round++) {
		struct place model[DISK];
		struct index index = {0};
		int layers = 1 + (int)random_below(&state, 6);

		for (int i = 0; i < DISK; i++)
			model[i] = (struct place){OB_RUN_HOLE, -1, 0};
		for (int i = 0; i < layers; i++) {
			int kind = random_below(&state, 2) ? OB_LAYER_LOG : OB_LAYER_SEALED;
			struct table table = random_layer(&state, kind, model, i);

			CHECK(add_layer(&index, kind, &table, DISK * 512, (uint32_t)i) == 0);
			free(table.at);
		}
		check_sorted(&index);
		check_lookup(&index, model, 0, DISK, ROOM);
		for (int i = 0; i < 10; i++) {
			uint64_t first = random_below(&state, DISK);

			check_lookup(&index, model, first, first + 1 + random_below(&state, DISK - first), 1 + (size_t)i);
		}
		index_free(&index);
	}
}

/* Many more entries than fit one chunk of a log, laid twice over one another. */
static void a_long_log_equals_the_model(void)
{
	enum { ENTRIES = 1300000, SPAN = 100000 };
	struct place *model = malloc(SPAN * sizeof(*model));
	struct table table = {0};
	struct index index = {0};
	uint64_t state = 2;

	for (size_t i = 0; i < SPAN; i++)
		model[i] = (struct place){OB_RUN_HOLE, -1, 0};
	for (int i = 0; i < ENTRIES; i++) {
		uint64_t length = 1 + random_below(&state, i % 1000 ? 3 : 900);
		struct segment s = segment(random_below(&state, SPAN - length), length, 8 + random_below(&state, 4000),
		                           random_below(&state, 9) == 0);

		model_put(model, s, 5);
		table_add(&table, s);
	}
	CHECK(add_layer(&index, OB_LAYER_LOG, &table, 0, 5) == 0);
	check_sorted(&index);
	check_lookup(&index, model, 0, SPAN, ROOM);
	index_free(&index);
	free(table.at);
	free(model);
}

/* Each entry inside the one before it: the worst case of replay. */
static void a_nested_log_is_not_quadratic(void)
{
	enum { DEPTH = 8000 };
	struct table table = {0};
	struct index index = {0};
	struct sectors runs[ROOM];

	for (int copy = 0; copy < 60; copy++)
		for (uint64_t i = 0; i < DEPTH; i++)
			table_add(&table, segment((uint64_t)copy * 16383 + i, 16383 - 2 * i, 8, 1));
	for (uint64_t i = 0; i < 300000; i++)
		table_add(&table, segment(i, 1 + 16382 * (i % 2), 8, 1));
	CHECK(add_layer(&index, OB_LAYER_LOG, &table, 0, 0) == 0);
	CHECK(lookup(&index, 0, 1000, runs, ROOM) == 1 && runs[0].kind == OB_RUN_ZERO);
	index_free(&index);
	free(table.at);
}

/* ---- large, and far out ---- */

static void a_million_entries_a_layer(void)
{
	enum { ENTRIES = 1000000 };
	struct table even = {0}, odd = {0};
	struct index index = {0};
	struct sectors run;

	for (uint64_t i = 0; i < ENTRIES; i++) {
		table_add(&even, segment(8 * i, 5, 8 + i % 1000, 0));
		table_add(&odd, segment(8 * i + 4, 4, 8 + i % 1000, 1));
	}
	CHECK(add_layer(&index, OB_LAYER_SEALED, &even, 0, 0) == 0);
	CHECK(add_layer(&index, OB_LAYER_SEALED, &odd, 0, 1) == 0);
	CHECK(index.count == 2 * ENTRIES);
	for (uint64_t i = 0; i < ENTRIES; i += 331) {
		CHECK(lookup(&index, 8 * i, 8 * i + 8, &run, 1) == 1);
		CHECK(run.kind == OB_RUN_DATA && run.length_sectors == 4 && run.moffset_sectors == 8 + i % 1000);
		CHECK(lookup(&index, 8 * i + 6, 8 * i + 8, &run, 1) == 1);
		CHECK(run.kind == OB_RUN_ZERO && run.length_sectors == 2 && run.layer == 1);
	}
	table_add(&even, padding);
	CHECK(add_layer(&index, OB_LAYER_SEALED, &even, 0, 2) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "more than 1000000"));
	index_free(&index);
	free(even.at);
	free(odd.at);
}

/* 255 layers of a million entries would be 4 GB. */
static void all_layers_together_are_limited(void)
{
	enum { ENTRIES = 1000000 };
	struct table table = {0};
	struct index index = {0};
	uint32_t layer = 0;
	int status = 0;

	for (uint64_t i = 0; i < ENTRIES; i++)
		table_add(&table, segment(0, 1, 8, 0));
	for (; status == 0 && layer < 20; layer++) {
		for (uint64_t i = 0; i < ENTRIES; i++)
			table.at[i] = segment(100 * i + 2 * layer, 1, 8, 0);
		status = add_layer(&index, OB_LAYER_SEALED, &table, 0, layer);
	}
	CHECK(status == -EBADMSG && layer == 6);
	CHECK(strstr(ob_last_error(), "more than 5000000"));
	index_free(&index);

	/* Also when each hides the one before: merging them would take minutes. */
	index.sealed = 0;
	for (layer = 0, status = 0; status == 0 && layer < 20; layer++)
		status = add_layer(&index, OB_LAYER_SEALED, &table, 0, layer);
	CHECK(status == -EBADMSG && layer == 6);
	index_free(&index);
	free(table.at);
}

static void addresses_past_two_tebibytes_are_exact(void)
{
	const uint64_t far = 3ull << 31, last = (1ull << 50) - 1; /* 3 TiB; the last sector there is */
	struct table table = {0};
	struct index index = {0};
	struct sectors runs[ROOM];

	table_add(&table, segment(0, 8, 8, 0));
	table_add(&table, segment(far, 16, 100, 0));
	table_add(&table, segment(last - 10, 11, 200, 0));
	CHECK(add_layer(&index, OB_LAYER_SEALED, &table, 0, 0) == 0);
	table.count = 0;
	table_add(&table, segment(far + 4, 2, 0x7f, 1));
	table_add(&table, segment(last - 10, 10, 0x7f, 1));
	CHECK(add_layer(&index, OB_LAYER_SEALED, &table, 0, 1) == 0);

	CHECK(lookup(&index, 1ull << 32, (1ull << 32) + 8, runs, ROOM) == 1); /* not sector 0 */
	CHECK(runs[0].kind == OB_RUN_HOLE);
	CHECK(lookup(&index, far - 5, far + 20, runs, ROOM) == 5);
	CHECK(runs[0].kind == OB_RUN_HOLE && runs[0].length_sectors == 5);
	CHECK(runs[1].kind == OB_RUN_DATA && runs[1].length_sectors == 4 && runs[1].moffset_sectors == 100);
	CHECK(runs[2].kind == OB_RUN_ZERO && runs[2].length_sectors == 2 && runs[2].layer == 1);
	CHECK(runs[3].kind == OB_RUN_DATA && runs[3].length_sectors == 10 && runs[3].moffset_sectors == 106);
	CHECK(runs[4].kind == OB_RUN_HOLE && runs[4].length_sectors == 4);
	CHECK(lookup(&index, last, last + 1, runs, ROOM) == 1);
	CHECK(runs[0].kind == OB_RUN_DATA && runs[0].offset_sectors == last && runs[0].moffset_sectors == 210);
	CHECK(lookup(&index, 0, last + 1, runs, ROOM) == 8);
	CHECK(lookup(&index, 5, 5, runs, ROOM) == 0);
	index_free(&index);
	free(table.at);
}

static void neighbours_that_continue_each_other_are_one_entry(void)
{
	struct table table = {0};
	struct index index = {0};

	for (uint64_t i = 0; i < 64; i++)
		table_add(&table, segment(64 * i, 64, 8 + 64 * i, 0));
	for (uint64_t i = 64; i < 80; i++)
		table_add(&table, segment(64 * i, 64, 8, 1));
	CHECK(add_layer(&index, OB_LAYER_SEALED, &table, 0, 0) == 0);
	CHECK(index.count == 2);
	index_free(&index);
	free(table.at);
}

static void a_flat_layer_maps_itself(void)
{
	struct index index = {0};
	struct sectors runs[ROOM];
	size_t size = 40000 * 512 + 1;
	void *zeros = calloc(1, size);
	ob_file *file = memory_file(engine, zeros, size);
	ob_layer layer = {.kind = OB_LAYER_FLAT, .file = file};
	uint64_t at = 0;

	CHECK(index_add_layer(&index, &layer, 3) == 0);
	size_t count = lookup(&index, 0, 40010, runs, ROOM);
	for (size_t i = 0; i + 1 < count; i++) {
		CHECK(runs[i].offset_sectors == at && runs[i].moffset_sectors == at);
		CHECK(runs[i].kind == OB_RUN_DATA && runs[i].layer == 3);
		at += runs[i].length_sectors;
	}
	CHECK(at == 40001 && runs[count - 1].kind == OB_RUN_HOLE);
	index_free(&index);
	ob_file_close(file);
	free(zeros);
}

/* ---- hostile ---- */

static int add_one(int kind, struct segment s, uint64_t limit)
{
	struct table table = {0};
	struct index index = {0};

	table_add(&table, segment(0, 1, 8, 0));
	table_add(&table, s);
	int status = add_layer(&index, kind, &table, limit, 0);
	CHECK(status == 0 || (status == -EBADMSG && strstr(ob_last_error(), "index entry 1:")));
	index_free(&index);
	free(table.at);
	return status;
}

static void entries_outside_their_bounds_are_refused(void)
{
	const uint64_t top = (1ull << 50) - 1;

	for (int kind = OB_LAYER_SEALED; kind <= OB_LAYER_LOG; kind++) {
		CHECK(add_one(kind, segment(10, 5, 8, 0), 0) == 0);
		CHECK(add_one(kind, segment(10, 5, 7, 0), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(10, 5, DATA_SECTORS - 5, 0), 0) == 0);
		CHECK(add_one(kind, segment(10, 5, DATA_SECTORS - 4, 0), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(10, 5, (1ull << 55) - 1, 0), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(10, 5, 7, 1), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(10, 5, DATA_SECTORS, 1), 0) == 0);
		CHECK(add_one(kind, segment(10, 5, DATA_SECTORS + 1, 1), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(10, 5, 8, 0), 15 * 512) == 0);
		CHECK(add_one(kind, segment(10, 5, 8, 0), 15 * 512 - 1) == -EBADMSG);
		CHECK(add_one(kind, segment(top - 1, 2, 8, 0), 0) == 0);
		CHECK(add_one(kind, segment(top - 1, 3, 8, 0), 0) == -EBADMSG);
		CHECK(add_one(kind, segment(top - 1, 16383, 8, 1), 0) == -EBADMSG);
	}
	CHECK(add_one(OB_LAYER_SEALED, segment(10, 0, 8, 0), 0) == -EBADMSG);
	CHECK(add_one(OB_LAYER_SEALED, segment(0, 1, 8, 0), 0) == -EBADMSG);
	CHECK(add_one(OB_LAYER_LOG, segment(10, 0, 0, 0), 0) == 0);
	CHECK(add_one(OB_LAYER_LOG, segment(0, 1, 8, 0), 0) == 0);
}

static void layers_outside_their_files_are_refused(void)
{
	struct segment entries[4] = {segment(0, 1, 8, 0), padding, padding, padding};
	ob_file *file = memory_file(engine, entries, sizeof(entries));
	const ob_layer good = {.kind = OB_LAYER_SEALED, .file = no_data, .index = file, .index_count = 4,
	                       .data_end = ob_file_size(no_data)};

#define REFUSED(field, value, error) do { \
		struct index index = {0}; \
		ob_layer layer = good; \
		layer.field = (value); \
		CHECK(index_add_layer(&index, &layer, 0) == -(error)); \
		index_free(&index); \
	} while (0)
	for (int kind = OB_LAYER_SEALED; kind <= OB_LAYER_LOG; kind++) {
		REFUSED(index_count, 5, EBADMSG);
		REFUSED(index_count, UINT64_MAX, EBADMSG);
		REFUSED(index_count, 128000001, EBADMSG);
		REFUSED(index_offset, 1, EBADMSG);
		REFUSED(index_offset, UINT64_MAX, EBADMSG);
		REFUSED(data_end, ob_file_size(no_data) + 1, EBADMSG);
		REFUSED(data_end, UINT64_MAX, EBADMSG);
		REFUSED(data_end, 0, EBADMSG);
	}
	REFUSED(kind, 3, EINVAL);
#undef REFUSED
	struct index index = {0};
	CHECK(index_add_layer(&index, &good, 0) == 0 && index.count == 1);
	CHECK(index_add_layer(&index, &good, OB_LAYERS_MAX) == -EINVAL);
	index_free(&index);
	ob_file_close(file);
}

/* Any bytes for a table: refused, or an index that answers every lookup. */
static void rubbish_is_answered(void)
{
	uint64_t state = 9;

	for (int round = 0; round < 4000; round++) {
		struct index index = {0};
		struct sectors runs[ROOM];
		int status = 0;

		for (uint32_t layer = 0; status == 0 && layer < 4; layer++) {
			struct table table = {0};
			uint64_t offset = 0;

			for (uint64_t n = random_below(&state, 12); n > 0; n--) {
				offset = random_below(&state, 3) ? offset + random_below(&state, 40000) : random_next(&state) >> 14;
				struct segment s = segment(offset & padding.lo, random_below(&state, 16384), random_below(&state, 8100), 0);

				s.hi |= random_next(&state) << 55;
				if (random_below(&state, 30) == 0)
					(random_below(&state, 2) ? &s.lo : &s.hi)[0] ^= random_next(&state);
				table_add(&table, s);
			}
			status = add_layer(&index, random_below(&state, 2) ? OB_LAYER_LOG : OB_LAYER_SEALED, &table, 0, layer);
			CHECK(status == 0 || status == -EBADMSG);
			free(table.at);
		}
		if (status == 0) {
			check_sorted(&index);
			for (uint64_t at = 0; at < 1ull << 50;) {
				size_t count = lookup(&index, at, 1ull << 50, runs, ROOM);

				CHECK(count > 0 && runs[0].offset_sectors == at);
				at = runs[count - 1].offset_sectors + runs[count - 1].length_sectors;
			}
		}
		index_free(&index);
	}
}

int main(void)
{
	void *zeros = calloc(DATA_SECTORS, 512);

	engine = memory_engine();
	no_data = memory_file(engine, zeros, DATA_SECTORS * 512);
	free(zeros);
	random_stacks_equal_the_model();
#ifndef __SANITIZE_THREAD__ /* one thread builds an index: nothing to see in the large cases */
	a_long_log_equals_the_model();
	a_nested_log_is_not_quadratic();
	a_million_entries_a_layer();
	all_layers_together_are_limited();
#endif
	addresses_past_two_tebibytes_are_exact();
	neighbours_that_continue_each_other_are_one_entry();
	a_flat_layer_maps_itself();
	entries_outside_their_bounds_are_refused();
	layers_outside_their_files_are_refused();
	rubbish_is_answered();
	ob_file_close(no_data);
	ob_engine_close(engine);
	return 0;
}
