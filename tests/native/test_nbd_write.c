/* SPDX-License-Identifier: Apache-2.0
 * test_nbd_write.c: writing over NBD, from a client's end of a socket pair, with requests that
 * an orderly client would not send.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memory.h"
#include "nbdwire.h"

enum {
	SECTOR = 512,
	DISK = 8 << 20,
	HEAD = 4096,
	PATIENCE_MS = 30000,       /* a failing test ends; a sanitizer is slow */
	LONG_WRITE = 3 << 20,      /* several pieces of nbd.h's */
	EPERM_WIRE = 1, EINVAL_WIRE = 22, ENOSPC_WIRE = 28
};

static const int64_t SECOND_NS = 1000000000;

struct stand {
	ob_engine *engine;
	ob_image *image;
	ob_nbd *nbd;
	int data, index, client;
};

static uint8_t bytes[LONG_WRITE], found[LONG_WRITE];

static void stand_open(struct stand *stand, int writable)
{
	static const uint8_t head[HEAD];
	ob_nbd_config config = { .id = 1 };
	int ends[2];

	stand->engine = memory_engine();
	stand->data = memory_fd(head, HEAD);
	stand->index = memory_fd(head, HEAD);
	CHECK(ob_image_open(stand->engine, NULL, 0, DISK, &stand->image) == 0);
	if (writable)
		CHECK(ob_image_open_upper(stand->image, stand->data, stand->index) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
	stand->client = ends[0];
	CHECK(ob_nbd_start(stand->image, ends[1], &config, &stand->nbd) == 0);
	close(ends[1]);
}

static void stand_close(struct stand *stand)
{
	close(stand->client);
	ob_nbd_close(stand->nbd, SECOND_NS);
	ob_image_close(stand->image);
	ob_engine_close(stand->engine);
	close(stand->data);
	close(stand->index);
}

static void send_bytes(struct stand *stand, const void *from, size_t length, size_t piece)
{
	for (size_t done = 0; done < length;) {
		size_t part = length - done < piece ? length - done : piece;
		ssize_t sent = send(stand->client, (const uint8_t *)from + done, part, MSG_NOSIGNAL);

		CHECK(sent > 0);
		done += (size_t)sent;
	}
}

static void ask(struct stand *stand, uint16_t type, uint16_t flags, uint64_t offset, uint32_t length)
{
	uint8_t wire[REQUEST_SIZE];

	put_be(put_be(put_be(put_be(put_be(put_be(wire, 0x25609513, 4), flags, 2), type, 2), type + 1000u, 8), offset, 8),
	       length, 4);
	send_bytes(stand, wire, sizeof(wire), sizeof(wire));
}

/* The error of the next reply, which is to that type of request. */
static uint32_t answer(struct stand *stand, uint16_t type)
{
	struct pollfd wait = { .fd = stand->client, .events = POLLIN };
	uint8_t wire[SIMPLE_SIZE];

	for (size_t done = 0; done < sizeof(wire);) {
		ssize_t got;

		CHECK(poll(&wait, 1, PATIENCE_MS) == 1);
		got = recv(stand->client, wire + done, sizeof(wire) - done, 0);
		CHECK(got > 0);
		done += (size_t)got;
	}
	CHECK(get_be(wire, 4) == 0x67446698 && get_be(wire + 8, 8) == type + 1000u);
	return (uint32_t)get_be(wire + 4, 4);
}

static uint32_t write_at(struct stand *stand, uint16_t flags, uint64_t offset, uint32_t length, size_t piece)
{
	ask(stand, CMD_WRITE, flags, offset, length);
	send_bytes(stand, bytes, length, piece);
	return answer(stand, CMD_WRITE);
}

static void test_a_write_in_any_pieces_is_whole(void)
{
	static const size_t pieces[] = { 1000, 4096, 70001, LONG_WRITE };
	struct stand stand;

	stand_open(&stand, 1);
	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)(i * 2654435761u >> 13);
	for (int i = 0; i < 4; i++) {
		CHECK(write_at(&stand, 0, (uint64_t)i * SECTOR, LONG_WRITE, pieces[i]) == 0);
		CHECK(ob_image_read(stand.image, (uint64_t)i * SECTOR, found, LONG_WRITE) == 0);
		CHECK(memcmp(found, bytes, LONG_WRITE) == 0);
	}
	stand_close(&stand);
}

static void test_writes_that_cannot_be_are_refused_and_the_next_is_understood(void)
{
	struct stand stand;

	stand_open(&stand, 1);
	CHECK(write_at(&stand, 0, 1, SECTOR, SECTOR) == EINVAL_WIRE);
	CHECK(write_at(&stand, 0, 0, SECTOR - 1, SECTOR) == EINVAL_WIRE);
	CHECK(write_at(&stand, 0, 0, 0, 1) == EINVAL_WIRE);
	CHECK(write_at(&stand, FLAG_DF, 0, SECTOR, SECTOR) == EINVAL_WIRE);
	CHECK(write_at(&stand, 0, DISK, SECTOR, SECTOR) == ENOSPC_WIRE);
	CHECK(write_at(&stand, 0, 0 - (uint64_t)SECTOR, 2 * SECTOR, SECTOR) == ENOSPC_WIRE);
	ask(&stand, CMD_TRIM, 0, 0, 100);
	CHECK(answer(&stand, CMD_TRIM) == EINVAL_WIRE);
	ask(&stand, CMD_WRITE_ZEROES, 0, DISK - SECTOR, 2 * SECTOR);
	CHECK(answer(&stand, CMD_WRITE_ZEROES) == ENOSPC_WIRE);
	CHECK(write_at(&stand, 0, 0, SECTOR, SECTOR) == 0);
	stand_close(&stand);
}

static void test_nothing_is_written_to_a_read_only_image(void)
{
	struct stand stand;

	stand_open(&stand, 0);
	CHECK(write_at(&stand, 0, 0, LONG_WRITE, 65536) == EPERM_WIRE);
	ask(&stand, CMD_TRIM, 0, 0, SECTOR);
	CHECK(answer(&stand, CMD_TRIM) == EPERM_WIRE);
	ask(&stand, CMD_FLUSH, 0, 0, 0);
	CHECK(answer(&stand, CMD_FLUSH) == 0);
	stand_close(&stand);
}

static uint64_t records(const struct stand *stand)
{
	return ((uint64_t)lseek(stand->index, 0, SEEK_END) - HEAD) / 16;
}

static void test_flush_and_force_unit_access_make_it_last(void)
{
	struct stand stand;

	stand_open(&stand, 1);
	CHECK(write_at(&stand, 0, 0, SECTOR, SECTOR) == 0 && records(&stand) == 0);
	CHECK(write_at(&stand, FLAG_FUA, SECTOR, SECTOR, SECTOR) == 0 && records(&stand) == 2);
	ask(&stand, CMD_TRIM, FLAG_FUA, 0, SECTOR);
	CHECK(answer(&stand, CMD_TRIM) == 0 && records(&stand) == 3);
	ask(&stand, CMD_WRITE_ZEROES, FLAG_NO_HOLE, 0, SECTOR);
	CHECK(answer(&stand, CMD_WRITE_ZEROES) == 0 && records(&stand) == 3);
	ask(&stand, CMD_FLUSH, 0, 0, 0);
	CHECK(answer(&stand, CMD_FLUSH) == 0 && records(&stand) == 4);
	stand_close(&stand);
}

static void test_a_client_that_hangs_up_in_a_write_leaves_the_pieces_before(void)
{
	struct stand stand;
	struct pollfd event;

	stand_open(&stand, 1);
	memset(bytes, 0x77, sizeof(bytes));
	ask(&stand, CMD_WRITE, 0, 0, LONG_WRITE);
	send_bytes(&stand, bytes, LONG_WRITE - 5, 65536);
	shutdown(stand.client, SHUT_WR);
	event = (struct pollfd){ .fd = ob_event_fd(stand.engine), .events = POLLIN };
	CHECK(poll(&event, 1, PATIENCE_MS) == 1);
	CHECK(ob_image_read(stand.image, 0, found, LONG_WRITE) == 0);
	CHECK(found[0] == 0x77 && found[(2 << 20) - 1] == 0x77 && found[2 << 20] == 0);
	stand_close(&stand);
}

int main(void)
{
	test_a_write_in_any_pieces_is_whole();
	test_writes_that_cannot_be_are_refused_and_the_next_is_understood();
	test_nothing_is_written_to_a_read_only_image();
	test_flush_and_force_unit_access_make_it_last();
	test_a_client_that_hangs_up_in_a_write_leaves_the_pieces_before();
	return 0;
}
