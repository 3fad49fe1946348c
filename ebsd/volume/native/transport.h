/* A FUSE connection served by threads of its own. Declarations read by cffi: no directives here.
 *
 * What an engine can do without Python (hot.h) is done in the thread that read the request; the rest waits in a queue
 * for Python, which takes requests and answers each exactly once. An answer gives the request's memory back.
 * Functions that can fail return 0 or -errno.
 */

typedef struct ebsd_fuse ebsd_fuse;

enum ebsd_fuse_kind {
    EBSD_FUSE_READ = 0,
    EBSD_FUSE_WRITE = 1,
    EBSD_FUSE_FLUSH = 2,
    EBSD_FUSE_ZERO = 3,      /* the range reads as zeros from then on */
    EBSD_FUSE_SEEK_DATA = 4, /* answered with an offset */
    EBSD_FUSE_SEEK_HOLE = 5
};

typedef struct {
    int kind;
    int durable; /* of a write: to be flushed before it is answered */
    uint64_t offset;
    uint64_t length;
    unsigned char *data; /* of a write, `length` bytes, until it is answered */
} ebsd_fuse_request;

/* A session over a duplicate of `fd`, a connection that somebody else mounted. `hot`: address of an ebsd_hot, or NULL.
 * NULL: *error says why. */
ebsd_fuse *ebsd_fuse_new(int fd, uint64_t size, int read_only, uint32_t uid, uint32_t gid, void *hot, int *error);

/* A new connection begins with these two. The first reads what the kernel offers, the 64 bytes of its struct
 * fuse_init_in: whoever is to resume the connection later needs them. The second answers. */
int ebsd_fuse_await_init(ebsd_fuse *fuse, int milliseconds, unsigned char *values);
int ebsd_fuse_answer_init(ebsd_fuse *fuse);

/* A connection that another process left: go on with what the kernel offered then, and have the kernel send again what
 * that process read and did not answer (Linux 6.9; -EINVAL before). */
int ebsd_fuse_resume(ebsd_fuse *fuse, const unsigned char *values);

/* Serve, with so many threads, until the connection ends. */
int ebsd_fuse_start(ebsd_fuse *fuse, int threads);

/* The next request for Python; NULL when there is none, and then the doorbell rings for the next one, once. */
ebsd_fuse_request *ebsd_fuse_take(ebsd_fuse *fuse);
/* Wait so long for a request without the doorbell; whether there is one. */
int ebsd_fuse_wait(ebsd_fuse *fuse, int milliseconds);
/* An eventfd: readable when a request came after `take` found none, and at the end of the connection. */
int ebsd_fuse_doorbell(ebsd_fuse *fuse);
/* Whether the last thread has ended, as the connection did. */
int ebsd_fuse_ended(ebsd_fuse *fuse);

void ebsd_fuse_answer_data(ebsd_fuse *fuse, ebsd_fuse_request *request, const unsigned char *data, size_t length);
void ebsd_fuse_answer_written(ebsd_fuse *fuse, ebsd_fuse_request *request);
void ebsd_fuse_answer_offset(ebsd_fuse *fuse, ebsd_fuse_request *request, uint64_t offset);
/* `number`: an errno; 0: done. */
void ebsd_fuse_answer(ebsd_fuse *fuse, ebsd_fuse_request *request, int number);

/* The size as of now. The kernel learns of it when it has forgotten the attributes, which may wait for the kernel. */
void ebsd_fuse_set_size(ebsd_fuse *fuse, uint64_t size);
int ebsd_fuse_forget_attributes(ebsd_fuse *fuse);

/* End the threads, whatever the connection does; -EBUSY when one does not end within two seconds. */
int ebsd_fuse_stop(ebsd_fuse *fuse);
/* Answer what is left in the queue with EIO and give everything back. After `stop` only. */
void ebsd_fuse_free(ebsd_fuse *fuse);
