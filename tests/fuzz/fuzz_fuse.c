/* SPDX-License-Identifier: Apache-2.0
 * fuzz_fuse.c: any messages where the kernel's are expected: FUSE requests over a socket
 * pair that keeps their borders, as /dev/fuse does. Each that is a request gets one
 * answer of its own number; one that is none ends the session.
 *
 * Input: how many slots, then messages: their opcode, length and body.
 */
#include <linux/fuse.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "served.h"

enum {
	MESSAGES = 24,
	MESSAGE_MAX = 600,
	READ_MAX = 1 << 20,
	FIRST_UNIQUE = 100,
	SEND_BUFFER = 2 * IMAGE_SIZE,   /* a device's answers are never turned away, a socket's may be */
	UNREAD_MAX = IMAGE_SIZE / 2
};

struct message {
	struct fuse_in_header head;
	uint8_t body[MESSAGE_MAX];
};

struct answer {
	struct fuse_out_header head;
	uint8_t body[READ_MAX];
};

static struct message messages[MESSAGES];
static uint8_t wanted[MESSAGES];
static struct answer answer;

/* Mostly what the kernel could send: few opcodes, a length that is the true one. */
static size_t take_message(struct tape *tape, struct message *message, uint64_t unique)
{
	static const uint8_t opcodes[] = {FUSE_READ, FUSE_READ, FUSE_LSEEK, FUSE_INIT, FUSE_GETATTR, FUSE_OPEN};
	uint64_t how = take(tape, 1), length = take(tape, how & 8 ? 2 : 1) % (MESSAGE_MAX + 1);

	memset(message, 0, sizeof(*message));
	message->head.opcode = how & 4 ? (uint32_t)take(tape, how & 16 ? 4 : 1) : opcodes[take(tape, 1) % sizeof(opcodes)];
	for (uint64_t i = 0; i < length; i++)
		message->body[i] = (uint8_t)take(tape, 1);
	length += sizeof(message->head);
	message->head.len = how % 32 == 31 ? (uint32_t)take(tape, 4) : (uint32_t)length;
	message->head.unique = unique;
	return how % 64 == 62 ? take(tape, 1) % length : length;
}

/* ---- what each must be answered with ---- */

static void check_read(const struct message *message, size_t length)
{
	struct fuse_read_in in;
	uint64_t expected = 0;

	memcpy(&in, message->body, sizeof(in));
	if (message->head.len < sizeof(message->head) + sizeof(in) || in.size > READ_MAX) {
		CHECK(answer.head.error == -EINVAL && length == 0);
		return;
	}
	CHECK(answer.head.error == 0);
	if (in.offset < IMAGE_SIZE)
		expected = in.size < IMAGE_SIZE - in.offset ? in.size : IMAGE_SIZE - in.offset;
	CHECK(length == expected);
	CHECK(memcmp(answer.body, served.bytes + (length ? in.offset : 0), length) == 0);
}

static void check_seek(const struct message *message, size_t length)
{
	struct fuse_lseek_in in;
	struct fuse_lseek_out out;
	uint64_t moffset, at;

	memcpy(&in, message->body, sizeof(in));
	if (answer.head.error)
		return;
	CHECK(length == sizeof(out) && (in.whence == SEEK_DATA || in.whence == SEEK_HOLE) && in.offset < IMAGE_SIZE);
	memcpy(&out, answer.body, sizeof(out));
	CHECK(out.offset >= in.offset && out.offset <= IMAGE_SIZE);
	for (at = in.offset; at < out.offset; at++)
		CHECK((served_kind(at, &moffset) == OB_RUN_DATA) != (in.whence == SEEK_DATA));
	if (at < IMAGE_SIZE)
		CHECK((served_kind(at, &moffset) == OB_RUN_DATA) == (in.whence == SEEK_DATA));
	else
		CHECK(in.whence == SEEK_HOLE);
}

static void check_answer(ssize_t got)
{
	uint64_t number = answer.head.unique - FIRST_UNIQUE;
	size_t length = (size_t)got - sizeof(answer.head);

	CHECK(got >= (ssize_t)sizeof(answer.head) && answer.head.len == got);
	CHECK(number < MESSAGES && wanted[number]);
	wanted[number] = 0;
	CHECK(answer.head.error <= 0 && answer.head.error > -512 && (!answer.head.error || !length));
	if (messages[number].head.opcode == FUSE_READ)
		check_read(&messages[number], length);
	if (messages[number].head.opcode == FUSE_LSEEK)
		check_seek(&messages[number], length);
	if (messages[number].head.opcode == FUSE_GETATTR)
		CHECK(length == sizeof(struct fuse_attr_out));
}

/* ---- one input ---- */

/* Bytes of the answer that may come. */
static uint64_t answer_size(const struct message *message)
{
	struct fuse_read_in in;

	memcpy(&in, message->body, sizeof(in));
	return message->head.opcode != FUSE_READ ? sizeof(struct fuse_attr_out) : in.size < IMAGE_SIZE ? in.size : IMAGE_SIZE;
}

/* Sends one message; 0 if the session is over after it. */
static int send_message(int kernel, struct tape *tape, int number)
{
	struct message *message = &messages[number];
	size_t length = take_message(tape, message, FIRST_UNIQUE + (uint64_t)number);
	int good = length >= sizeof(message->head) && message->head.len == length;

	/* An empty message is what the end of the socket looks like: the same to both sides. */
	if (send(kernel, message, length, MSG_NOSIGNAL) != (ssize_t)length)
		return 0;
	wanted[number] = good && message->head.opcode != FUSE_FORGET && message->head.opcode != FUSE_BATCH_FORGET;
	return good;
}

static int wanted_count(void)
{
	int count = 0;

	for (int i = 0; i < MESSAGES; i++)
		count += wanted[i];
	return count;
}

static void receive_all(int kernel)
{
	while (wanted_count()) {
		await(kernel, POLLIN);
		check_answer(recv(kernel, &answer, sizeof(answer), 0));
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = {input, length};
	uint64_t how = take(&tape, 1);
	ob_fuse_config config = {.id = 1, .threads = 1 + how % 2, .slots = 2 + how / 2 % 4};
	int ends[2], memfd = memory_fd("", 0), more = 1, room = SEND_BUFFER;
	uint64_t unread = 0;
	ob_fuse *fuse;

	if (!served.engine)
		served_start();
	memset(wanted, 0, sizeof(wanted));
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
	CHECK(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
	CHECK(ob_fuse_start(served.image, ends[1], memfd, &config, &fuse) == 0);
	for (int i = 0; i < MESSAGES && more && tape.left; i++) {
		more = send_message(ends[0], &tape, i);
		unread += answer_size(&messages[i]);
		if (more && (how & 16 || unread > UNREAD_MAX)) {
			receive_all(ends[0]);
			unread = 0;
		}
	}
	/* After one that ends the session nothing is promised to those still in hand. */
	if (more)
		receive_all(ends[0]);
	close(ends[1]);
	close(ends[0]);
	ob_fuse_close(fuse);
	close(memfd);
	served_reset();
	return 0;
}
