/* SPDX-License-Identifier: Apache-2.0
 * fuzz_nbd.c: any bytes in the transmission phase, in any pieces. Every request before
 * the stream breaks gets one reply, with the right bytes or the right error.
 *
 * Input: what was negotiated, the size of the pieces, then the client's stream. Cookies
 * are made unique, so that replies can be told apart in whatever order they come.
 */
#include <sys/socket.h>

#include "nbdwire.h"
#include "served.h"

enum {
	STREAM_MAX = 8192,
	REQUESTS_MAX = STREAM_MAX / REQUEST_SIZE,
	ALL_STATES = STATE_HOLE | STATE_ZERO
};

struct client {
	int fd, structured, allocation;
	uint8_t stream[STREAM_MAX];
	size_t length, sent, piece;
	struct wire_request requests[REQUESTS_MAX];
	uint32_t count, answered;
	uint8_t replied[REQUESTS_MAX];
};

static struct client client;
static uint8_t incoming[CHUNK_SIZE + 8 + IMAGE_SIZE];

/* ---- what is sent ---- */

/* The requests that the server will see whole, before anything that ends the connection. */
static void client_plan(void)
{
	size_t at = 0;

	client.count = client.answered = 0;
	memset(client.replied, 0, sizeof(client.replied));
	while (client.length - at >= REQUEST_SIZE) {
		struct wire_request *request = &client.requests[client.count];

		if (!request_parse(client.stream + at, request) || request->type == CMD_DISC)
			return;
		put_be(client.stream + at + 8, client.count, 8);
		at += REQUEST_SIZE;
		if (request->type == CMD_WRITE) {
			if (request->length > client.length - at)
				return;
			at += request->length;
		}
		client.count++;
	}
}

static void client_send(void)
{
	size_t left = client.length - client.sent, now = left < client.piece ? left : client.piece;
	ssize_t sent = send(client.fd, client.stream + client.sent, now, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (sent >= 0)
		client.sent += (size_t)sent;
	else if (errno != EAGAIN)
		client.sent = client.length;      /* hung up on: the replies tell */
	if (client.sent == client.length)
		shutdown(client.fd, SHUT_WR);
}

/* Exactly `length` bytes, sending meanwhile. 0: the server has hung up before the first. */
static int client_receive(uint8_t *to, size_t length)
{
	size_t done = 0;

	while (done < length) {
		int ready = await(client.fd, POLLIN | (client.sent < client.length ? POLLOUT : 0));
		ssize_t got;

		if (ready & POLLOUT)
			client_send();
		if (!(ready & (POLLIN | POLLHUP | POLLERR)))
			continue;
		got = recv(client.fd, to + done, length - done, MSG_DONTWAIT);
		if (got < 0 && errno == EAGAIN)
			continue;
		if (got <= 0) {
			CHECK(done == 0);
			return 0;
		}
		done += (size_t)got;
	}
	return 1;
}

/* ---- what is expected ---- */

static uint32_t expected_error(const struct wire_request *request)
{
	int read = request->type == CMD_READ, map = request->type == CMD_BLOCK_STATUS;
	uint16_t flags = read && client.structured ? FLAG_DF : map ? FLAG_REQ_ONE : 0;

	if (request->type == CMD_FLUSH)
		return 0;
	if (request->type == CMD_WRITE || request->type == CMD_TRIM || request->type == CMD_WRITE_ZEROES)
		return 1;
	if ((!read && !map) || (map && !client.allocation) || request->flags & ~flags || !request->length
	    || request->offset > IMAGE_SIZE || request->length > IMAGE_SIZE - request->offset)
		return 22;
	return 0;
}

static void check_map(const struct wire_request *request, uint32_t length)
{
	uint64_t at = request->offset, end = at + request->length, moffset;

	CHECK(length >= 12 && length % 8 == 4 && get_be(incoming, 4) == CONTEXT_ALLOCATION);
	for (uint32_t i = 4; i < length; i += 8) {
		uint64_t part = get_be(incoming + i, 4), state = get_be(incoming + i + 4, 4);

		CHECK(part > 0 && at + part <= end);
		for (uint64_t byte = at; byte < at + part; byte += byte + SECTOR < at + part ? SECTOR : 1)
			CHECK(state == (served_kind(byte, &moffset) == OB_RUN_DATA ? 0 : ALL_STATES));
		at += part;
	}
	CHECK(request->flags & FLAG_REQ_ONE ? length == 12 : at == end);
}

static void check_payload(const struct wire_request *request, uint32_t length)
{
	CHECK(length <= sizeof(incoming) && client_receive(incoming, length));
	if (request->type == CMD_BLOCK_STATUS) {
		check_map(request, length);
		return;
	}
	CHECK(length == request->length);
	CHECK(memcmp(incoming, served.bytes + request->offset, length) == 0);
}

static const struct wire_request *claim(uint64_t cookie)
{
	CHECK(cookie < client.count && !client.replied[cookie]);
	client.replied[cookie] = 1;
	client.answered++;
	return &client.requests[cookie];
}

static void check_simple(void)
{
	uint8_t rest[SIMPLE_SIZE - 4];
	const struct wire_request *request;
	uint32_t error;

	CHECK(client_receive(rest, sizeof(rest)));
	error = (uint32_t)get_be(rest, 4);
	request = claim(get_be(rest + 4, 8));
	CHECK(error == expected_error(request));
	CHECK(!client.structured || (request->type != CMD_READ && request->type != CMD_BLOCK_STATUS));
	if (!error && request->type == CMD_READ)
		check_payload(request, request->length);
}

static void check_chunk(void)
{
	uint8_t rest[CHUNK_SIZE - 4], more[8];
	const struct wire_request *request;
	uint32_t type, length;

	CHECK(client_receive(rest, sizeof(rest)) && get_be(rest, 2) == 1);
	type = (uint32_t)get_be(rest + 2, 2);
	request = claim(get_be(rest + 4, 8));
	length = (uint32_t)get_be(rest + 12, 4);
	if (type == REPLY_ERROR) {
		CHECK(length == 6 && client_receive(more, 6) && get_be(more, 4) == expected_error(request));
		return;
	}
	CHECK(expected_error(request) == 0);
	CHECK(type == (request->type == CMD_READ ? REPLY_DATA : REPLY_BLOCK_STATUS));
	if (type == REPLY_DATA) {
		CHECK(length > 8 && client_receive(more, 8) && get_be(more, 8) == request->offset);
		length -= 8;
	}
	check_payload(request, length);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = {input, length};
	uint64_t how = take(&tape, 1);
	ob_nbd_config config = {.id = 1, .structured = how & 1, .allocation = (how & 3) == 3};
	uint8_t magic[4];
	ob_nbd *nbd;
	int ends[2];

	if (!served.engine)
		served_start();
	client.structured = config.structured;
	client.allocation = config.allocation;
	client.piece = 1 + take(&tape, 1) * 16;
	client.sent = 0;
	client.length = tape.left < STREAM_MAX ? tape.left : STREAM_MAX;
	memcpy(client.stream, tape.at, client.length);
	client_plan();
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
	client.fd = ends[0];
	CHECK(ob_nbd_start(served.image, ends[1], &config, &nbd) == 0);
	close(ends[1]);
	client_send();
	while (client_receive(magic, sizeof(magic))) {
		if (get_be(magic, 4) == 0x67446698)
			check_simple();
		else if (get_be(magic, 4) == 0x668e33ef)
			check_chunk();
		else
			CHECK(!"a reply has its magic");
	}
	CHECK(client.answered == client.count);
	close(client.fd);
	ob_nbd_close(nbd, 0);
	served_reset();
	return 0;
}

/* ---- changes that keep the stream a stream ---- */

/* Requests at every 28 bytes get their magic back, and mostly lie inside the image. */
size_t LLVMFuzzerCustomMutator(uint8_t *input, size_t length, size_t most, unsigned seed)
{
	length = LLVMFuzzerMutate(input, length, most);
	for (size_t at = 2; seed % 8 && at + REQUEST_SIZE <= length; at += REQUEST_SIZE) {
		put_be(input + at, 0x25609513, 4);
		if (seed % 8 < 3)
			continue;
		put_be(input + at + 4, input[at + 5] & (FLAG_DF | FLAG_REQ_ONE), 2);
		put_be(input + at + 6, input[at + 7] % 9, 2);
		put_be(input + at + 16, get_be(input + at + 16, 8) % (IMAGE_SIZE + 2), 8);
		put_be(input + at + 24, get_be(input + at + 24, 4) % (input[at + 7] & 1 ? 64 : IMAGE_SIZE), 4);
	}
	return length;
}
