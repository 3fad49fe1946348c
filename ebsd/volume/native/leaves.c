#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "leaves.h"

#define HEADER_BYTES 128
#define RUN_BYTES 8
#define PAGE_RUNS 512 /* runs that a look-up reads */

struct ebsd_leaves {
    unsigned char *whole; /* of a small file; else NULL */
    size_t length;
    int fd; /* ours; -1 with `whole` */
    uint32_t runs;
    uint32_t chunks;
    uint32_t pages;
    uint32_t index[];
};

static ebsd_leaves nothing = {.fd = -1};

ebsd_leaves *ebsd_leaves_none(void)
{
    return &nothing;
}

ebsd_leaves *ebsd_leaves_new(const unsigned char *whole, size_t length, int fd, uint32_t runs, uint32_t chunks,
                             const uint32_t *index, uint32_t pages)
{
    ebsd_leaves *leaves = malloc(sizeof(*leaves) + (size_t)pages * sizeof(uint32_t));

    if (leaves == NULL)
        return NULL;
    leaves->whole = NULL;
    leaves->length = length;
    leaves->fd = -1;
    leaves->runs = runs;
    leaves->chunks = chunks;
    leaves->pages = pages;
    memcpy(leaves->index, index, (size_t)pages * sizeof(uint32_t));
    if (whole != NULL) {
        leaves->whole = malloc(length);
        if (leaves->whole != NULL)
            memcpy(leaves->whole, whole, length);
    } else {
        leaves->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    }
    if (leaves->whole == NULL && leaves->fd < 0) {
        free(leaves);
        return NULL;
    }
    return leaves;
}

void ebsd_leaves_free(ebsd_leaves *leaves)
{
    if (leaves == NULL || leaves == &nothing)
        return;
    if (leaves->fd >= 0)
        close(leaves->fd);
    free(leaves->whole);
    free(leaves);
}

static int take(const ebsd_leaves *leaves, void *to, size_t length, uint64_t offset, ebsd_pread read)
{
    size_t done = 0;

    if (leaves->whole != NULL) {
        if (offset > leaves->length || length > leaves->length - offset)
            return -EIO;
        memcpy(to, leaves->whole + offset, length);
        return 0;
    }
    while (done < length) {
        ssize_t count = read(leaves->fd, (char *)to + done, length - done, (off_t)(offset + done));

        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return -EIO;
        done += (size_t)count;
    }
    return 0;
}

/* Return how many of ascending numbers, `step` words apart, are at most `wanted`. */
static uint32_t at_most(const uint32_t *numbers, uint32_t count, uint32_t step, uint32_t wanted)
{
    uint32_t low = 0, high = count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (numbers[(size_t)middle * step] <= wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int ebsd_leaves_find(const ebsd_leaves *leaves, uint32_t chunk, unsigned char digest[EBSD_DIGEST], ebsd_pread read)
{
    uint32_t pairs[2 * (PAGE_RUNS + 1)]; /* (first chunk, number of its leaf), and the run behind the page */
    uint32_t page = at_most(leaves->index, leaves->pages, 1, chunk);
    uint32_t first, count, more, at;
    uint64_t number, end;

    if (page == 0)
        return 0;
    first = (page - 1) * PAGE_RUNS;
    if (first >= leaves->runs)
        return -EIO;
    count = leaves->runs - first < PAGE_RUNS ? leaves->runs - first : PAGE_RUNS;
    more = first + count < leaves->runs; /* says how long the last run of the page is */
    if (take(leaves, pairs, (size_t)RUN_BYTES * (count + more), HEADER_BYTES + (uint64_t)RUN_BYTES * first, read) != 0)
        return -EIO;
    at = at_most(pairs, count, 2, chunk);
    if (at == 0)
        return -EIO; /* it has changed since it was opened */
    number = (uint64_t)pairs[2 * (at - 1) + 1] + chunk - pairs[2 * (at - 1)];
    end = at < count + more ? pairs[2 * at + 1] : leaves->chunks;
    if (number >= end || end > leaves->chunks)
        return 0;
    if (take(leaves, digest, EBSD_DIGEST, HEADER_BYTES + (uint64_t)RUN_BYTES * leaves->runs + EBSD_DIGEST * number,
             read) != 0)
        return -EIO;
    return 1;
}
