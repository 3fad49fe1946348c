#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "changes.h"

int ebsd_changes_init(ebsd_changes *changes)
{
    memset(changes, 0, sizeof(*changes));
    atomic_init(&changes->touched, 0);
    return -pthread_mutex_init(&changes->lock, NULL);
}

void ebsd_changes_end(ebsd_changes *changes)
{
    free(changes->dirty.words);
    free(changes->changed.words);
    free(changes->left.words);
    pthread_mutex_destroy(&changes->lock);
}

static int widen(ebsd_bits *bits, uint64_t wanted)
{
    size_t old = bits->bits / 64, words = (size_t)(wanted / 64 + 1);
    uint64_t *more;

    if (words <= old)
        return 0;
    more = realloc(bits->words, words * sizeof(uint64_t));
    if (more == NULL)
        return -ENOMEM;
    memset(more + old, 0, (words - old) * sizeof(uint64_t));
    bits->words = more;
    bits->bits = words * 64;
    return 0;
}

static void set_bit(ebsd_bits *bits, uint64_t at)
{
    uint64_t bit = UINT64_C(1) << (at & 63);

    if (!(bits->words[at >> 6] & bit)) {
        bits->words[at >> 6] |= bit;
        bits->set++;
    }
}

int ebsd_changes_reserve(ebsd_changes *changes, uint64_t pages, uint64_t layers)
{
    int result;

    pthread_mutex_lock(&changes->lock);
    result = widen(&changes->dirty, pages);
    if (result == 0)
        result = widen(&changes->changed, pages);
    if (result == 0)
        result = widen(&changes->left, layers);
    pthread_mutex_unlock(&changes->lock);
    return result;
}

void ebsd_changes_name(ebsd_changes *changes, uint32_t first, uint32_t end, uint32_t head, uint32_t segment)
{
    pthread_mutex_lock(&changes->lock);
    atomic_fetch_or(&changes->touched, UINT64_C(1) << segment);
    for (uint32_t chunk = first; chunk < end; chunk++) {
        uint32_t layer = atomic_load_explicit(&changes->entries[chunk], memory_order_relaxed);
        uint32_t page = chunk >> EBSD_PAGE_SHIFT;

        if (layer == head)
            continue;
        set_bit(&changes->left, layer);
        set_bit(&changes->dirty, page);
        set_bit(&changes->changed, page);
        /* The mark first: a kill between the two must not leave an entry that nothing names. */
        atomic_store_explicit(&changes->marks[page], EBSD_DIRTY, memory_order_release);
        atomic_store_explicit(&changes->entries[chunk], head, memory_order_release);
    }
    pthread_mutex_unlock(&changes->lock);
}

/* The lock is held. */
static uint32_t copy_pages(ebsd_changes *changes, uint32_t *pages, unsigned char *copies)
{
    uint32_t count = 0;

    for (size_t word = 0; word < changes->dirty.bits / 64; word++) {
        uint64_t bits = changes->dirty.words[word];

        for (; bits != 0; bits &= bits - 1) {
            uint32_t page = (uint32_t)(word * 64) + (uint32_t)__builtin_ctzll(bits);

            atomic_store_explicit(&changes->marks[page], EBSD_FROZEN, memory_order_release);
            memcpy(copies + (size_t)count * EBSD_PAGE, (const void *)(changes->entries + ((size_t)page << EBSD_PAGE_SHIFT)),
                   EBSD_PAGE);
            pages[count++] = page;
        }
        changes->dirty.words[word] = 0;
    }
    changes->dirty.set = 0;
    return count;
}

int64_t ebsd_changes_freeze(ebsd_changes *changes, const uint32_t *also, uint32_t count, uint32_t *pages,
                            unsigned char *copies, uint32_t room, uint64_t *touched)
{
    int64_t result;

    pthread_mutex_lock(&changes->lock);
    for (uint32_t at = 0; at < count; at++)
        if (also[at] < changes->pages)
            set_bit(&changes->dirty, also[at]);
    if (changes->dirty.set > room) {
        result = -(int64_t)changes->dirty.set;
    } else {
        *touched = atomic_exchange(&changes->touched, 0);
        result = copy_pages(changes, pages, copies);
    }
    pthread_mutex_unlock(&changes->lock);
    return result;
}

void ebsd_changes_clean(ebsd_changes *changes, const uint32_t *pages, uint32_t count)
{
    pthread_mutex_lock(&changes->lock);
    for (uint32_t at = 0; at < count; at++)
        if (pages[at] < changes->pages
            && atomic_load_explicit(&changes->marks[pages[at]], memory_order_relaxed) == EBSD_FROZEN)
            atomic_store_explicit(&changes->marks[pages[at]], EBSD_CLEAN, memory_order_release);
    pthread_mutex_unlock(&changes->lock);
}

void ebsd_changes_take(ebsd_changes *changes, ebsd_bits *bits, uint64_t *words, size_t count)
{
    pthread_mutex_lock(&changes->lock);
    for (size_t at = 0; at < bits->bits / 64; at++) {
        if (at < count)
            words[at] = bits->words[at];
        bits->words[at] = 0;
    }
    bits->set = 0;
    pthread_mutex_unlock(&changes->lock);
}
