/* SPDX-License-Identifier: Apache-2.0
 * engine.c: threads, events, and the lifetime of what holds them.
 */
#include "engine.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "request.h"
#include "status.h"

/* Deepest engine frame is a decoder's; scratch lives on the heap. Small stacks keep an
 * owner with hundreds of connections small. */
enum { THREAD_STACK = 256 * 1024 };

struct event_node {
	ob_event event;
	struct event_node *next;
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
	struct event_queue *events = &engine->events;
	struct event_node *node = malloc(sizeof(*node));
	uint64_t one = 1;

	if (!node)
		return;
	*node = (struct event_node){ .event = { .kind = kind, .status = status, .id = id } };
	pthread_mutex_lock(&events->lock);
	*events->tail = node;
	events->tail = &node->next;
	pthread_mutex_unlock(&events->lock);
	/* Fails only when the counter is full, and then the descriptor is readable anyway. */
	if (write(events->fd, &one, sizeof(one)) < 0)
		return;
}

int ob_event_fd(struct ob_engine *engine)
{
	return engine->events.fd;
}

int ob_event_next(struct ob_engine *engine, ob_event *out)
{
	struct event_queue *events = &engine->events;
	struct event_node *node;
	uint64_t count;

	pthread_mutex_lock(&events->lock);
	node = events->head;
	if (node) {
		events->head = node->next;
		if (!events->head)
			events->tail = &events->head;
	}
	/* Emptied under the lock: a post that follows makes the descriptor readable again. */
	if (!events->head && read(events->fd, &count, sizeof(count)) < 0 && errno != EAGAIN) {
		pthread_mutex_unlock(&events->lock);
		free(node);
		return status_set(errno, "read events: eventfd: errno %d", errno);
	}
	pthread_mutex_unlock(&events->lock);
	if (!node)
		return 0;
	*out = node->event;
	free(node);
	return 1;
}

static int events_open(struct event_queue *events)
{
	pthread_mutex_init(&events->lock, NULL);
	events->head = NULL;
	events->tail = &events->head;
	events->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return events->fd < 0 ? status_set(errno, "open engine: eventfd: errno %d", errno) : 0;
}

static void events_close(struct event_queue *events)
{
	struct event_node *node;

	while ((node = events->head)) {
		events->head = node->next;
		free(node);
	}
	close(events->fd);
	pthread_mutex_destroy(&events->lock);
}

/* ---- work threads ---- */

void engine_work(struct ob_engine *engine, struct ob_request *request)
{
	struct work_queue *work = &engine->work;

	request->next = NULL;
	pthread_mutex_lock(&work->lock);
	*work->tail = request;
	work->tail = &request->next;
	pthread_cond_signal(&work->wake);
	pthread_mutex_unlock(&work->lock);
}

static void *work_run(void *argument)
{
	struct work_queue *work = &((struct ob_engine *)argument)->work;
	struct ob_request *request;

	pthread_mutex_lock(&work->lock);
	while (work->head || !work->stopping) {
		request = work->head;
		if (!request) {
			pthread_cond_wait(&work->wake, &work->lock);
			continue;
		}
		work->head = request->next;
		if (!work->head)
			work->tail = &work->head;
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

static void work_close(struct work_queue *work)
{
	work_stop(work);
	free(work->threads);
	pthread_cond_destroy(&work->wake);
	pthread_mutex_destroy(&work->lock);
}

static int work_open(struct ob_engine *engine, uint32_t threads)
{
	struct work_queue *work = &engine->work;
	int error = 0;

	pthread_mutex_init(&work->lock, NULL);
	pthread_cond_init(&work->wake, NULL);
	work->head = NULL;
	work->tail = &work->head;
	work->threads = calloc(threads, sizeof(*work->threads));
	if (!work->threads)
		error = status_set(ENOMEM, "open engine: work threads: out of memory");
	for (; !error && work->thread_count < threads; work->thread_count += !error)
		error = engine_thread(&work->threads[work->thread_count], "ob-work", work_run, engine);
	if (error)
		work_close(work);
	return error;
}

/* ---- lifetime ---- */

int ob_engine_open(const ob_engine_config *config, struct ob_engine **out)
{
	struct ob_engine *engine;
	int error;

	if (config->work_threads < 1 || config->work_threads > 256 || config->fetch_bytes < OB_EXTENT_SIZE)
		return status_set(EINVAL, "open engine: config: a field is out of range");
	engine = calloc(1, sizeof(*engine));
	if (!engine)
		return status_set(ENOMEM, "open engine: out of memory");
	engine->config = *config;
	atomic_init(&engine->references, 1);
	error = events_open(&engine->events);
	if (error)
		goto no_events;
	error = fetch_queue_open(engine);
	if (error)
		goto no_fetch;
	error = work_open(engine, config->work_threads);
	if (error)
		goto no_work;
	*out = engine;
	return 0;
no_work:
	fetch_queue_stop(engine);
	fetch_queue_close(engine);
no_fetch:
	events_close(&engine->events);
no_events:
	free(engine);
	return error;
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
	work_close(&engine->work);
	fetch_queue_close(engine);
	events_close(&engine->events);
	free(engine);
}
