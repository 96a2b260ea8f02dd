/* SPDX-License-Identifier: Apache-2.0
 * request.c: drive one read to its end, over as many waits as it takes.
 */
#include "request.h"

#include <errno.h>
#include <stddef.h>

#include "engine.h"
#include "image.h"

/* So much is decoded in less time than a work thread takes to wake up. */
static const uint64_t AT_ONCE_MAX = 16 << 10;

/* This thread is in request_run(), which must not be entered once more from within. */
static _Thread_local int running;

static void request_ready(struct parked *parked, int status)
{
	struct ob_request *request = (struct ob_request *)((char *)parked - offsetof(struct ob_request, parked));

	request->status = status;
	if (running || request->length > AT_ONCE_MAX)
		engine_work(request->image->engine, request);
	else
		request_resume(request);
}

/* The request may be gone when this returns. */
static void request_run(struct ob_request *request)
{
	struct parked *parked = &request->parked;
	int status;

	running++;
	status = image_read(request->image, request->offset, request->buffer, request->length, &request->done);
	if (status != -EAGAIN) {
		request->complete(request, status);
	} else {
		parked_begin(parked, request->image->engine);
		image_want(request->image, request->offset + request->done, request->length - request->done, parked);
		parked_end(parked);
	}
	running--;
}

void request_submit(struct ob_request *request)
{
	request->done = 0;
	request->parked = (struct parked){ .ready = request_ready };
	request_run(request);
}

void request_resume(struct ob_request *request)
{
	if (request->status)
		request->complete(request, request->status);
	else
		request_run(request);
}
