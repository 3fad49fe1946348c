/* Which segments of sealed layers are open, with their keys and leaves: found by (layer, segment) whatever their number.
 *
 * Descriptors and keys are Python's. Who uses one counts himself in, and `drop` waits until nobody does: when it has
 * returned they may be closed. A use lasts for one read and what is done with its bytes, and waits for nothing else.
 */
#ifndef EBSD_LAYERS_H
#define EBSD_LAYERS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "leaves.h"

typedef struct ebsd_xts ebsd_xts; /* a key of crypto/xts_kernel.h */

typedef struct ebsd_layer ebsd_layer;

struct ebsd_layer {
    ebsd_layer *next; /* of the same bucket */
    uint32_t number;
    uint32_t segment;
    int fd;
    ebsd_xts *key; /* NULL: sectors are stored as they are */
    unsigned char uuid[16];
    _Atomic(ebsd_leaves *) leaves; /* NULL: nobody has looked whether there are any */
    atomic_uint uses;
    atomic_uchar was_used; /* since `ebsd_layers_was_used` asked */
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t unused;
    atomic_uint dropping;
    ebsd_layer **buckets; /* a power of two of them */
    size_t size;
    size_t count;
} ebsd_layers;

int ebsd_layers_init(ebsd_layers *layers); /* 0 or -errno */
void ebsd_layers_end(ebsd_layers *layers);

/* 0; -EEXIST; -ENOMEM. */
int ebsd_layers_add(ebsd_layers *layers, uint32_t number, uint32_t segment, const unsigned char *uuid, int fd,
                    ebsd_xts *key);

/* Say what the leaves of a segment's layer are, once; they are taken over. -ENOENT: there is no such segment;
 * -EEXIST: that was said already. */
int ebsd_layers_give_leaves(ebsd_layers *layers, uint32_t number, uint32_t segment, ebsd_leaves *leaves);

/* Take a segment out and wait until nobody uses it; 0, or -ENOENT. */
int ebsd_layers_drop(ebsd_layers *layers, uint32_t number, uint32_t segment);

/* Whether a segment was used since this was asked last. */
int ebsd_layers_was_used(ebsd_layers *layers, uint32_t number, uint32_t segment);

/* Begin a use, NULL when the segment is not there; and end it. */
ebsd_layer *ebsd_layers_use(ebsd_layers *layers, uint32_t number, uint32_t segment);
void ebsd_layers_unuse(ebsd_layers *layers, ebsd_layer *layer);

#endif
