/* SPDX-License-Identifier: Apache-2.0
 * replay.c: a fuzz target's main() where libFuzzer is not: TARGET FILE_OR_FOLDER...
 *
 * Runs every kept input once, and after each a few changes of it that are the same in
 * every run, so that no build of the C tests goes without any fuzzing.
 */
#include <dirent.h>
#include <sys/stat.h>

#include "fuzz.h"
#include "random.h"

enum {
	INPUT_MAX = 1 << 20,
	CHANGES = 3           /* of each input; tools/fuzz makes millions */
};

static uint64_t seed;
static unsigned inputs;

size_t LLVMFuzzerMutate(uint8_t *input, size_t length, size_t most)
{
	static const uint8_t values[] = {0, 1, 0x7f, 0x80, 0xff};

	if (length == 0 || (random_below(&seed, 8) == 0 && length < most))
		input[length++] = (uint8_t)random_next(&seed);
	if (random_below(&seed, 8) == 0)
		length -= random_below(&seed, length);
	for (uint64_t i = 1 + random_below(&seed, 4); i > 0; i--)
		input[random_below(&seed, length)] =
			random_below(&seed, 2) ? values[random_below(&seed, sizeof(values))] : (uint8_t)random_next(&seed);
	return length;
}

__attribute__((weak)) size_t LLVMFuzzerCustomMutator(uint8_t *input, size_t length, size_t most, unsigned number)
{
	(void)number;
	return LLVMFuzzerMutate(input, length, most);
}

/* In memory of its own length, so that a sanitizer sees what is read past it. */
static void run(const uint8_t *input, size_t length)
{
	uint8_t *copy = malloc(length ? length : 1);

	CHECK(copy);
	memcpy(copy, input, length);
	LLVMFuzzerTestOneInput(copy, length);
	free(copy);
}

static void replay_file(const char *path)
{
	static uint8_t kept[INPUT_MAX], changed[INPUT_MAX];
	FILE *file = fopen(path, "rb");
	size_t length;

	CHECK(file);
	length = fread(kept, 1, sizeof(kept), file);
	fclose(file);
	run(kept, length);
	inputs++;
	memcpy(changed, kept, length);
	for (unsigned i = 0; i < CHANGES; i++) {
		length = LLVMFuzzerCustomMutator(changed, length, sizeof(changed), i);
		run(changed, length);
	}
}

static void replay(const char *path)
{
	struct dirent **entries;
	struct stat stat_of;
	int count;

	CHECK(stat(path, &stat_of) == 0);
	if (!S_ISDIR(stat_of.st_mode)) {
		replay_file(path);
		return;
	}
	CHECK((count = scandir(path, &entries, NULL, alphasort)) >= 0);
	for (int i = 0; i < count; i++) {
		char inside[4096];

		if (entries[i]->d_name[0] != '.') {
			CHECK(snprintf(inside, sizeof(inside), "%s/%s", path, entries[i]->d_name) < (int)sizeof(inside));
			replay(inside);
		}
		free(entries[i]);
	}
	free(entries);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		replay(argv[i]);
	printf("%u inputs, %d changes of each\n", inputs, CHANGES);
	return inputs == 0;       /* an empty corpus tests nothing */
}
