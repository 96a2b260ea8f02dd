/* SPDX-License-Identifier: Apache-2.0
 * test_mapping.c: cached blobs read through their mapping: right bytes while extents come
 * and go, bounded memory, and no death by a file that cannot be read.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "cache.h"
#include "mapping.h"
#include "memory.h"
#include "random.h"

enum {
	SMALL = 4096,
	PIECE = 1 << 20,
	READERS = 3,
	READS = 20000,
	BOUND_KB = 256 << 10,        /* mapping.c's own */
	SLACK_KB = 16 << 10          /* the program itself, and what other threads just fault in */
};

/* A blob of `size` bytes, all cached, the byte at p being that of its 4 KiB page's number. */
struct filled {
	ob_engine *engine;
	ob_blob *blob;
	int data_fd;
	uint64_t size;
	uint8_t *piece;
};

static void store_piece(struct filled *f, uint64_t offset)
{
	for (uint64_t page = 0; page < PIECE / SMALL; page++)
		memset(f->piece + page * SMALL, (uint8_t)((offset / SMALL + page) * 7), SMALL);
	CHECK(ob_blob_store(f->blob, offset, f->piece, PIECE) >= 0);
}

static void filled_open(struct filled *f, uint64_t size)
{
	ob_blob_config config = {.id = 1, .size = size, .table_offset = SMALL, .policy = OB_POLICY_HANG};
	int map = memory_fd("", 0);

	f->engine = memory_engine();
	f->data_fd = memory_fd("", 0);
	f->size = size;
	f->piece = malloc(PIECE);
	CHECK(f->piece && ob_blob_open_cached(f->engine, f->data_fd, map, &config, &f->blob) == 0);
	close(map);
	for (uint64_t offset = 0; offset < size; offset += PIECE)
		store_piece(f, offset);
}

static void filled_close(struct filled *f)
{
	ob_blob_close(f->blob);
	ob_engine_close(f->engine);
	close(f->data_fd);
	free(f->piece);
}

static void check_page(const struct filled *f, uint64_t page)
{
	uint8_t out[SMALL], right[SMALL];

	memset(right, (uint8_t)(page * 7), SMALL);
	CHECK(ob_blob_read(f->blob, page * SMALL, out, SMALL) == 0);
	CHECK(memcmp(out, right, SMALL) == 0);
}

/* ---- bus errors ---- */

static void somebody_else(int number)
{
	_exit(42);
}

/* What becomes of a process whose own mapping has nothing behind it, once the engine is there. */
static int death_of_child(void (*handler)(int))
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		struct filled f;
		int empty = memory_fd("", 0);

		signal(SIGBUS, handler);
		filled_open(&f, PIECE);
		check_page(&f, 0);
		volatile uint8_t *nothing = mmap(NULL, SMALL, PROT_READ, MAP_SHARED, empty, 0);
		CHECK(nothing != MAP_FAILED);
		_exit(nothing[0]);
	}
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

static void test_others_bus_errors_are_theirs(void)
{
	int status = death_of_child(somebody_else);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
	status = death_of_child(SIG_DFL);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

static void test_what_a_shortened_file_lacks_is_missing(void)
{
	struct filled f;
	uint8_t out[SMALL];

	filled_open(&f, PIECE);
	check_page(&f, 3);
	CHECK(ftruncate(f.data_fd, 2 * SMALL) == 0);
	for (int i = 0; i < 3; i++)
		CHECK(blob_try_read(f.blob, 3 * SMALL, out, SMALL) == -EAGAIN);
	filled_close(&f);
}

/* ---- memory ---- */

static long mapped_kb(void)
{
	FILE *status = fopen("/proc/self/status", "r");
	char line[256];
	long total = 0, kb;

	CHECK(status);
	while (fgets(line, sizeof(line), status))
		if (sscanf(line, "RssFile: %ld", &kb) == 1 || sscanf(line, "RssShmem: %ld", &kb) == 1)
			total += kb;
	fclose(status);
	return total;
}

static void test_mapped_memory_is_bounded(void)
{
	struct filled f;
	long before, most = 0;

	filled_open(&f, (uint64_t)(BOUND_KB + (64 << 10)) << 10);
	before = mapped_kb();
	/* Often enough for those refused at first to be let in. */
	for (int pass = 0; pass < 20; pass++) {
		for (uint64_t offset = 0; offset < f.size; offset += OB_EXTENT_SIZE)
			check_page(&f, offset / SMALL + (uint64_t)pass % 16);
		most = mapped_kb() > most ? mapped_kb() : most;
	}
	CHECK(most - before > BOUND_KB / 2);
	CHECK(most - before <= BOUND_KB + SLACK_KB);
	mapping_trim();
	CHECK(mapped_kb() - before <= SLACK_KB);
	check_page(&f, 5);
	filled_close(&f);
	CHECK(mapped_kb() - before <= SLACK_KB);
}

/* ---- extents that come and go ---- */

struct reader {
	struct filled *f;
	uint64_t seed;
};

static void *reader_run(void *argument)
{
	struct reader *reader = argument;

	for (int i = 0; i < READS; i++)
		check_page(reader->f, random_below(&reader->seed, reader->f->size / SMALL));
	return NULL;
}

static void test_right_bytes_while_extents_are_dropped(void)
{
	struct filled f;
	pthread_t threads[READERS];
	struct reader readers[READERS];

	filled_open(&f, 4 * PIECE);
	for (int i = 0; i < READERS; i++) {
		readers[i] = (struct reader){&f, (uint64_t)i};
		CHECK(pthread_create(&threads[i], NULL, reader_run, &readers[i]) == 0);
	}
	for (int i = 0; i < 400; i++) {
		uint64_t offset = (uint64_t)i % 4 * PIECE;

		CHECK(ob_blob_drop(f.blob, offset, PIECE) >= 0);
		if (i % 8 == 0)
			mapping_trim();
		store_piece(&f, offset);
	}
	for (int i = 0; i < READERS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	filled_close(&f);
}

int main(void)
{
	test_others_bus_errors_are_theirs();   /* forks: before any thread */
	test_what_a_shortened_file_lacks_is_missing();
	test_mapped_memory_is_bounded();
	test_right_bytes_while_extents_are_dropped();
	return 0;
}
