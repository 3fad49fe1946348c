/* What writes have changed since a flush pass or a seal looked: one mutex, so that a freeze sees all of a write or
 * nothing of it (rules R5 to R7 of CONCURRENCY.md).
 */
#ifndef EBSD_CHANGES_H
#define EBSD_CHANGES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define EBSD_PAGE_SHIFT 10 /* chunk >> this: its page of entries */
#define EBSD_PAGE 4096     /* bytes of one */
#define EBSD_CLEAN 0
#define EBSD_DIRTY 1
#define EBSD_FROZEN 2

typedef struct {
    uint64_t *words;
    size_t bits;
    size_t set;
} ebsd_bits;

typedef struct {
    pthread_mutex_t lock; /* of all that follows, and of every store into entries and marks from here */
    _Atomic uint64_t touched; /* segments of the head that were written; set without the lock where no entry changes */
    ebsd_bits dirty;   /* pages that the next pass must write */
    ebsd_bits changed; /* pages with an entry that was stored since `changed` was taken */
    ebsd_bits left;    /* layers that chunks were moved off, and 0 */
    _Atomic uint32_t *entries; /* shared memory */
    _Atomic unsigned char *marks;
    uint64_t pages;
} ebsd_changes;

int ebsd_changes_init(ebsd_changes *changes);
void ebsd_changes_end(ebsd_changes *changes);

/* Make room for this many pages, and layers up to this number; -ENOMEM, and nothing has changed. */
int ebsd_changes_reserve(ebsd_changes *changes, uint64_t pages, uint64_t layers);

/* Name `head` as the layer of chunks [first, end), whose data it holds in `segment`. */
void ebsd_changes_name(ebsd_changes *changes, uint32_t first, uint32_t end, uint32_t head, uint32_t segment);

/* Take over what the next pass must write: `also`, and the dirty pages. Their numbers, ascending, and copies of their
 * entries go to `pages` and `copies`, which have room for `room` of them; their marks become FROZEN. Returns how many,
 * or -(how many) when there is not room, and nothing was taken. */
int64_t ebsd_changes_freeze(ebsd_changes *changes, const uint32_t *also, uint32_t count, uint32_t *pages,
                            unsigned char *copies, uint32_t room, uint64_t *touched);

/* Turn FROZEN marks of pages that are durable into CLEAN ones; what was changed since stays DIRTY. */
void ebsd_changes_clean(ebsd_changes *changes, const uint32_t *pages, uint32_t count);

/* Copy the words of a bit set, and empty it. */
void ebsd_changes_take(ebsd_changes *changes, ebsd_bits *bits, uint64_t *words, size_t count);

#endif
