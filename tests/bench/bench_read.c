/* SPDX-License-Identifier: Apache-2.0
 * bench_read.c: warm reads of one image in process, against a bare loop over its blocks.
 *
 *   bench_read FILE [--json] [--mib N] [--rounds N] [--only CODEC BLOCK] [--dir DIR]
 *
 * The first N MiB of FILE become a layer as `ociblk import` writes it (holes left out,
 * ZFile blocks with CRC), stored in a cache entry in DIR. The bare loop has the stored
 * blocks in memory and does to each what must be done: CRC32C, then decompression with a
 * kept context, into one 1 MiB buffer. Both take the blocks in the same order, in turns;
 * the time is that of the reading threads' CPUs, the median of the rounds. A 4 KiB read
 * from a larger block is a whole block to both.
 *
 * One line for each cell: bytes/s of sequential reads, ns for each 4 KiB random read, ours
 * and the loop's with its range; `ratio` is ours / the loop's.
 */
#include <endian.h>
#include <fcntl.h>
#include <lz4.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

#include "../native/check.h"
#include "../native/random.h"
#include "codec.h"

enum {
	PAGE = 4096,
	PIECE = 1 << 20,             /* of a sequential read */
	THREADS = 2,
	ROUNDS_MAX = 99,
	HEAD = 4096,                 /* of a layer file: its data begin behind it */
	SEGMENT = 16376 / 8 * PAGE   /* longest mapping, in whole pages */
};

struct options {
	const char *file, *dir, *codec;
	uint32_t block_size;
	size_t mib;
	int rounds;
	bool json;
};

/* A mapping as on disk (overlaybd.md 1.2). */
struct entry {
	uint64_t lo, hi;
};

/* The disk as one compressed layer, in memory and behind an image. */
struct layer {
	int codec;
	uint32_t block_size;
	uint8_t *plain;              /* header page, then the disk's pages that are not zero */
	uint64_t *places;            /* of each such page on the disk */
	size_t pages;
	struct entry *entries;
	size_t entry_count;
	uint64_t disk_size;
	uint8_t *stored;             /* blocks, each with its CRC, one after the other */
	uint64_t *starts;            /* of block i in stored; one more than blocks */
	size_t blocks;
	ob_blob *blob;
	ob_image *image;
};

/* ---- content ---- */

static void *must(void *memory)
{
	CHECK(memory);
	return memory;
}

static void layer_load(struct layer *layer, const struct options *options)
{
	int fd = open(options->file, O_RDONLY);
	struct stat stat;
	uint64_t end;

	CHECK(fd >= 0 && fstat(fd, &stat) == 0);
	size_t size = options->mib << 20;
	if (!size || size > (size_t)stat.st_size)
		size = (size_t)stat.st_size / PIECE * PIECE;
	CHECK(size >= PIECE);
	layer->disk_size = size;
	layer->plain = must(calloc(1, HEAD + size));
	layer->places = must(malloc(size / PAGE * sizeof(*layer->places)));
	layer->entries = must(malloc(size / PAGE * sizeof(*layer->entries)));
	for (uint64_t at = 0; at < size; at += PAGE) {
		uint8_t *page = layer->plain + HEAD + layer->pages * PAGE;

		CHECK(pread(fd, page, PAGE, (off_t)at) == PAGE);
		if (ob_zero_run(page, PAGE, PAGE, &end) == 0)
			continue;
		struct entry *last = layer->pages ? &layer->entries[layer->entry_count - 1] : NULL;
		if (last && layer->places[layer->pages - 1] + PAGE == at && last->lo >> 50 < SEGMENT / 512)
			last->lo += (uint64_t)PAGE / 512 << 50;
		else
			layer->entries[layer->entry_count++] = (struct entry){at / 512 | (uint64_t)PAGE / 512 << 50,
			                                                      (HEAD + layer->pages * PAGE) / 512};
		layer->places[layer->pages++] = at;
	}
	close(fd);
	CHECK(layer->pages > 0);
}

static int scratch_file(const char *dir)
{
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	return fd;
}

/* A cache entry that holds everything. */
static ob_blob *filled_blob(ob_engine *engine, const struct layer *layer, const char *dir, uint64_t length)
{
	ob_blob_config config = {.id = 1, .size = length, .table_offset = PAGE};
	int data = scratch_file(dir), map = scratch_file(dir);
	ob_blob *blob;

	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	CHECK(ob_blob_store(blob, 0, layer->stored, length) >= 0);
	close(data);
	close(map);
	return blob;
}

static void layer_open(struct layer *layer, ob_engine *engine, const char *dir)
{
	size_t plain = HEAD + layer->pages * PAGE;
	layer->blocks = (plain + layer->block_size - 1) / layer->block_size;
	uint32_t *lengths = must(malloc(layer->blocks * sizeof(*lengths)));
	uint64_t bound = ob_zfile_bound(layer->codec, layer->block_size, plain), table = layer->blocks * sizeof(*lengths);

	layer->stored = must(malloc(bound + table));
	int64_t body = ob_zfile_compress(layer->codec, layer->block_size, 1, layer->plain, plain, layer->stored, bound, lengths);
	CHECK(body > 0);
	layer->starts = must(malloc((layer->blocks + 1) * sizeof(*layer->starts)));
	layer->starts[0] = 0;
	for (size_t i = 0; i < layer->blocks; i++) {
		layer->starts[i + 1] = layer->starts[i] + lengths[i];
		lengths[i] = htole32(lengths[i]);
	}
	memcpy(layer->stored + body, lengths, table);

	ob_zfile_head head = {.length = (uint64_t)body + table, .index_offset = (uint64_t)body,
	                      .block_count = layer->blocks, .plain_size = plain, .block_size = layer->block_size,
	                      .codec = layer->codec, .block_crc = 1};
	ob_blob *blob = layer->blob = filled_blob(engine, layer, dir, head.length), *index_blob;
	ob_file *file, *index;
	int fd = scratch_file(dir);
	size_t index_size = layer->entry_count * sizeof(*layer->entries);

	CHECK(write(fd, layer->entries, index_size) == (ssize_t)index_size);
	CHECK(ob_blob_open_local(engine, fd, index_size, &index_blob) == 0);
	CHECK(ob_file_open_raw(index_blob, 0, index_size, &index) == 0);
	CHECK(ob_file_open_zfile(blob, &head, &file) == 0);
	ob_layer lower = {.kind = OB_LAYER_SEALED, .file = file, .index = index, .index_count = layer->entry_count,
	                  .data_end = plain, .extent_limit = layer->disk_size};
	CHECK(ob_image_open(engine, &lower, 1, layer->disk_size, &layer->image) == 0);
	ob_file_close(file);
	ob_file_close(index);
	ob_blob_close(index_blob);
	close(fd);
	free(lengths);
}

static void layer_close(struct layer *layer)
{
	ob_image_close(layer->image);
	ob_blob_close(layer->blob);
	free(layer->stored);
	free(layer->starts);
}

/* ---- contestants ---- */

/* One thread's part: [first, end) of the disk's pieces, or of the shuffled pages. */
struct part {
	const struct layer *layer;
	const uint32_t *order;       /* of pages; NULL: sequential */
	size_t first, end;
	bool bare;
	double seconds;              /* CPU time it took */
	uint8_t *buffer;             /* PIECE bytes */
};

static void bare_block(const struct part *part, ZSTD_DCtx *context, size_t block, uint8_t *out)
{
	const struct layer *layer = part->layer;
	const uint8_t *in = layer->stored + layer->starts[block];
	size_t packed = layer->starts[block + 1] - layer->starts[block] - sizeof(uint32_t);
	uint32_t crc;

	memcpy(&crc, in + packed, sizeof(crc));
	CHECK(ob_crc32c(CODEC_CRC_SEED, in, packed) == le32toh(crc));
	if (context)
		CHECK(!ZSTD_isError(ZSTD_decompressDCtx(context, out, layer->block_size, in, packed)));
	else
		CHECK(LZ4_decompress_safe((const char *)in, (char *)out, (int)packed, (int)layer->block_size) > 0);
}

static void bare_run(const struct part *part, ZSTD_DCtx *context)
{
	const struct layer *layer = part->layer;
	uint32_t shift = (uint32_t)__builtin_ctz(layer->block_size);

	if (part->order) {
		for (size_t i = part->first; i < part->end; i++)
			bare_block(part, context, (HEAD + (size_t)part->order[i] * PAGE) >> shift, part->buffer);
		return;
	}
	for (size_t block = part->first; block < part->end; block++)
		bare_block(part, context, block, part->buffer + ((block << shift) & (PIECE - 1)));
}

static void our_run(const struct part *part)
{
	const struct layer *layer = part->layer;

	if (part->order) {
		for (size_t i = part->first; i < part->end; i++)
			CHECK(ob_image_read(layer->image, layer->places[part->order[i]], part->buffer, PAGE) == 0);
		return;
	}
	for (size_t piece = part->first; piece < part->end; piece++)
		CHECK(ob_image_read(layer->image, piece * PIECE, part->buffer, PIECE) == 0);
}

static double cpu_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *part_run(void *argument)
{
	struct part *part = argument;
	ZSTD_DCtx *context = part->bare && part->layer->codec == OB_CODEC_ZSTD ? must(ZSTD_createDCtx()) : NULL;

	memset(part->buffer, 0, PIECE);
	double start = cpu_seconds();
	if (part->bare)
		bare_run(part, context);
	else
		our_run(part);
	part->seconds = cpu_seconds() - start;
	ZSTD_freeDCtx(context);
	return NULL;
}

/* CPU seconds of all threads together for the whole disk, or for every page once. */
static double contest(const struct layer *layer, const uint32_t *order, int threads, bool bare, uint8_t **buffers)
{
	struct part parts[THREADS];
	pthread_t ids[THREADS];
	size_t total = order ? layer->pages : bare ? layer->blocks : layer->disk_size / PIECE;
	double seconds = 0;

	for (int i = 0; i < threads; i++) {
		parts[i] = (struct part){.layer = layer, .order = order, .first = total * (size_t)i / (size_t)threads,
		                         .end = total * (size_t)(i + 1) / (size_t)threads, .bare = bare, .buffer = buffers[i]};
		CHECK(pthread_create(&ids[i], NULL, part_run, &parts[i]) == 0);
	}
	for (int i = 0; i < threads; i++) {
		CHECK(pthread_join(ids[i], NULL) == 0);
		seconds += parts[i].seconds;
	}
	return seconds;
}

/* ---- cells ---- */

static int ascending(const void *a, const void *b)
{
	double left = *(const double *)a, right = *(const double *)b;

	return (left > right) - (left < right);
}

/* What the CPU seconds of a contest say: bytes/s of sequential reads, ns of a random one. */
static double figure(const struct layer *layer, const uint32_t *order, int threads, double seconds)
{
	double pages = (double)layer->pages;

	return order ? seconds / pages * 1e9 : pages * PAGE * threads / seconds;
}

static void cell(const struct layer *layer, const struct options *options, const uint32_t *order, int threads,
                 uint8_t **buffers)
{
	const char *codec = layer->codec == OB_CODEC_LZ4 ? "lz4" : "zstd";
	double times[2][ROUNDS_MAX];

	for (int round = 0; round < options->rounds; round++)
		for (int turn = 0; turn < 2; turn++) {
			bool bare = (round + turn) % 2;
			times[bare][round] = contest(layer, order, threads, bare, buffers);
		}
	for (int i = 0; i < 2; i++)
		qsort(times[i], (size_t)options->rounds, sizeof(double), ascending);

	const double *bare = times[1];
	int last = options->rounds - 1, middle = options->rounds / 2;
	double ours = figure(layer, order, threads, times[0][middle]), loop = figure(layer, order, threads, bare[middle]);
	double first = figure(layer, order, threads, bare[0]), slowest = figure(layer, order, threads, bare[last]);
	const char *format = options->json
		? "{\"read\": \"%s\", \"codec\": \"%s\", \"block\": %u, \"threads\": %d, \"unit\": \"%s\", "
		  "\"ours\": %.0f, \"bare\": %.0f, \"bare_range\": [%.0f, %.0f], \"ratio\": %.3f}\n"
		: "%-10s %-4s block %5u, %d thread(s), %s: ours %.0f, bare %.0f (%.0f to %.0f), ratio %.3f\n";

	printf(format, order ? "random" : "sequential", codec, layer->block_size, threads, order ? "ns/read" : "bytes/s", ours,
	       loop, first < slowest ? first : slowest, first < slowest ? slowest : first, ours / loop);
	fflush(stdout);
}

static void layer_bench(struct layer *layer, const struct options *options, const uint32_t *order, uint8_t **buffers)
{
	ob_engine_config config = {.work_threads = 1, .fetch_bytes = 1 << 20};
	ob_engine *engine;

	CHECK(ob_engine_open(&config, &engine) == 0);
	layer_open(layer, engine, options->dir);
	/* A fast wrong answer is a failure; and what is stored gets checked once. */
	for (size_t i = 0; i < layer->pages; i++) {
		CHECK(ob_image_read(layer->image, layer->places[i], buffers[0], PAGE) == 0);
		CHECK(memcmp(buffers[0], layer->plain + HEAD + i * PAGE, PAGE) == 0);
	}
	for (int threads = 1; threads <= THREADS; threads++) {
		cell(layer, options, NULL, threads, buffers);
		cell(layer, options, order, threads, buffers);
	}
	layer_close(layer);
	ob_engine_close(engine);
}

static uint32_t *shuffled(size_t count)
{
	uint32_t *order = must(malloc(count * sizeof(*order)));
	uint64_t seed = 1;

	for (size_t i = 0; i < count; i++) {
		size_t other = random_below(&seed, i + 1);

		order[i] = order[other];
		order[other] = (uint32_t)i;
	}
	return order;
}

static struct options parse(int count, char **words)
{
	struct options options = {.dir = "/tmp", .mib = 256, .rounds = 5};

	for (int i = 1; i < count; i++) {
		const char *word = words[i], *value = i + 1 < count ? words[i + 1] : "0";

		if (!strcmp(word, "--json"))
			options.json = true;
		else if (!strcmp(word, "--mib"))
			options.mib = strtoul(value, NULL, 10), i++;
		else if (!strcmp(word, "--rounds"))
			options.rounds = atoi(value), i++;
		else if (!strcmp(word, "--dir"))
			options.dir = value, i++;
		else if (!strcmp(word, "--only") && i + 2 < count)
			options.codec = value, options.block_size = (uint32_t)atoi(words[i + 2]), i += 2;
		else
			options.file = word;
	}
	return options;
}

int main(int count, char **words)
{
	static const struct { int codec; const char *name; uint32_t block_size; } shapes[] = {
		{OB_CODEC_LZ4, "lz4", 4096}, {OB_CODEC_LZ4, "lz4", 16384},
		{OB_CODEC_ZSTD, "zstd", 4096}, {OB_CODEC_ZSTD, "zstd", 16384}};
	struct options options = parse(count, words);
	struct layer layer = {0};
	uint8_t *buffers[THREADS];

	if (!options.file || options.rounds < 1 || options.rounds > ROUNDS_MAX) {
		fprintf(stderr, "usage: bench_read FILE [--json] [--mib N] [--rounds N] [--only CODEC BLOCK] [--dir DIR]\n");
		return 2;
	}
	layer_load(&layer, &options);
	for (int i = 0; i < THREADS; i++)
		buffers[i] = must(aligned_alloc(PAGE, PIECE));
	uint32_t *order = shuffled(layer.pages);
	for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		if (options.codec && (strcmp(options.codec, shapes[i].name) || options.block_size != shapes[i].block_size))
			continue;
		layer.codec = shapes[i].codec;
		layer.block_size = shapes[i].block_size;
		layer_bench(&layer, &options, order, buffers);
	}
	for (int i = 0; i < THREADS; i++)
		free(buffers[i]);
	free(order);
	free(layer.plain);
	free(layer.places);
	free(layer.entries);
	return 0;
}
