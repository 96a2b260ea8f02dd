/* SPDX-License-Identifier: Apache-2.0
 * test_nbd.c: the transmission phase from a client's end of a socket pair. Its blob is
 * half in the cache; the test itself answers fetches, so it decides when a miss ends.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "nbdwire.h"

enum {
	EXTENT = OB_EXTENT_SIZE,
	PRESENT = 40 * EXTENT,             /* [0, PRESENT) is in the cache */
	BLOB = 400 * EXTENT,               /* [PRESENT, BLOB) must be fetched */
	IMAGE = BLOB + 64 * EXTENT + 11,   /* and the rest is a hole */
	PATIENCE_MS = 30000,               /* a failing test ends; a sanitizer is slow */
	ID = 42
};

static const int64_t SECOND_NS = 1000000000;

struct stand {
	ob_engine *engine;
	ob_blob *blob;
	ob_file *file;
	ob_image *image;
	ob_nbd *nbd;
	int client;
};

static uint8_t image_byte(uint64_t offset)
{
	return offset < BLOB ? (uint8_t)((offset * 2654435761u) >> 13) : 0;
}

/* A connected pair of sockets of the kind asked for: ends[0] for the client. */
static void connect_pair(int family, int ends[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener;

	if (family == AF_UNIX) {
		CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
		return;
	}
	listener = socket(AF_INET, SOCK_STREAM, 0);
	ends[0] = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 1) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
	CHECK(connect(ends[0], (struct sockaddr *)&address, sizeof(address)) == 0);
	ends[1] = accept(listener, NULL, NULL);
	CHECK(ends[1] >= 0);
	close(listener);
}

static void stand_open(struct stand *stand, int family, int structured)
{
	ob_engine_config engine = { .work_threads = 2, .readahead_extents = 0, .fetch_bytes = 64 << 20 };
	ob_blob_config blob = { .id = 1, .size = BLOB, .table_offset = 4096, .policy = OB_POLICY_HANG };
	ob_nbd_config nbd = { .id = ID, .structured = structured, .allocation = structured };
	int data = memfd_create("data", 0), map = memfd_create("map", 0), ends[2];
	uint8_t *present = malloc(PRESENT);
	ob_layer layer = { .kind = OB_LAYER_FLAT };

	CHECK(ob_engine_open(&engine, &stand->engine) == 0);
	CHECK(ob_blob_open_cached(stand->engine, data, map, &blob, &stand->blob) == 0);
	for (uint64_t i = 0; i < PRESENT; i++)
		present[i] = image_byte(i);
	CHECK(ob_blob_store(stand->blob, 0, present, PRESENT) == PRESENT / EXTENT);
	CHECK(ob_file_open_raw(stand->blob, 0, BLOB, &stand->file) == 0);
	layer.file = stand->file;
	layer.index = stand->file;
	CHECK(ob_image_open(stand->engine, &layer, 1, IMAGE, &stand->image) == 0);
	connect_pair(family, ends);
	stand->client = ends[0];
	CHECK(ob_nbd_start(stand->image, ends[1], &nbd, &stand->nbd) == 0);
	close(ends[1]);
	close(data);
	close(map);
	free(present);
}

static void stand_close(struct stand *stand)
{
	close(stand->client);
	ob_nbd_close(stand->nbd, SECOND_NS);
	ob_image_close(stand->image);
	ob_file_close(stand->file);
	ob_blob_close(stand->blob);
	ob_engine_close(stand->engine);
}

/* Take every fetch there is, without answering. Returns how many. */
static int take(struct stand *stand, ob_fetch **fetches, int max)
{
	int count = 0;

	while (count < max && ob_fetch_next(stand->engine, OB_BULK, SECOND_NS / 10, &fetches[count]) == 0)
		count++;
	return count;
}

static uint64_t answer(ob_fetch *fetch)
{
	uint64_t length = fetch->length;

	for (uint64_t i = 0; i < length; i++)
		((uint8_t *)fetch->buffer)[i] = image_byte(fetch->offset + i);
	CHECK(ob_fetch_advance(fetch, length) == 0 && ob_fetch_finish(fetch, 0, 0) == 0);
	return length;
}

/* Answer every fetch there is, and that comes of it. Returns how many bytes that were. */
static uint64_t feed(struct stand *stand)
{
	ob_fetch *fetch;
	uint64_t fed = 0;

	while (take(stand, &fetch, 1))
		fed += answer(fetch);
	return fed;
}

/* The connection ends, by itself, before patience does. */
static void expect_closed_event(struct stand *stand)
{
	struct pollfd events = { .fd = ob_event_fd(stand->engine), .events = POLLIN };
	ob_event event;

	do {
		CHECK(poll(&events, 1, PATIENCE_MS) == 1);
		CHECK(ob_event_next(stand->engine, &event) == 1);
	} while (event.kind != OB_EVENT_NBD_CLOSED);
	CHECK(event.id == ID);
}

/* ---- the client ---- */

static uint8_t *request_put(uint8_t *at, int type, int flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
	at = put_be(put_be(put_be(at, 0x25609513, 4), (uint64_t)flags, 2), (uint64_t)type, 2);
	return put_be(put_be(put_be(at, cookie, 8), offset, 8), length, 4);
}

static void send_bytes(int fd, const void *bytes, size_t length)
{
	CHECK(send(fd, bytes, length, MSG_NOSIGNAL) == (ssize_t)length);
}

static void ask(struct stand *stand, int type, int flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
	uint8_t wire[REQUEST_SIZE];

	request_put(wire, type, flags, cookie, offset, length);
	send_bytes(stand->client, wire, sizeof(wire));
}

/* Exactly length bytes; 0 when the server has hung up instead. */
static int receive(struct stand *stand, void *to, size_t length)
{
	struct pollfd ready = { .fd = stand->client, .events = POLLIN };

	for (size_t at = 0; at < length;) {
		CHECK(poll(&ready, 1, PATIENCE_MS) == 1);
		ssize_t got = recv(stand->client, (uint8_t *)to + at, length - at, 0);

		if (got <= 0) {
			CHECK(at == 0);
			return 0;
		}
		at += (size_t)got;
	}
	return 1;
}

static void expect_hang_up(struct stand *stand)
{
	uint8_t byte;

	CHECK(!receive(stand, &byte, 1));
}

/* The next reply is a plain one with that error. Returns its cookie. */
static uint64_t expect_simple(struct stand *stand, uint32_t error)
{
	uint8_t header[SIMPLE_SIZE];

	CHECK(receive(stand, header, sizeof(header)));
	CHECK(get_be(header, 4) == 0x67446698 && get_be(header + 4, 4) == error);
	return get_be(header + 8, 8);
}

static void expect_content(struct stand *stand, uint64_t offset, uint32_t length)
{
	uint8_t *content = malloc(length);

	CHECK(receive(stand, content, length));
	for (uint32_t i = 0; i < length; i++)
		CHECK(content[i] == image_byte(offset + i));
	free(content);
}

/* The next reply is one final chunk of that type. Returns its length. */
static uint32_t expect_chunk(struct stand *stand, uint16_t type, uint64_t *cookie)
{
	uint8_t header[CHUNK_SIZE];

	CHECK(receive(stand, header, sizeof(header)));
	CHECK(get_be(header, 4) == 0x668e33ef && get_be(header + 4, 2) == 1 && get_be(header + 6, 2) == type);
	*cookie = get_be(header + 8, 8);
	return (uint32_t)get_be(header + 16, 4);
}

static void expect_error_chunk(struct stand *stand, uint64_t cookie, uint32_t error)
{
	uint8_t body[6];
	uint64_t of;

	CHECK(expect_chunk(stand, REPLY_ERROR, &of) == 6 && of == cookie);
	CHECK(receive(stand, body, 6) && get_be(body, 4) == error && get_be(body + 4, 2) == 0);
}

/* Cookies of reads are their offsets in the tests that answer out of order. */
static uint64_t expect_data_chunk(struct stand *stand, uint32_t length)
{
	uint8_t offset[8];
	uint64_t cookie;

	CHECK(expect_chunk(stand, REPLY_DATA, &cookie) == 8 + length);
	CHECK(receive(stand, offset, 8) && get_be(offset, 8) == cookie);
	expect_content(stand, cookie, length);
	return cookie;
}

/* ---- tests ---- */

static void test_reads(int family)
{
	struct stand stand;

	stand_open(&stand, family, 0);
	ask(&stand, CMD_READ, 0, 7, 12345, 99999);
	CHECK(expect_simple(&stand, 0) == 7);
	expect_content(&stand, 12345, 99999);
	ask(&stand, CMD_READ, 0, 8, IMAGE - 5, 5);
	CHECK(expect_simple(&stand, 0) == 8);
	expect_content(&stand, IMAGE - 5, 5);
	ask(&stand, CMD_FLUSH, 0, 9, 0, 0);
	CHECK(expect_simple(&stand, 0) == 9);
	ask(&stand, CMD_READ, 0, 10, IMAGE - 4, 5);
	CHECK(expect_simple(&stand, 22) == 10);
	ask(&stand, CMD_BLOCK_STATUS, 0, 11, 0, 512);
	CHECK(expect_simple(&stand, 22) == 11);
	ask(&stand, CMD_READ, FLAG_DF, 12, 0, 512);
	CHECK(expect_simple(&stand, 22) == 12);
	stand_close(&stand);

	stand_open(&stand, family, 1);
	ask(&stand, CMD_READ, FLAG_DF, 4096, 4096, 2000000);
	expect_data_chunk(&stand, 2000000);
	ask(&stand, CMD_READ, 0, 1, 1, 1);
	expect_data_chunk(&stand, 1);
	stand_close(&stand);
}

static void test_refuses_bad_reads(void)
{
	struct { int type, flags; uint64_t offset; uint32_t length, error; } bad[] = {
		{ CMD_READ, 0, 0, 0, 22 },
		{ CMD_READ, 0, IMAGE, 1, 22 },
		{ CMD_READ, 0, UINT64_MAX, 2, 22 },
		{ CMD_READ, 0, UINT64_MAX - 1, UINT32_MAX, 22 },
		{ CMD_READ, 1, 0, 512, 22 },
		{ CMD_READ, FLAG_REQ_ONE, 0, 512, 22 },
		{ CMD_BLOCK_STATUS, 0, 0, 0, 22 },
		{ CMD_BLOCK_STATUS, 0, IMAGE - 1, 2, 22 },
		{ CMD_BLOCK_STATUS, FLAG_DF, 0, 512, 22 },
	};
	struct stand stand;

	stand_open(&stand, AF_UNIX, 1);
	for (uint64_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		ask(&stand, bad[i].type, bad[i].flags, i, bad[i].offset, bad[i].length);
		expect_error_chunk(&stand, i, bad[i].error);
	}
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);
	stand_close(&stand);
}

/* Longer than 32 MiB needs an image that large: a hole will do. */
static void test_refuses_long_reads(void)
{
	ob_nbd_config config = { .id = ID, .structured = 1 };
	struct stand stand;
	ob_image *large;
	ob_layer layer = { .kind = OB_LAYER_FLAT };
	int ends[2];

	stand_open(&stand, AF_UNIX, 1);
	layer.file = layer.index = stand.file;
	CHECK(ob_image_open(stand.engine, &layer, 1, 1ULL << 40, &large) == 0);
	connect_pair(AF_UNIX, ends);
	close(stand.client);
	ob_nbd_close(stand.nbd, SECOND_NS);
	stand.client = ends[0];
	CHECK(ob_nbd_start(large, ends[1], &config, &stand.nbd) == 0);
	close(ends[1]);
	ob_image_close(large);                 /* the connection keeps what it needs */
	ask(&stand, CMD_READ, 0, 1, 1ULL << 30, (32 << 20) + 1);
	expect_error_chunk(&stand, 1, 22);
	ask(&stand, CMD_READ, FLAG_DF, 2, 1ULL << 30, (32 << 20) + 1);
	expect_error_chunk(&stand, 2, 75);
	ask(&stand, CMD_READ, 0, 1ULL << 30, 1ULL << 30, 32 << 20);
	expect_data_chunk(&stand, 32 << 20);
	stand_close(&stand);
}

static void test_refuses_writes_and_stays_in_step(void)
{
	struct stand stand;
	uint8_t payload[100000];

	memset(payload, 0x25, sizeof(payload));
	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_WRITE, 0, 1, 0, sizeof(payload));
	send_bytes(stand.client, payload, sizeof(payload));
	CHECK(expect_simple(&stand, 1) == 1);
	ask(&stand, CMD_WRITE, 1, 2, IMAGE, 1);    /* whatever else is wrong: EPERM */
	send_bytes(stand.client, payload, 1);
	CHECK(expect_simple(&stand, 1) == 2);
	ask(&stand, CMD_WRITE, 0, 3, 0, 0);
	CHECK(expect_simple(&stand, 1) == 3);
	ask(&stand, CMD_TRIM, 0, 4, 0, 512);
	CHECK(expect_simple(&stand, 1) == 4);
	ask(&stand, CMD_WRITE_ZEROES, 0, 5, 0, 512);
	CHECK(expect_simple(&stand, 1) == 5);
	ask(&stand, 5, 0, 6, 0, 512);              /* CACHE, which is not offered */
	CHECK(expect_simple(&stand, 22) == 6);
	ask(&stand, 999, 0, 7, 0, 512);
	CHECK(expect_simple(&stand, 22) == 7);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);
	stand_close(&stand);
}

/* One send() of many requests, and the last of them in two parts. */
static void test_pipelined(void)
{
	enum { COUNT = 1000 };
	struct stand stand;
	uint8_t wire[COUNT * REQUEST_SIZE], *at = wire;

	stand_open(&stand, AF_UNIX, 0);
	for (uint64_t i = 0; i < COUNT; i++)
		at = request_put(at, CMD_READ, 0, i, i * 97, 100);
	send_bytes(stand.client, wire, sizeof(wire) - 3);
	for (uint64_t i = 0; i < COUNT - 1; i++) {
		CHECK(expect_simple(&stand, 0) == i);
		expect_content(&stand, i * 97, 100);
	}
	send_bytes(stand.client, at - 3, 3);
	CHECK(expect_simple(&stand, 0) == COUNT - 1);
	expect_content(&stand, (COUNT - 1) * 97, 100);
	stand_close(&stand);
}

static void expect_extents(struct stand *stand, uint64_t cookie, const uint32_t (*want)[2], uint32_t count)
{
	uint8_t body[4 + 8 * 8];
	uint64_t of;

	CHECK(expect_chunk(stand, REPLY_BLOCK_STATUS, &of) == 4 + 8 * count && of == cookie);
	CHECK(receive(stand, body, 4 + 8 * count) && get_be(body, 4) == CONTEXT_ALLOCATION);
	for (uint32_t i = 0; i < count; i++)
		CHECK(get_be(body + 4 + 8 * i, 4) == want[i][0] && get_be(body + 8 + 8 * i, 4) == want[i][1]);
}

static void test_block_status(void)
{
	struct stand stand;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_BLOCK_STATUS, 0, 1, 100, IMAGE - 100);
	expect_extents(&stand, 1, (uint32_t[][2]){ { BLOB - 100, 0 }, { IMAGE - BLOB, 3 } }, 2);
	ask(&stand, CMD_BLOCK_STATUS, FLAG_REQ_ONE, 2, 100, IMAGE - 100);
	expect_extents(&stand, 2, (uint32_t[][2]){ { BLOB - 100, 0 } }, 1);
	ask(&stand, CMD_BLOCK_STATUS, 0, 3, BLOB + 7, 1);
	expect_extents(&stand, 3, (uint32_t[][2]){ { 1, 3 } }, 1);
	stand_close(&stand);
}

static void test_extents_join_and_count(void)
{
	uint8_t extents[24];
	uint32_t count = 0;

	count = extents_add(extents, count, 10, 0);
	count = extents_add(extents, count, 20, 3);
	count = extents_add(extents, count, 0xfffffff0 - 20, 3);
	CHECK(count == 2 && get_be(extents + 8, 4) == 0xfffffff0 && get_be(extents + 12, 4) == 3);
	CHECK(extents_add(extents, count, 1, 0) == 3);
}

static void test_out_of_step_is_hung_up_on(void)
{
	struct stand stand;
	uint8_t wire[REQUEST_SIZE] = { 0 };

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	send_bytes(stand.client, wire, sizeof(wire));
	expect_data_chunk(&stand, 512);
	expect_hang_up(&stand);
	expect_closed_event(&stand);
	stand_close(&stand);
}

static void test_goodbye_comes_after_the_answers(int family)
{
	struct stand stand;

	stand_open(&stand, family, 1);
	ask(&stand, CMD_READ, 0, PRESENT + 3 * EXTENT, PRESENT + 3 * EXTENT, 5 * EXTENT);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	ask(&stand, CMD_DISC, 0, 0, 0, 0);
	CHECK(expect_data_chunk(&stand, 512) == 0);
	CHECK(feed(&stand) == 5 * EXTENT);
	expect_data_chunk(&stand, 5 * EXTENT);
	expect_hang_up(&stand);
	expect_closed_event(&stand);
	stand_close(&stand);
}

static void test_hits_overtake_misses(int family)
{
	struct stand stand;

	stand_open(&stand, family, 0);
	ask(&stand, CMD_READ, 0, 100, PRESENT - 50, 100);
	ask(&stand, CMD_READ, 0, 200, 4096, 512);
	CHECK(expect_simple(&stand, 0) == 200);
	expect_content(&stand, 4096, 512);
	CHECK(feed(&stand) == EXTENT);
	CHECK(expect_simple(&stand, 0) == 100);
	expect_content(&stand, PRESENT - 50, 100);
	stand_close(&stand);
}

/* Until so many of its reads have had to wait. */
static void await_misses(const struct stand *stand, uint64_t count)
{
	ob_blob_stat stat;

	for (int tries = 0; ob_blob_get_stat(stand->blob, &stat), stat.misses < count; tries++) {
		CHECK(tries < PATIENCE_MS);
		usleep(1000);
	}
}

/* More misses than may be parked: the rest waits in the socket, and none is lost. */
static void test_parks_no_more_than_its_limit(void)
{
	enum { COUNT = 350 };
	struct stand stand;
	uint8_t wire[COUNT * REQUEST_SIZE], *at = wire, seen[COUNT] = { 0 };
	uint64_t fed = 0;
	ob_fetch *fetches[COUNT];
	int count;

	stand_open(&stand, AF_UNIX, 1);
	for (uint64_t i = 0; i < COUNT; i++) {
		uint64_t offset = PRESENT + i * EXTENT + 5;

		at = request_put(at, CMD_READ, 0, offset, offset, 100);
	}
	send_bytes(stand.client, wire, sizeof(wire));
	await_misses(&stand, 128); /* while nothing is taken, neighbours join: few fetches, all of which may be out */
	count = take(&stand, fetches, COUNT);
	for (int i = 0; i < count; i++)
		fed += answer(fetches[i]);
	CHECK(fed == 128 * EXTENT);
	CHECK(fed + feed(&stand) == (uint64_t)COUNT * EXTENT);
	for (int i = 0; i < COUNT; i++) {
		uint64_t cookie = expect_data_chunk(&stand, 100);

		CHECK(!seen[(cookie - PRESENT) / EXTENT]++);
	}
	stand_close(&stand);
}

/* Three reads of 20 MiB may wait; behind a fourth even a hit does. */
static void test_parks_no_more_bytes_than_its_limit(void)
{
	enum { LENGTH = 20 << 20 };
	struct stand stand;
	struct pollfd reply;

	stand_open(&stand, AF_UNIX, 1);
	for (int i = 0; i < 3; i++)
		ask(&stand, CMD_READ, 0, PRESENT, PRESENT, LENGTH);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	CHECK(expect_data_chunk(&stand, 512) == 0);
	ask(&stand, CMD_READ, 0, PRESENT, PRESENT, LENGTH);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	reply = (struct pollfd){ .fd = stand.client, .events = POLLIN };
	CHECK(poll(&reply, 1, 200) == 0);
	feed(&stand);
	for (int i = 0; i < 5; i++) {              /* the hit is not always last */
		uint8_t offset[8];
		uint64_t cookie;
		uint32_t length = expect_chunk(&stand, REPLY_DATA, &cookie) - 8;

		CHECK(length == (cookie ? LENGTH : 512));
		CHECK(receive(&stand, offset, 8));
		expect_content(&stand, cookie, length);
	}
	stand_close(&stand);
}

static void *close_slowly(void *argument)
{
	struct stand *stand = argument;

	ob_nbd_close(stand->nbd, 20 * SECOND_NS);
	stand->nbd = NULL;
	return NULL;
}

static void test_close_waits_for_what_is_in_hand(void)
{
	struct pollfd gone = { .events = POLLRDHUP };
	struct stand stand;
	pthread_t closer;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, PRESENT, PRESENT, 700);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);            /* so both were read */
	pthread_create(&closer, NULL, close_slowly, &stand);
	/* Its SHUT_RD is our broken pipe: no request gets in any more. */
	while (send(stand.client, &gone, 1, MSG_NOSIGNAL) == 1)
		usleep(1000);
	CHECK(feed(&stand) == EXTENT);
	expect_data_chunk(&stand, 700);
	expect_hang_up(&stand);
	pthread_join(closer, NULL);
	stand_close(&stand);
}

/* A read that is parked at the time of close ends later, and finds nobody. */
static void test_close_leaves_what_does_not_end(void)
{
	struct stand stand;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, PRESENT, PRESENT, 700);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);
	ob_nbd_close(stand.nbd, SECOND_NS / 50);
	stand.nbd = NULL;
	expect_hang_up(&stand);
	ob_image_close(stand.image);
	ob_file_close(stand.file);
	CHECK(feed(&stand) == EXTENT);
	stand.image = NULL;
	stand.file = NULL;
	stand_close(&stand);
}

/* The same with a further read that has no place among the parked. */
static void test_close_while_the_parked_are_full(int family)
{
	enum { COUNT = 200 };
	struct stand stand;
	ob_fetch *fetches[COUNT];
	int count;

	stand_open(&stand, family, 1);
	for (uint64_t i = 0; i < COUNT; i++)
		ask(&stand, CMD_READ, 0, i, PRESENT + i * EXTENT, 10);
	count = take(&stand, fetches, COUNT);
	ob_nbd_close(stand.nbd, SECOND_NS / 50);
	stand.nbd = NULL;
	for (int i = 0; i < count; i++)
		answer(fetches[i]);
	stand_close(&stand);
}

static void test_client_that_vanishes(void)
{
	struct stand stand;
	time_t started;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, PRESENT, PRESENT, 700);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);
	close(stand.client);
	started = time(NULL);
	expect_closed_event(&stand);
	CHECK(time(NULL) - started < 15);          /* not after half a minute's lingering */
	stand.client = -1;
	stand_close(&stand);
}

/* Replies pile up in the socket until the connection's thread stands still. Nobody else does. */
static void test_client_that_never_reads(int family)
{
	struct stand stand;
	ob_nbd_config config = { .id = ID + 1, .structured = 1 };
	int unread = -1, ends[2];
	ob_nbd *second;

	stand_open(&stand, family, 1);
	connect_pair(family, ends);
	CHECK(ob_nbd_start(stand.image, ends[1], &config, &second) == 0);
	close(ends[1]);
	for (uint64_t i = 0; i < 100; i++)
		ask(&stand, CMD_READ, 0, i, i, PRESENT - 100);
	for (uint64_t i = 0; i < 4; i++)           /* and misses that work threads finish */
		ask(&stand, CMD_READ, 0, i, PRESENT + i * EXTENT, 512);
	unread = stand.client;
	stand.client = ends[0];
	ask(&stand, CMD_READ, 0, PRESENT + 9 * EXTENT, PRESENT + 9 * EXTENT, 3 * EXTENT);
	CHECK(feed(&stand) >= 3 * EXTENT);
	expect_data_chunk(&stand, 3 * EXTENT);
	ob_nbd_close(stand.nbd, SECOND_NS / 50);
	stand.nbd = second;
	close(unread);
	stand_close(&stand);
}

static void test_stopping_engine_is_told(void)
{
	struct stand stand;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, 1, PRESENT, 700);
	ask(&stand, CMD_READ, 0, 0, 0, 512);
	expect_data_chunk(&stand, 512);
	ob_engine_stop(stand.engine);
	expect_error_chunk(&stand, 1, 108);
	stand_close(&stand);
}

static void test_failed_fetch_is_an_io_error(void)
{
	struct stand stand;
	ob_fetch *fetch;

	stand_open(&stand, AF_UNIX, 1);
	ask(&stand, CMD_READ, 0, 1, PRESENT, 700);
	CHECK(ob_fetch_next(stand.engine, OB_BULK, 10 * SECOND_NS, &fetch) == 0);
	CHECK(ob_fetch_finish(fetch, -ECONNREFUSED, 0) == 0);
	expect_error_chunk(&stand, 1, 5);
	ask(&stand, CMD_READ, 0, PRESENT, PRESENT, 700);
	CHECK(feed(&stand) == EXTENT);
	expect_data_chunk(&stand, 700);
	stand_close(&stand);
}

/* Random requests behind right magics: one reply each, then the stream is still in step. */
static void test_random_requests(void)
{
	enum { ROUNDS = 400 };
	struct stand stand;
	uint32_t random = 12345;
	uint8_t skipped[IMAGE > 65536 ? 65536 : IMAGE], header[CHUNK_SIZE];

	stand_open(&stand, AF_UNIX, 1);
	for (uint64_t i = 0; i < ROUNDS; i++) {
		uint32_t length, payload = 0;
		int type;

		random = random * 1664525 + 1013904223;
		type = (int)(random >> 28);
		length = (random >> 7) % 70000;
		if (type == CMD_DISC)
			continue;
		ask(&stand, type, random >> 27 & 1 ? 0 : (random >> 3) & 0xffff, i, random % PRESENT, length);
		for (uint32_t sent = 0; type == CMD_WRITE && sent < length;) {
			uint32_t step = length - sent < sizeof(skipped) ? length - sent : sizeof(skipped);

			memset(skipped, (int)random, step);
			send_bytes(stand.client, skipped, step);
			sent += step;
		}
		CHECK(receive(&stand, header, SIMPLE_SIZE) && get_be(header + 8, 8) == i);
		if (get_be(header, 4) == 0x668e33ef) {
			CHECK(receive(&stand, header + SIMPLE_SIZE, CHUNK_SIZE - SIMPLE_SIZE));
			payload = (uint32_t)get_be(header + 16, 4);
		}
		for (uint32_t got = 0; got < payload;) {
			uint32_t step = payload - got < sizeof(skipped) ? payload - got : sizeof(skipped);

			CHECK(receive(&stand, skipped, step));
			got += step;
		}
	}
	stand_close(&stand);
}

int main(void)
{
	test_reads(AF_UNIX);
	test_reads(AF_INET);
	test_refuses_bad_reads();
	test_refuses_long_reads();
	test_refuses_writes_and_stays_in_step();
	test_pipelined();
	test_block_status();
	test_extents_join_and_count();
	test_out_of_step_is_hung_up_on();
	test_goodbye_comes_after_the_answers(AF_UNIX);
	test_goodbye_comes_after_the_answers(AF_INET);
	test_hits_overtake_misses(AF_UNIX);
	test_hits_overtake_misses(AF_INET);
	test_parks_no_more_than_its_limit();
	test_parks_no_more_bytes_than_its_limit();
	test_close_waits_for_what_is_in_hand();
	test_close_leaves_what_does_not_end();
	test_close_while_the_parked_are_full(AF_UNIX);
	test_close_while_the_parked_are_full(AF_INET);
	test_client_that_vanishes();
	test_client_that_never_reads(AF_UNIX);
	test_client_that_never_reads(AF_INET);
	test_stopping_engine_is_told();
	test_failed_fetch_is_an_io_error();
	test_random_requests();
	return 0;
}
