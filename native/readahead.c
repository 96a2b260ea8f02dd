/* SPDX-License-Identifier: Apache-2.0
 * readahead.c: sequential readers get windows that grow.
 *
 * A window is asked for when its reader comes to the start of the one before, so that
 * the next is on its way while the last is read. It doubles while windows are read in less
 * than WINDOW_NS: a long fat link gets all it can carry, a slow one no more than it delivers
 * soon. A blob remembers a few streams.
 */
#include "readahead.h"

#include "cache.h"
#include "engine.h"
#include "round.h"

enum {
	WINDOW_FIRST = 4,    /* extents of the first window */
	STREAM_SLACK = 2,    /* a reader may skip this many extents and go on */
	STREAM_BACK = 16     /* requests of one reader may overtake each other by as many */
};

static const int64_t WINDOW_NS = 1000000000;

/* The stream a reader at `first` belongs to, or the one to use for a new reader. */
static struct stream *stream_find(struct ob_blob *blob, uint64_t first)
{
	struct stream *oldest = &blob->streams[0];

	for (int i = 0; i < STREAMS; i++) {
		struct stream *stream = &blob->streams[i];

		if (stream->used && first + STREAM_BACK >= stream->at && first <= stream->next + STREAM_SLACK)
			return stream;
		if (stream->used < oldest->used)
			oldest = stream;
	}
	*oldest = (struct stream){ 0 };
	return oldest;
}

/* Has the reader come to its stream's mark? It is taken away. */
static int stream_marked(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	uint32_t seen = 0;

	for (uint64_t extent = first; extent <= last; extent++) {
		if (atomic_load(&blob->state[extent]) & EXTENT_MARK)
			seen |= atomic_fetch_and(&blob->state[extent], ~(uint32_t)EXTENT_MARK);
	}
	return (seen & EXTENT_MARK) != 0;
}

static uint64_t stream_window(const struct stream *stream, uint64_t most)
{
	int64_t took = engine_now() - stream->asked_ns;
	uint64_t window = stream->window;

	if (!window)
		window = WINDOW_FIRST;
	else if (took < WINDOW_NS)
		window *= 2;
	else if (took > 2 * WINDOW_NS && window > WINDOW_FIRST)
		window /= 2;
	return min_u64(window, most);
}

void readahead_reached(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	struct stream *stream = stream_find(blob, first);
	int marked = stream_marked(blob, first, last), is_new = !stream->used;
	uint64_t start, window;

	stream->used = ++blob->stream_clock;
	stream->at = max_u64(stream->at, last);
	if (is_new)
		stream->next = unit_end(blob, last);
	/* Inside what was asked for, and not at its mark: the same extent missed twice is no stream. */
	if (is_new || (last < stream->next && !marked))
		return;
	start = max_u64(unit_end(blob, last), stream->next);
	window = stream_window(stream, blob->engine->config.readahead_extents);
	if (start >= blob->extents || !window)
		return;
	stream->window = window;
	stream->next = unit_end(blob, min_u64(start + window, blob->extents) - 1);
	stream->asked_ns = engine_now();
	fetch_missing(blob, start, stream->next - 1, OB_PREFETCH);
	atomic_fetch_or(&blob->state[start], EXTENT_MARK);
}

void readahead_mark(struct ob_blob *blob, uint64_t extent)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	pthread_mutex_lock(&queue->lock);
	if (!queue->stopping && !blob->down && (atomic_load(&blob->state[extent]) & EXTENT_MARK))
		readahead_reached(blob, extent, extent);
	fetch_unlock(queue, NULL, NULL);
}
