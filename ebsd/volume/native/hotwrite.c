/* Writes without Python: rules R1 to R6, in one pwrite each.
 *
 * Whatever may make it punt is looked at before the pwrite: the entries, the blocks of the map (R4), the space (R20), and
 * what has to be read to complete a chunk. Only a disk without space punts after it, with nothing named.
 */
#include <errno.h>
#include <openssl/err.h>
#include <string.h>
#include <time.h>

#include "engine.h"

static const char LEAF_LABEL[] = "ebsd/1/leaf"; /* and its zero byte */

typedef struct {
    uint64_t offset; /* of the request */
    uint64_t end;
    const unsigned char *data;
    uint32_t first; /* its chunks */
    uint32_t last;
    uint32_t segment;
    uint32_t unnamed; /* chunks that the head does not hold */
    uint32_t taking;  /* those of them that need space */
    uint64_t start;   /* what is written */
    uint64_t stop;
} plan;

static int has_leaf(ebsd_core *core, ebsd_lane *lane, const ebsd_layer *layer, uint32_t chunk,
                    const unsigned char *ciphertext, const unsigned char wanted[EBSD_DIGEST])
{
    unsigned char number[8], digest[EVP_MAX_MD_SIZE];
    unsigned int length = 0;

    for (int at = 0; at < 8; at++)
        number[at] = at < 4 ? (unsigned char)(chunk >> (8 * at)) : 0;
    if (EVP_DigestInit_ex(lane->digest, core->sha256, NULL) != 1
        || EVP_DigestUpdate(lane->digest, LEAF_LABEL, sizeof(LEAF_LABEL)) != 1
        || EVP_DigestUpdate(lane->digest, layer->uuid, sizeof(layer->uuid)) != 1
        || EVP_DigestUpdate(lane->digest, number, sizeof(number)) != 1
        || EVP_DigestUpdate(lane->digest, ciphertext, CHUNK) != 1
        || EVP_DigestFinal_ex(lane->digest, digest, &length) != 1) {
        ERR_clear_error();
        return 0;
    }
    return length == EBSD_DIGEST && memcmp(digest, wanted, EBSD_DIGEST) == 0;
}

/* What is copied to the head is encrypted and hashed anew, so damage must show now; Python says what is damaged. */
static int check_leaf(ebsd_core *core, ebsd_lane *lane, ebsd_layer *layer, uint32_t chunk,
                      const unsigned char *ciphertext)
{
    unsigned char wanted[EBSD_DIGEST];
    ebsd_leaves *leaves = atomic_load_explicit(&layer->leaves, memory_order_acquire);
    int found;

    if (!core->checks_leaves)
        return 0;
    if (leaves == NULL)
        return EBSD_HOT_PUNT;
    found = ebsd_leaves_find(leaves, chunk, wanted, core->pread_call);
    if (found == 0)
        return 0;
    return found == 1 && has_leaf(core, lane, layer, chunk, ciphertext, wanted) ? 0 : EBSD_HOT_PUNT;
}

static int read_parent(ebsd_core *core, ebsd_lane *lane, uint32_t number, uint32_t chunk, unsigned char *whole)
{
    uint64_t start = (uint64_t)chunk << CHUNK_SHIFT;
    ebsd_layer *layer = ebsd_layers_use(&core->layers, number, (uint32_t)(start >> SEGMENT_SHIFT));
    int result;

    if (layer == NULL)
        return EBSD_HOT_PUNT;
    result = ebsd_read_all(core, layer->fd, whole, CHUNK, start & (SEGMENT - 1));
    if (result == 0)
        result = check_leaf(core, lane, layer, chunk, whole);
    if (result == 0)
        result = ebsd_run_cipher(core, layer->key, 0, whole, whole, CHUNK, start);
    ebsd_layers_unuse(&core->layers, layer);
    return result;
}

/* Build the plaintext of a chunk that the head does not hold, with the request's bytes in it. Nothing is read where the
 * request covers all of it that lies in the volume; behind the end of the volume are zeros. */
static int build_chunk(ebsd_core *core, ebsd_lane *lane, const plan *p, uint32_t chunk, unsigned char *whole)
{
    uint64_t start = (uint64_t)chunk << CHUNK_SHIFT;
    uint64_t stop = start + CHUNK < core->size ? start + CHUNK : core->size;
    uint64_t from = p->offset > start ? p->offset : start;
    uint64_t to = p->end < start + CHUNK ? p->end : start + CHUNK;
    uint32_t layer = ebsd_entry(core, chunk);

    if ((p->offset > start || p->end < stop) && layer != HOLE) {
        int result = read_parent(core, lane, layer, chunk, whole);

        if (result != 0)
            return result;
        memset(whole + (stop - start), 0, CHUNK - (size_t)(stop - start));
        ebsd_count(core, EBSD_CORE_COPIED, 1);
    } else {
        memset(whole, 0, CHUNK);
    }
    memcpy(whole + (from - start), p->data + (from - p->offset), (size_t)(to - from));
    return 0;
}

static int covers(const plan *p, uint32_t chunk)
{
    return p->offset <= (uint64_t)chunk << CHUNK_SHIFT && p->end >= ((uint64_t)chunk + 1) << CHUNK_SHIFT;
}

/* Look at what the request meets; EBSD_HOT_PUNT where that is not for the hot path. */
static int make_plan(ebsd_core *core, plan *p)
{
    p->first = (uint32_t)(p->offset >> CHUNK_SHIFT);
    p->last = (uint32_t)((p->end - 1) >> CHUNK_SHIFT);
    p->segment = (uint32_t)(p->offset >> SEGMENT_SHIFT);
    p->unnamed = p->taking = 0;
    if (p->segment != (uint32_t)((p->end - 1) >> SEGMENT_SHIFT) || p->segment >= core->segments)
        return EBSD_HOT_PUNT;
    for (uint32_t chunk = p->first; chunk <= p->last; chunk++) {
        uint32_t entry = ebsd_entry(core, chunk);

        if (entry == core->head)
            continue;
        if (entry > core->head)
            return EBSD_HOT_PUNT; /* no layer */
        p->unnamed++;
        p->taking += chunk >= core->preallocated;
    }
    if (p->unnamed > 0)
        for (uint32_t extent = p->first >> EXTENT_SHIFT; extent <= p->last >> EXTENT_SHIFT; extent++)
            if (!atomic_load_explicit(&core->extents[extent], memory_order_acquire))
                return EBSD_HOT_PUNT;
    p->start = p->offset;
    p->stop = p->end;
    if (ebsd_entry(core, p->first) != core->head && !covers(p, p->first))
        p->start = (uint64_t)p->first << CHUNK_SHIFT;
    if (ebsd_entry(core, p->last) != core->head && !covers(p, p->last))
        p->stop = ((uint64_t)p->last + 1) << CHUNK_SHIFT;
    return 0;
}

static int take_credit(ebsd_core *core, uint32_t chunks)
{
    struct timespec now;
    int64_t nanoseconds;

    if (chunks == 0)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &now);
    nanoseconds = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    if (nanoseconds >= atomic_load_explicit(&core->credit_until, memory_order_relaxed))
        return EBSD_HOT_PUNT;
    if (atomic_fetch_sub(&core->credit, chunks) < (int64_t)chunks) {
        atomic_fetch_add(&core->credit, chunks);
        return EBSD_HOT_PUNT;
    }
    return 0;
}

/* Encrypt all that is to be written into the scratch buffer: completed ends, and what lies between them. */
static int encrypt_all(ebsd_core *core, ebsd_lane *lane, const plan *p, ebsd_xts *key)
{
    int has_front = ebsd_entry(core, p->first) != core->head && !covers(p, p->first);
    int has_back = p->last != p->first && ebsd_entry(core, p->last) != core->head && !covers(p, p->last);
    uint64_t lower = has_front ? p->start + CHUNK : p->start;
    uint64_t upper = has_back ? p->stop - CHUNK : p->stop;
    int result = 0;

    if (has_front) {
        result = build_chunk(core, lane, p, p->first, lane->front);
        if (result == 0)
            result = ebsd_run_cipher(core, key, 1, lane->front, lane->scratch, CHUNK, p->start);
    }
    if (result == 0 && has_back) {
        result = build_chunk(core, lane, p, p->last, lane->back);
        if (result == 0)
            result = ebsd_run_cipher(core, key, 1, lane->back, lane->scratch + (upper - p->start), CHUNK, upper);
    }
    if (result == 0 && lower < upper)
        result = ebsd_run_cipher(core, key, 1, p->data + (lower - p->offset), lane->scratch + (lower - p->start),
                                 (size_t)(upper - lower), lower);
    return result;
}

static int write_all(ebsd_core *core, int fd, const unsigned char *from, size_t length, uint64_t place)
{
    size_t done = 0;

    while (done < length) {
        ssize_t count = core->pwrite_call(fd, from + done, length - done, (off_t)(place + done));

        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && (errno == ENOSPC || errno == EDQUOT))
            return EBSD_HOT_PUNT; /* Python has it wait for space, or queues what is there for a punch (R21) */
        if (count < 0)
            return errno > 0 ? -errno : -EIO;
        if (count == 0)
            return -EIO;
        done += (size_t)count;
    }
    return 0;
}

static int write_claimed(ebsd_core *core, ebsd_lane *lane, plan *p)
{
    int result = make_plan(core, p);

    if (result != 0)
        return result;
    result = take_credit(core, p->taking);
    if (result != 0)
        return result;
    result = encrypt_all(core, lane, p, core->head_keys[p->segment]);
    if (result != 0) {
        atomic_fetch_add(&core->credit, p->taking);
        return result;
    }
    result = write_all(core, core->head_fds[p->segment], lane->scratch, (size_t)(p->stop - p->start),
                       p->start & (SEGMENT - 1));
    /* After the pwrite, of which a part may be there after an error, too (R6). With the entries, where there are any
     * to store, so that a freeze takes over both or neither. */
    if (result == 0 && p->unnamed > 0)
        ebsd_changes_name(&core->changes, p->first, p->last + 1, core->head, p->segment);
    else
        atomic_fetch_or(&core->changes.touched, UINT64_C(1) << p->segment);
    return result;
}

int ebsd_write(void *engine, void *lane_, uint64_t offset, size_t length, const unsigned char *data)
{
    ebsd_core *core = engine;
    ebsd_lane *lane = lane_;
    plan p = {.offset = offset, .end = offset + length, .data = data};
    ebsd_claim claim;
    int result;

    if (length == 0 || length > MAX_WRITE || ((offset | length) & (SECTOR - 1)) != 0 || offset >> 46 != 0
        || core->read_only)
        return EBSD_HOT_PUNT;
    claim.first = (uint32_t)(offset >> CHUNK_SHIFT);
    claim.end = (uint32_t)((offset + length - 1) >> CHUNK_SHIFT) + 1;
    claim.exclusive = 1;
    claim.granted = &lane->granted;
    ebsd_claims_hold(&core->claims, &claim);
    if (atomic_load(&core->stopped) || p.end > core->size)
        result = EBSD_HOT_PUNT;
    else
        result = write_claimed(core, lane, &p);
    ebsd_claims_release(&core->claims, &claim);
    if (result == 0) {
        ebsd_count(core, EBSD_CORE_WRITES, 1);
        ebsd_count(core, EBSD_CORE_WRITTEN_BYTES, length);
    }
    return result;
}
