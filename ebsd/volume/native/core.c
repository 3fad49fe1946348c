#include <errno.h>
#include <openssl/err.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

static ssize_t call_pread(int fd, void *buffer, size_t length, off_t offset)
{
    return pread(fd, buffer, length, offset);
}

static ssize_t call_pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    return pwrite(fd, buffer, length, offset);
}

static int begin(ebsd_core *core)
{
    if (ebsd_claims_init(&core->claims) != 0)
        return -1;
    if (ebsd_changes_init(&core->changes) == 0) {
        if (ebsd_layers_init(&core->layers) == 0)
            return 0;
        ebsd_changes_end(&core->changes);
    }
    ebsd_claims_end(&core->claims);
    return -1;
}

ebsd_core *ebsd_core_new(uintptr_t xts_run, int read_only, int checks_leaves)
{
    ebsd_core *core = calloc(1, sizeof(*core));

    if (core == NULL)
        return NULL;
    core->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (core->sha256 == NULL || begin(core) != 0) {
        ERR_clear_error();
        EVP_MD_free(core->sha256);
        free(core);
        return NULL;
    }
    core->hot.engine = core;
    core->hot.lane_new = ebsd_lane_new;
    core->hot.lane_free = ebsd_lane_free;
    core->hot.read = ebsd_read;
    core->hot.write = ebsd_write;
    core->xts_run = (ebsd_xts_call)xts_run;
    core->pread_call = call_pread;
    core->pwrite_call = call_pwrite;
    core->read_only = read_only;
    core->checks_leaves = checks_leaves;
    return core;
}

static void end(ebsd_core *core)
{
    ebsd_layers_end(&core->layers);
    ebsd_changes_end(&core->changes);
    ebsd_claims_end(&core->claims);
    EVP_MD_free(core->sha256);
    free(core);
}

void ebsd_core_free(ebsd_core *core)
{
    /* Python's garbage collector knows no order: a task that is collected later still gives its claim back. */
    core->is_orphan = 1;
    if (ebsd_core_claims(core) == 0)
        end(core);
}

void ebsd_core_stop(ebsd_core *core)
{
    atomic_store(&core->stopped, 1);
}

uintptr_t ebsd_core_hot(ebsd_core *core)
{
    return (uintptr_t)&core->hot;
}

int ebsd_core_bell(ebsd_core *core)
{
    return ebsd_claims_listen(&core->claims);
}

void ebsd_core_use_calls(ebsd_core *core, uintptr_t pread_call, uintptr_t pwrite_call)
{
    core->pread_call = (ebsd_pread)pread_call;
    core->pwrite_call = (ebsd_pwrite)pwrite_call;
}

/* --- maps and head */

int ebsd_core_reserve(ebsd_core *core, uint64_t chunks, uint32_t head)
{
    if (chunks > MAX_CHUNKS)
        return -EINVAL;
    return ebsd_changes_reserve(&core->changes, (chunks >> EBSD_PAGE_SHIFT) + 1, head);
}

void ebsd_core_use_map(ebsd_core *core, uintptr_t entries, uintptr_t marks, uint64_t chunks, uint64_t size)
{
    core->chunks = chunks;
    core->size = size;
    pthread_mutex_lock(&core->changes.lock);
    core->changes.entries = (_Atomic uint32_t *)entries;
    core->changes.marks = (_Atomic unsigned char *)marks;
    core->changes.pages = (chunks + (UINT64_C(1) << EBSD_PAGE_SHIFT) - 1) >> EBSD_PAGE_SHIFT;
    pthread_mutex_unlock(&core->changes.lock);
}

int ebsd_core_use_head(ebsd_core *core, uint32_t number, const int *fds, const uintptr_t *keys, uint32_t segments,
                       uint32_t preallocated)
{
    if (segments > MAX_SEGMENTS)
        return -EINVAL;
    for (uint32_t at = 0; at < segments; at++) {
        core->head_fds[at] = fds[at];
        core->head_keys[at] = (ebsd_xts *)keys[at];
    }
    core->segments = segments;
    core->head = number;
    core->preallocated = preallocated;
    return 0;
}

void ebsd_core_wrote_out(ebsd_core *core, uint32_t extent, int is_written_out)
{
    if (extent < MAX_EXTENTS)
        atomic_store_explicit(&core->extents[extent], is_written_out != 0, memory_order_release);
}

uint64_t ebsd_core_next_stored(ebsd_core *core, uint64_t first, uint64_t end)
{
    while (first < end && atomic_load_explicit(&core->changes.entries[first], memory_order_relaxed) == HOLE)
        first++;
    return first;
}

/* --- claims */

ebsd_claim *ebsd_core_claim(ebsd_core *core, uint32_t first, uint32_t end, int exclusive, uint32_t *blockers)
{
    ebsd_claim *claim = malloc(sizeof(*claim));

    if (claim == NULL)
        return NULL;
    claim->first = first;
    claim->end = end;
    claim->exclusive = exclusive != 0;
    claim->granted = NULL;
    *blockers = ebsd_claims_join(&core->claims, claim);
    return claim;
}

int ebsd_core_is_held(ebsd_core *core, ebsd_claim *claim)
{
    return ebsd_claims_is_held(&core->claims, claim);
}

uint32_t ebsd_core_unclaim(ebsd_core *core, ebsd_claim *claim)
{
    uint32_t tasks = ebsd_claims_leave(&core->claims, claim);

    free(claim);
    if (core->is_orphan && ebsd_core_claims(core) == 0)
        end(core);
    return tasks;
}

uint32_t ebsd_core_claims(ebsd_core *core)
{
    uint32_t count;

    pthread_mutex_lock(&core->claims.lock);
    count = core->claims.count;
    pthread_mutex_unlock(&core->claims.lock);
    return count;
}

/* --- sealed layers */

int ebsd_core_add_layer(ebsd_core *core, uint32_t number, uint32_t segment, const unsigned char *uuid, int fd,
                        uintptr_t key)
{
    return ebsd_layers_add(&core->layers, number, segment, uuid, fd, (ebsd_xts *)key);
}

int ebsd_core_give_leaves(ebsd_core *core, uint32_t number, uint32_t segment, const unsigned char *whole,
                          size_t length, int fd, uint32_t runs, uint32_t chunks, const uint32_t *index,
                          uint32_t pages)
{
    ebsd_leaves *leaves = ebsd_leaves_new(whole, length, fd, runs, chunks, index, pages);

    if (leaves == NULL)
        return -ENOMEM;
    return ebsd_layers_give_leaves(&core->layers, number, segment, leaves);
}

int ebsd_core_give_no_leaves(ebsd_core *core, uint32_t number, uint32_t segment)
{
    return ebsd_layers_give_leaves(&core->layers, number, segment, ebsd_leaves_none());
}

int ebsd_core_drop_layer(ebsd_core *core, uint32_t number, uint32_t segment)
{
    return ebsd_layers_drop(&core->layers, number, segment);
}

int ebsd_core_was_used(ebsd_core *core, uint32_t number, uint32_t segment)
{
    return ebsd_layers_was_used(&core->layers, number, segment);
}

void ebsd_core_lend(ebsd_core *core, int64_t chunks, int64_t until)
{
    atomic_store(&core->credit_until, until);
    atomic_store(&core->credit, chunks);
}

/* --- changes */

int64_t ebsd_core_freeze(ebsd_core *core, const uint32_t *also, uint32_t count, uint32_t *pages,
                         unsigned char *copies, uint32_t room, uint64_t *touched)
{
    return ebsd_changes_freeze(&core->changes, also, count, pages, copies, room, touched);
}

void ebsd_core_clean(ebsd_core *core, const uint32_t *pages, uint32_t count)
{
    ebsd_changes_clean(&core->changes, pages, count);
}

uint64_t ebsd_core_touched(ebsd_core *core)
{
    return atomic_exchange(&core->changes.touched, 0);
}

uint32_t ebsd_core_dirty_pages(ebsd_core *core)
{
    uint32_t count;

    pthread_mutex_lock(&core->changes.lock);
    count = (uint32_t)core->changes.dirty.set;
    pthread_mutex_unlock(&core->changes.lock);
    return count;
}

int ebsd_core_needs_flush(ebsd_core *core)
{
    return atomic_load(&core->changes.touched) != 0 || ebsd_core_dirty_pages(core) != 0;
}

static ebsd_bits *set_of(ebsd_core *core, int set)
{
    return set == EBSD_CORE_LEFT ? &core->changes.left : &core->changes.changed;
}

size_t ebsd_core_words(ebsd_core *core, int set)
{
    return set_of(core, set)->bits / 64; /* changed by the loop alone */
}

void ebsd_core_take(ebsd_core *core, int set, uint64_t *words, size_t count)
{
    ebsd_changes_take(&core->changes, set_of(core, set), words, count);
}

void ebsd_core_counts(ebsd_core *core, uint64_t *counts)
{
    for (int at = 0; at < EBSD_CORE_COUNTS; at++)
        counts[at] = atomic_load_explicit(&core->counts[at], memory_order_relaxed);
}

/* --- the hot calls */

void *ebsd_hot_lane_new(uintptr_t hot)
{
    return ((ebsd_hot *)hot)->lane_new(((ebsd_hot *)hot)->engine);
}

void ebsd_hot_lane_free(uintptr_t hot, void *lane)
{
    ((ebsd_hot *)hot)->lane_free(((ebsd_hot *)hot)->engine, lane);
}

int ebsd_hot_read(uintptr_t hot, void *lane, uint64_t offset, size_t length, unsigned char *out)
{
    return ((ebsd_hot *)hot)->read(((ebsd_hot *)hot)->engine, lane, offset, length, out);
}

int ebsd_hot_write(uintptr_t hot, void *lane, uint64_t offset, size_t length, const unsigned char *data)
{
    return ((ebsd_hot *)hot)->write(((ebsd_hot *)hot)->engine, lane, offset, length, data);
}
