/* SPDX-License-Identifier: Apache-2.0
 * readahead.c: sequential readers get windows that double.
 *
 * A window is asked for when its reader comes to the start of the one before, so that
 * the next is on its way while the last is read. A blob remembers a few streams.
 */
#include "readahead.h"

#include "cache.h"
#include "engine.h"

enum {
	WINDOW_FIRST = 4,    /* extents of the first window */
	STREAM_SLACK = 2     /* a reader may skip this many extents and go on */
};

/* The stream a reader at [first, last] belongs to, or the one to use for a new reader. */
static struct stream *stream_find(struct ob_blob *blob, uint64_t first)
{
	struct stream *oldest = &blob->streams[0];

	for (int i = 0; i < STREAMS; i++) {
		struct stream *stream = &blob->streams[i];

		if (stream->used && first + stream->window + STREAM_SLACK >= stream->next && first <= stream->next + STREAM_SLACK)
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

void readahead_reached(struct ob_blob *blob, uint64_t first, uint64_t last)
{
	struct stream *stream = stream_find(blob, first);
	uint64_t start, window, most = blob->engine->config.readahead_extents;
	int marked = stream_marked(blob, first, last);

	if (!stream->used) {
		*stream = (struct stream){ .next = last + 1, .used = ++blob->stream_clock };
		return;
	}
	stream->used = ++blob->stream_clock;
	if (last < stream->next && !marked)
		return; /* inside what was asked for, and not at its mark: the same extent missed twice is no stream */
	window = stream->window ? stream->window * 2 : WINDOW_FIRST;
	window = window < most ? window : most;
	start = last + 1 > stream->next ? last + 1 : stream->next;
	if (start >= blob->extents || !window)
		return;
	if (window > blob->extents - start)
		window = blob->extents - start;
	fetch_missing(blob, start, start + window - 1, OB_PREFETCH);
	atomic_fetch_or(&blob->state[start], EXTENT_MARK);
	stream->next = start + window;
	stream->window = window;
}

void readahead_mark(struct ob_blob *blob, uint64_t extent)
{
	struct fetch_queue *queue = &blob->engine->fetch;

	pthread_mutex_lock(&queue->lock);
	if (!queue->stopping && !blob->down && (atomic_load(&blob->state[extent]) & EXTENT_MARK))
		readahead_reached(blob, extent, extent);
	fetch_unlock(queue, NULL, NULL);
}
