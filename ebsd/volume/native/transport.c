/* The native transport: threads that read FUSE requests and answer most of them without Python.
 *
 * 1. All threads read the one descriptor, blocking: the kernel wakes exactly one of them. No clone_fd, no io_uring:
 *    what a dead process had read must be found in one place by FUSE_NOTIFY_RESEND.
 * 2. What the kernel copies a request into, or an answer from, is touched and locked before: a SIGKILL while read(2)
 *    waits for a page would lose the request for ever.
 * 3. No thread waits for Python, but for room in the queue: what is not answered at once is copied and queued.
 * 4. The write-back cache stays off: with it sync(2) does not wait for FUSE data. Files are open for direct I/O, so
 *    that there is no second cache of plaintext.
 * 5. FSYNC is never answered with ENOSYS: the kernel would not ask again (fs/fuse/file.c, no_fsync).
 * 6. Handles have no state but their number, so they mean the same to the process that takes over.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 314

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "hot.h"
#include "transport.h"

enum {
    PAGE = 4096,
    MOST = 1 << 20,                     /* bytes of one READ or WRITE */
    INIT_VALUES = 64,                   /* struct fuse_init_in of protocol 7.36 */
    INIT_VALUES_BEFORE_7_36 = 16,
    MAX_THREADS = 64,
    STACK = 1 << 20,
    MAX_BACKGROUND = 64,
    CONGESTED = 48,
    STOP_MILLISECONDS = 2000,
    ORDINARY = 1,                       /* file handles */
    SYNCHRONOUS = 2,                    /* opened with O_SYNC or O_DSYNC: each write is durable before its answer */
    NOTIFY_RESEND = 7,                  /* FUSE_NOTIFY_RESEND, Linux 6.9 */
};

/* Where a request is read to: the data of a WRITE, which follows two headers, then begins with a page. */
#define WRITE_HEADERS (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define REQUEST_AT (PAGE - WRITE_HEADERS)
#define REQUEST_ROOM (WRITE_HEADERS + MOST + PAGE)
#define REQUEST_MEMORY (PAGE + MOST + 2 * PAGE)
#define HUGE_PAGE ((size_t)2 << 20) /* what all of it lies in */

#define CHUNK 65536
#define ATTRIBUTE_SECONDS 300.0 /* nothing but a growth, which invalidates them, changes attributes */
#define QUEUE_BYTES (64L << 20) /* what waits for Python may hold so much; then the threads wait */
#define STOP_SIGNAL (SIGRTMIN + 5)

_Static_assert(sizeof(struct fuse_init_in) == INIT_VALUES, "the live map keeps a whole fuse_init_in");
_Static_assert(REQUEST_MEMORY <= HUGE_PAGE, "a request lies in one huge page");
/* So what is read may lie where the data of a write would: it covers no byte of the request. */
_Static_assert(sizeof(struct fuse_in_header) + sizeof(struct fuse_read_in) <= WRITE_HEADERS, "READ has no data");

typedef struct punted {
    ebsd_fuse_request shown; /* first, so that the one is the other */
    struct punted *next;
    fuse_req_t req;
    size_t cost;
} punted;

/* What one thread works with. */
typedef struct {
    ebsd_fuse *fuse;
    unsigned char *request; /* REQUEST_MEMORY */
    unsigned char *data;    /* in it: of a write that was read, or of a read that is answered; MOST */
    void *hot;
    pthread_t thread;
    bool started;
    atomic_int done;
} lane;

struct ebsd_fuse {
    struct fuse_session *session;
    int fd;
    int doorbell;
    const ebsd_hot *hot;
    bool read_only;
    uint32_t uid, gid;
    _Atomic uint64_t size;
    bool mute; /* answers are not for the kernel: the INIT of a resumed connection */
    int muted_error;

    unsigned char *init; /* the request that await_init read */
    size_t init_length;

    lane *lanes;
    int lane_count;
    atomic_int running;
    atomic_int stopping;

    pthread_mutex_t lock;
    pthread_cond_t filled, room; /* of the queue */
    punted *first, *last;
    size_t queued_bytes;
    int waiting_for_room, waiting_for_request;
    bool armed; /* the doorbell is to ring */
    atomic_int ended;
};

static __thread lane *own; /* of the thread that runs a handler; NULL outside the threads */

/* --- memory ------------------------------------------------------------------------------------------------------- */

/* Memory for one request with all its pages, locked where the host allows that; NULL: there is none. A huge page where
 * there is one: the kernel looks up and pins what it copies page by page, a tenth of what a sequential read costs. */
static unsigned char *request_memory(void) {
    /* Not to be used before it is known where it begins: a page that is there already keeps a huge one out. */
    unsigned char *all = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    size_t before = (HUGE_PAGE - (uintptr_t)all % HUGE_PAGE) % HUGE_PAGE;
    unsigned char *memory = all + before;
    if (before > 0)
        (void)munmap(all, before);
    (void)munmap(memory + HUGE_PAGE, HUGE_PAGE - before);
    (void)madvise(memory, HUGE_PAGE, MADV_DONTDUMP);
    (void)madvise(memory, HUGE_PAGE, MADV_HUGEPAGE);
    memset(memory, 0xff, REQUEST_MEMORY); /* and not 0, which could be left to the kernel's one page of zeros */
    (void)mlock(memory, HUGE_PAGE); /* refused to who is not root: then the pages are there, and may be swapped */
    return memory;
}

static void release_memory(unsigned char *memory) {
    if (memory == NULL)
        return;
    explicit_bzero(memory, REQUEST_MEMORY);
    (void)munmap(memory, HUGE_PAGE);
}

/* --- the queue for Python ----------------------------------------------------------------------------------------- */

static void ring(ebsd_fuse *fuse) {
    (void)eventfd_write(fuse->doorbell, 1);
}

/* Whether the request may be queued; waits while the queue is full. The lock is held. */
static bool has_room(ebsd_fuse *fuse, size_t cost) {
    while (!atomic_load(&fuse->stopping)) {
        if (fuse->first == NULL || fuse->queued_bytes + cost <= QUEUE_BYTES)
            return true;
        fuse->waiting_for_room++;
        (void)pthread_cond_wait(&fuse->room, &fuse->lock);
        fuse->waiting_for_room--;
    }
    return false;
}

static void enqueue(ebsd_fuse *fuse, punted *request) {
    bool rings = false;
    (void)pthread_mutex_lock(&fuse->lock);
    bool room = has_room(fuse, request->cost);
    if (room) {
        if (fuse->last == NULL)
            fuse->first = request;
        else
            fuse->last->next = request;
        fuse->last = request;
        fuse->queued_bytes += request->cost;
        if (fuse->waiting_for_request) {
            (void)pthread_cond_signal(&fuse->filled);
        } else {
            rings = fuse->armed;
            fuse->armed = false;
        }
    }
    (void)pthread_mutex_unlock(&fuse->lock);
    if (rings)
        ring(fuse);
    if (!room) {
        (void)fuse_reply_err(request->req, EIO);
        free(request);
    }
}

/* Hand a request to Python; the data of a write is copied. */
static void punt(fuse_req_t req, ebsd_fuse_request shown) {
    ebsd_fuse *fuse = fuse_req_userdata(req);
    size_t held = shown.kind == EBSD_FUSE_WRITE ? shown.length : 0;
    punted *request = malloc(sizeof *request + held);
    if (request == NULL) {
        (void)fuse_reply_err(req, ENOMEM);
        return;
    }
    *request = (punted){.shown = shown, .next = NULL, .req = req, .cost = sizeof *request + held};
    if (held) {
        request->shown.data = (unsigned char *)(request + 1);
        memcpy(request->shown.data, shown.data, held);
    }
    enqueue(fuse, request);
}

ebsd_fuse_request *ebsd_fuse_take(ebsd_fuse *fuse) {
    (void)pthread_mutex_lock(&fuse->lock);
    punted *request = fuse->first;
    if (request == NULL) {
        fuse->armed = true;
    } else {
        fuse->first = request->next;
        if (fuse->first == NULL)
            fuse->last = NULL;
        fuse->queued_bytes -= request->cost;
        if (fuse->waiting_for_room)
            (void)pthread_cond_broadcast(&fuse->room);
    }
    (void)pthread_mutex_unlock(&fuse->lock);
    return request == NULL ? NULL : &request->shown;
}

static struct timespec in_milliseconds(int milliseconds) {
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += (long)(milliseconds % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return until;
}

int ebsd_fuse_wait(ebsd_fuse *fuse, int milliseconds) {
    struct timespec until = in_milliseconds(milliseconds);
    (void)pthread_mutex_lock(&fuse->lock);
    fuse->waiting_for_request++;
    while (fuse->first == NULL && !atomic_load(&fuse->ended))
        if (pthread_cond_timedwait(&fuse->filled, &fuse->lock, &until) != 0)
            break;
    fuse->waiting_for_request--;
    int found = fuse->first != NULL;
    (void)pthread_mutex_unlock(&fuse->lock);
    return found;
}

int ebsd_fuse_doorbell(ebsd_fuse *fuse) {
    return fuse->doorbell;
}

int ebsd_fuse_ended(ebsd_fuse *fuse) {
    return atomic_load(&fuse->ended);
}

static void forget(ebsd_fuse_request *request) {
    free((punted *)(void *)request);
}

static fuse_req_t req_of(ebsd_fuse_request *request) {
    return ((punted *)(void *)request)->req;
}

void ebsd_fuse_answer_data(ebsd_fuse *fuse, ebsd_fuse_request *request, const unsigned char *data, size_t length) {
    (void)fuse;
    (void)fuse_reply_buf(req_of(request), (const char *)data, length);
    forget(request);
}

void ebsd_fuse_answer_written(ebsd_fuse *fuse, ebsd_fuse_request *request) {
    (void)fuse;
    (void)fuse_reply_write(req_of(request), request->length);
    forget(request);
}

void ebsd_fuse_answer_offset(ebsd_fuse *fuse, ebsd_fuse_request *request, uint64_t offset) {
    (void)fuse;
    (void)fuse_reply_lseek(req_of(request), (off_t)offset);
    forget(request);
}

void ebsd_fuse_answer(ebsd_fuse *fuse, ebsd_fuse_request *request, int number) {
    (void)fuse;
    (void)fuse_reply_err(req_of(request), number);
    forget(request);
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static void on_init(void *userdata, struct fuse_conn_info *conn) {
    (void)userdata;
    conn->max_write = MOST;
    conn->max_background = MAX_BACKGROUND;
    conn->congestion_threshold = CONGESTED;
    conn->want |= conn->capable & FUSE_CAP_ASYNC_DIO; /* or a loop device has one request under way at a time */
    /* With O_TRUNC in OPEN the kernel takes the file for empty before it asks us; without it SETATTR refuses. */
    conn->want &= ~(unsigned)(FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_WRITEBACK_CACHE | FUSE_CAP_SPLICE_READ |
                              FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
}

static struct stat attributes(ebsd_fuse *fuse) {
    struct stat found;
    memset(&found, 0, sizeof found);
    uint64_t size = atomic_load(&fuse->size);
    found.st_ino = FUSE_ROOT_ID;
    found.st_mode = S_IFREG | (fuse->read_only ? 0400 : 0600);
    found.st_nlink = 1;
    found.st_uid = fuse->uid;
    found.st_gid = fuse->gid;
    found.st_size = (off_t)size;
    found.st_blksize = CHUNK;
    found.st_blocks = (blkcnt_t)(size / 512);
    return found;
}

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    struct stat found = attributes(fuse_req_userdata(req));
    (void)fuse_reply_attr(req, &found, ATTRIBUTE_SECONDS);
}

static void on_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *wanted, int to_set, struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    struct stat found = attributes(fuse_req_userdata(req));
    /* A block device has no size, owner or mode to set; times are nobody's business but touch(1) may try. */
    bool refused = (to_set & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) != 0 ||
                   ((to_set & FUSE_SET_ATTR_SIZE) != 0 && wanted->st_size != found.st_size);
    if (refused)
        (void)fuse_reply_err(req, EPERM);
    else
        (void)fuse_reply_attr(req, &found, ATTRIBUTE_SECONDS);
}

static void on_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
    (void)ino;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    if (fuse->read_only && (file->flags & O_ACCMODE) != O_RDONLY) {
        (void)fuse_reply_err(req, EROFS);
        return;
    }
    struct fuse_open_out out;
    memset(&out, 0, sizeof out);
    /* For direct I/O the kernel leaves O_SYNC and O_DSYNC to us: no FSYNC follows such a write. */
    out.fh = (file->flags & O_DSYNC) != 0 ? SYNCHRONOUS : ORDINARY;
    /* Not by fuse_reply_open, which knows no parallel writes before libfuse 3.15. */
    out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH;
    (void)fuse_reply_buf(req, (const char *)&out, sizeof out);
}

static void on_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    (void)fuse_reply_err(req, 0); /* at close(2), too: POSIX promises no durability there */
}

static void on_statfs(fuse_req_t req, fuse_ino_t ino) {
    (void)ino;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    struct statvfs found;
    memset(&found, 0, sizeof found);
    found.f_bsize = CHUNK; /* sets the discard granularity of a loop device on this file */
    found.f_frsize = CHUNK;
    found.f_blocks = atomic_load(&fuse->size) / CHUNK;
    found.f_files = 1;
    found.f_namemax = 255;
    (void)fuse_reply_statfs(req, &found);
}

/* Answer an error of the hot path; one that is no errno is EIO. */
static void refuse(fuse_req_t req, int result) {
    (void)fuse_reply_err(req, result < 0 && result > -4096 ? -result : EIO);
}

static bool is_hot(const ebsd_fuse *fuse, uint64_t offset, size_t length) {
    uint64_t size = atomic_load(&fuse->size);
    return fuse->hot != NULL && own != NULL && own->hot != NULL && length > 0 && length <= MOST && offset < size &&
           length <= size - offset;
}

static void on_read(fuse_req_t req, fuse_ino_t ino, size_t length, off_t offset, struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    uint64_t size = atomic_load(&fuse->size), at = (uint64_t)offset;
    if (at < size && length > size - at)
        length = (size_t)(size - at); /* cut as for a file */
    int result = EBSD_HOT_PUNT;
    if (is_hot(fuse, at, length))
        result = fuse->hot->read(fuse->hot->engine, own->hot, at, length, own->data);
    if (result == 0)
        (void)fuse_reply_buf(req, (const char *)own->data, length);
    else if (result == EBSD_HOT_PUNT)
        punt(req, (ebsd_fuse_request){.kind = EBSD_FUSE_READ, .offset = at, .length = length});
    else
        refuse(req, result);
}

static void on_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t length, off_t offset,
                     struct fuse_file_info *file) {
    (void)ino;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    uint64_t at = (uint64_t)offset;
    /* Of the handle, or of this write alone: pwritev2(2) with RWF_DSYNC. */
    int durable = file->fh == SYNCHRONOUS || (file->flags & O_DSYNC) != 0;
    int result = EBSD_HOT_PUNT;
    if (!durable && !fuse->read_only && is_hot(fuse, at, length))
        result = fuse->hot->write(fuse->hot->engine, own->hot, at, length, (const unsigned char *)data);
    if (result == 0)
        (void)fuse_reply_write(req, length);
    else if (result == EBSD_HOT_PUNT)
        punt(req, (ebsd_fuse_request){.kind = EBSD_FUSE_WRITE,
                                      .durable = durable,
                                      .offset = at,
                                      .length = length,
                                      .data = (unsigned char *)(uintptr_t)data});
    else
        refuse(req, result);
}

static void on_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *file) {
    (void)ino;
    (void)datasync;
    (void)file;
    punt(req, (ebsd_fuse_request){.kind = EBSD_FUSE_FLUSH});
}

/* 0 and the range to zero, cut at the end of the file, or an errno. */
static int zeroed_range(uint64_t size, int mode, uint64_t offset, uint64_t *length) {
    switch (mode) {
    case FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: /* what a loop device makes of a discard */
        if (offset >= size)
            *length = 0;
        else if (*length > size - offset)
            *length = size - offset;
        return 0;
    case FALLOC_FL_ZERO_RANGE:
    case FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE: /* and of write-zeroes */
        return offset <= size && *length <= size - offset ? 0 : EFBIG;
    default:
        /* A plain allocation promises that later writes find space, which nothing here can keep. posix_fallocate(3)
         * then writes, which does it. */
        return EOPNOTSUPP;
    }
}

static void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                         struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    if (offset < 0 || length <= 0) {
        (void)fuse_reply_err(req, EINVAL);
        return;
    }
    uint64_t range = (uint64_t)length;
    int refusal = zeroed_range(atomic_load(&fuse->size), mode, (uint64_t)offset, &range);
    if (refusal != 0 || range == 0)
        (void)fuse_reply_err(req, refusal);
    else
        punt(req, (ebsd_fuse_request){.kind = EBSD_FUSE_ZERO, .offset = (uint64_t)offset, .length = range});
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *file) {
    (void)ino;
    (void)file;
    ebsd_fuse *fuse = fuse_req_userdata(req);
    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        (void)fuse_reply_err(req, EINVAL);
    else if (offset < 0 || (uint64_t)offset >= atomic_load(&fuse->size))
        (void)fuse_reply_err(req, ENXIO);
    else
        punt(req, (ebsd_fuse_request){.kind = whence == SEEK_DATA ? EBSD_FUSE_SEEK_DATA : EBSD_FUSE_SEEK_HOLE,
                                      .offset = (uint64_t)offset});
}

static const struct fuse_lowlevel_ops operations = {
    .init = on_init,
    .getattr = on_getattr,
    .setattr = on_setattr,
    .open = on_open,
    .read = on_read,
    .write = on_write,
    .flush = on_release,
    .release = on_release,
    .fsync = on_fsync,
    .statfs = on_statfs,
    .fallocate = on_fallocate,
    .lseek = on_lseek,
};

/* --- the descriptor ----------------------------------------------------------------------------------------------- */

static ssize_t io_read(int fd, void *buffer, size_t length, void *userdata) {
    (void)userdata;
    return read(fd, buffer, length);
}

static ssize_t io_write(int fd, struct iovec *iov, int count, void *userdata) {
    ebsd_fuse *fuse = userdata;
    if (fuse->mute) { /* the kernel had this answer from the process before us */
        const struct fuse_out_header *header = iov[0].iov_base;
        fuse->muted_error = header->error;
        size_t length = 0;
        for (int at = 0; at < count; at++)
            length += iov[at].iov_len;
        return (ssize_t)length;
    }
    ssize_t written = writev(fd, iov, count);
    if (written < 0 && (errno == ENODEV || errno == ECONNABORTED))
        errno = ENOENT; /* nobody waits any more; libfuse logs everything but this */
    return written;
}

static const struct fuse_custom_io descriptor_io = {.read = io_read, .writev = io_write};

static void process(ebsd_fuse *fuse, void *request, size_t length) {
    struct fuse_buf buffer;
    memset(&buffer, 0, sizeof buffer);
    buffer.mem = request;
    buffer.size = length;
    fuse_session_process_buf(fuse->session, &buffer);
}

int ebsd_fuse_await_init(ebsd_fuse *fuse, int milliseconds, unsigned char *values) {
    struct pollfd ready = {.fd = fuse->fd, .events = POLLIN};
    int found = poll(&ready, 1, milliseconds);
    if (found <= 0)
        return found == 0 ? -ETIMEDOUT : -errno;
    unsigned char *memory = request_memory();
    if (memory == NULL)
        return -ENOMEM;
    ssize_t length = read(fuse->fd, memory + REQUEST_AT, REQUEST_ROOM);
    int failure = length < 0 ? -errno : 0;
    const struct fuse_in_header *header = (const void *)(memory + REQUEST_AT);
    size_t least = sizeof *header + INIT_VALUES_BEFORE_7_36;
    if (failure == 0 && ((size_t)length < least || header->opcode != FUSE_INIT))
        failure = -EPROTO;
    if (failure != 0) {
        release_memory(memory);
        return failure;
    }
    size_t offered = (size_t)length - sizeof *header;
    memset(values, 0, INIT_VALUES);
    memcpy(values, header + 1, offered < INIT_VALUES ? offered : INIT_VALUES);
    fuse->init = memory;
    fuse->init_length = (size_t)length;
    return 0;
}

int ebsd_fuse_answer_init(ebsd_fuse *fuse) {
    if (fuse->init == NULL)
        return -EINVAL;
    process(fuse, fuse->init + REQUEST_AT, fuse->init_length);
    release_memory(fuse->init);
    fuse->init = NULL;
    return 0;
}

int ebsd_fuse_resume(ebsd_fuse *fuse, const unsigned char *values) {
    struct {
        struct fuse_in_header header;
        unsigned char values[INIT_VALUES];
    } init;
    memset(&init, 0, sizeof init);
    init.header.len = sizeof init;
    init.header.opcode = FUSE_INIT;
    init.header.unique = 2; /* of a request, not of an interrupt; nothing is looked up by it */
    memcpy(init.values, values, INIT_VALUES);
    fuse->mute = true;
    fuse->muted_error = -EPROTO;
    process(fuse, &init, sizeof init);
    fuse->mute = false;
    if (fuse->muted_error != 0)
        return fuse->muted_error;
    struct fuse_out_header resend = {.len = sizeof resend, .error = NOTIFY_RESEND, .unique = 0};
    return write(fuse->fd, &resend, sizeof resend) < 0 ? -errno : 0;
}

/* --- the threads -------------------------------------------------------------------------------------------------- */

/* Whether to read on after read(2) failed. */
static bool goes_on(int fd, int failure) {
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    switch (failure) {
    case EINTR:
    case ENOENT: /* the request was taken back meanwhile */
        return true;
    case EAGAIN: /* somebody made the descriptor non-blocking */
        (void)poll(&ready, 1, -1);
        return true;
    case ENODEV: /* unmounted */
    case ECONNABORTED:
        return false;
    default:
        (void)fprintf(stderr, "ebsd-volume: the FUSE connection cannot be read: %s\n", strerror(failure));
        return false;
    }
}

static void *serve(void *argument) {
    lane *mine = argument;
    ebsd_fuse *fuse = mine->fuse;
    own = mine;
    sigset_t unblocked;
    (void)sigemptyset(&unblocked);
    (void)sigaddset(&unblocked, STOP_SIGNAL);
    (void)pthread_sigmask(SIG_UNBLOCK, &unblocked, NULL);
    while (!atomic_load(&fuse->stopping)) {
        ssize_t length = read(fuse->fd, mine->request + REQUEST_AT, REQUEST_ROOM);
        if (length < 0 && goes_on(fuse->fd, errno))
            continue;
        if (length < (ssize_t)sizeof(struct fuse_in_header))
            break;
        process(fuse, mine->request + REQUEST_AT, (size_t)length);
    }
    if (atomic_fetch_sub(&fuse->running, 1) == 1) {
        (void)pthread_mutex_lock(&fuse->lock);
        atomic_store(&fuse->ended, 1);
        (void)pthread_cond_broadcast(&fuse->filled);
        (void)pthread_mutex_unlock(&fuse->lock);
        ring(fuse);
    }
    atomic_store(&mine->done, 1);
    return NULL;
}

static void on_stop_signal(int number) {
    (void)number; /* it only interrupts read(2) */
}

static int prepare_lane(ebsd_fuse *fuse, lane *made) {
    made->fuse = fuse;
    made->request = request_memory();
    if (made->request == NULL)
        return -ENOMEM;
    made->data = made->request + PAGE;
    if (fuse->hot != NULL) {
        made->hot = fuse->hot->lane_new(fuse->hot->engine);
        if (made->hot == NULL)
            return -ENOMEM;
    }
    return 0;
}

static int start_lane(lane *made) {
    pthread_attr_t attributes_of_thread;
    int failure = pthread_attr_init(&attributes_of_thread);
    if (failure != 0)
        return -failure;
    (void)pthread_attr_setstacksize(&attributes_of_thread, STACK);
    failure = pthread_create(&made->thread, &attributes_of_thread, serve, made);
    (void)pthread_attr_destroy(&attributes_of_thread);
    made->started = failure == 0;
    return -failure;
}

int ebsd_fuse_start(ebsd_fuse *fuse, int threads) {
    if (fuse->lanes != NULL || threads < 1 || threads > MAX_THREADS)
        return -EINVAL;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_stop_signal; /* without SA_RESTART */
    if (sigaction(STOP_SIGNAL, &action, NULL) != 0)
        return -errno;
    fuse->lanes = calloc((size_t)threads, sizeof *fuse->lanes);
    if (fuse->lanes == NULL)
        return -ENOMEM;
    fuse->lane_count = threads;
    int failure = 0;
    for (int at = 0; at < threads && failure == 0; at++)
        failure = prepare_lane(fuse, &fuse->lanes[at]);
    if (failure != 0)
        return failure;
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's; the threads inherit this */
    atomic_store(&fuse->running, threads);
    for (int at = 0; at < threads && failure == 0; at++) {
        failure = start_lane(&fuse->lanes[at]);
        if (failure != 0) { /* those that run are counted, the others were never there */
            int missing = threads - at;
            if (atomic_fetch_sub(&fuse->running, missing) == missing)
                atomic_store(&fuse->ended, 1);
        }
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

int ebsd_fuse_stop(ebsd_fuse *fuse) {
    (void)pthread_mutex_lock(&fuse->lock);
    atomic_store(&fuse->stopping, 1);
    (void)pthread_cond_broadcast(&fuse->room);
    (void)pthread_mutex_unlock(&fuse->lock);
    const struct timespec pause = {.tv_nsec = 1000000};
    int patience = STOP_MILLISECONDS;
    for (int at = 0; at < fuse->lane_count; at++) {
        lane *each = &fuse->lanes[at];
        if (!each->started)
            continue;
        /* Again and again: one signal may come between the look at `stopping` and the read. */
        while (!atomic_load(&each->done) && patience-- > 0) {
            (void)pthread_kill(each->thread, STOP_SIGNAL);
            (void)nanosleep(&pause, NULL);
        }
        if (!atomic_load(&each->done))
            return -EBUSY;
        (void)pthread_join(each->thread, NULL);
        each->started = false;
    }
    return 0;
}

/* --- life --------------------------------------------------------------------------------------------------------- */

static int open_session(ebsd_fuse *fuse, int fd) {
    char *argv[] = {"ebsd", NULL};
    struct fuse_args arguments = FUSE_ARGS_INIT(1, argv);
    fuse->session = fuse_session_new(&arguments, &operations, sizeof operations, fuse);
    fuse_opt_free_args(&arguments);
    if (fuse->session == NULL)
        return -ENOMEM;
    int own_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own_fd < 0)
        return -errno;
    int failure = fuse_session_custom_io(fuse->session, &descriptor_io, own_fd);
    if (failure != 0) {
        (void)close(own_fd);
        return failure < 0 ? failure : -EIO;
    }
    fuse->fd = own_fd; /* closed with the session */
    return 0;
}

ebsd_fuse *ebsd_fuse_new(int fd, uint64_t size, int read_only, uint32_t uid, uint32_t gid, void *hot, int *error) {
    ebsd_fuse *fuse = calloc(1, sizeof *fuse);
    if (fuse == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    fuse->hot = hot;
    fuse->read_only = read_only != 0;
    fuse->uid = uid;
    fuse->gid = gid;
    atomic_store(&fuse->size, size);
    pthread_condattr_t monotonic;
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&fuse->lock, NULL);
    (void)pthread_cond_init(&fuse->filled, &monotonic);
    (void)pthread_cond_init(&fuse->room, NULL);
    (void)pthread_condattr_destroy(&monotonic);
    fuse->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    *error = fuse->doorbell < 0 ? -errno : open_session(fuse, fd);
    if (*error != 0) {
        ebsd_fuse_free(fuse);
        return NULL;
    }
    return fuse;
}

void ebsd_fuse_free(ebsd_fuse *fuse) {
    ebsd_fuse_request *left;
    while ((left = ebsd_fuse_take(fuse)) != NULL)
        ebsd_fuse_answer(fuse, left, EIO);
    for (int at = 0; at < fuse->lane_count; at++) {
        lane *each = &fuse->lanes[at];
        if (fuse->hot != NULL)
            fuse->hot->lane_free(fuse->hot->engine, each->hot);
        release_memory(each->request);
    }
    free(fuse->lanes);
    release_memory(fuse->init);
    if (fuse->session != NULL)
        fuse_session_destroy(fuse->session);
    if (fuse->doorbell >= 0)
        (void)close(fuse->doorbell);
    (void)pthread_cond_destroy(&fuse->filled);
    (void)pthread_cond_destroy(&fuse->room);
    (void)pthread_mutex_destroy(&fuse->lock);
    free(fuse);
}

void ebsd_fuse_set_size(ebsd_fuse *fuse, uint64_t size) {
    atomic_store(&fuse->size, size);
}

int ebsd_fuse_forget_attributes(ebsd_fuse *fuse) {
    int result = fuse_lowlevel_notify_inval_inode(fuse->session, FUSE_ROOT_ID, -1, 0);
    return result == -ENOENT ? 0 : result; /* the kernel has no such inode: nothing is remembered of it */
}
