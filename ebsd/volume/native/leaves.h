/* What chunks of a sealed layer must hash to (store/leaves.py): looked up as there, one page of runs and one digest. */
#ifndef EBSD_LEAVES_H
#define EBSD_LEAVES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EBSD_DIGEST 32

typedef struct ebsd_leaves ebsd_leaves;

typedef ssize_t (*ebsd_pread)(int fd, void *buffer, size_t length, off_t offset);

/* Of a leaf file that was checked as a whole: either its bytes, or a descriptor, of which a duplicate is kept. `index`
 * has the first chunk of each page of runs. All is copied. NULL: no memory, or no descriptor. */
ebsd_leaves *ebsd_leaves_new(const unsigned char *whole, size_t length, int fd, uint32_t runs, uint32_t chunks,
                             const uint32_t *index, uint32_t pages);

/* Of a layer that has none: nothing says what its chunks were. */
ebsd_leaves *ebsd_leaves_none(void);

void ebsd_leaves_free(ebsd_leaves *leaves); /* NULL, and what `none` returned, are allowed */

/* 1: the leaf of a chunk is in `digest`; 0: the file does not cover it; -EIO: it could not be read, or has changed. */
int ebsd_leaves_find(const ebsd_leaves *leaves, uint32_t chunk, unsigned char digest[EBSD_DIGEST], ebsd_pread read);

#endif
