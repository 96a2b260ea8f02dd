/* SPDX-License-Identifier: Apache-2.0
 * http_ranges.c: what a server gives plain libcurl clients that ask for given ranges.
 *
 *   http_ranges LIST CLIENTS
 *
 * LIST has lines "FIRST-LAST URL". CLIENTS threads, each with one easy handle that is kept
 * (and so its connection), take the lines in turns. Every answer must be a 206 of that
 * length. Prints one line of JSON: seconds for all, and the microseconds of each request.
 */
#include <curl/curl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LINES_MAX = 1 << 16, CLIENTS_MAX = 256, LINE_MAX_BYTES = 1024, RANGE_MAX = 48 };

struct wanted {
	char range[RANGE_MAX];
	size_t length;
	char *url;
};

static struct wanted list[LINES_MAX];
static double microseconds[LINES_MAX];
static size_t count;
static atomic_size_t next;

static void fail(const char *what, const char *why)
{
	fprintf(stderr, "http_ranges: %s: %s\n", what, why);
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static void read_list(const char *path)
{
	char line[LINE_MAX_BYTES], url[LINE_MAX_BYTES];
	FILE *file = fopen(path, "r");

	if (!file)
		fail(path, "cannot be opened");
	while (fgets(line, sizeof(line), file)) {
		unsigned long long first, last;

		if (count == LINES_MAX || sscanf(line, "%llu-%llu %s", &first, &last, url) != 3 || last < first)
			fail(path, "a line is not FIRST-LAST URL, or there are too many");
		struct wanted *wanted = &list[count++];
		snprintf(wanted->range, sizeof(wanted->range), "%llu-%llu", first, last);
		wanted->length = (size_t)(last - first + 1);
		if (!(wanted->url = strdup(url)))
			fail(path, "out of memory");
	}
	fclose(file);
}

/* A buffer the bytes are copied to, as any client would. */
struct sink {
	uint8_t *bytes;
	size_t size, filled;
};

static size_t take(void *bytes, size_t size, size_t number, void *argument)
{
	struct sink *sink = argument;
	size_t length = size * number;

	if (length > sink->size - sink->filled)
		return 0;
	memcpy(sink->bytes + sink->filled, bytes, length);
	sink->filled += length;
	return length;
}

static void ask(CURL *handle, const struct wanted *wanted, struct sink *sink)
{
	long status = 0;

	if (wanted->length > sink->size) {
		sink->size = wanted->length;
		if (!(sink->bytes = realloc(sink->bytes, sink->size)))
			fail(wanted->url, "out of memory");
	}
	sink->filled = 0;
	curl_easy_setopt(handle, CURLOPT_URL, wanted->url);
	curl_easy_setopt(handle, CURLOPT_RANGE, wanted->range);
	CURLcode code = curl_easy_perform(handle);
	if (code != CURLE_OK)
		fail(wanted->url, curl_easy_strerror(code));
	curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &status);
	if (status != 206 || sink->filled != wanted->length)
		fail(wanted->url, "not answered with the range");
}

static void *client(void *argument)
{
	struct sink sink = {0};
	CURL *handle = curl_easy_init();
	size_t mine;

	(void)argument;
	if (!handle)
		fail("libcurl", "no handle");
	curl_easy_setopt(handle, CURLOPT_WRITEFUNCTION, take);
	curl_easy_setopt(handle, CURLOPT_WRITEDATA, &sink);
	while ((mine = atomic_fetch_add(&next, 1)) < count) {
		double start = now();

		ask(handle, &list[mine], &sink);
		microseconds[mine] = now() - start;
	}
	curl_easy_cleanup(handle);
	free(sink.bytes);
	return NULL;
}

int main(int words, char **word)
{
	pthread_t threads[CLIENTS_MAX];
	int clients = words == 3 ? atoi(word[2]) : 0;

	if (clients < 1 || clients > CLIENTS_MAX)
		fail("usage", "http_ranges LIST CLIENTS");
	read_list(word[1]);
	curl_global_init(CURL_GLOBAL_DEFAULT);
	double start = now();
	for (int i = 0; i < clients; i++)
		if (pthread_create(&threads[i], NULL, client, NULL))
			fail("pthread_create", "no thread");
	for (int i = 0; i < clients; i++)
		pthread_join(threads[i], NULL);
	printf("{\"seconds\": %.6f, \"microseconds\": [", (now() - start) / 1e6);
	for (size_t i = 0; i < count; i++)
		printf("%s%.1f", i ? ", " : "", microseconds[i]);
	printf("]}\n");
	for (size_t i = 0; i < count; i++)
		free(list[i].url);
	return 0;
}
