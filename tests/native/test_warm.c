/* SPDX-License-Identifier: Apache-2.0
 * test_warm.c: from a request to its bytes nothing is allocated: in process, over NBD and
 * over FUSE, once each thread and each buffer has been used.
 *
 * Counts the calls of malloc() and mmap() of all threads by standing in their place, in
 * the plain build; sanitizers bring their own, and there only the bytes are checked.
 */
#include <errno.h>
#include <linux/fuse.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include "memory.h"
#include "nbdwire.h"
#include "random.h"

enum { PLAIN = 4 << 20, BLOCK = 4096, LONGEST = 1 << 20, READS = 60, ROUNDS = 50, FUSE_SLOTS = 4 };

static atomic_long allocations;

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);

void *malloc(size_t size)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
	atomic_fetch_add(&allocations, 1);
	return __libc_realloc(memory, size);
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	atomic_fetch_add(&allocations, 1);
	return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}
#endif

/* ---- an image whose bytes are all in the cache ---- */

static uint8_t plain[PLAIN], got[LONGEST + 64];

struct stand {
	ob_engine *engine;
	ob_blob *blob;
	ob_image *image;
	ob_nbd *nbd;
	ob_fuse *fuse;
	int nbd_client, kernel;
};

static ob_file *compressed_file(ob_engine *engine, int codec, ob_blob **out)
{
	static uint32_t lengths[PLAIN / BLOCK];
	uint64_t bound = ob_zfile_bound(codec, BLOCK, PLAIN);
	uint8_t *stored = malloc(bound + sizeof(lengths));
	int64_t body = ob_zfile_compress(codec, BLOCK, 1, plain, PLAIN, stored, bound, lengths);
	int data = memory_fd("", 0), map = memory_fd("", 0);
	ob_blob *blob;
	ob_file *file;

	CHECK(body > 0);
	memcpy(stored + body, lengths, sizeof(lengths));
	ob_zfile_head head = {.length = (uint64_t)body + sizeof(lengths), .index_offset = (uint64_t)body,
	                      .block_count = PLAIN / BLOCK, .plain_size = PLAIN, .block_size = BLOCK, .codec = codec,
	                      .block_crc = 1};
	ob_blob_config config = {.id = 1, .size = head.length, .table_offset = 4096};
	CHECK(ob_blob_open_cached(engine, data, map, &config, &blob) == 0);
	CHECK(ob_blob_store(blob, 0, stored, head.length) > 0);
	CHECK(ob_file_open_zfile(blob, &head, &file) == 0);
	*out = blob;
	close(data);
	close(map);
	free(stored);
	return file;
}

static void stand_open(struct stand *stand, int codec)
{
	ob_nbd_config nbd = {.id = 1};
	ob_fuse_config fuse = {.id = 2, .threads = 2, .slots = FUSE_SLOTS};
	int pair[2], memfd = memory_fd("", 0);

	stand->engine = memory_engine();
	ob_layer layer = {.kind = OB_LAYER_FLAT, .file = compressed_file(stand->engine, codec, &stand->blob)};
	layer.index = layer.file;
	CHECK(ob_image_open(stand->engine, &layer, 1, PLAIN, &stand->image) == 0);
	ob_file_close(layer.file);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	CHECK(ob_nbd_start(stand->image, pair[1], &nbd, &stand->nbd) == 0);
	stand->nbd_client = pair[0];
	close(pair[1]);
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
	int room = 2 * LONGEST;
	CHECK(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room)) == 0
	      || setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
	CHECK(ob_fuse_start(stand->image, pair[1], memfd, &fuse, &stand->fuse) == 0);
	stand->kernel = pair[0];
	close(pair[1]);
	close(memfd);
}

static void stand_close(struct stand *stand)
{
	close(stand->nbd_client);
	close(stand->kernel);
	ob_nbd_close(stand->nbd, 0);
	ob_fuse_close(stand->fuse);
	ob_image_close(stand->image);
	ob_blob_close(stand->blob);
	ob_engine_close(stand->engine);
}

/* ---- three ways to read; each returns where the bytes are ---- */

static const uint8_t *by_call(struct stand *stand, uint64_t offset, uint32_t length)
{
	CHECK(ob_image_read(stand->image, offset, got, length) == 0);
	return got;
}

static const uint8_t *by_nbd(struct stand *stand, uint64_t offset, uint32_t length)
{
	uint8_t request[REQUEST_SIZE];

	put_be(put_be(put_be(put_be(put_be(request, 0x25609513, 4), CMD_READ, 4), 7, 8), offset, 8), length, 4);
	CHECK(write(stand->nbd_client, request, sizeof(request)) == sizeof(request));
	CHECK(recv(stand->nbd_client, got, SIMPLE_SIZE + length, MSG_WAITALL) == (ssize_t)(SIMPLE_SIZE + length));
	CHECK(get_be(got, 4) == 0x67446698 && get_be(got + 4, 4) == 0);
	return got + SIMPLE_SIZE;
}

static const uint8_t *by_fuse(struct stand *stand, uint64_t offset, uint32_t length)
{
	struct { struct fuse_in_header head; struct fuse_read_in in; } ask = {
		{.len = sizeof(ask), .opcode = FUSE_READ, .unique = 9, .nodeid = 1}, {.offset = offset, .size = length}};
	struct fuse_out_header head;

	CHECK(write(stand->kernel, &ask, sizeof(ask)) == sizeof(ask));
	CHECK(read(stand->kernel, got, sizeof(got)) == (ssize_t)(sizeof(head) + length));
	memcpy(&head, got, sizeof(head));
	CHECK(head.error == 0 && head.unique == 9);
	return got + sizeof(head);
}

/* Lengths and alignments of all kinds, the same in every round. */
static void read_round(struct stand *stand, const uint8_t *(*way)(struct stand *, uint64_t, uint32_t))
{
	static const uint32_t lengths[] = {512, 4096, 5000, 65536, 128 << 10, LONGEST};
	uint64_t seed = 11;

	for (int i = 0; i < READS; i++) {
		uint32_t length = lengths[i % 6];
		uint64_t offset = random_below(&seed, (PLAIN - length) / 512 + 1) * 512;

		CHECK(memcmp(way(stand, offset, length), plain + offset, length) == 0);
	}
}

static void test_nothing_is_allocated(int codec)
{
	static const uint8_t *(*const ways[])(struct stand *, uint64_t, uint32_t) = {by_call, by_nbd, by_fuse};
	struct stand stand;

	stand_open(&stand, codec);
	for (int i = 0; i < 3; i++) {
		/* The first rounds allocate: each thread meets its first block, each slot its longest
		 * read; and a server left idle by a busy machine gives some of that back. */
		for (int round = 0, quiet = 0; !quiet; round++) {
			long before = atomic_load(&allocations);

			CHECK(round < ROUNDS);
			read_round(&stand, ways[i]);
			quiet = atomic_load(&allocations) == before;
		}
	}
	stand_close(&stand);
}

int main(void)
{
	uint64_t seed = 3;

	random_bytes(&seed, plain, PLAIN);
	test_nothing_is_allocated(OB_CODEC_LZ4);
	test_nothing_is_allocated(OB_CODEC_ZSTD);
	return 0;
}
