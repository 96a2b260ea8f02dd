/* SPDX-License-Identifier: Apache-2.0
 * test_zfile.c: ZFiles of every shape read as their plain bytes; wrong ones are refused.
 */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "codec.h"
#include "memory.h"
#include "random.h"

enum {
	BASE = 1536,          /* the ZFile begins inside the blob, as behind a tar header */
	DATA = 512,           /* of block 0 in the ZFile */
	TABLE_OFFSET = 4096   /* of the presence table */
};

struct shape {
	int codec;
	uint32_t block_size;
	int block_crc;
	size_t plain_size;
};

/* A ZFile in memory. */
struct made {
	uint8_t *plain, *blob;
	size_t blob_size;
	uint32_t *lengths;
	ob_zfile_head head;
};

static struct made make(const struct shape *shape, uint64_t seed)
{
	struct made m = {.head = {.base = BASE, .data_offset = DATA, .plain_size = shape->plain_size,
	                          .block_size = shape->block_size, .codec = shape->codec,
	                          .block_crc = shape->block_crc, .check_index = 1}};
	ob_zfile_head *h = &m.head;
	uint64_t bound = ob_zfile_bound(shape->codec, shape->block_size, shape->plain_size);
	uint8_t *stored = malloc(bound + 1);

	h->block_count = (shape->plain_size + shape->block_size - 1) / shape->block_size;
	m.plain = malloc(shape->plain_size + 1);
	m.lengths = calloc(h->block_count + 1, sizeof(*m.lengths));
	random_bytes(&seed, m.plain, shape->plain_size);
	int64_t total = ob_zfile_compress(shape->codec, shape->block_size, shape->block_crc, m.plain, shape->plain_size,
	                                  stored, bound, m.lengths);
	CHECK(total >= 0);
	h->index_offset = DATA + (uint64_t)total;
	h->length = h->index_offset + h->block_count * 4 + 512;
	h->index_crc = ob_crc32c(0, m.lengths, h->block_count * 4);
	m.blob_size = BASE + h->length;
	m.blob = calloc(1, m.blob_size);
	memcpy(m.blob + BASE + DATA, stored, (size_t)total);
	memcpy(m.blob + BASE + h->index_offset, m.lengths, h->block_count * 4);
	free(stored);
	return m;
}

static void made_free(struct made *m)
{
	free(m->plain);
	free(m->blob);
	free(m->lengths);
}

static int made_open(ob_engine *engine, const struct made *m, ob_file **out)
{
	ob_blob *blob = memory_blob(engine, m->blob, m->blob_size);
	int status = ob_file_open_zfile(blob, &m->head, out);

	ob_blob_close(blob);
	return status;
}

static void check_read(ob_file *file, const struct made *m, uint64_t offset, uint64_t length)
{
	uint8_t *out = malloc(length + 1);

	memset(out, 0xA5, length + 1);
	CHECK(ob_file_read(file, offset, out, length) == 0);
	CHECK(memcmp(out, m->plain + offset, length) == 0);
	CHECK(out[length] == 0xA5);
	free(out);
}

/* ---- right ones ---- */

static void every_range_reads_as_the_plain_bytes(ob_engine *engine, const struct shape *shape)
{
	struct made m = make(shape, shape->block_size + shape->plain_size);
	uint64_t state = 1, size = shape->plain_size;
	ob_file *file;

	CHECK(made_open(engine, &m, &file) == 0);
	CHECK(ob_file_size(file) == size);
	check_read(file, &m, 0, size);
	check_read(file, &m, size, 0);
	for (int i = 0; i < 60 && size > 0; i++) {
		uint64_t offset = random_below(&state, size);

		check_read(file, &m, offset, 1 + random_below(&state, size - offset));
	}
	/* as a sequential reader whose requests do not end where blocks do */
	for (uint64_t offset = 0, step = shape->block_size / 3 + 1; offset + step <= size; offset += step)
		check_read(file, &m, offset, step);
	CHECK(ob_file_read(file, size, m.plain, 1) == -EINVAL);
	CHECK(ob_file_read(file, 1, m.plain, size) == -EINVAL);
	CHECK(ob_file_read(file, UINT64_MAX, m.plain, 2) == -EINVAL);
	ob_file_close(file);
	made_free(&m);
}

static void all_shapes(ob_engine *engine)
{
	static const int codecs[] = {OB_CODEC_LZ4, OB_CODEC_ZSTD};

	for (int i = 0; i < 2; i++)
		for (uint32_t bs = CODEC_BLOCK_MIN; bs <= CODEC_BLOCK_MAX; bs *= 2)
			for (int crc = 0; crc <= 1; crc++) {
				size_t sizes[] = {0, 1, bs - 1, bs, bs + 1, 300007, 3 * (size_t)bs};

				for (size_t k = 0; k < sizeof(sizes) / sizeof(*sizes); k++)
					every_range_reads_as_the_plain_bytes(engine, &(struct shape){codecs[i], bs, crc, sizes[k]});
			}
}

static void two_files_do_not_share_remembered_blocks(ob_engine *engine)
{
	struct shape shape = {OB_CODEC_LZ4, 4096, 1, 20000};
	struct made a = make(&shape, 10), b = make(&shape, 11);
	ob_file *first, *second;

	CHECK(made_open(engine, &a, &first) == 0);
	CHECK(made_open(engine, &b, &second) == 0);
	for (uint64_t offset = 0; offset < 8000; offset += 500) {
		check_read(first, &a, offset, 300);
		check_read(second, &b, offset, 300);
	}
	ob_file_close(first);
	CHECK(made_open(engine, &b, &first) == 0);
	check_read(first, &b, 7500, 300);
	ob_file_close(first);
	ob_file_close(second);
	made_free(&a);
	made_free(&b);
}

struct reader {
	ob_file *file;
	const struct made *m;
	uint64_t seed;
};

static void *read_at_random(void *argument)
{
	struct reader *r = argument;

	for (int i = 0; i < 300; i++) {
		uint64_t offset = random_below(&r->seed, r->m->head.plain_size - 1);

		check_read(r->file, r->m, offset, 1 + random_below(&r->seed, r->m->head.plain_size - offset));
	}
	return NULL;
}

static void threads_read_one_file(ob_engine *engine)
{
	struct made m = make(&(struct shape){OB_CODEC_ZSTD, 4096, 1, 200000}, 12);
	struct reader readers[4];
	pthread_t threads[4];
	ob_file *file;

	CHECK(made_open(engine, &m, &file) == 0);
	for (uint64_t i = 0; i < 4; i++) {
		readers[i] = (struct reader){file, &m, i};
		CHECK(pthread_create(&threads[i], NULL, read_at_random, &readers[i]) == 0);
	}
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	ob_file_close(file);
	made_free(&m);
}

/* ---- wrong ones ---- */

static void a_changed_block_is_named(ob_engine *engine, int codec)
{
	struct made m = make(&(struct shape){codec, 4096, 1, 100000}, 13);
	uint8_t out[4096];
	ob_file *file;

	m.blob[BASE + DATA + m.lengths[0] + m.lengths[1] + 2] ^= 1; /* in block 2 */
	CHECK(made_open(engine, &m, &file) == 0);
	check_read(file, &m, 0, 2 * 4096);
	CHECK(ob_file_read(file, 2 * 4096, out, 4096) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "block 2 at offset"));
	CHECK(ob_file_read(file, 2 * 4096 + 7, out, 1) == -EBADMSG);
	CHECK(ob_file_read(file, 2 * 4096 - 1, out, 2) == -EBADMSG);
	check_read(file, &m, 3 * 4096, 100000 - 3 * 4096);
	ob_file_close(file);
	made_free(&m);
}

static int open_changed(ob_engine *engine, struct made *m, int refresh_crc)
{
	ob_file *file;

	if (refresh_crc)
		m->head.index_crc = ob_crc32c(0, m->blob + BASE + m->head.index_offset, m->head.block_count * 4);
	int status = made_open(engine, m, &file);
	if (status == 0)
		ob_file_close(file);
	return status;
}

static void a_bad_jump_table_is_refused(ob_engine *engine)
{
	static const uint32_t bad[] = {0, 1, 4, 2 * 4096 + 4097, UINT32_MAX};
	struct made m = make(&(struct shape){OB_CODEC_LZ4, 4096, 1, 5000000}, 14);
	uint8_t *entry = m.blob + BASE + m.head.index_offset + 4 * 1100;

	CHECK(open_changed(engine, &m, 0) == 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		memcpy(entry, &bad[i], 4);
		CHECK(open_changed(engine, &m, 1) == -EBADMSG);
		CHECK(strstr(ob_last_error(), "entry 1100: length"));
	}
	uint32_t longer = m.lengths[1100] + 1; /* all after it shift: the last passes the table's start */
	memcpy(entry, &longer, 4);
	CHECK(open_changed(engine, &m, 0) == -EBADMSG);
	CHECK(open_changed(engine, &m, 1) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "ends past the data area"));
	uint32_t shorter = m.lengths[1100] - 1;
	memcpy(entry, &shorter, 4);
	CHECK(open_changed(engine, &m, 0) == -EBADMSG);
	CHECK(strstr(ob_last_error(), "checksum"));
	m.head.check_index = 0;
	CHECK(open_changed(engine, &m, 0) == 0);
	made_free(&m);
}

static void a_bad_head_is_refused(ob_engine *engine)
{
	struct made m = make(&(struct shape){OB_CODEC_LZ4, 4096, 1, 50000}, 15);
	const ob_zfile_head good = m.head;

#define REFUSED(field, value) do { \
		m.head = good; \
		m.head.field = (value); \
		CHECK(open_changed(engine, &m, 0) == -EBADMSG); \
	} while (0)
	REFUSED(block_size, 0);
	REFUSED(block_size, 4095);
	REFUSED(block_size, 256);
	REFUSED(block_size, 131072);
	REFUSED(block_size, 8192);
	REFUSED(codec, 0);
	REFUSED(codec, 3);
	REFUSED(block_count, 0);
	REFUSED(block_count, good.block_count + 1);
	REFUSED(block_count, UINT64_MAX);
	REFUSED(block_count, UINT64_MAX / 4 + 2);
	REFUSED(plain_size, UINT64_MAX);
	REFUSED(plain_size, good.plain_size + 4096);
	REFUSED(base, UINT64_MAX);
	REFUSED(base, BASE + 1);
	REFUSED(length, UINT64_MAX);
	REFUSED(length, good.index_offset);
	REFUSED(length, 0);
	REFUSED(data_offset, UINT64_MAX);
	REFUSED(data_offset, good.index_offset + 1);
	REFUSED(data_offset, DATA + 1);
	REFUSED(index_offset, UINT64_MAX);
	REFUSED(index_offset, good.length);
#undef REFUSED
	m.head = good;
	m.head.block_count = (good.length - good.index_offset) / 4; /* all there is, and as many plain bytes */
	m.head.plain_size = m.head.block_count * 4096;
	CHECK(open_changed(engine, &m, 1) == -EBADMSG);
	made_free(&m);
}

/* Any bytes behind an honest head: refused, or read to some end. */
static void rubbish_is_answered(ob_engine *engine, int codec, int block_crc)
{
	uint64_t state = 16;

	for (int round = 0; round < 400; round++) {
		struct made m = make(&(struct shape){codec, 1024, block_crc, 1 + random_below(&state, 30000)}, state);
		uint8_t *out = malloc(m.head.plain_size);
		ob_file *file;

		for (uint64_t n = 1 + random_below(&state, 20); n > 0; n--)
			m.blob[random_below(&state, m.blob_size)] = (uint8_t)random_next(&state);
		m.head.check_index = round % 2;
		int status = made_open(engine, &m, &file);
		CHECK(status == 0 || status == -EBADMSG);
		if (status == 0) {
			for (int i = 0; i < 20; i++) {
				uint64_t offset = random_below(&state, m.head.plain_size);

				status = ob_file_read(file, offset, out, random_below(&state, m.head.plain_size - offset) + 1);
				CHECK(status == 0 || status == -EBADMSG);
			}
			ob_file_close(file);
		}
		free(out);
		made_free(&m);
	}
}

/* ---- bytes that come wrong over the network ---- */

/* Answers fetches from a ZFile in memory, a given byte changed the first `spoilt` times. */
struct server {
	ob_engine *engine;
	const struct made *m;
	uint64_t bad;
	int spoilt;
};

static void *serve(void *argument)
{
	struct server *s = argument;
	ob_fetch *fetch;
	int status;

	while ((status = ob_fetch_next(s->engine, OB_BULK, 1000000000, &fetch)) != -ESHUTDOWN) {
		if (status == -ETIMEDOUT)
			continue;
		CHECK(status == 0);
		memcpy(fetch->buffer, s->m->blob + fetch->offset, fetch->length);
		if (s->bad - fetch->offset < fetch->length && s->spoilt > 0) {
			((uint8_t *)fetch->buffer)[s->bad - fetch->offset] ^= 0x10;
			s->spoilt--;
		}
		CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
		CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
	}
	return NULL;
}

/* Open and read all of it through a cache; status of the first call that failed. */
static int read_through_cache(const struct made *m, uint64_t bad, int spoilt)
{
	ob_engine *engine = memory_engine();
	struct server server = {engine, m, bad, spoilt};
	int data = memory_fd("", 0), map = memory_fd("", 0);
	ob_blob_config config = {.id = 1, .size = m->blob_size, .table_offset = TABLE_OFFSET, .policy = OB_POLICY_HANG};
	uint8_t *out = malloc(m->head.plain_size);
	pthread_t thread;
	ob_blob *blob;
	ob_file *file = NULL;

	CHECK(ftruncate(data, (off_t)m->blob_size) == 0 && ftruncate(map, 1 << 20) == 0);
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	CHECK(pthread_create(&thread, NULL, serve, &server) == 0);
	int status = ob_file_open_zfile(blob, &m->head, &file);
	if (status == 0)
		status = ob_file_read(file, 0, out, m->head.plain_size);
	CHECK(status != 0 || memcmp(out, m->plain, m->head.plain_size) == 0);
	ob_file_close(file);
	ob_blob_close(blob);
	ob_engine_stop(engine);
	CHECK(pthread_join(thread, NULL) == 0);
	ob_engine_close(engine);
	close(data);
	close(map);
	free(out);
	return status;
}

static void wrong_bytes_are_fetched_again_once(void)
{
	struct made m = make(&(struct shape){OB_CODEC_LZ4, 4096, 1, 3000000}, 17);
	uint64_t block = BASE + DATA + 200000, table = BASE + m.head.index_offset + 5;

	CHECK(read_through_cache(&m, 0, 0) == 0);
	CHECK(read_through_cache(&m, block, 1) == 0);
	CHECK(read_through_cache(&m, block, 1000) == -EBADMSG);
	CHECK(read_through_cache(&m, table, 1) == 0);
	CHECK(read_through_cache(&m, table, 1000) == -EBADMSG);
	made_free(&m);
}

int main(void)
{
	ob_engine *engine = memory_engine();

	all_shapes(engine);
	two_files_do_not_share_remembered_blocks(engine);
	threads_read_one_file(engine);
	a_changed_block_is_named(engine, OB_CODEC_LZ4);
	a_changed_block_is_named(engine, OB_CODEC_ZSTD);
	a_bad_jump_table_is_refused(engine);
	a_bad_head_is_refused(engine);
	for (int crc = 0; crc <= 1; crc++) {
		rubbish_is_answered(engine, OB_CODEC_LZ4, crc);
		rubbish_is_answered(engine, OB_CODEC_ZSTD, crc);
	}
	ob_engine_close(engine);
	wrong_bytes_are_fetched_again_once();
	return 0;
}
