/* SPDX-License-Identifier: Apache-2.0
 * fuse_serve.c: what each FUSE request is answered with.
 *
 * The image changes only by what the kernel itself writes, hence attributes and pages are
 * the kernel's to keep for ever, and opens carry no state here.
 */
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "round.h"

enum {
	OLDEST_MINOR = 28,                  /* Linux 4.20, the first that reads 1 MiB at a time */
	RUNS_AT_ONCE = 64,
	FILE_MODE = S_IFREG | 0444,
	WRITABLE_MODE = S_IFREG | 0644,
	BLOCK_SIZE = 4096,
	NAME_MAX_LENGTH = 255
};

/* How long the kernel may believe our attributes: the image never changes. */
static const uint64_t FOREVER_SECONDS = 365 * 86400;

/* Errors of writing are the kernel's last word: ENOENT, the request was interrupted;
 * ENODEV or EPERM, the file is no longer mounted. */
static ssize_t slot_write(struct slot *slot, int error, const void *payload, size_t length)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;
	struct fuse_out_header out = { .len = sizeof(out) + length, .error = error, .unique = in->unique };
	struct iovec parts[2] = { { &out, sizeof(out) }, { (void *)payload, length } };

	return writev(slot->fuse->fd, parts, length ? 2 : 1);
}

/* Answer and give the slot back. error is 0 or -errno. */
static void slot_answer(struct slot *slot, int error, const void *payload, size_t length)
{
	/* An answer the kernel cannot take (no memory to copy it) must not leave the reader hanging. */
	if (slot_write(slot, error, payload, length) < 0 && length && errno != ENOENT)
		slot_write(slot, -EIO, NULL, 0);
	slot_give(slot);
}

/* The request's argument, or NULL if the request is shorter than that. */
static const void *slot_argument(const struct slot *slot, size_t length)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;

	return in->len < sizeof(*in) + length ? NULL : in + 1;
}

static void serve_init(struct slot *slot)
{
	const struct fuse_init_in *in = slot_argument(slot, offsetof(struct fuse_init_in, flags2));
	struct ob_fuse *fuse = slot->fuse;
	struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION };

	if (!in || in->major < FUSE_KERNEL_VERSION || (in->major == FUSE_KERNEL_VERSION && in->minor < OLDEST_MINOR)) {
		slot_answer(slot, -EPROTO, NULL, 0);
		return;
	}
	if (in->major == FUSE_KERNEL_VERSION) {   /* a newer one asks again after our answer */
		out.minor = min_u64(in->minor, FUSE_KERNEL_MINOR_VERSION);
		out.max_readahead = min_u64(in->max_readahead, fuse_read_max(fuse));
		out.flags = in->flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES
		                         | (fuse->image->upper ? FUSE_BIG_WRITES : 0));
		out.max_background = fuse->config.slots;
		out.congestion_threshold = fuse->config.slots;
		out.max_write = fuse->image->upper ? WRITE_MAX : BLOCK_SIZE;
		out.time_gran = 1;
		out.max_pages = fuse_read_max(fuse) / sysconf(_SC_PAGESIZE);
		fuse->session->minor = out.minor;
		fuse->session->read_max = fuse_read_max(fuse);
	}
	slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_getattr(struct slot *slot)
{
	uint64_t size = slot->fuse->image->size;
	struct fuse_attr_out out = {
		.attr_valid = FOREVER_SECONDS,
		.attr = {
			.ino = FUSE_ROOT_ID,
			.size = size,
			.blocks = div_up(size, 512),
			.mode = slot->fuse->image->upper ? WRITABLE_MODE : FILE_MODE,
			.nlink = 1,
			.uid = geteuid(),
			.gid = getegid(),
			.blksize = BLOCK_SIZE,
		},
	};

	slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_open(struct slot *slot)
{
	const struct fuse_open_in *in = slot_argument(slot, sizeof(*in));
	/* NOFLUSH: close() of a file whose server is stopped must not wait for it. */
	struct fuse_open_out out = { .open_flags = FOPEN_KEEP_CACHE | FOPEN_NOFLUSH };

	if (!in || ((in->flags & O_ACCMODE) != O_RDONLY && !slot->fuse->image->upper))
		slot_answer(slot, in ? -EROFS : -EINVAL, NULL, 0);
	else
		slot_answer(slot, 0, &out, sizeof(out));
}

static void serve_statfs(struct slot *slot)
{
	struct fuse_statfs_out out = {
		.st = {
			.blocks = div_up(slot->fuse->image->size, BLOCK_SIZE),
			.files = 1,
			.bsize = BLOCK_SIZE,
			.frsize = BLOCK_SIZE,
			.namelen = NAME_MAX_LENGTH,
		},
	};

	slot_answer(slot, 0, &out, sizeof(out));
}

/* The first byte at or after offset that is data, or that is not; or -errno. */
static int64_t file_seek(struct ob_image *image, uint64_t offset, int data)
{
	ob_run runs[RUNS_AT_ONCE];

	if (offset >= image->size)
		return -ENXIO;
	while (offset < image->size) {
		int count = ob_image_runs(image, offset, image->size - offset, runs, RUNS_AT_ONCE);

		if (count <= 0)
			return -EIO;
		for (int i = 0; i < count; i++) {
			if ((runs[i].kind == OB_RUN_DATA) == data)
				return (int64_t)runs[i].offset;
			offset = runs[i].offset + runs[i].length;
		}
	}
	return data ? -ENXIO : (int64_t)image->size;
}

static void serve_lseek(struct slot *slot)
{
	const struct fuse_lseek_in *in = slot_argument(slot, sizeof(*in));
	struct fuse_lseek_out out;
	int64_t place = -EINVAL;

	if (in && (in->whence == SEEK_DATA || in->whence == SEEK_HOLE))
		place = file_seek(slot->fuse->image, in->offset, in->whence == SEEK_DATA);
	out.offset = (uint64_t)place;
	slot_answer(slot, place < 0 ? (int)place : 0, &out, place < 0 ? 0 : sizeof(out));
}

static void read_complete(struct ob_request *request, int status)
{
	struct slot *slot = (struct slot *)request;

	if (status) {
		slot_answer(slot, -EIO, NULL, 0);
		return;
	}
	atomic_fetch_add_explicit(&slot->fuse->read_bytes, request->length, memory_order_relaxed);
	slot_answer(slot, 0, request->buffer, request->length);
}

static void serve_read(struct slot *slot)
{
	const struct fuse_read_in *in = slot_argument(slot, sizeof(*in));
	struct ob_image *image = slot->fuse->image;
	uint64_t length;

	if (!in || in->size > fuse_read_max(slot->fuse)) {
		slot_answer(slot, -EINVAL, NULL, 0);
		return;
	}
	length = in->offset < image->size ? min_u64(in->size, image->size - in->offset) : 0;
	if (!length) {
		slot_answer(slot, 0, NULL, 0);
		return;
	}
	slot->touched = 1;
	atomic_store_explicit(&slot->fuse->dirty, 1, memory_order_relaxed);
	slot->request.image = image;
	slot->request.offset = in->offset;
	slot->request.length = length;
	slot->request.buffer = slot->buffer;
	slot->request.complete = read_complete;
	request_submit(&slot->request);
}

/* ---- writing: on the thread that took the request, which waits for the disk ---- */

/* What the kernel gets to know of a failed write. */
static int write_error(int status)
{
	return status == 0 || status == -EROFS || status == -ENOSPC || status == -EINVAL ? status : -EIO;
}

static void serve_write(struct slot *slot)
{
	const struct fuse_in_header *head = (const void *)slot->record->request;
	const struct fuse_write_in *in = slot_argument(slot, sizeof(*in));
	struct fuse_write_out out = { 0 };
	int status;

	if (!slot->fuse->image->upper || !in || in->size != head->len - sizeof(*head) - sizeof(*in)) {
		slot_answer(slot, slot->fuse->image->upper ? -EINVAL : -EROFS, NULL, 0);
		return;
	}
	out.size = in->size;
	status = image_write(slot->fuse->image, in->offset, in + 1, in->size, &slot->fuse->ending);
	if (!status && in->flags & O_DSYNC)
		status = ob_image_flush(slot->fuse->image);
	slot_answer(slot, write_error(status), &out, status ? 0 : sizeof(out));
}

static void serve_fallocate(struct slot *slot)
{
	const struct fuse_fallocate_in *in = slot_argument(slot, sizeof(*in));
	struct ob_image *image = slot->fuse->image;
	int status = image->upper ? -EOPNOTSUPP : -EROFS;

	if (image->upper && in && (in->mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
	                           || (in->mode & ~FALLOC_FL_KEEP_SIZE) == FALLOC_FL_ZERO_RANGE)) {
		uint64_t room = in->offset < image->size ? image->size - in->offset : 0;

		/* A hole may reach past the end of the file, which does not grow; nothing else may. */
		status = 0;
		if (in->length > room && !(in->mode & FALLOC_FL_KEEP_SIZE))
			status = -EFBIG;
		else if (room)
			status = write_error(image_write(image, in->offset, NULL, min_u64(in->length, room), &slot->fuse->ending));
	}
	slot_answer(slot, status, NULL, 0);
}

/* The size is fixed; `> file` and chmod are refused. */
static void serve_setattr(struct slot *slot)
{
	const struct fuse_setattr_in *in = slot_argument(slot, sizeof(*in));

	if (!slot->fuse->image->upper)
		slot_answer(slot, -EROFS, NULL, 0);
	else if (in && (in->valid & ~(FATTR_FH | FATTR_LOCKOWNER)) == FATTR_SIZE && in->size == slot->fuse->image->size)
		serve_getattr(slot);
	else
		slot_answer(slot, -EPERM, NULL, 0);
}

/* ---- all of them ---- */

void slot_serve(struct slot *slot)
{
	const struct fuse_in_header *in = (const void *)slot->record->request;

	switch (in->opcode) {
	case FUSE_READ:
		serve_read(slot);
		break;
	case FUSE_INIT:
		serve_init(slot);
		break;
	case FUSE_GETATTR:
		serve_getattr(slot);
		break;
	case FUSE_OPEN:
		serve_open(slot);
		break;
	case FUSE_STATFS:
		serve_statfs(slot);
		break;
	case FUSE_LSEEK:
		serve_lseek(slot);
		break;
	case FUSE_RELEASE:
	case FUSE_DESTROY:
		slot_answer(slot, 0, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:             /* take no answer */
		slot_give(slot);
		break;
	case FUSE_WRITE:
		serve_write(slot);
		break;
	case FUSE_FSYNC:                    /* ENOSYS: there is nothing to write, so do not ask again */
		slot_answer(slot, !slot->fuse->image->upper ? -ENOSYS : write_error(ob_image_flush(slot->fuse->image)), NULL, 0);
		break;
	case FUSE_FALLOCATE:
		serve_fallocate(slot);
		break;
	case FUSE_SETATTR:
		serve_setattr(slot);
		break;
	case FUSE_IOCTL:
		slot_answer(slot, -ENOTTY, NULL, 0);
		break;
	default:
		/* For the kernel this means "never ask again", INTERRUPT, FLUSH, ACCESS and
		 * the extended attributes included. */
		slot_answer(slot, -ENOSYS, NULL, 0);
	}
}
