/* SPDX-License-Identifier: Apache-2.0
 * test_fuse_write.c: a writable FUSE file against a kernel made of a socket pair: one message
 * in, one message out, as with /dev/fuse, and requests that the real kernel would not send.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memory.h"

enum {
	SECTOR = 512,
	DISK = 1 << 20,
	HEAD = 4096,
	WRITE_MAX = 256 << 10,     /* what INIT answers */
	PART = 100000,             /* what a socket takes at once */
	PATIENCE_MS = 20000        /* a failing test ends; a sanitizer is slow */
};

struct session {
	ob_engine *engine;
	ob_image *image;
	ob_fuse *fuse;
	int kernel, memfd, data, index;
};

static uint8_t model[DISK], found[DISK];
static struct { struct fuse_out_header head; uint8_t payload[DISK]; } answer;

/* A request of two parts; the error of its answer. */
static int call(struct session *session, uint32_t opcode, const void *argument, size_t length, const void *more, size_t size)
{
	static uint8_t message[sizeof(struct fuse_in_header) + sizeof(struct fuse_setattr_in) + PART];
	static uint64_t unique = 1000;
	struct fuse_in_header head = { .len = (uint32_t)(sizeof(head) + length + size), .opcode = opcode, .unique = ++unique,
	                               .nodeid = 1 };
	struct pollfd wait = { .fd = session->kernel, .events = POLLIN };
	ssize_t got;

	memcpy(message, &head, sizeof(head));
	memcpy(message + sizeof(head), argument, length);
	if (size)
		memcpy(message + sizeof(head) + length, more, size);
	CHECK(write(session->kernel, message, head.len) == head.len);
	CHECK(poll(&wait, 1, PATIENCE_MS) == 1);
	got = read(session->kernel, &answer, sizeof(answer));
	CHECK(got >= (ssize_t)sizeof(answer.head) && answer.head.len == got && answer.head.unique == unique);
	return answer.head.error;
}

/* The files of an upper layer that has nothing yet. */
static void make_pair(struct session *session)
{
	static const uint8_t head[HEAD];

	session->data = memory_fd(head, HEAD);
	session->index = memory_fd(head, HEAD);
}

static void start_session(struct session *session)
{
	ob_fuse_config config = { .id = 7, .threads = 2, .slots = 4 };
	int pair[2];

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	session->kernel = pair[0];
	session->memfd = memfd_create("test-fuse", MFD_CLOEXEC);
	CHECK(ob_fuse_start(session->image, pair[1], session->memfd, &config, &session->fuse) == 0);
	close(pair[1]);
}

static void open_session(struct session *session, int writable)
{
	struct fuse_init_in init = { .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = 1 << 20,
	                             .flags = FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_ASYNC_DIO };
	struct fuse_init_out out;

	session->engine = memory_engine();
	make_pair(session);
	CHECK(ob_image_open(session->engine, NULL, 0, DISK, &session->image) == 0);
	if (writable)
		CHECK(ob_image_open_upper(session->image, session->data, session->index) == 0);
	start_session(session);
	CHECK(call(session, FUSE_INIT, &init, sizeof(init), NULL, 0) == 0);
	memcpy(&out, answer.payload, sizeof(out));
	CHECK(out.max_write == (writable ? WRITE_MAX : 4096) && !(out.flags & FUSE_BIG_WRITES) == !writable);
	memset(model, 0, sizeof(model));
}

static void close_session(struct session *session)
{
	ob_fuse_close(session->fuse);
	ob_image_close(session->image);
	ob_engine_close(session->engine);
	close(session->kernel);
	close(session->memfd);
	close(session->data);
	close(session->index);
}

static int write_at(struct session *session, uint64_t offset, uint32_t size, uint8_t fill, uint32_t flags)
{
	struct fuse_write_in in = { .offset = offset, .size = size, .flags = flags };
	static uint8_t bytes[PART];
	int error;

	memset(bytes, fill, size);
	error = call(session, FUSE_WRITE, &in, sizeof(in), bytes, size);
	if (!error) {
		struct fuse_write_out out;

		memcpy(&out, answer.payload, sizeof(out));
		CHECK(out.size == size);
		memset(model + offset, fill, size);
	}
	return error;
}

static int punch(struct session *session, uint32_t mode, uint64_t offset, uint64_t length)
{
	struct fuse_fallocate_in in = { .offset = offset, .length = length, .mode = mode };
	int error = call(session, FUSE_FALLOCATE, &in, sizeof(in), NULL, 0);

	if (!error && offset < DISK)
		memset(model + offset, 0, length < DISK - offset ? length : DISK - offset);
	return error;
}

static uint64_t records(const struct session *session)
{
	return ((uint64_t)lseek(session->index, 0, SEEK_END) - HEAD) / 16;
}

static void expect_model(struct session *session)
{
	struct fuse_read_in in = { .size = PART };

	for (in.offset = 0; in.offset < DISK; in.offset += PART) {
		size_t length = DISK - in.offset < PART ? DISK - in.offset : PART;

		CHECK(call(session, FUSE_READ, &in, sizeof(in), NULL, 0) == 0);
		memcpy(found, answer.payload, length);
		CHECK(answer.head.len == sizeof(answer.head) + length && memcmp(found, model + in.offset, length) == 0);
	}
}

static void test_what_is_written_anywhere_is_read(void)
{
	const uint32_t hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	struct session session;

	open_session(&session, 1);
	CHECK(write_at(&session, 0, PART, 1, 0) == 0);
	CHECK(write_at(&session, 511, 2, 2, 0) == 0);
	CHECK(write_at(&session, 1000, 5000, 3, 0) == 0);
	CHECK(write_at(&session, DISK - 3, 3, 4, 0) == 0);
	CHECK(punch(&session, hole, 700, 3000) == 0);
	CHECK(punch(&session, FALLOC_FL_ZERO_RANGE, 50000, SECTOR) == 0);
	CHECK(punch(&session, hole, DISK - SECTOR, 2 * SECTOR) == 0);
	CHECK(punch(&session, hole, 2 * DISK, SECTOR) == 0);
	expect_model(&session);
	close_session(&session);
}

static void test_fsync_and_synchronous_writes_make_it_last(void)
{
	struct fuse_fsync_in sync = { 0 };
	struct session session;

	open_session(&session, 1);
	CHECK(write_at(&session, 0, SECTOR, 1, 0) == 0 && records(&session) == 0);
	CHECK(call(&session, FUSE_FSYNC, &sync, sizeof(sync), NULL, 0) == 0 && records(&session) == 1);
	CHECK(write_at(&session, 0, SECTOR, 1, O_DSYNC) == 0 && records(&session) == 2);
	close_session(&session);
}

static void test_what_cannot_be_is_refused(void)
{
	struct fuse_setattr_in set = { .valid = FATTR_SIZE, .size = DISK };
	struct fuse_write_in in = { .size = 100 };
	struct fuse_open_in open_in = { .flags = O_RDWR };
	struct session session;

	open_session(&session, 1);
	CHECK(write_at(&session, DISK - 1, 2, 9, 0) == -EINVAL);
	CHECK(write_at(&session, UINT64_MAX, 2, 9, 0) == -EINVAL);
	CHECK(call(&session, FUSE_WRITE, &in, sizeof(in), "short", 5) == -EINVAL);
	CHECK(call(&session, FUSE_WRITE, &in, 10, NULL, 0) == -EINVAL);
	CHECK(punch(&session, 0, 0, SECTOR) == -EOPNOTSUPP);
	CHECK(punch(&session, FALLOC_FL_ZERO_RANGE, DISK, SECTOR) == -EFBIG);
	CHECK(call(&session, FUSE_FALLOCATE, &in, 8, NULL, 0) == -EOPNOTSUPP);
	CHECK(call(&session, FUSE_SETATTR, &set, sizeof(set), NULL, 0) == 0);
	set.size--;
	CHECK(call(&session, FUSE_SETATTR, &set, sizeof(set), NULL, 0) == -EPERM);
	CHECK(call(&session, FUSE_SETATTR, &set, 4, NULL, 0) == -EPERM);
	CHECK(call(&session, FUSE_OPEN, &open_in, sizeof(open_in), NULL, 0) == 0);
	expect_model(&session);
	close_session(&session);
}

static void test_a_read_only_file_stays_so(void)
{
	struct fuse_open_in open_in = { .flags = O_RDWR };
	struct fuse_fsync_in sync = { 0 };
	struct session session;

	open_session(&session, 0);
	CHECK(call(&session, FUSE_OPEN, &open_in, sizeof(open_in), NULL, 0) == -EROFS);
	CHECK(write_at(&session, 0, SECTOR, 1, 0) == -EROFS);
	CHECK(punch(&session, FALLOC_FL_ZERO_RANGE, 0, SECTOR) == -EROFS);
	CHECK(call(&session, FUSE_FSYNC, &sync, sizeof(sync), NULL, 0) == -ENOSYS);
	expect_model(&session);
	close_session(&session);
}

/* Over a layer that never comes. */
static void open_over_missing(struct session *session, ob_blob **blob)
{
	ob_blob_config missing = { .id = 1, .size = DISK, .table_offset = 4096, .policy = OB_POLICY_HANG };
	ob_layer layer = { .kind = OB_LAYER_FLAT };
	int data = memory_fd("", 0), map = memory_fd("", 0);

	session->engine = memory_engine();
	CHECK(ob_blob_open_cached(session->engine, data, map, &missing, blob) == 0);
	CHECK(ob_file_open_raw(*blob, 0, DISK, &layer.file) == 0);
	layer.index = layer.file;
	CHECK(ob_image_open(session->engine, &layer, 1, DISK, &session->image) == 0);
	ob_file_close(layer.file);
	close(data);
	close(map);
	make_pair(session);
	CHECK(ob_image_open_upper(session->image, session->data, session->index) == 0);
	start_session(session);
}

static void test_a_write_that_waits_for_its_sector_ends_with_the_session(void)
{
	struct { struct fuse_in_header head; struct fuse_write_in in; uint8_t bytes[10]; } request = {
		.head = { .len = sizeof(request.head) + sizeof(request.in) + 10, .opcode = FUSE_WRITE, .unique = 2, .nodeid = 1 },
		.in = { .offset = 5, .size = 10 },
	};
	struct session session;
	ob_blob_stat stat = { 0 };
	ob_blob *blob;

	open_over_missing(&session, &blob);
	CHECK(write(session.kernel, &request, request.head.len) == request.head.len);
	while (!stat.misses) {
		usleep(1000);
		ob_blob_get_stat(blob, &stat);
	}
	ob_fuse_close(session.fuse);
	session.fuse = NULL;
	CHECK(read(session.kernel, &answer, sizeof(answer)) > 0 && answer.head.unique == 2 && answer.head.error == -EIO);
	ob_blob_close(blob);
	close_session(&session);
}

int main(void)
{
	test_what_is_written_anywhere_is_read();
	test_fsync_and_synchronous_writes_make_it_last();
	test_what_cannot_be_is_refused();
	test_a_read_only_file_stays_so();
	test_a_write_that_waits_for_its_sector_ends_with_the_session();
	return 0;
}
