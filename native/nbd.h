/* SPDX-License-Identifier: Apache-2.0
 * nbd.h: an NBD connection in transmission: nbd.c owns it, nbd_serve.c answers its requests.
 */
#ifndef OB_NBD_H
#define OB_NBD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "image.h"
#include "nbdwire.h"
#include "ob.h"
#include "request.h"

enum {
	BATCH_MAX = 16,                /* replies in one sendmsg() */
	INPUT_SIZE = 4096,             /* some 146 requests */
	WRITE_PIECE = 1 << 20          /* of a write's payload, received at one time */
};

/* A request from its arrival to its reply. */
struct slot {
	struct ob_request read;        /* first: read_complete() casts */
	struct ob_nbd *nbd;
	struct slot *next;             /* `spare` or `finished` */
	atomic_int answerable;         /* set by submitter and complete(): the second answers */
	int status;                    /* 0 or -errno */
	int reply;                     /* REPLY_* */
	struct wire_request request;
	uint32_t header_length, payload_length;
	uint8_t header[HEADER_MAX];
	uint8_t *memory;               /* the payload; mapped, so that it goes back when unmapped */
	uint64_t capacity;
	bool kept;                     /* one of `statuses`: never given back */
};

struct ob_nbd {
	atomic_int references;         /* the handle, and each read between submit and complete */
	struct ob_image *image;
	int fd;
	int wake;                      /* eventfd: `finished` or `closing` has changed */
	ob_nbd_config config;
	pthread_t thread;
	_Atomic(struct slot *) finished;
	atomic_int closing;            /* take no more requests */
	pthread_mutex_t lock;          /* of ended */
	pthread_cond_t at_end;
	bool ended;

	/* the connection's thread only, from here on */
	struct slot *spare;
	uint64_t retained;             /* bytes of memory of the spare slots */
	struct slot *batch[BATCH_MAX];
	struct slot statuses[BATCH_MAX];    /* for replies without a payload: the one of the next place in batch is free */
	uint8_t *writes;               /* WRITE_PIECE bytes of a write's payload; NULL: the image is read-only */
	uint32_t batch_count;
	uint64_t batch_bytes;
	uint32_t parked;
	uint64_t parked_bytes;
	uint32_t head, tail;           /* unread part of input */
	uint8_t input[INPUT_SIZE];
};

/* ---- the connection's thread ---- */

/* A slot with room for `size` bytes; NULL when out of memory. */
struct slot *nbd_take(struct ob_nbd *nbd, uint64_t size);
/* Reply with the slot, sooner or later, and give it back. False: the connection is of no more use. */
bool nbd_reply(struct ob_nbd *nbd, struct slot *slot);
/* Reply to the reads that work threads have finished, and send what is held back. False: as above. */
bool nbd_collect(struct ob_nbd *nbd);
/* Waits for a wake or for `events` of the socket, whose revents it returns; -1: time is up. */
int nbd_wait(struct ob_nbd *nbd, short events, int timeout_ms);
/* The next bytes of a write's payload; into nowhere if buffer is NULL. False: there will be no more. */
bool nbd_payload(struct ob_nbd *nbd, uint8_t *buffer, uint64_t length);

/* ---- any thread ---- */

void nbd_wake(struct ob_nbd *nbd);
/* Whoever ends a read later than the connection ends may be the last. */
void nbd_unref(struct ob_nbd *nbd);

/* ---- nbd_serve.c ---- */

/* Answer a request, or park it. False: hang up. */
bool nbd_answer(struct ob_nbd *nbd, const struct wire_request *request);

#endif
