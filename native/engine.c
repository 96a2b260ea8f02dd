/* SPDX-License-Identifier: Apache-2.0
 * engine.c: threads, events, and the lifetime of what holds them.
 */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "request.h"
#include "status.h"

/* Deepest engine frame is a decoder's; scratch lives on the heap. Small stacks keep an
 * owner with hundreds of connections small. */
enum {
	THREAD_STACK = 256 * 1024,
	EVENT_BYTES = 1 << 20    /* that may wait: 65,536 events */
};

int64_t engine_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void engine_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t until_ns)
{
	struct timespec at = { .tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000 };

	pthread_cond_timedwait(condition, lock, &at);
}

int engine_thread(pthread_t *thread, const char *name, void *(*run)(void *), void *argument)
{
	pthread_attr_t attributes;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, THREAD_STACK < PTHREAD_STACK_MIN ? PTHREAD_STACK_MIN : THREAD_STACK);
	error = pthread_create(thread, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	if (error)
		return status_set(error, "start thread: %s: error %d", name, error);
	pthread_setname_np(*thread, name);
	return 0;
}

/* ---- events ---- */

void engine_post(struct ob_engine *engine, int kind, int status, uint64_t id)
{
	ob_event event = { .kind = kind, .status = status, .id = id };

	/* Whole or not at all, since it is shorter than PIPE_BUF. */
	if (write(engine->events[1], &event, sizeof(event)) < 0)
		return;
}

int ob_event_fd(struct ob_engine *engine)
{
	return engine->events[0];
}

int ob_event_next(struct ob_engine *engine, ob_event *out)
{
	ssize_t got = read(engine->events[0], out, sizeof(*out));

	if (got < 0 && errno != EAGAIN)
		return status_set(errno, "read events: pipe: errno %d", errno);
	return got == sizeof(*out);
}

/* ---- work threads ---- */

void engine_work(struct ob_engine *engine, struct ob_request *request)
{
	struct work_queue *work = &engine->work;

	pthread_mutex_lock(&work->lock);
	STAILQ_INSERT_TAIL(&work->requests, request, waiting);
	pthread_mutex_unlock(&work->lock);
	pthread_cond_signal(&work->wake);
}

static void *work_run(void *argument)
{
	struct work_queue *work = &((struct ob_engine *)argument)->work;
	struct ob_request *request;

	pthread_mutex_lock(&work->lock);
	while ((request = STAILQ_FIRST(&work->requests)) || !work->stopping) {
		if (!request) {
			pthread_cond_wait(&work->wake, &work->lock);
			continue;
		}
		STAILQ_REMOVE_HEAD(&work->requests, waiting);
		pthread_mutex_unlock(&work->lock);
		request_resume(request);
		pthread_mutex_lock(&work->lock);
	}
	pthread_mutex_unlock(&work->lock);
	return NULL;
}

/* Join the threads, once they have finished what is queued. */
static void work_stop(struct work_queue *work)
{
	pthread_mutex_lock(&work->lock);
	work->stopping = 1;
	pthread_cond_broadcast(&work->wake);
	pthread_mutex_unlock(&work->lock);
	while (work->thread_count)
		pthread_join(work->threads[--work->thread_count], NULL);
}

/* ---- lifetime ---- */

int ob_engine_open(const ob_engine_config *config, struct ob_engine **out)
{
	struct ob_engine *engine;
	int error;

	if (config->work_threads < 1 || config->work_threads > WORK_THREADS_MAX || config->fetch_bytes < OB_EXTENT_SIZE)
		return status_set(EINVAL, "open engine: config: a field is out of range");
	engine = calloc(1, sizeof(*engine));
	if (!engine)
		return status_set(ENOMEM, "open engine: out of memory");
	engine->config = *config;
	atomic_init(&engine->references, 1);
	pthread_mutex_init(&engine->work.lock, NULL);
	pthread_cond_init(&engine->work.wake, NULL);
	STAILQ_INIT(&engine->work.requests);
	engine->events[0] = engine->events[1] = -1;
	error = fetch_queue_open(engine);
	if (!error && pipe2(engine->events, O_CLOEXEC | O_NONBLOCK))
		error = status_set(errno, "open engine: pipe: errno %d", errno);
	for (; !error && engine->work.thread_count < config->work_threads; engine->work.thread_count += !error)
		error = engine_thread(&engine->work.threads[engine->work.thread_count], "ob-work", work_run, engine);
	if (error) {
		ob_engine_close(engine);
		return error;
	}
	fcntl(engine->events[1], F_SETPIPE_SZ, EVENT_BYTES);
	*out = engine;
	return 0;
}

void ob_engine_stop(struct ob_engine *engine)
{
	if (!atomic_exchange(&engine->stopped, 1))
		fetch_queue_stop(engine);
}

void ob_engine_close(struct ob_engine *engine)
{
	if (!engine)
		return;
	ob_engine_stop(engine);
	/* Not left to the last reference: a parked request may hold it, and give it up on a work thread. */
	work_stop(&engine->work);
	engine_unref(engine);
}

struct ob_engine *engine_ref(struct ob_engine *engine)
{
	atomic_fetch_add(&engine->references, 1);
	return engine;
}

void engine_unref(struct ob_engine *engine)
{
	if (atomic_fetch_sub(&engine->references, 1) != 1)
		return;
	pthread_cond_destroy(&engine->work.wake);
	pthread_mutex_destroy(&engine->work.lock);
	fetch_queue_close(engine);
	close(engine->events[0]);
	close(engine->events[1]);
	free(engine);
}
