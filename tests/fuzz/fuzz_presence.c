/* SPDX-License-Identifier: Apache-2.0
 * fuzz_presence.c: a cached blob with any data file and any presence map, then any order
 * of reads, fetches, stores, drops and reopenings. Whatever is read is what the source
 * holds, and every wait ends.
 *
 * Input: size, how each extent lies in data and map, the end of the map, then steps.
 */
#include <errno.h>
#include <stdatomic.h>

#include "cache.h"
#include "fuzz.h"
#include "parked.h"

enum {
	EXTENT = OB_EXTENT_SIZE,
	EXTENTS = 6,
	BLOB_MAX = EXTENTS * EXTENT,
	TABLE = 4096,
	STEPS = 48,
	HELD = 3,               /* fetches in hand */
	WAITS = 8,
	LOOKS = 3000            /* for half a minute */
};

static const int64_t LOOK_NS = 10000000;

struct wait {
	struct parked parked;   /* first: ready() casts */
	atomic_int pending;
};

struct stand {
	ob_blob *blob;
	ob_blob_config config;
	int data_fd, map_fd;
	ob_fetch *held[HELD];
	uint64_t filled[HELD];
};

static ob_engine *engine;
static uint8_t content[BLOB_MAX], got[BLOB_MAX];
static struct wait waits[WAITS];

static void waited(struct parked *parked, int status)
{
	struct wait *wait = (struct wait *)parked;

	(void)status;
	CHECK(atomic_exchange(&wait->pending, 0) == 1);
}

static void write_at(int fd, const void *bytes, size_t length, uint64_t offset)
{
	CHECK(pwrite(fd, bytes, length, (off_t)offset) == (ssize_t)length);
}

/* An entry that happens to be the checksum of wrong bytes goes: a CRC tells of accidents, not of forgery,
 * and a fuzzer that sees the comparison forges it. */
static void unforge(struct stand *stand, uint64_t at, uint64_t length)
{
	static const uint32_t absent;
	off_t place = (off_t)(stand->config.table_offset + 4 * (at / EXTENT));
	uint32_t entry = 0, sum;

	memset(got, 0, length);     /* what the data file is too short for reads as zeros */
	CHECK(pread(stand->data_fd, got, length, (off_t)at) >= 0);
	CHECK(pread(stand->map_fd, &entry, sizeof(entry), place) >= 0);
	sum = ~ob_crc32c(~0u, got, length);
	if (entry == (sum ? sum : 1) && memcmp(got, content + at, length))
		write_at(stand->map_fd, &absent, sizeof(absent), (uint64_t)place);
}

/* Extent by extent: right, absent, rotten, lost data under a map that kept its entry, or the reverse.
 * Also: how many extents are fetched together. */
static void lay_down(struct stand *stand, struct tape *tape)
{
	static const uint8_t rot = 0x5a;
	uint64_t size = stand->config.size;

	for (uint64_t i = 0; i * EXTENT < size; i++) {
		uint64_t how = take(tape, 1), at = i * EXTENT;
		uint64_t length = size - at < EXTENT ? size - at : EXTENT;
		uint32_t sum = ~ob_crc32c(~0u, content + at, length);

		sum = how & 4 ? (uint32_t)take(tape, 4) : sum ? sum : 1;
		if (how & 1)
			write_at(stand->data_fd, content + at, length, at);
		if (how & 2)
			write_at(stand->map_fd, &sum, sizeof(sum), stand->config.table_offset + 4 * i);
		if (how & 8)
			write_at(stand->data_fd, &rot, 1, at + take(tape, 2) % length);
	}
	uint64_t how = take(tape, 1);

	stand->config.unit = (uint32_t)(how >> 2) % 6;
	if (how % 4 == 0)
		CHECK(ftruncate(stand->map_fd, (off_t)(TABLE + take(tape, 1) % 32)) == 0);
	if (take(tape, 1) % 8 == 1)
		CHECK(ftruncate(stand->data_fd, (off_t)(take(tape, 3) % (size + 1))) == 0);
	for (uint64_t at = 0; at < size; at += EXTENT)
		unforge(stand, at, size - at < EXTENT ? size - at : EXTENT);
}

static void check_read(ob_blob *blob, uint64_t offset, uint64_t length)
{
	int status = blob_try_read(blob, offset, got, length);

	CHECK(status == 0 || status == -EAGAIN || status == -EIO);
	if (status == 0)
		CHECK(memcmp(got, content + offset, length) == 0);
}

static void begin_wait(struct stand *stand, struct wait *wait, uint64_t offset, uint64_t length)
{
	if (atomic_exchange(&wait->pending, 1))
		return;
	memset(&wait->parked, 0, sizeof(wait->parked));
	wait->parked.ready = waited;
	parked_begin(&wait->parked, engine);
	blob_want(stand->blob, offset, length, &wait->parked);
	parked_end(&wait->parked);
}

/* More of what was lent; `to` is where the source stops for now. */
static void advance(struct stand *stand, int slot, uint64_t to)
{
	ob_fetch *fetch = stand->held[slot];

	if (to < stand->filled[slot])
		return;
	memcpy((uint8_t *)fetch->buffer + stand->filled[slot], content + fetch->offset + stand->filled[slot],
	       to - stand->filled[slot]);
	stand->filled[slot] = to;
	CHECK(ob_fetch_advance(fetch, to) == 0);
}

static void finish(struct stand *stand, int slot, int status, int64_t retry_ns)
{
	CHECK(ob_fetch_finish(stand->held[slot], status, retry_ns) == 0);
	stand->held[slot] = NULL;
}

static void step_fetch(struct stand *stand, struct tape *tape, int slot)
{
	uint64_t how = take(tape, 1);

	if (!stand->held[slot]) {
		stand->filled[slot] = 0;
		if (ob_fetch_next(engine, how % 3, 0, &stand->held[slot]))
			stand->held[slot] = NULL;
		return;
	}
	if (how & 1)
		advance(stand, slot, take(tape, 3) % (stand->held[slot]->length + 1));
	else if (how & 2)
		finish(stand, slot, -EIO, how & 4 ? 1000 * (int64_t)take(tape, 1) : 0);
	else {
		advance(stand, slot, stand->held[slot]->length);
		finish(stand, slot, 0, 0);
	}
}

static void reopen(struct stand *stand)
{
	CHECK(ob_blob_open_cached(engine, stand->data_fd, stand->map_fd, &stand->config, &stand->blob) == 0);
}

/* Each extent is counted once, whatever brought it. */
static void check_counts(ob_blob *blob)
{
	uint64_t bytes = 0;
	ob_blob_stat stat;

	ob_blob_get_stat(blob, &stat);
	for (uint64_t extent = 0; extent < blob->extents; extent++)
		bytes += extent_kind(blob, extent) == EXTENT_PRESENT ? extent_length(blob, extent) : 0;
	CHECK(stat.size == blob->size && stat.present_bytes == bytes);
}

static void step(struct stand *stand, struct tape *tape)
{
	uint64_t how = take(tape, 1), size = stand->config.size;
	uint64_t offset = take(tape, 3) % (size + 1), length = take(tape, how & 128 ? 3 : 2) % (size - offset + 1);

	switch (how % 16) {
	case 0: case 1: case 2:
		check_read(stand->blob, offset, length);
		break;
	case 3: case 4:
		begin_wait(stand, &waits[how / 16 % WAITS], offset, length);
		break;
	case 5: case 6: case 7: case 8:
		step_fetch(stand, tape, (int)(how / 16 % HELD));
		break;
	case 9:
		CHECK(ob_blob_prefetch(stand->blob, offset, length, how & 16 ? OB_PREFETCH : OB_BULK) == 0);
		break;
	case 10: case 11:
		CHECK(ob_blob_store(stand->blob, offset, content + offset, length) >= 0);
		break;
	case 12:
		CHECK(ob_blob_drop(stand->blob, offset, length) >= 0);
		break;
	case 13:
		if (length)
			blob_reject(stand->blob, offset, length);
		break;
	case 14:
		CHECK(ob_blob_set_policy(stand->blob, how / 16 % 3, take(tape, 2)) == 0);
		break;
	default:
		check_counts(stand->blob);
		ob_blob_healthy(stand->blob);
		CHECK(blob_try_read(stand->blob, offset, got, UINT64_MAX - take(tape, 1)) == -EINVAL);
	}
}

static int waiting(void)
{
	int count = 0;

	for (int i = 0; i < WAITS; i++)
		count += atomic_load(&waits[i].pending);
	return count;
}

/* The source answers everything from now on: all waits end. */
static void settle(struct stand *stand)
{
	CHECK(ob_blob_set_policy(stand->blob, OB_POLICY_HANG, 0) == 0);
	ob_blob_healthy(stand->blob);
	for (int slot = 0; slot < HELD; slot++)
		if (stand->held[slot])
			finish(stand, slot, -EIO, 1);
	for (int looks = 0; waiting(); looks++) {
		/* The engine's clock may be about to end the last wait: then nothing comes. */
		CHECK(looks < LOOKS);
		if (ob_fetch_next(engine, OB_BULK, LOOK_NS, &stand->held[0]))
			continue;
		stand->filled[0] = 0;
		advance(stand, 0, stand->held[0]->length);
		finish(stand, 0, 0, 0);
	}
}

/* A blob so large that its map is nearly all hole. */
static void open_large(struct stand *stand)
{
	if (ob_blob_open_cached(engine, stand->data_fd, stand->map_fd, &stand->config, &stand->blob))
		return;
	CHECK(blob_try_read(stand->blob, stand->config.size - 1, got, 1) != 0);
	ob_blob_close(stand->blob);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = {input, length};
	uint64_t how = take(&tape, 1);
	struct stand stand = {
		.config = {.id = 1, .size = how & 128 ? take(&tape, 6) : take(&tape, 3) % BLOB_MAX + 1, .table_offset = TABLE,
		           .policy = OB_POLICY_HANG},
		.data_fd = memory_fd("", 0),
		.map_fd = memory_fd("", 0),
	};
	ob_event event;
	ob_fetch *fetch;

	if (!engine) {
		engine = memory_engine();
		content_fill(content, 0, sizeof(content));
	}
	if (stand.config.size > BLOB_MAX) {
		open_large(&stand);
	} else if (stand.config.size) {
		lay_down(&stand, &tape);
		reopen(&stand);
		for (int i = 0; i < STEPS && tape.left; i++)
			step(&stand, &tape);
		settle(&stand);
		check_counts(stand.blob);
		ob_blob_close(stand.blob);
		reopen(&stand);
		for (uint64_t at = 0; at < stand.config.size; at += EXTENT)
			check_read(stand.blob, at, stand.config.size - at < EXTENT ? stand.config.size - at : EXTENT);
		ob_blob_close(stand.blob);
	}
	CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == -ETIMEDOUT);     /* nobody is left to want anything */
	while (ob_event_next(engine, &event) == 1)
		;
	close(stand.data_fd);
	close(stand.map_fd);
	return 0;
}
