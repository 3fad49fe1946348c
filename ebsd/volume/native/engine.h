/* The parts of the native engine, among themselves. */
#ifndef EBSD_ENGINE_H
#define EBSD_ENGINE_H

#include <openssl/evp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "changes.h"
#include "claims.h"
#include "hot.h"
#include "layers.h"
#include "leaves.h"

#include "core.h"

#define SECTOR ((size_t)4096)
#define CHUNK_SHIFT 16
#define CHUNK ((size_t)1 << CHUNK_SHIFT)
#define SEGMENT_SHIFT 40
#define SEGMENT ((uint64_t)1 << SEGMENT_SHIFT)
#define MAX_SEGMENTS 64
#define MAX_WRITE ((size_t)1 << 20) /* the largest FUSE request */
#define MAX_CHUNKS ((size_t)MAX_SEGMENTS << (SEGMENT_SHIFT - CHUNK_SHIFT))
#define EXTENT_SHIFT 18             /* chunk >> this: its extent of the durable map, 1 MiB of entries */
#define MAX_EXTENTS (MAX_CHUNKS >> EXTENT_SHIFT)
#define HOLE 0

typedef int (*ebsd_xts_call)(ebsd_xts *xts, int encrypt, const unsigned char *src, unsigned char *dst, size_t length,
                             size_t unit, const unsigned char *tweak);
typedef ssize_t (*ebsd_pwrite)(int fd, const void *buffer, size_t length, off_t offset);

struct ebsd_core {
    ebsd_hot hot;
    ebsd_claims claims;
    ebsd_changes changes;
    ebsd_layers layers;
    ebsd_xts_call xts_run;
    ebsd_pread pread_call;
    ebsd_pwrite pwrite_call;
    int read_only;
    int checks_leaves;
    EVP_MD *sha256;
    atomic_int stopped;
    int is_orphan; /* Python has let go of it, but not yet of all claims */

    /* Changed while everything is claimed, read by who holds a claim: the claims' mutex is between the two. */
    uint64_t size;
    uint64_t chunks;
    uint32_t head;
    uint32_t segments;
    uint32_t preallocated; /* chunks from the first on that have blocks in the head, whatever the map says */
    int head_fds[MAX_SEGMENTS];
    ebsd_xts *head_keys[MAX_SEGMENTS];
    /* Of the durable map: whether it has all its blocks. Room for the largest volume: threads read it while one grows. */
    _Atomic unsigned char extents[MAX_EXTENTS];

    _Atomic int64_t credit; /* new chunks that nobody need be asked for */
    _Atomic int64_t credit_until;
    _Atomic uint64_t counts[EBSD_CORE_COUNTS];
};

/* The buffers of one thread. */
typedef struct {
    pthread_cond_t granted;
    EVP_MD_CTX *digest;
    size_t length;          /* bytes of all this, in one mapping */
    unsigned char *scratch; /* ciphertext of one write: MAX_WRITE and the chunks that its ends may have to complete */
    unsigned char *front;   /* plaintext of a chunk that is completed */
    unsigned char *back;
} ebsd_lane;

/* hotread.c, hotwrite.c, lane.c: see hot.h */
int ebsd_read(void *engine, void *lane, uint64_t offset, size_t length, unsigned char *out);
int ebsd_write(void *engine, void *lane, uint64_t offset, size_t length, const unsigned char *data);
void *ebsd_lane_new(void *engine);
void ebsd_lane_free(void *engine, void *lane);

/* Read all of a range; 0, -errno, or EBSD_HOT_PUNT where the file ends: Python says what that means. */
int ebsd_read_all(ebsd_core *core, int fd, unsigned char *to, size_t length, uint64_t place);

/* Encrypt or decrypt whole sectors, of which the first is that at `offset` of the volume; 0, -EIO or EBSD_HOT_PUNT. */
int ebsd_run_cipher(ebsd_core *core, ebsd_xts *key, int encrypt, const unsigned char *from, unsigned char *to,
                    size_t length, uint64_t offset);

static inline uint32_t ebsd_entry(const ebsd_core *core, uint64_t chunk)
{
    return atomic_load_explicit(&core->changes.entries[chunk], memory_order_acquire);
}

static inline void ebsd_count(ebsd_core *core, enum ebsd_core_count which, uint64_t more)
{
    atomic_fetch_add_explicit(&core->counts[which], more, memory_order_relaxed);
}

#endif
