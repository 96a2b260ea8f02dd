/* SPDX-License-Identifier: Apache-2.0
 * http.c: a fetch filled by one ranged GET, on libcurl.
 *
 * Only the plain case lives here. Any other answer than the range is for the caller to
 * understand: he is told the status. Each thread keeps its connections, in a multi handle
 * (curl_easy_perform() makes one for each new handle, with two sockets to wake it). But not
 * its easy handle: libcurl before 8.1 writes to a freed header when an answer on a used
 * handle starts with a folded line. A new one costs a microsecond.
 */
#include <curl/curl.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cache.h"
#include "engine.h"
#include "status.h"

static const long RECEIVE_SIZE = 128 * 1024;    /* two extents: fewer turns of curl's loop, still in a core's own cache */
static const int PROGRESS_MS = 1000;            /* between two calls of on_progress() at most */
static const uint64_t HEADERS_MAX = 64 * 1024;  /* of one answer; registries send 1 KiB */

static _Thread_local CURL *handle;            /* of the transfer under way */
static _Thread_local CURLM *connections;      /* this thread's */
static pthread_key_t connections_key;         /* the same; closes them when the thread ends */
static int connections_error;

static void connections_close(void *kept)
{
	curl_multi_cleanup(kept);
}

static void connections_prepare(void)
{
	connections_error = curl_global_init(CURL_GLOBAL_DEFAULT) || pthread_key_create(&connections_key, connections_close);
}

void http_disconnect(void)
{
	if (!connections)
		return;
	pthread_setspecific(connections_key, NULL);
	curl_multi_cleanup(connections);
	connections = NULL;
}

/* What a thread keeps from one request to the next. */
static int connections_open(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	if (connections)
		return 0;
	pthread_once(&once, connections_prepare);
	connections = connections_error ? NULL : curl_multi_init();
	if (!connections || pthread_setspecific(connections_key, connections)) {
		curl_multi_cleanup(connections);
		connections = NULL;
		return -ENOMEM;
	}
	return 0;
}

struct transfer {
	struct fetch *fetch;
	char wanted[80];          /* the Content-Range to be answered */
	uint64_t filled;          /* of the lent buffer */
	uint64_t header_bytes;
	int hold;                 /* advance nothing */
	int accepted, refused;    /* the headers are over, and the body is what was asked for; or is not */
	const ob_http_target *target;
	int64_t since_ns;         /* of the stall time that runs ... */
	curl_off_t heard;         /* ... and what had come before it */
};

static const char *answer_header(const char *name)
{
	struct curl_header *header;

	if (curl_easy_header(handle, name, 0, CURLH_HEADER, -1, &header))
		return "";
	return header->amount == 1 ? header->value : "?";
}

/* The blob's size may be left out: "bytes 0-9/" and an asterisk. */
static int is_wanted(const struct transfer *transfer, const char *range)
{
	size_t length = strcspn(transfer->wanted, "/") + 1;

	return !strcmp(range, transfer->wanted) || (!strncmp(range, transfer->wanted, length) && !strcmp(range + length, "*"));
}

static size_t on_header(char *line, size_t unit, size_t count, void *argument)
{
	struct transfer *transfer = argument;
	const char *encoding;
	long status = 0;

	transfer->header_bytes += unit * count;
	if (transfer->header_bytes > HEADERS_MAX)
		return 0;
	if (transfer->accepted || (line[0] != '\r' && line[0] != '\n'))
		return unit * count;
	curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &status);
	if (status < 200)
		return unit * count; /* of an interim answer */
	encoding = answer_header("Content-Encoding");
	transfer->accepted = status == 206 && is_wanted(transfer, answer_header("Content-Range")) &&
	                     (!*encoding || !strcmp(encoding, "identity"));
	transfer->refused = !transfer->accepted;
	return transfer->accepted ? unit * count : 0;
}

static size_t on_body(char *bytes, size_t unit, size_t count, void *argument)
{
	struct transfer *transfer = argument;
	ob_fetch *lent = &transfer->fetch->lent;
	uint64_t length = unit * count;

	if (!transfer->accepted || length > lent->length - transfer->filled)
		return 0;
	memcpy((uint8_t *)lent->buffer + transfer->filled, bytes, length);
	transfer->filled += length;
	fetch_heard(transfer->fetch);
	if (!transfer->hold && (transfer->filled == lent->length || transfer->filled / OB_EXTENT_SIZE > transfer->fetch->published))
		ob_fetch_advance(lent, transfer->filled);
	return length;
}

/* Nobody waits for it any more, which is no fault of the host's. */
static int transfer_unwanted(const struct fetch *fetch)
{
	return atomic_load(&fetch->blob->engine->stopped) || atomic_load(&fetch->blob->closed);
}

/* Called by curl at least every PROGRESS_MS. */
static int on_progress(void *argument, curl_off_t total, curl_off_t now, curl_off_t up_total, curl_off_t up)
{
	struct transfer *transfer = argument;

	if (engine_now() - transfer->since_ns > transfer->target->stall_ns) {
		if (now - transfer->heard < (curl_off_t)transfer->target->stall_bytes)
			return 1;
		transfer->since_ns = engine_now();
		transfer->heard = now;
	}
	return transfer_unwanted(transfer->fetch);
}

/* What holds for every request. Proxies, certificates and addresses come with each target:
 * nothing is taken from the environment. */
static int handle_open(void)
{
	handle = connections_open() ? NULL : curl_easy_init();
	if (!handle)
		return -ENOMEM;
	curl_easy_setopt(handle, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(handle, CURLOPT_QUICK_EXIT, 1L);
	curl_easy_setopt(handle, CURLOPT_PROTOCOLS_STR, "http,https");
	curl_easy_setopt(handle, CURLOPT_HTTP_VERSION, CURL_HTTP_VERSION_1_1);
	curl_easy_setopt(handle, CURLOPT_PATH_AS_IS, 1L);
	curl_easy_setopt(handle, CURLOPT_NOPROXY, "");
	curl_easy_setopt(handle, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
	curl_easy_setopt(handle, CURLOPT_SSLVERSION, CURL_SSLVERSION_TLSv1_2);
	curl_easy_setopt(handle, CURLOPT_SSL_OPTIONS, CURLSSLOPT_NO_PARTIALCHAIN);
	curl_easy_setopt(handle, CURLOPT_CAINFO, NULL);
	curl_easy_setopt(handle, CURLOPT_BUFFERSIZE, RECEIVE_SIZE);
	curl_easy_setopt(handle, CURLOPT_HEADERFUNCTION, on_header);
	curl_easy_setopt(handle, CURLOPT_WRITEFUNCTION, on_body);
	curl_easy_setopt(handle, CURLOPT_XFERINFOFUNCTION, on_progress);
	curl_easy_setopt(handle, CURLOPT_NOPROGRESS, 0L);
	return 0;
}

static CURLcode transfer_drive(void)
{
	CURLcode code = CURLE_OUT_OF_MEMORY;
	CURLMsg *message;
	int running = 1, left;

	if (curl_multi_add_handle(connections, handle))
		return code;
	while (running && !curl_multi_perform(connections, &running)) {
		if (running && curl_multi_poll(connections, NULL, 0, PROGRESS_MS, NULL))
			break;
	}
	message = curl_multi_info_read(connections, &left);
	if (message)
		code = message->data.result;
	curl_multi_remove_handle(connections, handle);
	return code;
}

static CURLcode transfer_run(struct transfer *transfer, const ob_http_target *target, int64_t timeout_ns)
{
	struct curl_blob certificates = { (void *)target->certificates, target->certificates_size, CURL_BLOB_NOCOPY };
	struct curl_slist headers[OB_HTTP_HEADERS] = { { 0 } };
	const ob_fetch *lent = &transfer->fetch->lent;
	char range[48];

	for (int i = 0; i < OB_HTTP_HEADERS && target->headers[i]; i++) {
		headers[i].data = (char *)target->headers[i];
		if (i)
			headers[i - 1].next = &headers[i];
	}
	snprintf(range, sizeof(range), "%" PRIu64 "-%" PRIu64, lent->offset + transfer->filled, lent->offset + lent->length - 1);
	snprintf(transfer->wanted, sizeof(transfer->wanted), "bytes %s/%" PRIu64, range, transfer->fetch->blob->size);
	curl_easy_setopt(handle, CURLOPT_HEADERDATA, transfer);
	curl_easy_setopt(handle, CURLOPT_WRITEDATA, transfer);
	curl_easy_setopt(handle, CURLOPT_XFERINFODATA, transfer);
	curl_easy_setopt(handle, CURLOPT_HTTPHEADER, headers[0].data ? headers : NULL);
	curl_easy_setopt(handle, CURLOPT_CONNECTTIMEOUT_MS, (long)(target->connect_ns / 1000000));
	curl_easy_setopt(handle, CURLOPT_TIMEOUT_MS, (long)(timeout_ns / 1000000) + 1);
	/* These copy. What was set before must not stay in their place for want of memory. */
	if (curl_easy_setopt(handle, CURLOPT_CAINFO_BLOB, certificates.len ? &certificates : NULL) ||
	    curl_easy_setopt(handle, CURLOPT_CAPATH, target->ca_path) || curl_easy_setopt(handle, CURLOPT_PROXY, target->proxy) ||
	    curl_easy_setopt(handle, CURLOPT_RANGE, range) || curl_easy_setopt(handle, CURLOPT_URL, target->url))
		return CURLE_OUT_OF_MEMORY;
	return transfer_drive();
}

/* In the words of blockdev/registry/exchange.py. */
static const char *reason(CURLcode code)
{
	switch (code) {
	case CURLE_OPERATION_TIMEDOUT: case CURLE_ABORTED_BY_CALLBACK: return "no answer in time";
	case CURLE_OK: case CURLE_PARTIAL_FILE: return "the answer ended early";
	case CURLE_WRITE_ERROR: return "the answer is not what its head says";
	default: return curl_easy_strerror(code);
	}
}

int ob_fetch_http(ob_fetch *lent, const ob_http_target *target, int64_t timeout_ns, int32_t hold, ob_http_answer *out)
{
	struct fetch *fetch = (struct fetch *)lent;
	struct transfer transfer = { .fetch = fetch, .filled = fetch->published * OB_EXTENT_SIZE,
	                             .hold = hold, .target = target, .since_ns = engine_now() };
	long status = 0;
	CURLcode code = handle_open() ? CURLE_OUT_OF_MEMORY : transfer_run(&transfer, target, timeout_ns);
	int result = 0;

	*out = (ob_http_answer){ .filled = transfer.filled };
	if (transfer_unwanted(fetch)) {
		result = status_set(ESHUTDOWN, "%s: the engine is stopping, or the blob was closed", target->failed);
	} else if (transfer.filled == lent->length) {
		result = 1;
	} else if (!transfer.refused) {
		result = status_set(EIO, "%s: %s", target->failed, reason(code));
	} else {
		curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &status);
		out->status = (int32_t)status;
		snprintf(out->retry_after, sizeof(out->retry_after), "%s", answer_header("Retry-After"));
	}
	curl_easy_cleanup(handle);
	return result;
}
