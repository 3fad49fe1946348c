#include <openssl/err.h>
#include <string.h>
#include <sys/mman.h>

#include "engine.h"

#define HEAD_BYTES SECTOR
#define SCRATCH (MAX_WRITE + 2 * CHUNK)

void *ebsd_lane_new(void *engine)
{
    const size_t length = HEAD_BYTES + SCRATCH + 2 * CHUNK;
    unsigned char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ebsd_lane *lane;

    (void)engine;
    if (memory == MAP_FAILED)
        return NULL;
    /* As for all memory of the process: where the host does not allow it, it is left, and `doctor` tells of swap. */
    (void)mlock(memory, length);
    (void)madvise(memory, length, MADV_DONTDUMP);
    memset(memory, 0, length); /* in the path of write-back: memory is taken here and not in a request */
    lane = (ebsd_lane *)memory;
    lane->length = length;
    lane->scratch = memory + HEAD_BYTES;
    lane->front = lane->scratch + SCRATCH;
    lane->back = lane->front + CHUNK;
    lane->digest = EVP_MD_CTX_new();
    if (lane->digest == NULL || pthread_cond_init(&lane->granted, NULL) != 0) {
        EVP_MD_CTX_free(lane->digest);
        ERR_clear_error();
        munmap(memory, length);
        return NULL;
    }
    return lane;
}

void ebsd_lane_free(void *engine, void *lane_)
{
    ebsd_lane *lane = lane_;
    size_t length;

    (void)engine;
    if (lane == NULL)
        return;
    length = lane->length;
    EVP_MD_CTX_free(lane->digest);
    pthread_cond_destroy(&lane->granted);
    explicit_bzero(lane, length);
    munmap(lane, length);
}
