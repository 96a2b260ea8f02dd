/* SPDX-License-Identifier: Apache-2.0
 * bare_compress.c: what lz4 and CRC32C cost by themselves, as the measure of an import.
 *
 *   bare_compress DISK THREADS [OUTPUT]
 *
 * Loads DISK, then compresses each of its 4 KiB blocks that is not zero and takes the CRC of
 * the result: each of THREADS threads an equal part of them, all starting together. Prints a
 * line of JSON: seconds by the clock, seconds of all threads' CPUs, bytes read and stored.
 * With OUTPUT, reading DISK and writing the results there are counted too.
 */
#include <fcntl.h>
#include <lz4.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../native/check.h"

enum { BLOCK = 4096, THREADS_MAX = 64, GATHERED = 1 << 20 };

struct part {
	const uint8_t *plain;        /* blocks one after the other */
	size_t blocks;
	uint64_t stored;
	uint32_t crc;
	int output;                  /* -1: results are dropped */
	off_t place;                 /* in the output */
};

static double seconds(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *compress_part(void *argument)
{
	struct part *part = argument;
	uint8_t *out = malloc(GATHERED + LZ4_COMPRESSBOUND(BLOCK));
	size_t filled = 0;

	CHECK(out);
	for (size_t i = 0; i < part->blocks; i++) {
		int length = LZ4_compress_default((const char *)part->plain + i * BLOCK, (char *)out + filled, BLOCK,
		                                  LZ4_COMPRESSBOUND(BLOCK));

		CHECK(length > 0);
		part->crc ^= ob_crc32c(0, out + filled, (uint64_t)length);
		part->stored += (uint64_t)length + sizeof(uint32_t);
		filled = part->output < 0 ? 0 : filled + (size_t)length;
		if (filled >= GATHERED || (filled && i + 1 == part->blocks)) {
			CHECK(pwrite(part->output, out, filled, part->place) == (ssize_t)filled);
			part->place += (off_t)filled;
			filled = 0;
		}
	}
	free(out);
	return NULL;
}

/* All blocks of the disk that are not zero, moved together. */
static uint8_t *load(const char *path, size_t *blocks)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat stat;
	uint64_t end;

	CHECK(fd >= 0 && fstat(fd, &stat) == 0);
	uint8_t *plain = malloc((size_t)stat.st_size);
	CHECK(plain);
	for (off_t at = 0; at + BLOCK <= stat.st_size; at += BLOCK) {
		uint8_t *block = plain + *blocks * BLOCK;

		CHECK(pread(fd, block, BLOCK, at) == BLOCK);
		*blocks += ob_zero_run(block, BLOCK, BLOCK, &end) != 0;
	}
	close(fd);
	return plain;
}

int main(int words, char **word)
{
	int threads = words == 3 || words == 4 ? atoi(word[2]) : 0;
	struct part parts[THREADS_MAX] = {0};
	pthread_t ids[THREADS_MAX];
	size_t blocks = 0;
	uint64_t stored = 0;
	int output = words == 4 ? open(word[3], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;

	if (threads < 1 || threads > THREADS_MAX || (words == 4 && output < 0)) {
		fprintf(stderr, "usage: bare_compress DISK THREADS [OUTPUT]\n");
		return 2;
	}
	double clock = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	uint8_t *plain = load(word[1], &blocks);
	if (output < 0) {
		clock = seconds(CLOCK_MONOTONIC);
		cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	}
	for (size_t i = 0, first = 0; i < (size_t)threads; i++) {
		size_t end = blocks * (i + 1) / (size_t)threads;

		parts[i] = (struct part){.plain = plain + first * BLOCK, .blocks = end - first, .output = output,
		                         .place = (off_t)(first * BLOCK)};
		first = end;
		CHECK(pthread_create(&ids[i], NULL, compress_part, &parts[i]) == 0);
	}
	for (int i = 0; i < threads; i++) {
		CHECK(pthread_join(ids[i], NULL) == 0);
		stored += parts[i].stored;
	}
	clock = seconds(CLOCK_MONOTONIC) - clock;
	cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	printf("{\"seconds\": %.6f, \"cpu\": %.6f, \"bytes\": %zu, \"stored\": %llu}\n", clock, cpu, blocks * BLOCK,
	       (unsigned long long)stored);
	free(plain);
	return 0;
}
