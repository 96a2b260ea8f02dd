/* SPDX-License-Identifier: Apache-2.0
 * nbd_serve.c: what each NBD request is answered with.
 *
 * Reads that miss are parked. Writes and flushes wait for the disk, on the connection's
 * thread: what a client sends behind a flush is answered after it.
 */
#include "nbd.h"

#include <errno.h>

#include "checked.h"
#include "round.h"

enum {
	READ_MAX = 32 << 20,           /* longest read or write: the maximum nbdwire.py announces */
	PARKED_MAX = 128,              /* reads that wait for fetches, of one connection */
	PARKED_BYTES_MAX = 64 << 20,   /* ... and their buffers: two of the longest */
	EXTENTS_MAX = 1024,            /* in one answer to BLOCK_STATUS: 8 KiB */
	RUNS_AT_ONCE = 64              /* from the image; on the stack */
};

/* A reply without payload. */
static bool answer_status(struct ob_nbd *nbd, const struct wire_request *request, int reply, int status)
{
	struct slot *slot = &nbd->statuses[nbd->batch_count];

	slot->kept = true;
	slot->request = *request;
	slot->reply = reply;
	slot->status = status;
	slot->payload_length = 0;
	return nbd_reply(nbd, slot);
}

static int request_check(const struct ob_nbd *nbd, const struct wire_request *request, uint16_t flags)
{
	if (request->flags & ~flags || !request->length)
		return -EINVAL;
	return range_inside(request->offset, request->length, nbd->image->size) ? 0 : -EINVAL;
}

/* request_submit()'s answer: on this thread inside it, or at any time on another. */
static void read_complete(struct ob_request *request, int status)
{
	struct slot *slot = (struct slot *)request;
	struct ob_nbd *nbd = slot->nbd;

	slot->status = status;
	if (!atomic_exchange(&slot->answerable, 1))
		return;
	slot->next = atomic_load(&nbd->finished);
	while (!atomic_compare_exchange_weak(&nbd->finished, &slot->next, slot))
		;
	nbd_wake(nbd);
	nbd_unref(nbd);
}

/* Wait until another read of that length may be parked. */
static bool nbd_admit(struct ob_nbd *nbd, uint64_t length)
{
	while (nbd->parked && (nbd->parked >= PARKED_MAX || nbd->parked_bytes + length > PARKED_BYTES_MAX)) {
		uint32_t before = nbd->parked;

		/* Their wake may be spent: it is only waited for when there was nothing to collect. */
		if (!nbd_collect(nbd) || (nbd->parked == before && nbd_wait(nbd, 0, -1)))
			return false;
	}
	return true;
}

static bool answer_read(struct ob_nbd *nbd, const struct wire_request *request)
{
	int reply = nbd->config.structured ? REPLY_DATA : REPLY_SIMPLE;
	int status = request_check(nbd, request, nbd->config.structured ? FLAG_DF : 0);
	struct slot *slot;

	if (!status && request->length > READ_MAX)
		status = request->flags & FLAG_DF ? -EOVERFLOW : -EINVAL;
	if (status)
		return answer_status(nbd, request, reply, status);
	if (!nbd_admit(nbd, round_up(request->length, 4096)))
		return false;
	slot = nbd_take(nbd, request->length);
	if (!slot)
		return answer_status(nbd, request, reply, -ENOMEM);
	slot->request = *request;
	slot->reply = reply;
	slot->payload_length = request->length;
	slot->read.image = nbd->image;
	slot->read.offset = request->offset;
	slot->read.length = request->length;
	slot->read.buffer = slot->memory;
	slot->read.complete = read_complete;
	atomic_store(&slot->answerable, 0);
	nbd->parked++;
	nbd->parked_bytes += slot->capacity;
	atomic_fetch_add(&nbd->references, 1);
	request_submit(&slot->read);
	if (!atomic_exchange(&slot->answerable, 1))
		return true;
	nbd->parked--;
	nbd->parked_bytes -= slot->capacity;
	nbd_unref(nbd);
	return nbd_reply(nbd, slot);
}

/* Descriptors of [offset, offset + length), at most `max`; -errno. Room is for max + 1. */
static int extents_fill(struct ob_image *image, const struct wire_request *request, uint8_t *extents, uint32_t max)
{
	ob_run runs[RUNS_AT_ONCE];
	uint64_t at = request->offset, end = at + request->length;
	uint32_t count = 0;

	while (at < end) {
		int found = ob_image_runs(image, at, end - at, runs, RUNS_AT_ONCE);

		if (found <= 0)
			return found ? found : -EIO;
		for (int i = 0; i < found; i++) {
			uint32_t state = runs[i].kind == OB_RUN_DATA ? 0 : STATE_HOLE | STATE_ZERO;

			count = extents_add(extents, count, runs[i].length, state);
			if (count > max)
				return (int)max;
		}
		at = runs[found - 1].offset + runs[found - 1].length;
	}
	return (int)count;
}

static bool answer_block_status(struct ob_nbd *nbd, const struct wire_request *request)
{
	int reply = nbd->config.structured ? REPLY_BLOCK_STATUS : REPLY_SIMPLE;
	int status = nbd->config.allocation ? request_check(nbd, request, FLAG_REQ_ONE) : -EINVAL;
	struct slot *slot;
	int count;

	if (status)
		return answer_status(nbd, request, reply, status);
	slot = nbd_take(nbd, 4 + 8 * (EXTENTS_MAX + 1));
	if (!slot)
		return answer_status(nbd, request, reply, -ENOMEM);
	put_be(slot->memory, CONTEXT_ALLOCATION, 4);
	count = extents_fill(nbd->image, request, slot->memory + 4, request->flags & FLAG_REQ_ONE ? 1 : EXTENTS_MAX);
	slot->request = *request;
	slot->reply = reply;
	slot->status = count < 0 ? count : 0;
	slot->payload_length = 4 + 8 * (uint32_t)count;
	return nbd_reply(nbd, slot);
}

/* ---- writing ---- */

static int write_check(const struct ob_nbd *nbd, const struct wire_request *request, uint16_t flags)
{
	if (!nbd->writes)
		return -EPERM;
	if ((request->offset | request->length) % SECTOR)
		return -EINVAL;
	/* Past the end there is no room: the protocol's own word for it. */
	return range_inside(request->offset, request->length, nbd->image->size) ? request_check(nbd, request, flags) : -ENOSPC;
}

static int write_end(struct ob_nbd *nbd, const struct wire_request *request, int status)
{
	return !status && request->flags & FLAG_FUA ? ob_image_flush(nbd->image) : status;
}

/* Taken piece by piece: a write that fails on its way leaves the disk with what came before. */
static bool answer_write(struct ob_nbd *nbd, const struct wire_request *request)
{
	int status = request->length > READ_MAX ? -EINVAL : write_check(nbd, request, FLAG_FUA);
	uint64_t done = 0, part;

	for (; !status && done < request->length; done += part) {
		part = min_u64(request->length - done, WRITE_PIECE);
		if (!nbd_payload(nbd, nbd->writes, part))
			return false;
		status = ob_image_write(nbd->image, request->offset + done, nbd->writes, part);
	}
	return nbd_payload(nbd, NULL, request->length - done)
	       && answer_status(nbd, request, REPLY_SIMPLE, write_end(nbd, request, status));
}

static bool answer_zero(struct ob_nbd *nbd, const struct wire_request *request, uint16_t flags)
{
	int status = write_check(nbd, request, flags);

	if (!status)
		status = ob_image_zero(nbd->image, request->offset, request->length);
	return answer_status(nbd, request, REPLY_SIMPLE, write_end(nbd, request, status));
}

/* ---- all of them ---- */

bool nbd_answer(struct ob_nbd *nbd, const struct wire_request *request)
{
	switch (request->type) {
	case CMD_READ:
		return answer_read(nbd, request);
	case CMD_BLOCK_STATUS:
		return answer_block_status(nbd, request);
	case CMD_FLUSH:
		/* What is ready need not wait for the disk. */
		return (!nbd->writes || nbd_collect(nbd)) && answer_status(nbd, request, REPLY_SIMPLE, ob_image_flush(nbd->image));
	case CMD_WRITE:
		return answer_write(nbd, request);
	case CMD_TRIM:
		return answer_zero(nbd, request, FLAG_FUA);
	case CMD_WRITE_ZEROES:
		return answer_zero(nbd, request, FLAG_FUA | FLAG_NO_HOLE);
	default:
		return answer_status(nbd, request, REPLY_SIMPLE, -EINVAL);
	}
}
