/* SPDX-License-Identifier: Apache-2.0
 * mapping.c: reading cache files through their mappings.
 *
 * A pread of one compressed block costs about half of what decoding it does. Here the
 * block costs a memcpy, and a page fault for the first read of each extent: a fault maps
 * the 64 KiB around it. EXTENT_MAPPED counts those first reads.
 */
#include "mapping.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "cache.h"

/* Mapped extents of all blobs: 256 MiB that count as the process's memory (RssFile). */
enum { MAPPED_MAX = 4096 };
/* Extents refused for want of room before it is made: what is read now is then something
 * else than what was, and unmapping costs little against that many preads. */
enum { REFUSED_MAX = 4 * MAPPED_MAX };
/* A larger blob is not mapped: 255 of these fit any address space. */
static const uint64_t BLOB_MAX = 64ull << 30;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   /* innermost; of the next three */
static struct ob_blob *mapped;
static uint32_t mapped_extents, refused_extents;
static struct sigaction previous;
static _Thread_local sigjmp_buf *volatile guard;            /* where a copy under way is abandoned to */

/* ---- bus errors ---- */

static void bus_error(int number, siginfo_t *info, void *context)
{
	bool sent = info->si_code <= 0;

	if (guard && !sent) {
		pthread_sigmask(SIG_SETMASK, &((ucontext_t *)context)->uc_sigmask, NULL);
		siglongjmp(*guard, 1);
	}
	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(number, info, context);
	} else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
		previous.sa_handler(number);
	} else if (!sent || previous.sa_handler == SIG_DFL) {
		/* A fault comes again when we return, and kills. */
		sigaction(number, &(struct sigaction){ .sa_handler = SIG_DFL }, NULL);
		if (sent)
			raise(number);
	}
}

static void bus_error_catch(void)
{
	struct sigaction action = { .sa_sigaction = bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	sigaction(SIGBUS, &action, &previous);
}

static bool copy(void *buffer, const uint8_t *bytes, uint64_t length)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		guard = NULL;
		return false;
	}
	guard = &here;
	atomic_signal_fence(memory_order_seq_cst);
	memcpy(buffer, bytes, length);
	atomic_signal_fence(memory_order_seq_cst);
	guard = NULL;
	return true;
}

/* ---- mappings ---- */

void mapping_open(struct ob_blob *blob)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	void *bytes = blob->size && blob->size <= BLOB_MAX
		? mmap(NULL, blob->size, PROT_READ, MAP_SHARED, blob->data_fd, 0) : MAP_FAILED;

	if (bytes == MAP_FAILED)
		return;
	pthread_once(&once, bus_error_catch);
	blob->bytes = bytes;
	pthread_mutex_lock(&lock);
	blob->next_mapped = mapped;
	mapped = blob;
	pthread_mutex_unlock(&lock);
}

static void trim_locked(void)
{
	for (struct ob_blob *blob = mapped; mapped_extents && blob; blob = blob->next_mapped) {
		for (uint64_t extent = 0; extent < blob->extents; extent++)
			if (atomic_load_explicit(&blob->state[extent], memory_order_relaxed) & EXTENT_MAPPED)
				atomic_fetch_and(&blob->state[extent], ~(uint32_t)EXTENT_MAPPED);
		madvise((void *)blob->bytes, blob->size, MADV_DONTNEED);
	}
	mapped_extents = refused_extents = 0;
}

void mapping_trim(void)
{
	pthread_mutex_lock(&lock);
	trim_locked();
	pthread_mutex_unlock(&lock);
}

void mapping_close(struct ob_blob *blob)
{
	struct ob_blob **at = &mapped;

	if (!blob->bytes)
		return;
	pthread_mutex_lock(&lock);
	while (*at != blob)
		at = &(*at)->next_mapped;
	*at = blob->next_mapped;
	for (uint64_t extent = 0; extent < blob->extents; extent++)
		mapped_extents -= !!(atomic_load(&blob->state[extent]) & EXTENT_MAPPED);
	pthread_mutex_unlock(&lock);
	munmap((void *)blob->bytes, blob->size);
}

/* Is there room for one more extent? */
static bool admit(struct ob_blob *blob, uint64_t extent)
{
	pthread_mutex_lock(&lock);
	if (mapped_extents == MAPPED_MAX && ++refused_extents > REFUSED_MAX)
		trim_locked();
	bool room = mapped_extents < MAPPED_MAX;
	if (room && !(atomic_fetch_or(&blob->state[extent], EXTENT_MAPPED) & EXTENT_MAPPED))
		mapped_extents++;
	pthread_mutex_unlock(&lock);
	return room;
}

bool mapping_read(struct ob_blob *blob, uint64_t offset, void *buffer, uint64_t length)
{
	if (!blob->bytes || length > MAPPING_READ_MAX)
		return false;
	for (uint64_t extent = offset / OB_EXTENT_SIZE; extent <= (offset + length - 1) / OB_EXTENT_SIZE; extent++)
		if (!(atomic_load_explicit(&blob->state[extent], memory_order_relaxed) & EXTENT_MAPPED)
		    && !admit(blob, extent))
			return false;
	return copy(buffer, blob->bytes + offset, length);
}
