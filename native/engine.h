/* SPDX-License-Identifier: Apache-2.0
 * engine.h: what outlives every blob and image: threads, the fetch queue, events.
 *
 * Lock order, outer first: fetch queue -> work queue. Nobody holds one of
 * them while calling complete() or ready(), or waiting for Python. Nor while doing I/O, but
 * for whoever takes an extent away: until its readers have let go of it, its entry in the map
 * is cleared and its bytes are gone, nobody may want it (cache.c).
 */
#ifndef OB_ENGINE_H
#define OB_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/queue.h>

#include "fetch.h"
#include "ob.h"

struct ob_request;

enum { WORK_THREADS_MAX = 64 };

struct work_queue {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	STAILQ_HEAD(, ob_request) requests;
	pthread_t threads[WORK_THREADS_MAX];
	uint32_t thread_count;
	int stopping;
};

struct ob_engine {
	atomic_int references;          /* the user's handle, and each blob */
	atomic_int stopped;
	ob_engine_config config;
	struct fetch_queue fetch;
	struct work_queue work;
	int events[2];                  /* a pipe of ob_event */
};

struct ob_engine *engine_ref(struct ob_engine *engine);
void engine_unref(struct ob_engine *engine);

/* Tell the user something happened. Never blocks, never fails: if he takes none, later events
 * are lost, and the state they tell of can still be asked for. */
void engine_post(struct ob_engine *engine, int kind, int status, uint64_t id);

/* Hand a request whose wait is over to a work thread. */
void engine_work(struct ob_engine *engine, struct ob_request *request);

/* Start a named thread with a stack that fits what the engine does on it. */
int engine_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

/* Monotonic nanoseconds. */
int64_t engine_now(void);

/* Wait on a condition that uses the monotonic clock, at most until then. */
void engine_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t until_ns);

#endif
