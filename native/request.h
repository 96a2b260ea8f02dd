/* SPDX-License-Identifier: Apache-2.0
 * request.h: one read of an image on behalf of a transport: split, park, complete.
 *
 * A transport fills the public part and submits. complete() is called exactly once:
 * on the submitting thread if everything was at hand, else later on a work thread.
 * It runs with no lock held and may free the request, submit another, or write to a
 * socket; it must not wait for another request.
 */
#ifndef OB_REQUEST_H
#define OB_REQUEST_H

#include "ob.h"

struct ob_request {
	/* set by the transport */
	struct ob_image *image;
	uint64_t offset;
	uint64_t length;
	uint8_t *buffer;
	void (*complete)(struct ob_request *request, int status); /* 0 or -errno */

	/* private to request.c and fetch.c */
	uint64_t done;                 /* bytes of buffer that are right */
	uint32_t refetched;            /* bad blocks dropped on behalf of this request */
	int32_t missed;                /* parked at least once */
	int64_t start_ns;              /* when first parked */
	_Atomic int32_t pending;       /* extents waited for, + 1 while still counting */
	_Atomic int32_t failure;       /* -errno that ends the wait */
	struct ob_waiter *waiters;     /* this request's places in fetches */
	struct ob_blob *blob;          /* whose policy rules the wait */
	struct ob_request *next, *prev; /* work queue or parked list */
};

void request_submit(struct ob_request *request);

#endif
