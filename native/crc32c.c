/* SPDX-License-Identifier: Apache-2.0
 * crc32c.c: raw CRC32C by CPU instruction where there is one, else by table.
 *
 * The x86 instruction takes three cycles and one can start each cycle, so three
 * thirds of the buffer are computed side by side. The CRC of a part followed by L more
 * bytes is its product with x^(8L) modulo the polynomial: a carry-less multiply by
 * x^(8L - 33), whose product the crc32 instruction itself reduces (the two reflected
 * factors bring one x, the instruction 32 more).
 */
#include "crc32c.h"

#include <endian.h>
#include <stdbool.h>
#include <string.h>

#include "ob.h"
#include "round.h"

#define POLYNOMIAL 0x82F63B78u /* reflected: bit 31 is x^0 */
#define X0 0x80000000u         /* the polynomial 1 */

static uint32_t table[8][256];
static crc32c_way ways[3];

static inline uint64_t load64(const uint8_t *p)
{
	uint64_t word;
	memcpy(&word, p, sizeof word);
	return word;
}

/* Slicing by eight: table[k][b] is the CRC of byte b followed by k zero bytes. */
static uint32_t crc32c_portable(uint32_t seed, const void *buffer, size_t length)
{
	const uint8_t *p = buffer;
	uint32_t crc = seed;
	for (; length >= 8; length -= 8, p += 8) {
		uint64_t word = le64toh(load64(p)) ^ crc;
		crc = 0;
		for (int k = 0; k < 8; k++)
			crc ^= table[7 - k][(word >> (8 * k)) & 0xff];
	}
	for (; length > 0; length--, p++)
		crc = (crc >> 8) ^ table[0][(crc ^ *p) & 0xff];
	return crc;
}

static void fill_table(void)
{
	for (uint32_t b = 0; b < 256; b++) {
		uint32_t crc = b;
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
		table[0][b] = crc;
	}
	for (int k = 1; k < 8; k++)
		for (uint32_t b = 0; b < 256; b++)
			table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 0xff];
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Words in one of the three lanes: 12 KiB a round, more than most compressed blocks. */
#define LANE_MAX 512
/* Below this a lane is too short to be worth the joining. */
#define LANE_MIN 8

/* shift[w] = x^(64w - 33): moves a CRC over w words. */
static uint32_t shift[2 * LANE_MAX + 1];

static uint32_t times_x(uint32_t a)
{
	return (a >> 1) ^ (a & 1 ? POLYNOMIAL : 0);
}

static void fill_shift(void)
{
	uint32_t power = X0;
	for (int n = 0; n < 64 - 33; n++)
		power = times_x(power);
	for (int words = 1; words <= 2 * LANE_MAX; words++) {
		shift[words] = power;
		for (int n = 0; n < 64; n++)
			power = times_x(power);
	}
}

__attribute__((target("sse4.2,pclmul")))
static inline uint64_t multiply(uint32_t crc, uint32_t by)
{
	__m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)crc), _mm_cvtsi32_si128((int)by), 0);
	return (uint64_t)_mm_cvtsi128_si64(product);
}

__attribute__((target("sse4.2,pclmul")))
static uint32_t crc32c_fast(uint32_t seed, const void *buffer, size_t length)
{
	const uint8_t *p = buffer;
	uint64_t crc = seed;
	while (length >= 3 * 8 * LANE_MIN) {
		size_t lane = length / 24 < LANE_MAX ? length / 24 : LANE_MAX;
		const uint8_t *end = p + 8 * lane;
		uint64_t second = 0, third = 0;
		for (; p < end; p += 8) {
			crc = _mm_crc32_u64(crc, load64(p));
			second = _mm_crc32_u64(second, load64(p + 8 * lane));
			third = _mm_crc32_u64(third, load64(p + 16 * lane));
		}
		crc = third ^ _mm_crc32_u64(0, multiply((uint32_t)crc, shift[2 * lane])
		                               ^ multiply((uint32_t)second, shift[lane]));
		p += 16 * lane;
		length -= 24 * lane;
	}
	for (; length >= 8; length -= 8, p += 8)
		crc = _mm_crc32_u64(crc, load64(p));
	for (; length > 0; length--, p++)
		crc = _mm_crc32_u8((uint32_t)crc, *p);
	return (uint32_t)crc;
}

static bool fast(void)
{
	__builtin_cpu_init();
	if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul"))
		return false;
	fill_shift();
	return true;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#define CPU_HAS_CRC32 (1ul << 7) /* HWCAP_CRC32 of asm/hwcap.h */

/* Assembly, because not every compiler offers the intrinsics below ARMv8.1. */
static inline uint32_t step8(uint32_t crc, uint64_t word)
{
	__asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
	return crc;
}

static inline uint32_t step1(uint32_t crc, uint8_t byte)
{
	__asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(byte));
	return crc;
}

static uint32_t crc32c_fast(uint32_t seed, const void *buffer, size_t length)
{
	const uint8_t *p = buffer;
	uint32_t crc = seed;
	for (; length >= 8; length -= 8, p += 8)
		crc = step8(crc, le64toh(load64(p)));
	for (; length > 0; length--, p++)
		crc = step1(crc, *p);
	return crc;
}

static bool fast(void)
{
	return getauxval(AT_HWCAP) & CPU_HAS_CRC32;
}

#else
#define crc32c_fast crc32c_portable

static bool fast(void)
{
	return false;
}
#endif

__attribute__((constructor))
static void choose(void)
{
	crc32c_way *way = ways;

	fill_table();
	if (fast())
		*way++ = crc32c_fast;
	*way = crc32c_portable;
}

const crc32c_way *crc32c_ways(void)
{
	return ways;
}

uint32_t ob_crc32c(uint32_t seed, const void *buffer, uint64_t length)
{
	return ways[0](seed, buffer, length);
}

static int is_zero(const uint8_t *p, uint64_t length)
{
	/* If the first bytes are zero and each byte equals the one `step` before it, all are. */
	enum { step = 16 };
	static const uint8_t zeros[step];
	if (length <= step)
		return memcmp(p, zeros, length) == 0;
	return memcmp(p, zeros, step) == 0 && memcmp(p, p + step, length - step) == 0;
}

uint64_t ob_zero_run(const void *buffer, uint64_t length, uint64_t grain, uint64_t *end)
{
	const uint8_t *p = buffer;
	uint64_t start = 0;

	while (start < length && !is_zero(p + start, min_u64(grain, length - start)))
		start += min_u64(grain, length - start);
	*end = start;
	while (*end < length && is_zero(p + *end, min_u64(grain, length - *end)))
		*end += min_u64(grain, length - *end);
	return start;
}
