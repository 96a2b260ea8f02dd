/* SPDX-License-Identifier: Apache-2.0
 *
 * ob.h: the engine's public header and manual.
 *
 * The engine turns immutable blobs into block devices. Blobs are layer files, on a
 * local descriptor or in a cache that fills from elsewhere; a *file* is the plain
 * content of one layer (a window of a blob, possibly behind ZFile); an *image* is a
 * stack of LSMT indexes over such files, and what the transports (NBD, FUSE) serve.
 *
 * Rules that hold for every call
 *  - A fallible call returns 0 or a count, or -errno; the sentence that explains the
 *    last failure in the calling thread is ob_last_error().
 *  - "Blocks" in a description means: may wait for ob_fetch_* calls made by another
 *    thread. Such a call returns -ESHUTDOWN once ob_engine_stop() has been called.
 *  - Handles are opaque. A handle keeps what it was made from alive (an image its
 *    files, a file its blob): handles may be closed in any order, and closing NULL is
 *    a no-op. But a cached blob ends with its own handle (ob_blob_close). Close an engine
 *    last, after its transports have ended.
 *  - offset and length are bytes unless the name says _sectors (512 bytes).
 *  - The engine never calls back into its user: it queues fetches and events, and the
 *    user takes them (ob_fetch_next, ob_event_next).
 *
 * This file is also the source of the Python binding: everything but preprocessor
 * lines is handed to cffi, so it stays within plain declarations.
 */
#ifndef OB_H
#define OB_H

#include <stdint.h>

/* Raised whenever a declaration below changes; checked when the binding is imported. */
#define OB_ABI_VERSION 8
uint32_t ob_abi_version(void);

/* Text of the last failure in this thread: "what failed: which thing: why". Never NULL. */
const char *ob_last_error(void);

/* ---- engine ------------------------------------------------------------------- */

typedef struct ob_engine ob_engine;

typedef struct {
	uint32_t work_threads;       /* threads that finish parked requests; >= 1 */
	uint32_t readahead_extents;  /* largest read-ahead window; 0 turns read-ahead off */
	uint64_t fetch_bytes;        /* ceiling on buffers lent to fetches at one time */
} ob_engine_config;

int ob_engine_open(const ob_engine_config *config, ob_engine **out);
/* Parked requests fail with ESHUTDOWN; every blocked call returns. Idempotent. */
void ob_engine_stop(ob_engine *engine);
/* Stops, joins the engine's threads and frees it when its last child is closed. */
void ob_engine_close(ob_engine *engine);

/* ---- events -------------------------------------------------------------------- */

enum {
	OB_EVENT_BLOB_COMPLETE = 1,  /* every extent of blob `id` is in its cache */
	OB_EVENT_CACHE_WRITE = 2,    /* a cache write of blob `id` failed; `status` is -errno */
	OB_EVENT_BLOB_FAILING = 3,   /* the first fetch of blob `id` failed after success */
	OB_EVENT_BLOB_DOWN = 4,      /* ... and its policy has now run out: misses fail at once */
	OB_EVENT_NBD_CLOSED = 5,     /* NBD connection `id` has ended */
	OB_EVENT_FUSE_CLOSED = 6,    /* FUSE session `id` has ended */
	OB_EVENT_BLOB_DAMAGED = 7    /* a block of blob `id` (0: a local one) is wrong for good, another than the last */
};

typedef struct {
	int32_t kind;
	int32_t status;
	uint64_t id;
} ob_event;

/* A descriptor that polls readable while events wait. Owned by the engine. */
int ob_event_fd(ob_engine *engine);
/* The next event; 1 if *out was filled, 0 if there is none. Never blocks. */
int ob_event_next(ob_engine *engine, ob_event *out);

/* ---- blobs ----------------------------------------------------------------------- */

typedef struct ob_blob ob_blob;

enum {
	OB_EXTENT_SIZE = 65536,           /* the cache's unit of presence */
	OB_UNIT_MAX = 32                  /* extents fetched together, at the most */
};

enum {
	OB_POLICY_EIO = 0,    /* policy_ns runs from the source's first failure */
	OB_POLICY_RETRY = 1,  /* policy_ns runs from each request's own start */
	OB_POLICY_HANG = 2    /* a request waits for ever */
};

typedef struct {
	uint64_t id;            /* the user's name for the blob in fetches and events */
	uint64_t size;          /* bytes of the blob */
	uint64_t table_offset;  /* where the presence table starts in the map file */
	uint64_t seal_offset;   /* of the map's word that is made 0, synced, before any extent is taken away; 0 = none */
	int32_t policy;         /* OB_POLICY_* */
	uint64_t policy_ns;
	uint32_t unit;          /* extents fetched together, none without the others: what is missing is asked for
	                           in whole units. 0 and 1: each for itself */
} ob_blob_config;

typedef struct {
	uint64_t size;
	uint64_t present_bytes;   /* of the blob, in the cache */
	uint64_t fetched_bytes;   /* delivered by fetches since the blob was opened */
	uint64_t fetches;         /* fetches handed out since the blob was opened */
	uint64_t hits;            /* reads answered without waiting */
	uint64_t misses;          /* reads that waited */
	uint64_t crc_failures;    /* blocks or extents that failed their checksum */
	uint64_t retired;         /* extents taken away since the blob was opened: no seal from before holds */
	int64_t failing_ns;       /* how long the source has been failing; 0 = healthy */
	int32_t down;             /* 1 once misses fail at once */
	int32_t write_error;      /* -errno of the last write of its cache that failed */
	uint64_t write_failures;  /* since the blob was opened */
	uint64_t damaged_offset;  /* of the block that was found wrong for good last, ... */
	int32_t damaged;          /* ... if one was */
} ob_blob_stat;

/* A local file that already holds the whole blob. fd is duplicated. */
int ob_blob_open_local(ob_engine *engine, int fd, uint64_t size, ob_blob **out);
/* A cached blob: sparse data file plus presence map (docs/formats/presence-map.md),
 * whose head the caller has checked. Both descriptors are duplicated. One ob_blob per
 * cache entry at a time: the caller holds the root's lock. */
int ob_blob_open_cached(ob_engine *engine, int data_fd, int map_fd, const ob_blob_config *config, ob_blob **out);
/* Ends a cached blob for good, whoever holds files of it or works on a fetch: waits and reads fail with EIO,
 * what is delivered goes nowhere. Reads and writes of its cache that are under way are waited for; none
 * comes later, so the entry may be opened anew. */
void ob_blob_close(ob_blob *blob);
/* Blocks. Exactly length bytes or an error; past the end is -EINVAL. */
int ob_blob_read(ob_blob *blob, uint64_t offset, void *buffer, uint64_t length);
/* Bytes the caller got by whatever way; every extent they cover whole and that is not
 * present is written to the cache and its waiters are woken. Returns extents stored; -EBADF once it is closed. */
int64_t ob_blob_store(ob_blob *blob, uint64_t offset, const void *buffer, uint64_t length);
/* Take extents wholly inside the range out of the cache: their map entries first, then
 * the holes. Extents being read are left. Returns extents dropped. */
int64_t ob_blob_drop(ob_blob *blob, uint64_t offset, uint64_t length);
/* Ask for a range without waiting for it, at priority OB_PREFETCH or OB_BULK. The latter is for who wants it on
 * disk: what is in memory alone, since it could not be written, is asked for anew. */
int ob_blob_prefetch(ob_blob *blob, uint64_t offset, uint64_t length, int priority);
/* A probe found the source well again: misses are fetched from now on. */
void ob_blob_healthy(ob_blob *blob);
/* Which host the blob's bytes come from, by a number of the user's; 0 at first. Each host has its share of
 * the fetches lent at one time, and one whose fetches fail, or bring nothing for seconds, a small one. */
void ob_blob_set_host(ob_blob *blob, uint32_t host);
/* Waits for writes of its cache that are under way: what was read of a fetch is present then, if it can be kept. */
void ob_blob_settle(ob_blob *blob);
int ob_blob_set_policy(ob_blob *blob, int policy, uint64_t policy_ns);
void ob_blob_get_stat(ob_blob *blob, ob_blob_stat *out);

/* ---- fetches: the border where misses are answered --------------------------------- */

enum { OB_FOREGROUND = 0, OB_PREFETCH = 1, OB_BULK = 2 };

/* A contiguous missing range, with a buffer lent until ob_fetch_finish(). Only one
 * thread may work on a fetch. */
typedef struct {
	uint64_t blob_id;
	uint64_t offset;      /* multiple of OB_EXTENT_SIZE, and of the blob's unit unless part of one was advanced */
	uint64_t length;      /* multiple of both but at the blob's end */
	void *buffer;         /* length bytes, lent */
	int32_t priority;     /* OB_FOREGROUND ... OB_BULK, as of now */
	uint32_t attempt;     /* 0 the first time; + 1 for each finish with a retry */
} ob_fetch;

/* Waits at most timeout_ns for the most urgent fetch of priority `lowest` or better.
 * 0 and *out set, -ETIMEDOUT, or -ESHUTDOWN. */
int ob_fetch_next(ob_engine *engine, int lowest, int64_t timeout_ns, ob_fetch **out);
/* The first `filled` bytes of the buffer are right (filled never shrinks): extents now
 * whole go to their waiters, then to the cache. Cheap to call for each piece received. */
int ob_fetch_advance(ob_fetch *fetch, uint64_t filled);
/* Gives the fetch back; it is invalid afterwards. status 0: everything was advanced.
 * status -errno: what was not advanced is queued again after retry_ns, if retry_ns > 0
 * and somebody still wants it, else its waiters fail with EIO. -ESHUTDOWN: the source was
 * not at fault, and nothing is tried again. */
int ob_fetch_finish(ob_fetch *fetch, int status, int64_t retry_ns);

enum { OB_HTTP_HEADERS = 4 };

/* Where one GET brings a blob's ranges: redirects followed, logged in. */
typedef struct {
	const char *failed;                    /* how errors begin: "what failed: which thing" */
	const char *url;                       /* http or https */
	const char *headers[OB_HTTP_HEADERS];  /* whole lines; the rest NULL */
	const char *proxy;                     /* "" for none */
	const char *ca_path;                   /* directory of trusted certificates, or NULL; and more, as PEM: */
	const void *certificates;
	uint64_t certificates_size;
	int64_t connect_ns;                    /* longest wait to connect */
	int64_t stall_ns;                      /* longest time with less than ... */
	uint64_t stall_bytes;                  /* ... that many bytes in it; is kept to a second */
} ob_http_target;

typedef struct {
	uint64_t filled;        /* bytes of the lent buffer that have come, whatever became of the rest */
	int32_t status;         /* of the answer that was not what was asked for */
	char retry_after[60];
} ob_http_answer;

/* Fills what is not advanced yet with one GET of that range, advancing as it arrives; with
 * `hold` it advances nothing: the caller looks at the bytes first. Blocks for timeout_ns. 1: it
 * is full. 0: the answer was another; *out, and nothing was taken of it. -EIO: no answer, or not
 * all of it; what was advanced stays. -ESHUTDOWN: the engine was stopped, or the blob closed. */
int ob_fetch_http(ob_fetch *fetch, const ob_http_target *target, int64_t timeout_ns, int32_t hold, ob_http_answer *out);

/* ---- files: plain content of a layer --------------------------------------------------- */

typedef struct ob_file ob_file;

enum { OB_CODEC_LZ4 = 1, OB_CODEC_ZSTD = 2 };   /* ZFile's own numbers */

/* A ZFile head, already checked by formats/zfile.py. Offsets count from `base`. */
typedef struct {
	uint64_t base;            /* of the ZFile in the blob */
	uint64_t length;          /* of the ZFile */
	uint64_t data_offset;     /* of block 0 */
	uint64_t index_offset;    /* of the jump table */
	uint64_t block_count;
	uint64_t plain_size;
	uint32_t block_size;
	uint32_t index_crc;       /* raw CRC32C, seed 0, of the jump table */
	int32_t codec;
	int32_t block_crc;        /* 1: each block is followed by its CRC */
	int32_t check_index;      /* 1: index_crc is meaningful */
} ob_zfile_head;

/* `length` bytes of the blob from `base`, as they are. */
int ob_file_open_raw(ob_blob *blob, uint64_t base, uint64_t length, ob_file **out);
/* Blocks (reads and checks the jump table). -EBADMSG names the bad entry. */
int ob_file_open_zfile(ob_blob *blob, const ob_zfile_head *head, ob_file **out);
void ob_file_close(ob_file *file);
uint64_t ob_file_size(ob_file *file);
/* Blocks. Exactly length bytes or an error. -EBADMSG: a block failed its checksum or
 * could not be decoded, and fetching it again did not help. */
int ob_file_read(ob_file *file, uint64_t offset, void *buffer, uint64_t length);

/* ---- images ------------------------------------------------------------------------------ */

typedef struct ob_image ob_image;

enum {
	OB_LAYER_SEALED = 0,   /* sorted index in the file itself */
	OB_LAYER_LOG = 1,      /* RW pair: `index` is the chronological index file */
	OB_LAYER_FLAT = 2      /* no index: the file is the disk */
};

typedef struct {
	int32_t kind;             /* OB_LAYER_* */
	ob_file *file;            /* where data live */
	ob_file *index;           /* where the entries live; may be the same file */
	uint64_t index_offset;    /* of the entries in `index` */
	uint64_t index_count;     /* entries, padding included */
	uint64_t data_end;        /* first byte of `file` past the data area */
	uint64_t extent_limit;    /* refuse entries that end past this many bytes; 0 = none */
} ob_layer;

enum { OB_LAYERS_MAX = 255 };

/* Blocks (reads the indexes). layers[0] is the bottom; there may be none. The image reads as zeros where
 * no layer has data. -EBADMSG: ob_last_error() names layer and entry. */
int ob_image_open(ob_engine *engine, const ob_layer *layers, uint32_t layer_count, uint64_t size, ob_image **out);
/* Waits for the disk. From now on writes go to the pair of files, which lies over all layers,
 * whose heads the caller has checked and which nobody else may change. Before the image is
 * served; once. Descriptors are duplicated. */
int ob_image_open_upper(ob_image *image, int data_fd, int index_fd);
/* What was not flushed of a writable image is lost. */
void ob_image_close(ob_image *image);
uint64_t ob_image_size(ob_image *image);
/* Blocks. Exactly length bytes or an error. */
int ob_image_read(ob_image *image, uint64_t offset, void *buffer, uint64_t length);

/* Take bytes at any offset; whoever reads from now on gets them. They outlast a crash or a power
 * cut once ob_image_flush() has returned 0. -EROFS, -ENOSPC, -ENODATA (the disk). Blocks only if it
 * begins or ends inside a sector, for the rest of that sector; else waits for the disk. */
int ob_image_write(ob_image *image, uint64_t offset, const void *buffer, uint64_t length);
/* As a write of zeros, without the zeros. */
int ob_image_zero(ob_image *image, uint64_t offset, uint64_t length);
/* Waits for the disk. A sync that fails is final: no write succeeds after it. Whatever fails before that (-ENOSPC, a
 * disk that refuses to be written) loses nothing, and may be tried again. */
int ob_image_flush(ob_image *image);

enum { OB_RUN_HOLE = 0, OB_RUN_ZERO = 1, OB_RUN_DATA = 2 };   /* unmapped, zeroed, stored */

typedef struct {
	uint64_t offset;
	uint64_t length;
	int32_t kind;     /* OB_RUN_* */
	int32_t layer;    /* of data and zero runs: position in the stack, 0 = bottom; the writable layer is the last */
} ob_run;

/* Map a range to at most `max` runs, neighbours of one kind and layer joined. Returns
 * how many; together they start at offset and have no gaps. Never blocks. */
int ob_image_runs(ob_image *image, uint64_t offset, uint64_t length, ob_run *runs, uint32_t max);

/* ---- transports ------------------------------------------------------------------------------ */

typedef struct ob_nbd ob_nbd;

typedef struct {
	uint64_t id;              /* in OB_EVENT_NBD_CLOSED */
	int32_t structured;       /* client negotiated structured replies */
	int32_t allocation;       /* ... and base:allocation, with context id 1 */
} ob_nbd_config;

/* Serve the transmission phase on a connected socket after negotiation. fd is
 * duplicated; a thread of the engine owns the connection until it ends. */
int ob_nbd_start(ob_image *image, int fd, const ob_nbd_config *config, ob_nbd **out);
/* Take no more requests, answer those in hand (at most timeout_ns), hang up, free. */
void ob_nbd_close(ob_nbd *nbd, int64_t timeout_ns);

typedef struct ob_fuse ob_fuse;

typedef struct {
	uint64_t id;              /* in OB_EVENT_FUSE_CLOSED */
	uint32_t threads;
	uint32_t slots;           /* requests in hand at one time */
} ob_fuse_config;

typedef struct {
	uint64_t requests;        /* answered since start */
	uint64_t read_bytes;
} ob_fuse_stat;

/* Serve an image as the single file of a mounted /dev/fuse descriptor (duplicated).
 * Requests are read into slots of memfd (duplicated, sized here), so that another
 * process holding both can answer what this one had read. */
int ob_fuse_start(ob_image *image, int fuse_fd, int memfd, const ob_fuse_config *config, ob_fuse **out);
void ob_fuse_get_stat(ob_fuse *fuse, ob_fuse_stat *out);
/* Ends the session's threads and frees it; the mount itself is its mounter's. May wait for the disk, but for no
 * source: a write that does fails. */
void ob_fuse_close(ob_fuse *fuse);

/* ---- pieces the builders share with the read path ----------------------------------------------- */

/* CRC32C without initial and final inversion, as ZFile uses it. */
uint32_t ob_crc32c(uint32_t seed, const void *buffer, uint64_t length);
/* Compress `length` bytes as consecutive ZFile blocks into out (capacity out_size), each
 * followed by its CRC when block_crc; lengths[i] = stored length of block i, CRC included.
 * Returns bytes written. Any number of threads may call it at once. */
int64_t ob_zfile_compress(int codec, uint32_t block_size, int block_crc, const void *buffer, uint64_t length,
                          void *out, uint64_t out_size, uint32_t *lengths);
/* Upper bound of what ob_zfile_compress() writes for `length` bytes. */
uint64_t ob_zfile_bound(int codec, uint32_t block_size, uint64_t length);
/* The first grains in a row that are all zero: where they start, and *end where they end;
 * both `length` if there are none. `grain` >= 1 bytes; the last one may be shorter. */
uint64_t ob_zero_run(const void *buffer, uint64_t length, uint64_t grain, uint64_t *end);

#endif
