/* SPDX-License-Identifier: Apache-2.0
 * nbdwire.h: bytes of NBD's transmission phase, big endian (docs/formats/nbd.md).
 * Negotiation is formats/nbdwire.py's.
 */
#ifndef OB_NBDWIRE_H
#define OB_NBDWIRE_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

enum { REQUEST_SIZE = 28, SIMPLE_SIZE = 16, CHUNK_SIZE = 20, HEADER_MAX = CHUNK_SIZE + 8 };
enum {
	CMD_READ = 0,
	CMD_WRITE = 1,
	CMD_DISC = 2,
	CMD_FLUSH = 3,
	CMD_TRIM = 4,
	CMD_WRITE_ZEROES = 6,
	CMD_BLOCK_STATUS = 7
};
enum { FLAG_FUA = 1 << 0, FLAG_NO_HOLE = 1 << 1, FLAG_DF = 1 << 2, FLAG_REQ_ONE = 1 << 3 };
/* How a request is answered: plainly, or by a chunk of that type. */
enum { REPLY_SIMPLE = -1, REPLY_DATA = 1, REPLY_BLOCK_STATUS = 5, REPLY_ERROR = (1 << 15) + 1 };
enum { STATE_HOLE = 1, STATE_ZERO = 2 };
enum { CONTEXT_ALLOCATION = 1 };       /* formats/nbdwire.py announces the same id */

struct wire_request {
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
};

static inline uint64_t get_be(const uint8_t *from, int bytes)
{
	uint64_t value = 0;

	while (bytes--)
		value = value << 8 | *from++;
	return value;
}

static inline uint8_t *put_be(uint8_t *to, uint64_t value, int bytes)
{
	for (int i = bytes; i--; value >>= 8)
		to[i] = (uint8_t)value;
	return to + bytes;
}

/* False: not a request; the stream is out of step. */
static inline bool request_parse(const uint8_t wire[REQUEST_SIZE], struct wire_request *out)
{
	*out = (struct wire_request){
		.flags = (uint16_t)get_be(wire + 4, 2),
		.type = (uint16_t)get_be(wire + 6, 2),
		.cookie = get_be(wire + 8, 8),
		.offset = get_be(wire + 16, 8),
		.length = (uint32_t)get_be(wire + 24, 4),
	};
	return get_be(wire, 4) == 0x25609513;
}

/* -errno of ours -> error number of the protocol. The only place that knows. */
static inline uint32_t nbd_errno(int status)
{
	switch (-status) {
	case 0: return 0;
	case EPERM: return 1;
	case ENOMEM: return 12;
	case EINVAL: return 22;
	case ENOSPC: return 28;
	case EOVERFLOW: return 75;
	case ESHUTDOWN: return 108;
	default: return 5;             /* EIO */
	}
}

/* What precedes the payload, which an error does not have. Returns the header's length.
 * A chunk is always the last of its reply. */
static inline uint32_t header_build(uint8_t header[HEADER_MAX], int reply, int status, uint32_t payload,
                                    const struct wire_request *request)
{
	uint32_t error = nbd_errno(status);
	uint8_t *at = header;

	at = put_be(at, reply == REPLY_SIMPLE ? 0x67446698 : 0x668e33ef, 4);
	if (reply == REPLY_SIMPLE) {
		at = put_be(at, error, 4);
		at = put_be(at, request->cookie, 8);
		return (uint32_t)(at - header);
	}
	if (error)
		reply = REPLY_ERROR;
	at = put_be(at, 1, 2);                   /* NBD_REPLY_FLAG_DONE */
	at = put_be(at, (uint64_t)reply, 2);
	at = put_be(at, request->cookie, 8);
	if (reply == REPLY_ERROR) {
		at = put_be(at, 6, 4);
		at = put_be(at, error, 4);
		at = put_be(at, 0, 2);           /* bytes of text */
	} else if (reply == REPLY_DATA) {
		at = put_be(at, 8 + (uint64_t)payload, 4);
		at = put_be(at, request->offset, 8);
	} else {
		at = put_be(at, payload, 4);
	}
	return (uint32_t)(at - header);
}

/* Append a descriptor to `count` of them, or lengthen the last if it says the same. */
static inline uint32_t extents_add(uint8_t *extents, uint32_t count, uint64_t length, uint32_t state)
{
	uint8_t *end = extents + 8 * (uint64_t)count;

	if (count && get_be(end - 4, 4) == state) {
		put_be(end - 8, get_be(end - 8, 4) + length, 4);
		return count;
	}
	put_be(put_be(end, length, 4), state, 4);
	return count + 1;
}

#endif
