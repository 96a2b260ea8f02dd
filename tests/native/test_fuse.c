/* SPDX-License-Identifier: Apache-2.0
 * test_fuse.c: the FUSE session against a kernel made of a socket pair: one message in,
 * one message out, as with /dev/fuse, and requests the real kernel would not send.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"

enum {
	SLOTS = 4,
	THREADS = 2,
	PATIENCE_MS = 20000,       /* a failing test ends; a sanitizer is slow */
	FILE_SIZE = 200001,
	BLOB_SIZE = 8 * OB_EXTENT_SIZE,
	ANSWER_MAX = 1 << 20,
	RECORDS_AT = 4096,
	RECORD_SIZE = 12288,
	REQUEST_AT = 64            /* in a record; its first word is the state */
};

/* A session and the test's end of its descriptor. */
struct session {
	ob_engine *engine;
	ob_blob *blob;
	ob_image *image;
	ob_fuse *fuse;
	int kernel;
	int memfd;
};

struct answer {
	struct fuse_out_header head;
	uint8_t payload[ANSWER_MAX];
};

static struct answer answer;
static uint8_t content[BLOB_SIZE];

/* ---- the kernel's side ---- */

static void ask(struct session *session, uint64_t unique, uint32_t opcode, const void *argument, size_t length)
{
	uint8_t message[1024];
	struct fuse_in_header head = { .len = sizeof(head) + length, .opcode = opcode, .unique = unique, .nodeid = 1 };

	memcpy(message, &head, sizeof(head));
	if (length)
		memcpy(message + sizeof(head), argument, length);
	CHECK(write(session->kernel, message, head.len) == head.len);
}

static int answered(struct session *session, int timeout_ms)
{
	struct pollfd wait = { .fd = session->kernel, .events = POLLIN };

	return poll(&wait, 1, timeout_ms) == 1;
}

/* The next answer's error; its payload is in `answer`. */
static int listen_for(struct session *session, uint64_t unique)
{
	ssize_t got;

	CHECK(answered(session, PATIENCE_MS));
	got = read(session->kernel, &answer, sizeof(answer));
	CHECK(got >= (ssize_t)sizeof(answer.head) && answer.head.len == got);
	CHECK(answer.head.unique == unique);
	return answer.head.error;
}

static int call(struct session *session, uint32_t opcode, const void *argument, size_t length)
{
	static uint64_t unique = 1000;

	unique += 2;
	ask(session, unique, opcode, argument, length);
	return listen_for(session, unique);
}

static size_t payload_length(void)
{
	return answer.head.len - sizeof(answer.head);
}

static void ask_read(struct session *session, uint64_t unique, uint64_t offset, uint32_t size)
{
	struct fuse_read_in in = { .offset = offset, .size = size };

	ask(session, unique, FUSE_READ, &in, sizeof(in));
}

static void expect_read(struct session *session, uint64_t offset, uint32_t size, size_t expected)
{
	struct fuse_read_in in = { .offset = offset, .size = size };

	CHECK(call(session, FUSE_READ, &in, sizeof(in)) == 0);
	CHECK(payload_length() == expected);
	CHECK(memcmp(answer.payload, content + offset, expected) == 0);
}

static int seek(struct session *session, uint64_t offset, uint32_t whence)
{
	struct fuse_lseek_in in = { .offset = offset, .whence = whence };

	return call(session, FUSE_LSEEK, &in, sizeof(in));
}

static uint64_t seek_result(void)
{
	struct fuse_lseek_out out;

	CHECK(payload_length() == sizeof(out));
	memcpy(&out, answer.payload, sizeof(out));
	return out.offset;
}

/* ---- sessions ---- */

static void serve(struct session *session, uint64_t data_size, uint64_t image_size)
{
	ob_fuse_config config = { .id = 77, .threads = THREADS, .slots = SLOTS };
	ob_layer layer = { .kind = OB_LAYER_FLAT };
	ob_file *file;
	int pair[2];

	CHECK(ob_file_open_raw(session->blob, 0, data_size, &file) == 0);
	layer.file = layer.index = file;
	CHECK(ob_image_open(session->engine, &layer, 1, image_size, &session->image) == 0);
	ob_file_close(file);
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	session->kernel = pair[0];
	session->memfd = memfd_create("test-fuse", MFD_CLOEXEC);
	CHECK(session->memfd >= 0);
	CHECK(ob_fuse_start(session->image, pair[1], session->memfd, &config, &session->fuse) == 0);
	close(pair[1]);
}

static int scratch(const void *bytes, size_t length)
{
	int fd = memfd_create("test-blob", MFD_CLOEXEC);

	CHECK(fd >= 0 && pwrite(fd, bytes, length, 0) == (ssize_t)length);
	return fd;
}

static void open_engine(struct session *session)
{
	ob_engine_config config = { .work_threads = 1, .fetch_bytes = 1 << 20 };

	CHECK(ob_engine_open(&config, &session->engine) == 0);
}

static void open_session(struct session *session, uint64_t image_size)
{
	int fd = scratch(content, FILE_SIZE);

	open_engine(session);
	CHECK(ob_blob_open_local(session->engine, fd, FILE_SIZE, &session->blob) == 0);
	close(fd);
	serve(session, image_size < FILE_SIZE ? image_size : FILE_SIZE, image_size);
}

/* Nothing is in the cache: every read parks until the test answers its fetch. */
static void open_cold_session(struct session *session)
{
	ob_blob_config config = {
		.id = 5, .size = BLOB_SIZE, .table_offset = 4096, .policy = OB_POLICY_HANG,
	};
	int data_fd = scratch("", 0), map_fd = scratch(content, 0);

	open_engine(session);
	CHECK(ftruncate(data_fd, BLOB_SIZE) == 0);
	CHECK(ftruncate(map_fd, 4096 + 4 * (BLOB_SIZE / OB_EXTENT_SIZE)) == 0);
	CHECK(ob_blob_open_cached(session->engine, data_fd, map_fd, &config, &session->blob) == 0);
	close(data_fd);
	close(map_fd);
	serve(session, BLOB_SIZE, BLOB_SIZE);
}

static void close_session(struct session *session)
{
	ob_fuse_close(session->fuse);
	ob_image_close(session->image);
	ob_blob_close(session->blob);
	ob_engine_close(session->engine);
	close(session->kernel);
	close(session->memfd);
}

static void deliver(struct session *session)
{
	ob_fetch *fetch;

	CHECK(ob_fetch_next(session->engine, OB_BULK, PATIENCE_MS * 1000000LL, &fetch) == 0);
	memcpy(fetch->buffer, content + fetch->offset, fetch->length);
	CHECK(ob_fetch_advance(fetch, fetch->length) == 0);
	CHECK(ob_fetch_finish(fetch, 0, 0) == 0);
}

static uint64_t wait_event(struct session *session, int kind)
{
	struct pollfd wait = { .fd = ob_event_fd(session->engine), .events = POLLIN };
	ob_event event;

	for (;;) {
		CHECK(poll(&wait, 1, PATIENCE_MS) == 1);
		while (ob_event_next(session->engine, &event) == 1)
			if (event.kind == kind)
				return event.id;
	}
}

/* ---- tests ---- */

static void reads_are_exact(void)
{
	struct session session;

	open_session(&session, FILE_SIZE);
	expect_read(&session, 0, 1, 1);
	expect_read(&session, 0, 131072, 131072);
	expect_read(&session, 65535, 2, 2);
	expect_read(&session, 131072, 131072, FILE_SIZE - 131072);
	expect_read(&session, FILE_SIZE - 1, 4096, 1);
	expect_read(&session, FILE_SIZE, 4096, 0);
	expect_read(&session, 0, 0, 0);
	struct fuse_read_in past = { .offset = UINT64_MAX - 5, .size = 4096 };
	CHECK(call(&session, FUSE_READ, &past, sizeof(past)) == 0 && payload_length() == 0);
	struct fuse_read_in huge = { .size = UINT32_MAX };
	CHECK(call(&session, FUSE_READ, &huge, sizeof(huge)) == -EINVAL);
	CHECK(call(&session, FUSE_READ, NULL, 0) == -EINVAL);

	ob_fuse_stat stat;
	ob_fuse_get_stat(session.fuse, &stat);
	CHECK(stat.requests == 10);
	CHECK(stat.read_bytes == 1 + 131072 + 2 + FILE_SIZE - 131072 + 1);
	close_session(&session);
}

static void sizes_that_are_no_multiple_of_anything(void)
{
	static const uint64_t sizes[] = { 0, 1, 511, 513, 65537, FILE_SIZE };

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		struct session session;
		struct fuse_attr_out out;

		open_session(&session, sizes[i]);
		CHECK(call(&session, FUSE_GETATTR, NULL, 0) == 0);
		CHECK(payload_length() == sizeof(out));
		memcpy(&out, answer.payload, sizeof(out));
		CHECK(out.attr.size == sizes[i] && out.attr.mode == 0100444 && out.attr.nlink == 1);
		CHECK(out.attr_valid >= 86400);
		expect_read(&session, 0, 131072, sizes[i] < 131072 ? sizes[i] : 131072);
		expect_read(&session, sizes[i], 4096, 0);
		close_session(&session);
	}
}

static void negotiation_takes_what_both_know(void)
{
	struct session session;
	struct fuse_init_in in = { .major = 7, .minor = 99, .max_readahead = 1u << 30, .flags = UINT32_MAX };
	struct fuse_init_out out;

	open_session(&session, FILE_SIZE);
	CHECK(call(&session, FUSE_INIT, &in, sizeof(in)) == 0);
	memcpy(&out, answer.payload, sizeof(out));
	CHECK(out.major == 7 && out.minor == FUSE_KERNEL_MINOR_VERSION);
	CHECK(out.flags == (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES));
	CHECK(out.max_pages * (uint64_t)sysconf(_SC_PAGESIZE) == 1 << 20 && out.max_readahead == 1 << 20);
	CHECK(out.max_background == SLOTS);
	in.minor = 31;
	in.flags = FUSE_ASYNC_READ;
	CHECK(call(&session, FUSE_INIT, &in, sizeof(in) - 48) == 0);     /* as 7.31 sends it */
	memcpy(&out, answer.payload, sizeof(out));
	CHECK(out.minor == 31 && out.flags == FUSE_ASYNC_READ);
	in.minor = 27;
	CHECK(call(&session, FUSE_INIT, &in, sizeof(in)) == -EPROTO);
	in.major = 8;
	CHECK(call(&session, FUSE_INIT, &in, sizeof(in)) == 0);
	memcpy(&out, answer.payload, sizeof(out));
	CHECK(out.major == 7);
	CHECK(call(&session, FUSE_INIT, NULL, 0) == -EPROTO);
	close_session(&session);
}

static void only_reading_is_allowed(void)
{
	struct session session;
	struct fuse_open_in in = { .flags = O_RDONLY };
	struct fuse_open_out out;

	open_session(&session, FILE_SIZE);
	CHECK(call(&session, FUSE_OPEN, &in, sizeof(in)) == 0);
	memcpy(&out, answer.payload, sizeof(out));
	CHECK(out.open_flags == (FOPEN_KEEP_CACHE | FOPEN_NOFLUSH));
	in.flags = O_RDWR;
	CHECK(call(&session, FUSE_OPEN, &in, sizeof(in)) == -EROFS);
	CHECK(call(&session, FUSE_WRITE, NULL, 0) == -EROFS);
	CHECK(call(&session, FUSE_SETATTR, NULL, 0) == -EROFS);
	close_session(&session);
}

static void every_request_but_forget_is_answered(void)
{
	struct session session;

	open_session(&session, FILE_SIZE);
	ask(&session, 2, FUSE_FORGET, NULL, 0);
	ask(&session, 4, FUSE_BATCH_FORGET, NULL, 0);
	CHECK(call(&session, FUSE_RELEASE, NULL, 0) == 0);   /* and the next answer is this one's */
	CHECK(call(&session, FUSE_STATFS, NULL, 0) == 0);
	CHECK(payload_length() == sizeof(struct fuse_statfs_out));
	CHECK(call(&session, FUSE_IOCTL, NULL, 0) == -ENOTTY);
	CHECK(call(&session, FUSE_FLUSH, NULL, 0) == -ENOSYS);
	CHECK(call(&session, FUSE_INTERRUPT, NULL, 0) == -ENOSYS);
	CHECK(call(&session, FUSE_GETXATTR, NULL, 0) == -ENOSYS);
	CHECK(call(&session, 4000, NULL, 0) == -ENOSYS);
	CHECK(call(&session, FUSE_DESTROY, NULL, 0) == 0);
	close_session(&session);
}

static void seek_finds_data_and_holes(void)
{
	struct session session;

	open_session(&session, 4 << 20);            /* data up to FILE_SIZE's sector, then a hole */
	CHECK(seek(&session, 5, SEEK_DATA) == 0 && seek_result() == 5);
	CHECK(seek(&session, 5, SEEK_HOLE) == 0);
	CHECK(seek_result() >= FILE_SIZE && seek_result() < FILE_SIZE + 512);
	CHECK(seek(&session, 1 << 20, SEEK_HOLE) == 0 && seek_result() == 1 << 20);
	CHECK(seek(&session, 1 << 20, SEEK_DATA) == -ENXIO);
	CHECK(seek(&session, 4 << 20, SEEK_HOLE) == -ENXIO);
	CHECK(seek(&session, 0, SEEK_END) == -EINVAL);
	close_session(&session);
	open_session(&session, FILE_SIZE);
	CHECK(seek(&session, 0, SEEK_HOLE) == 0 && seek_result() == FILE_SIZE);
	close_session(&session);
}

static void an_answer_that_cannot_be_written_becomes_eio(void)
{
	struct session session;
	int small = 4096;
	struct fuse_read_in in = { .size = 131072 };

	open_session(&session, FILE_SIZE);
	ob_fuse_close(session.fuse);
	ob_image_close(session.image);
	close(session.kernel);
	close(session.memfd);

	int pair[2];
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	CHECK(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);   /* EMSGSIZE */
	ob_fuse_config config = { .threads = 1, .slots = 1 };
	ob_layer layer = { .kind = OB_LAYER_FLAT };
	CHECK(ob_file_open_raw(session.blob, 0, FILE_SIZE, &layer.file) == 0);
	layer.index = layer.file;
	CHECK(ob_image_open(session.engine, &layer, 1, FILE_SIZE, &session.image) == 0);
	ob_file_close(layer.file);
	session.kernel = pair[0];
	session.memfd = memfd_create("test-fuse", MFD_CLOEXEC);
	CHECK(ob_fuse_start(session.image, pair[1], session.memfd, &config, &session.fuse) == 0);
	close(pair[1]);
	CHECK(call(&session, FUSE_READ, &in, sizeof(in)) == -EIO);
	close_session(&session);
}

static void parked_reads_do_not_hold_up_others(void)
{
	struct session session;

	open_cold_session(&session);
	for (uint64_t i = 0; i < 3; i++)                     /* apart: a fetch each */
		ask_read(&session, 10 + 2 * i, 2 * i * OB_EXTENT_SIZE, 4096);
	CHECK(call(&session, FUSE_GETATTR, NULL, 0) == 0);   /* more parked than there are threads */
	for (int i = 0; i < 3; i++)
		deliver(&session);
	for (int i = 0; i < 3; i++) {
		CHECK(answered(&session, PATIENCE_MS));
		CHECK(read(session.kernel, &answer, sizeof(answer)) > 0 && answer.head.error == 0);
		size_t offset = (answer.head.unique - 10) * OB_EXTENT_SIZE;
		CHECK(memcmp(answer.payload, content + offset, payload_length()) == 0);
	}
	close_session(&session);
}

static void with_all_slots_parked_the_rest_waits_its_turn(void)
{
	struct session session;

	open_cold_session(&session);
	for (uint64_t i = 0; i < SLOTS; i++)
		ask_read(&session, 20 + 2 * i, 0, 100 + (uint32_t)i);
	ask(&session, 100, FUSE_GETATTR, NULL, 0);
	CHECK(!answered(&session, 100));
	deliver(&session);
	int seen = 0;
	for (int i = 0; i < SLOTS + 1; i++) {
		CHECK(answered(&session, PATIENCE_MS));
		CHECK(read(session.kernel, &answer, sizeof(answer)) > 0 && answer.head.error == 0);
		seen += answer.head.unique == 100;
	}
	CHECK(seen == 1);
	close_session(&session);
}

/* What a later server would have to answer. */
static uint64_t unanswered(struct session *session, const uint8_t *map)
{
	uint64_t found = 0;

	for (int i = 0; i < SLOTS; i++) {
		const uint8_t *record = map + RECORDS_AT + (size_t)i * RECORD_SIZE;
		const struct fuse_in_header *in = (const void *)(record + REQUEST_AT);

		if (__atomic_load_n((const uint32_t *)record, __ATOMIC_ACQUIRE) == 1 && in->opcode == FUSE_READ)
			found += in->unique;
	}
	return found;
}

static void the_memfd_shows_what_was_read_and_not_answered(void)
{
	struct session session;
	size_t length = RECORDS_AT + SLOTS * RECORD_SIZE;
	const uint8_t *map;

	open_cold_session(&session);
	map = mmap(NULL, length, PROT_READ, MAP_SHARED, session.memfd, 0);
	CHECK(map != MAP_FAILED);
	CHECK(memcmp(map, "obfuse\0\1", 8) == 0 && ((const uint32_t *)map)[2] == SLOTS);
	ask_read(&session, 30, 0, 4096);
	ask_read(&session, 32, 4096, 4096);
	ob_fetch *fetch;
	CHECK(ob_fetch_next(session.engine, OB_BULK, PATIENCE_MS * 1000000LL, &fetch) == 0);
	CHECK(call(&session, FUSE_GETATTR, NULL, 0) == 0);   /* so both were read */
	while (unanswered(&session, map) != 30 + 32)
		usleep(100);
	memcpy(fetch->buffer, content + fetch->offset, fetch->length);
	CHECK(ob_fetch_finish(fetch, ob_fetch_advance(fetch, fetch->length), 0) == 0);
	for (int i = 0; i < 2; i++)
		CHECK(answered(&session, PATIENCE_MS) && read(session.kernel, &answer, sizeof(answer)) > 0);
	while (unanswered(&session, map) != 0)
		usleep(100);
	munmap((void *)map, length);
	close_session(&session);
}

static void a_session_ends_with_its_mount(void)
{
	struct session session;

	open_session(&session, FILE_SIZE);
	CHECK(call(&session, FUSE_GETATTR, NULL, 0) == 0);
	shutdown(session.kernel, SHUT_RDWR);
	CHECK(wait_event(&session, OB_EVENT_FUSE_CLOSED) == 77);
	close_session(&session);
}

static void a_session_whose_slots_are_all_parked_ends_too(void)
{
	struct session session;

	open_cold_session(&session);
	for (uint64_t i = 0; i < SLOTS; i++)
		ask_read(&session, 40 + 2 * i, 0, 4096);
	close(session.kernel);
	session.kernel = -1;
	CHECK(wait_event(&session, OB_EVENT_FUSE_CLOSED) == 77);
	close_session(&session);           /* with requests parked: the engine's stop frees them */
}

static void a_stopped_engine_answers_eio(void)
{
	struct session session;

	open_cold_session(&session);
	ask_read(&session, 50, 0, 4096);
	ob_engine_stop(session.engine);
	CHECK(listen_for(&session, 50) == -EIO);
	ask_read(&session, 52, 0, 4096);
	CHECK(listen_for(&session, 52) == -EIO);
	close_session(&session);
}

static void nonsense_is_refused_at_the_start(void)
{
	struct session session;
	ob_fuse *fuse;
	ob_fuse_config none = { .threads = 0, .slots = 4 };
	ob_fuse_config few = { .threads = 4, .slots = 3 };
	ob_fuse_config many = { .threads = 4, .slots = 100000 };
	ob_fuse_config good = { .threads = 1, .slots = 1 };

	open_session(&session, FILE_SIZE);
	CHECK(ob_fuse_start(session.image, session.kernel, session.memfd, &none, &fuse) == -EINVAL);
	CHECK(ob_fuse_start(session.image, session.kernel, session.memfd, &few, &fuse) == -EINVAL);
	CHECK(ob_fuse_start(session.image, session.kernel, session.memfd, &many, &fuse) == -EINVAL);
	CHECK(ob_fuse_start(session.image, -1, session.memfd, &good, &fuse) == -EBADF);
	CHECK(ob_fuse_start(session.image, session.kernel, -1, &good, &fuse) == -EBADF);
	close_session(&session);
}

int main(void)
{
	for (size_t i = 0; i < sizeof(content); i++)
		content[i] = (uint8_t)(i * 2654435761u >> 13);
	reads_are_exact();
	sizes_that_are_no_multiple_of_anything();
	negotiation_takes_what_both_know();
	only_reading_is_allowed();
	every_request_but_forget_is_answered();
	seek_finds_data_and_holes();
	an_answer_that_cannot_be_written_becomes_eio();
	parked_reads_do_not_hold_up_others();
	with_all_slots_parked_the_rest_waits_its_turn();
	the_memfd_shows_what_was_read_and_not_answered();
	a_session_ends_with_its_mount();
	a_session_whose_slots_are_all_parked_ends_too();
	a_stopped_engine_answers_eio();
	nonsense_is_refused_at_the_start();
	return 0;
}
