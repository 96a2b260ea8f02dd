/* SPDX-License-Identifier: Apache-2.0
 * fuzz_http.c: any bytes as a registry's answer to a ranged GET, over loopback. Nothing is
 * taken that does not name the range that was asked for, and every transfer ends.
 *
 * Input: the size of the pieces it is sent in, then the answer. libcurl itself is not
 * instrumented; what is judged is what http.c makes of it.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "fuzz.h"

enum { BLOB_SIZE = 100, ANSWER_MAX = 80000 };

static const char RANGE[] = "0-99/";      /* a folded line may part it from its unit, but not its digits */
static const char *const SIZES[] = { "100", "*" };
static const int64_t TIMEOUT_NS = 5000000000;

static ob_engine *engine;
static char url[64];
static int listener;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;      /* of what follows */
static uint8_t answer[ANSWER_MAX];
static size_t answer_length, answer_piece;

/* ---- the registry ---- */

static void serve_one(int client)
{
	static uint8_t mine[ANSWER_MAX];
	size_t length, piece;
	char request[4096] = "";
	size_t got = 0;
	ssize_t count = 1;

	while (count > 0 && got < sizeof(request) - 1 && !strstr(request, "\r\n\r\n")) {
		count = recv(client, request + got, sizeof(request) - 1 - got, 0);
		got += count > 0 ? (size_t)count : 0;
		request[got] = 0;
	}
	pthread_mutex_lock(&lock);
	length = answer_length;
	piece = answer_piece;
	memcpy(mine, answer, length);
	pthread_mutex_unlock(&lock);
	for (size_t sent = 0; count > 0 && sent < length; sent += (size_t)count)
		count = send(client, mine + sent, length - sent < piece ? length - sent : piece, MSG_NOSIGNAL);
	shutdown(client, SHUT_WR);
	while (recv(client, request, sizeof(request), 0) > 0)
		;
	close(client);
}

static void *serve(void *unused)
{
	for (;;) {
		int client = accept(listener, NULL, NULL);

		if (client >= 0)
			serve_one(client);
	}
	return unused;
}

static void start(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	pthread_t thread;

	engine = memory_engine();
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 16) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
	snprintf(url, sizeof(url), "http://127.0.0.1:%d/v2/a/blobs/b", ntohs(address.sin_port));
	CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
}

/* ---- one input ---- */

static int contains(const char *wanted)
{
	return memmem(answer, answer_length, wanted, strlen(wanted)) != NULL;
}

static int contains_range(const char *size)
{
	char range[16];

	snprintf(range, sizeof(range), "%s%s", RANGE, size);
	return contains(range);
}

static void check(int status, const ob_http_answer *other)
{
	CHECK(status == 1 || status == 0 || status == -EIO);
	if (status == 1)
		CHECK(contains("206") && (contains_range(SIZES[0]) || contains_range(SIZES[1])));
	if (status == 0) {
		CHECK(other->status >= 200);    /* libcurl lets a fourth digit pass */
		CHECK(memchr(other->retry_after, 0, sizeof(other->retry_after)));
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t length)
{
	struct tape tape = {input, length};
	ob_blob_config config = {.id = 1, .size = BLOB_SIZE, .table_offset = 4096, .policy = OB_POLICY_HANG};
	ob_http_target target = {.failed = "fuzz", .url = url, .proxy = "", .connect_ns = TIMEOUT_NS,
	                         .stall_ns = TIMEOUT_NS, .stall_bytes = 1};
	int data = memory_fd("", 0), map = memory_fd("", 0), status;
	ob_http_answer other;
	ob_event event;
	ob_blob *blob;
	ob_fetch *fetch;

	if (!engine)
		start();
	pthread_mutex_lock(&lock);
	answer_piece = 1 + 32 * take(&tape, 1);
	answer_length = tape.left < ANSWER_MAX ? tape.left : ANSWER_MAX;
	memcpy(answer, tape.at, answer_length);
	pthread_mutex_unlock(&lock);
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	CHECK(ob_blob_prefetch(blob, 0, BLOB_SIZE, OB_BULK) == 0 && ob_fetch_next(engine, OB_BULK, 0, &fetch) == 0);
	status = ob_fetch_http(fetch, &target, TIMEOUT_NS, 0, &other);
	check(status, &other);
	CHECK(ob_fetch_finish(fetch, status == 1 ? 0 : -EIO, 0) == 0);
	ob_blob_close(blob);
	if (answer_piece & 32)     /* with nothing to do, a thread gives its connections back */
		CHECK(ob_fetch_next(engine, OB_BULK, 0, &fetch) == -ETIMEDOUT);
	while (ob_event_next(engine, &event) == 1)
		;
	close(data);
	close(map);
	return 0;
}

/* ---- changes that keep an answer an answer ---- */

size_t LLVMFuzzerCustomMutator(uint8_t *input, size_t length, size_t most, unsigned seed)
{
	static const char *const lines[] = {
		"HTTP/1.1 206 Partial Content\r\n", "Content-Range: bytes 0-99/100\r\n", "Content-Length: 100\r\n",
		"Content-Encoding: gzip\r\n", "Content-Encoding: identity\r\n", "Transfer-Encoding: chunked\r\n\r\n64\r\n",
		"HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\n", "HTTP/1.1 200 OK\r\n", "\r\n",
		"Content-Range: bytes 0-9/100\r\n", "Content-Range: bytes 0-99/*\r\n", "Connection: keep-alive\r\n", "HTTP/1.0 206 x\n",
	};
	const char *line = lines[seed % (sizeof(lines) / sizeof(*lines))];
	size_t size = strlen(line), at = length ? (seed >> 8) % (length + 1) : 0;

	if (seed >> 6 & 3 || length + size > most)
		return LLVMFuzzerMutate(input, length, most);
	memmove(input + at + size, input + at, length - at);
	memcpy(input + at, line, size);
	return length + size;
}
