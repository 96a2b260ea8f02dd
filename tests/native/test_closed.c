/* SPDX-License-Identifier: Apache-2.0
 * test_closed.c: a cached blob ends with its handle, whoever waits for it, brings it or holds a
 * file of it: its files may be another opening's then. This program's own pread() and pwrite()
 * can be held up in the middle of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cache.h"
#include "file.h"
#include "memory.h"
#include "parked.h"
#include "random.h"

enum { EXTENT = OB_EXTENT_SIZE, EXTENTS = 12, SIZE = EXTENTS * EXTENT, TABLE = 4096, ROUNDS = 30, OPENINGS = 150 };

static ob_engine *engine;
static int data_fd, map_fd;          /* of the entry, for one opening after the other */
static ob_blob *blob;
static ob_file *file;

/* ---- a disk that can be held up ---- */

static atomic_int held, entered, closed;

/* The next call stays here until nothing is held any more, and the blob must not be closed before. */
static void pass(void)
{
	if (!atomic_load(&held))
		return;
	atomic_store(&entered, 1);
	while (atomic_load(&held))
		sched_yield();
	CHECK(!atomic_load(&closed));
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
	pass();
	return syscall(SYS_pwrite64, fd, bytes, length, offset);
}

ssize_t pread(int fd, void *bytes, size_t length, off_t offset)
{
	pass();
	return syscall(SYS_pread64, fd, bytes, length, offset);
}

/* ---- the entry ---- */

/* What is in it is taken away first, as when another repository's image has it. */
static void open_blob(uint64_t id)
{
	ob_blob_config config = {.id = id, .size = SIZE, .table_offset = TABLE, .policy = OB_POLICY_HANG};

	CHECK(ftruncate(data_fd, 0) == 0 && ftruncate(data_fd, SIZE) == 0 && ftruncate(map_fd, 0) == 0);
	CHECK(ob_blob_open_cached(engine, data_fd, map_fd, &config, &blob) == 0);
	CHECK(ob_file_open_raw(blob, 0, SIZE, &file) == 0);
}

static void open_first(void)
{
	engine = memory_engine();
	data_fd = memory_fd("", 0);
	map_fd = memory_fd("", 0);
	open_blob('A');
}

static void close_all(void)
{
	ob_blob_close(blob);
	ob_file_close(file);
	ob_engine_close(engine);
	close(data_fd);
	close(map_fd);
}

static void *close_blob(void *argument)
{
	(void)argument;
	ob_blob_close(blob);
	atomic_store(&closed, 1);
	return NULL;
}

static uint32_t entry(uint64_t extent)
{
	uint32_t sum = 0;

	CHECK(pread(map_fd, &sum, sizeof(sum), (off_t)(TABLE + extent * sizeof(sum))) >= 0);
	return sum;
}

/* Only what `byte` says may be there. How many extents that are. */
static int only(uint8_t byte)
{
	static uint8_t bytes[EXTENT];
	int count = 0;

	for (uint64_t extent = 0; extent < EXTENTS; extent++) {
		CHECK(pread(data_fd, bytes, EXTENT, (off_t)(extent * EXTENT)) == EXTENT);
		CHECK(bytes[0] == byte || (!bytes[0] && !entry(extent)));
		CHECK(memcmp(bytes, bytes + 1, EXTENT - 1) == 0);
		count += entry(extent) != 0;
	}
	return count;
}

static void store(ob_blob *into, uint8_t byte, int64_t expected)
{
	uint8_t *bytes = malloc(SIZE);

	memset(bytes, byte, SIZE);
	CHECK(ob_blob_store(into, 0, bytes, SIZE) == expected);
	free(bytes);
}

static ob_fetch *next(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == 0);
	return fetch;
}

static void no_more(void)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == -ETIMEDOUT);
}

static void bring(ob_fetch *fetch, uint8_t byte)
{
	memset(fetch->buffer, byte, fetch->length);
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
}

struct wait {
	struct parked parked;        /* first: waited() casts */
	int over, status;
};

static void waited(struct parked *parked, int status)
{
	struct wait *wait = (struct wait *)parked;

	CHECK(!wait->over);
	wait->over = 1;
	wait->status = status;
}

static void begin(struct wait *wait, uint64_t first, uint64_t count)
{
	*wait = (struct wait){.parked = {.ready = waited}};
	parked_begin(&wait->parked, engine);
	file_want(file, first * EXTENT, count * EXTENT, &wait->parked);
	parked_end(&wait->parked);
}

/* ---- what is in hand ---- */

static void what_comes_late_goes_nowhere(void)
{
	struct wait lent, queued, late;
	ob_file *first;
	ob_fetch *fetch;
	ob_event event;

	open_first();
	begin(&lent, 0, 3);
	fetch = next();
	memset(fetch->buffer, 'A', fetch->length);
	CHECK(ob_fetch_advance(fetch, EXTENT) == 0 && entry(0) && !lent.over);
	begin(&queued, 5, 2);
	ob_blob_close(blob);
	CHECK(lent.over && lent.status == -EIO && queued.over && queued.status == -EIO);
	begin(&late, 7, 1);
	CHECK(late.over && late.status == -EIO);
	first = file;
	open_blob('B');
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && only('B') == 0);
	CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
	no_more();
	begin(&late, 1, 1);
	bring(next(), 'B');
	CHECK(late.over && late.status == 0 && only('B') == 1);
	CHECK(ob_event_next(engine, &event) == 0);
	ob_file_close(first);
	close_all();
}

static void what_fails_late_is_not_tried_again(void)
{
	struct wait wait;
	ob_fetch *fetch;
	ob_event event;

	open_first();
	begin(&wait, 0, 3);
	fetch = next();
	ob_blob_close(blob);
	CHECK(wait.over && wait.status == -EIO);
	CHECK(ob_fetch_finish(fetch, -EIO, 1) == 0);
	no_more();
	CHECK(ob_event_next(engine, &event) == 0);
	blob = NULL;
	close_all();
}

static void what_was_here_is_not_read_any_more(void)
{
	ob_blob *first = blob_hold((open_first(), blob));
	static uint8_t bytes[SIZE];
	ob_file *old = file;

	store(blob, 'A', EXTENTS);
	CHECK(ob_file_read(file, 0, bytes, SIZE) == 0 && ob_file_read(file, 10, bytes, 10) == 0);
	ob_blob_close(blob);
	CHECK(only('A') == EXTENTS);
	open_blob('B');
	store(blob, 'B', EXTENTS);
	CHECK(ob_file_read(old, 0, bytes, SIZE) == -EIO && ob_file_read(old, 10, bytes, 10) == -EIO);
	store(first, 'A', -EBADF);
	CHECK(blob_reject(first, 0, SIZE) == 1);
	CHECK(only('B') == EXTENTS);
	ob_file_close(old);
	blob_release(first);
	close_all();
}

static void what_could_not_be_written_is_not_kept(void)
{
	ob_blob_config config = {.id = 1, .size = SIZE, .table_offset = TABLE, .policy = OB_POLICY_HANG};
	ob_blob *first;
	ob_fetch *fetch;
	char path[64];
	int writable;

	open_first();
	ob_file_close(file);
	ob_blob_close(blob);
	writable = data_fd;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", writable);
	data_fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(ob_blob_open_cached(engine, data_fd, map_fd, &config, &blob) == 0);
	CHECK(ob_blob_prefetch(blob, 0, SIZE, OB_BULK) == 0);
	fetch = next();
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
	first = blob_hold(blob);
	ob_blob_close(blob);
	CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
	CHECK(atomic_load(&first->references) == 1);
	blob_release(first);
	blob = NULL;
	file = NULL;
	close_all();
	close(writable);
}

/* ---- what the disk is doing ---- */

static void *run_store(void *argument)
{
	(void)argument;
	store(blob, 'A', EXTENTS);
	return NULL;
}

static void *run_bring(void *fetch)
{
	bring(fetch, 'A');
	return NULL;
}

static void *run_read(void *argument)
{
	static uint8_t bytes[SIZE];

	(void)argument;
	CHECK(ob_file_read(file, 0, bytes, SIZE) == 0 && bytes[0] == 'A' && bytes[SIZE - 1] == 'A');
	return NULL;
}

/* run() is in the middle of a read or write when the blob is closed. */
static void close_in_the_middle(void *(*run)(void *), void *argument)
{
	pthread_t worker, closer;

	atomic_store(&closed, 0);
	atomic_store(&entered, 0);
	atomic_store(&held, 1);
	CHECK(pthread_create(&worker, NULL, run, argument) == 0);
	while (!atomic_load(&entered))
		sched_yield();
	CHECK(pthread_create(&closer, NULL, close_blob, NULL) == 0);
	while (!atomic_load(&file->blob->closed))
		sched_yield();
	atomic_store(&held, 0);
	CHECK(pthread_join(worker, NULL) == 0 && pthread_join(closer, NULL) == 0);
	blob = NULL;
}

static void what_the_disk_is_doing_is_waited_for(void)
{
	for (int round = 0; round < ROUNDS; round++) {
		struct wait wait;

		open_first();
		if (round % 3 == 0) {
			close_in_the_middle(run_store, NULL);
		} else if (round % 3 == 1) {
			begin(&wait, 0, EXTENTS);
			close_in_the_middle(run_bring, next());
			CHECK(wait.over && wait.status == 0);
		} else {
			store(blob, 'A', EXTENTS);
			close_in_the_middle(run_read, NULL);
		}
		CHECK(only('A') == EXTENTS);
		close_all();
	}
}

/* ---- all of it at once, one opening after the other ---- */

static void *serve(void *argument)
{
	uint64_t noise = (uintptr_t)argument;
	ob_fetch *fetch;
	int status;

	while ((status = ob_fetch_next(engine, OB_BULK, 20000000, &fetch)) != -ESHUTDOWN) {
		if (status == -ETIMEDOUT)
			continue;
		CHECK(status == 0);
		memset(fetch->buffer, (int)fetch->blob_id, fetch->length);
		for (uint64_t filled = 0; filled < fetch->length; filled += EXTENT / 2) {
			if (random_below(&noise, 4) == 0)
				usleep(200);
			CHECK(ob_fetch_advance(fetch, filled) == 0);
		}
		if (random_below(&noise, 5) == 0) {
			CHECK(ob_fetch_finish(fetch, -EIO, 1000) == 0);
			continue;
		}
		CHECK(ob_fetch_advance(fetch, fetch->length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
	}
	return NULL;
}

struct user {
	ob_file *file;
	uint8_t byte;
	int stores;
	uint64_t noise;
	pthread_t thread;
};

static void *use(void *argument)
{
	struct user *user = argument;
	static _Thread_local uint8_t bytes[2 * EXTENT];
	int64_t status = 0;

	while (status >= 0) {
		uint64_t length = 1 + random_below(&user->noise, 2 * EXTENT), offset = random_below(&user->noise, SIZE - length);

		if (user->stores) {
			memset(bytes, user->byte, length);
			status = ob_blob_store(user->file->blob, offset, bytes, length);
		} else {
			status = ob_file_read(user->file, offset, bytes, length);
			CHECK(status < 0 || (bytes[0] == user->byte && bytes[length - 1] == user->byte));
		}
	}
	CHECK(status == (user->stores ? -EBADF : -EIO));
	ob_file_close(user->file);
	return NULL;
}

static void each_opening_finds_and_leaves_its_own(void)
{
	enum { SERVERS = 3, USERS = 3 };
	struct user users[2][USERS] = {0};
	pthread_t servers[SERVERS];
	uint64_t noise = 7;

	open_first();
	for (uintptr_t i = 0; i < SERVERS; i++)
		CHECK(pthread_create(&servers[i], NULL, serve, (void *)(i + 1)) == 0);
	for (int opening = 0; opening < OPENINGS; opening++) {
		struct user *now = users[opening % 2];
		uint8_t byte = (uint8_t)(1 + opening % 250);

		ob_file_close(file);
		ob_blob_close(blob);
		open_blob(byte);
		for (int i = 0; i < USERS; i++) {
			if (opening >= 2)
				CHECK(pthread_join(now[i].thread, NULL) == 0);
			now[i] = (struct user){.file = file_ref(file), .byte = byte, .stores = i == 0, .noise = (uint64_t)(opening * USERS + i)};
			CHECK(pthread_create(&now[i].thread, NULL, use, &now[i]) == 0);
		}
		usleep((useconds_t)random_below(&noise, 2000));
		ob_blob_close(blob);
		only(byte);
		blob = NULL;
	}
	for (int i = 0; i < 2 * USERS; i++)
		CHECK(pthread_join(users[i / USERS][i % USERS].thread, NULL) == 0);
	ob_engine_stop(engine);
	for (int i = 0; i < SERVERS; i++)
		CHECK(pthread_join(servers[i], NULL) == 0);
	close_all();
}

int main(void)
{
	what_comes_late_goes_nowhere();
	what_fails_late_is_not_tried_again();
	what_was_here_is_not_read_any_more();
	what_could_not_be_written_is_not_kept();
	what_the_disk_is_doing_is_waited_for();
	each_opening_finds_and_leaves_its_own();
	return 0;
}
