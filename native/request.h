/* SPDX-License-Identifier: Apache-2.0
 * request.h: one read of an image on behalf of a transport: try, park, complete.
 *
 * A transport fills the public part and submits. complete() is called exactly once:
 * on the submitting thread if everything was at hand, else later on a work thread, or the
 * fetch thread that brought a short read's bytes.
 * It runs with no lock held and may free the request, submit another, or write to a
 * socket; it must not wait for another request.
 */
#ifndef OB_REQUEST_H
#define OB_REQUEST_H

#include "parked.h"
#include "ob.h"

struct ob_request {
	/* set by the transport */
	struct ob_image *image;
	uint64_t offset;
	uint64_t length;                /* the range lies inside the image */
	uint8_t *buffer;
	void (*complete)(struct ob_request *request, int status);  /* 0 or -errno */

	/* private to request.c */
	uint64_t done;                  /* bytes of buffer that are right */
	struct parked parked;
	int status;                     /* how the wait ended */
	STAILQ_ENTRY(ob_request) waiting;   /* work queue */
};

void request_submit(struct ob_request *request);
/* A work thread goes on with a request whose wait is over. */
void request_resume(struct ob_request *request);

#endif
