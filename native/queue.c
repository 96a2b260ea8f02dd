/* SPDX-License-Identifier: Apache-2.0
 * queue.c: which fetch comes next, and which thread takes it.
 */
#include "queue.h"

#include <errno.h>
#include <sys/mman.h>

#include "cache.h"
#include "engine.h"
#include "fetch.h"
#include "status.h"

/* Nothing has come from a host for so long: it may be stuck. A new one answers sooner. */
static const int64_t QUIET_NS = 3 * 1000000000LL;

/* ---- threads ---- */

/* Somebody should look for a fetch of this priority. One kept for foreground goes first,
 * so that the others stay free for more. */
static void queue_call(struct fetch_queue *queue, int priority)
{
	uint32_t kept = priority == OB_FOREGROUND ? queue->idle & queue->foreground : 0;
	uint32_t able = kept ? kept : queue->idle & ~queue->foreground, one = able & -able;

	queue->idle &= ~one;
	queue->called |= one;
}

void queue_call_next(struct fetch_queue *queue, uint64_t budget)
{
	int64_t until = INT64_MAX;
	struct fetch *fetch = queue_pick(queue, OB_BULK, budget, &until);

	if (fetch)
		queue_call(queue, fetch->lent.priority);
	else if (until < INT64_MAX)
		queue_call(queue, OB_BULK); /* somebody has to wait for that */
}

int queue_wait(struct fetch_queue *queue, int lowest, int64_t until_ns)
{
	uint32_t slot, bit;

	if (queue->used == UINT32_MAX)
		return status_set(EMFILE, "next fetch: more than %d threads wait", FETCH_SLOTS);
	slot = (uint32_t)__builtin_ctz(~queue->used);
	bit = (uint32_t)1 << slot;
	queue->used |= bit;
	queue->idle |= bit;
	queue->foreground = lowest == OB_FOREGROUND ? queue->foreground | bit : queue->foreground & ~bit;
	engine_wait_until(&queue->wake[slot], &queue->lock, until_ns);
	queue->used &= ~bit;
	queue->idle &= ~bit;
	return -EAGAIN;
}

/* ---- order ---- */

void queue_push(struct fetch_queue *queue, struct fetch *fetch)
{
	TAILQ_INSERT_TAIL(&queue->queues[fetch->lent.priority], fetch, queued);
	queue_call(queue, fetch->lent.priority);
}

void queue_remove(struct fetch_queue *queue, struct fetch *fetch)
{
	TAILQ_REMOVE(&queue->queues[fetch->lent.priority], fetch, queued);
}

static int host_has_room(const struct fetch_queue *queue, const struct fetch *fetch, int64_t now)
{
	const struct host *host = &queue->hosts[fetch->blob->host];
	int urgent = fetch->lent.priority == OB_FOREGROUND;
	int last = queue->lent + (urgent ? THREADS_KEPT_URGENT : THREADS_KEPT) >= FETCH_SLOTS;
	int ailing = host->failing || now - atomic_load(&host->heard_ns) > QUIET_NS;

	/* One of each share is kept for foreground. */
	return host->lent + !urgent < (last || ailing ? HOST_FETCHES_AILING : HOST_FETCHES);
}

struct fetch *queue_pick(struct fetch_queue *queue, int lowest, uint64_t budget, int64_t *until_ns)
{
	int64_t now = engine_now();
	struct fetch *fetch;

	for (int priority = 0; priority <= lowest; priority++) {
		TAILQ_FOREACH(fetch, &queue->queues[priority], queued) {
			if (fetch->not_before_ns > now) {
				if (fetch->not_before_ns < *until_ns)
					*until_ns = fetch->not_before_ns;
				continue;
			}
			if (!host_has_room(queue, fetch, now))
				continue;
			if (queue->lent && queue->lent_bytes + fetch->count * OB_EXTENT_SIZE > budget)
				return NULL;
			return fetch;
		}
	}
	return NULL;
}

void queue_lend(struct fetch_queue *queue, struct fetch *fetch)
{
	queue_remove(queue, fetch);
	fetch->host = &queue->hosts[fetch->blob->host];
	if (!fetch->host->lent++)
		fetch_heard(fetch);
	queue->lent++;
	queue->lent_bytes += fetch->lent.length;
}

void queue_take_back(struct fetch_queue *queue, struct fetch *fetch)
{
	fetch->host->lent--;
	queue->lent--;
	queue->lent_bytes -= fetch->lent.length;
}

void fetch_heard(struct fetch *fetch)
{
	atomic_store(&fetch->host->heard_ns, engine_now());
}

/* ---- buffers ---- */

void *buffer_take(struct fetch_queue *queue)
{
	void *buffer;

	if (queue->spares)
		return queue->spare[--queue->spares];
	buffer = mmap(NULL, FETCH_BUFFER_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return buffer == MAP_FAILED ? NULL : buffer;
}

int buffer_give(struct fetch_queue *queue, void *buffer)
{
	if (queue->spares == FETCH_SPARES)
		return 0;
	queue->spare[queue->spares++] = buffer;
	return 1;
}

void buffers_free(struct fetch_queue *queue)
{
	while (queue->spares)
		munmap(queue->spare[--queue->spares], FETCH_BUFFER_SIZE);
}
