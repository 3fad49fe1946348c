#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

#define FIRST_BUCKETS 256

int ebsd_layers_init(ebsd_layers *layers)
{
    int result;

    layers->buckets = calloc(FIRST_BUCKETS, sizeof(ebsd_layer *));
    if (layers->buckets == NULL)
        return -ENOMEM;
    layers->size = FIRST_BUCKETS;
    layers->count = 0;
    atomic_init(&layers->dropping, 0);
    result = pthread_mutex_init(&layers->lock, NULL);
    if (result == 0) {
        result = pthread_cond_init(&layers->unused, NULL);
        if (result == 0)
            return 0;
        pthread_mutex_destroy(&layers->lock);
    }
    free(layers->buckets);
    return -result;
}

void ebsd_layers_end(ebsd_layers *layers)
{
    for (size_t at = 0; at < layers->size; at++) {
        while (layers->buckets[at] != NULL) {
            ebsd_layer *layer = layers->buckets[at];

            layers->buckets[at] = layer->next;
            ebsd_leaves_free(atomic_load(&layer->leaves));
            free(layer);
        }
    }
    free(layers->buckets);
    pthread_cond_destroy(&layers->unused);
    pthread_mutex_destroy(&layers->lock);
}

static size_t bucket_of(const ebsd_layers *layers, uint32_t number, uint32_t segment)
{
    uint64_t mixed = ((uint64_t)number << 32 | segment) * UINT64_C(0x9e3779b97f4a7c15);

    return (size_t)(mixed >> 32) & (layers->size - 1);
}

/* Return where the pointer to a segment stands, or would. */
static ebsd_layer **place_of(const ebsd_layers *layers, uint32_t number, uint32_t segment)
{
    ebsd_layer **place = &layers->buckets[bucket_of(layers, number, segment)];

    while (*place != NULL && ((*place)->number != number || (*place)->segment != segment))
        place = &(*place)->next;
    return place;
}

/* Twice as many buckets; without memory for them the old ones do, with longer chains. */
static void spread(ebsd_layers *layers)
{
    ebsd_layer **old = layers->buckets;
    size_t old_size = layers->size;
    ebsd_layer **more = calloc(old_size * 2, sizeof(ebsd_layer *));

    if (more == NULL)
        return;
    layers->buckets = more;
    layers->size = old_size * 2;
    for (size_t at = 0; at < old_size; at++) {
        while (old[at] != NULL) {
            ebsd_layer *layer = old[at];
            size_t to = bucket_of(layers, layer->number, layer->segment);

            old[at] = layer->next;
            layer->next = more[to];
            more[to] = layer;
        }
    }
    free(old);
}

int ebsd_layers_add(ebsd_layers *layers, uint32_t number, uint32_t segment, const unsigned char *uuid, int fd,
                    ebsd_xts *key)
{
    ebsd_layer *layer = calloc(1, sizeof(*layer));
    ebsd_layer **place;

    if (layer == NULL)
        return -ENOMEM;
    layer->number = number;
    layer->segment = segment;
    layer->fd = fd;
    layer->key = key;
    memcpy(layer->uuid, uuid, sizeof(layer->uuid));
    atomic_init(&layer->leaves, NULL);
    atomic_init(&layer->uses, 0);
    atomic_init(&layer->was_used, 1);
    pthread_mutex_lock(&layers->lock);
    if (layers->count >= layers->size)
        spread(layers);
    place = place_of(layers, number, segment);
    if (*place != NULL) {
        pthread_mutex_unlock(&layers->lock);
        free(layer);
        return -EEXIST;
    }
    *place = layer;
    layers->count++;
    pthread_mutex_unlock(&layers->lock);
    return 0;
}

int ebsd_layers_give_leaves(ebsd_layers *layers, uint32_t number, uint32_t segment, ebsd_leaves *leaves)
{
    ebsd_layer *layer;
    int result = 0;

    pthread_mutex_lock(&layers->lock);
    layer = *place_of(layers, number, segment);
    if (layer == NULL)
        result = -ENOENT;
    else if (atomic_load(&layer->leaves) != NULL)
        result = -EEXIST;
    else
        atomic_store(&layer->leaves, leaves);
    pthread_mutex_unlock(&layers->lock);
    if (result != 0)
        ebsd_leaves_free(leaves);
    return result;
}

int ebsd_layers_drop(ebsd_layers *layers, uint32_t number, uint32_t segment)
{
    ebsd_layer **place, *layer;

    pthread_mutex_lock(&layers->lock);
    place = place_of(layers, number, segment);
    layer = *place;
    if (layer == NULL) {
        pthread_mutex_unlock(&layers->lock);
        return -ENOENT;
    }
    *place = layer->next;
    layers->count--;
    atomic_fetch_add(&layers->dropping, 1);
    while (atomic_load(&layer->uses) > 0)
        pthread_cond_wait(&layers->unused, &layers->lock);
    atomic_fetch_sub(&layers->dropping, 1);
    pthread_mutex_unlock(&layers->lock);
    ebsd_leaves_free(atomic_load(&layer->leaves));
    free(layer);
    return 0;
}

int ebsd_layers_was_used(ebsd_layers *layers, uint32_t number, uint32_t segment)
{
    ebsd_layer *layer;
    int was_used = 0;

    pthread_mutex_lock(&layers->lock);
    layer = *place_of(layers, number, segment);
    if (layer != NULL)
        was_used = atomic_exchange_explicit(&layer->was_used, 0, memory_order_relaxed);
    pthread_mutex_unlock(&layers->lock);
    return was_used;
}

ebsd_layer *ebsd_layers_use(ebsd_layers *layers, uint32_t number, uint32_t segment)
{
    ebsd_layer *layer;

    pthread_mutex_lock(&layers->lock);
    layer = *place_of(layers, number, segment);
    if (layer != NULL)
        atomic_fetch_add(&layer->uses, 1);
    pthread_mutex_unlock(&layers->lock);
    if (layer != NULL)
        atomic_store_explicit(&layer->was_used, 1, memory_order_relaxed);
    return layer;
}

void ebsd_layers_unuse(ebsd_layers *layers, ebsd_layer *layer)
{
    /* Both are sequentially consistent: either `drop` sees no use, or we see that somebody drops. The layer may be gone
     * after the first; the table is not. */
    if (atomic_fetch_sub(&layer->uses, 1) != 1 || atomic_load(&layers->dropping) == 0)
        return;
    pthread_mutex_lock(&layers->lock);
    pthread_cond_broadcast(&layers->unused);
    pthread_mutex_unlock(&layers->lock);
}
