/* SPDX-License-Identifier: Apache-2.0
 * test_crc32c.c: all ways to compute it agree with the definition.
 */
#include "crc32c.h"

#include <string.h>

#include "check.h"
#include "random.h"

/* The definition, bit by bit. */
static uint32_t by_bits(uint32_t seed, const uint8_t *p, size_t length)
{
	for (size_t i = 0; i < length; i++) {
		seed ^= p[i];
		for (int bit = 0; bit < 8; bit++)
			seed = (seed >> 1) ^ (seed & 1 ? 0x82F63B78u : 0);
	}
	return seed;
}

static void gives_the_published_values(void)
{
	for (const crc32c_way *way = crc32c_ways(); *way; way++) {
		CHECK((*way)(0, "123456789", 9) == 0x58E3FA20);
		CHECK((*way)(100007, "123456789", 9) == 0x3C9BD4E0);
		CHECK((uint32_t)~(*way)(~0u, "123456789", 9) == 0xE3069283); /* the standard's check value */
	}
	CHECK(ob_crc32c(100007, "123456789", 9) == 0x3C9BD4E0);
}

static void every_way_agrees_at_every_length_and_alignment(void)
{
	static uint8_t bytes[40000];
	uint64_t state = 1;

	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)random_next(&state);
	for (size_t length = 0; length < 1200; length++) {
		uint32_t seed = (uint32_t)random_next(&state);
		const uint8_t *at = bytes + length % 17;
		uint32_t right = by_bits(seed, at, length);

		for (const crc32c_way *way = crc32c_ways(); *way; way++)
			CHECK((*way)(seed, at, length) == right);
	}
	for (int i = 0; i < 300; i++) {
		size_t length = random_below(&state, sizeof(bytes));
		const uint8_t *at = bytes + random_below(&state, sizeof(bytes) - length);
		uint32_t right = by_bits(7, at, length);

		for (const crc32c_way *way = crc32c_ways(); *way; way++)
			CHECK((*way)(7, at, length) == right);
	}
}

static void a_crc_can_be_continued(void)
{
	uint8_t bytes[5000];
	uint64_t state = 2;

	random_bytes(&state, bytes, sizeof(bytes));
	for (size_t cut = 0; cut <= sizeof(bytes); cut += 97)
		CHECK(ob_crc32c(ob_crc32c(5, bytes, cut), bytes + cut, sizeof(bytes) - cut) == ob_crc32c(5, bytes, sizeof(bytes)));
}

static void one_bit_anywhere_is_not_zero(void)
{
	uint8_t bytes[200] = {0};
	uint64_t end;

	for (size_t length = 1; length <= sizeof(bytes); length++) {
		CHECK(ob_zero_run(bytes, length, length, &end) == 0 && end == length);
		for (size_t i = 0; i < length; i++) {
			bytes[i] = 0x40;
			CHECK(ob_zero_run(bytes, length, length, &end) == length && end == length);
			bytes[i] = 0;
		}
	}
}

static void a_run_of_zeros_is_whole_grains(void)
{
	uint8_t bytes[100] = {0};
	uint64_t end;

	CHECK(ob_zero_run(bytes, 0, 8, &end) == 0 && end == 0);
	CHECK(ob_zero_run(bytes, 100, 8, &end) == 0 && end == 100);
	bytes[17] = 1;
	CHECK(ob_zero_run(bytes, 100, 8, &end) == 0 && end == 16);
	bytes[3] = 1;
	CHECK(ob_zero_run(bytes, 100, 8, &end) == 8 && end == 16);
	bytes[15] = 1;
	CHECK(ob_zero_run(bytes, 100, 8, &end) == 24 && end == 100);
	memset(bytes, 1, 96);
	CHECK(ob_zero_run(bytes, 100, 8, &end) == 96 && end == 100);
}

int main(void)
{
	gives_the_published_values();
	every_way_agrees_at_every_length_and_alignment();
	a_crc_can_be_continued();
	one_bit_anywhere_is_not_zero();
	a_run_of_zeros_is_whole_grains();
	return 0;
}
