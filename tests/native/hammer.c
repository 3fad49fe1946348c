/* Hammers the native engine from many threads, for ThreadSanitizer and AddressSanitizer, and compares all they read.
 *
 * usage: hammer DIRECTORY MILLISECONDS SEED
 *
 * Sectors carry stamps: their number and a version. Each is written by one thread, which knows what it must read there;
 * threads share chunks, so their writes meet in claims, in copies of chunks and in the map. One more thread does what
 * Python does: freezes, cleans, seals (with leaves), drops and adds layers, lends credit, claims what the others want.
 * Disk calls are short, are interrupted and fail now and then.
 */
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

#define CHUNKS 40
#define SECTORS (CHUNKS * 16 - 5) /* the last chunk is cut by the end of the volume */
#define THREADS 4
#define LAYERS 200
#define WORDS (4096 / 8)

struct ebsd_xts {
    uint64_t pad;
};

static ebsd_core *core;
static ebsd_hot *hot;
static ebsd_xts keys[LAYERS + 1];
static int files[LAYERS + 1];
static unsigned char *leaves[LAYERS + 1]; /* as a leaf file, from its first byte */
static uint32_t leaf_chunks[LAYERS + 1];
static uint32_t entries[1024] __attribute__((aligned(4096)));
static unsigned char marks[1];
static _Atomic uint32_t acked[SECTORS]; /* the last version that was answered */
static atomic_int ended, failed;
static atomic_uint head = 1;
static _Atomic uint64_t punts, hits;
static pthread_mutex_t rare = PTHREAD_MUTEX_INITIALIZER; /* what Python's loop is: one at a time */
static __thread uint64_t dice;

#define CHECK(what) ((what) ? (void)0 : complain(__LINE__, #what))

static void complain(int line, const char *what)
{
    fprintf(stderr, "hammer: line %d: %s\n", line, what);
    atomic_store(&failed, 1);
    atomic_store(&ended, 1);
}

static uint32_t throw(uint32_t sides)
{
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return (uint32_t)(dice >> 20) % sides;
}

static int toy_run(ebsd_xts *key, int encrypt, const unsigned char *src, unsigned char *dst, size_t length, size_t unit,
                   const unsigned char *tweak)
{
    uint64_t sector;

    (void)encrypt;
    memcpy(&sector, tweak, sizeof(sector));
    for (size_t at = 0; at < length; at += 8) {
        uint64_t word;

        memcpy(&word, src + at, 8);
        word ^= (key->pad + sector + at / unit) * UINT64_C(0x9e3779b97f4a7c15);
        memcpy(dst + at, &word, 8);
    }
    return 0;
}

static size_t stumble(size_t length)
{
    if (throw(50) == 0) {
        errno = EINTR;
        return 0;
    }
    if (throw(3000) == 0) {
        errno = throw(2) ? EIO : ENOSPC;
        return 0;
    }
    return throw(20) == 0 && length > 4096 ? 1 + throw((uint32_t)length) : length;
}

static ssize_t clumsy_pread(int fd, void *buffer, size_t length, off_t offset)
{
    size_t part = stumble(length);

    return part == 0 ? -1 : pread(fd, buffer, part, offset);
}

static ssize_t clumsy_pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    size_t part = stumble(length);

    return part == 0 ? -1 : pwrite(fd, buffer, part, offset);
}

static void stamp(unsigned char *sector, uint32_t number, uint32_t version)
{
    uint64_t word = (uint64_t)number << 32 | version;

    for (int at = 0; at < WORDS; at++)
        memcpy(sector + 8 * at, &word, 8);
}

/* Return the version of a sector that was read; it must be whole. */
static uint32_t version_of(const unsigned char *sector, uint32_t number)
{
    uint64_t first, word;

    memcpy(&first, sector, 8);
    for (int at = 1; at < WORDS; at++) {
        memcpy(&word, sector + 8 * at, 8);
        if (word != first) {
            complain(__LINE__, "a sector is a mixture");
            return 0;
        }
    }
    CHECK(first == 0 || first >> 32 == number);
    return (uint32_t)first;
}

/* --- the rare things */

static void add_layer(uint32_t number)
{
    unsigned char uuid[16];
    int result;

    memset(uuid, (int)number, sizeof(uuid));
    result = ebsd_core_add_layer(core, number, 0, uuid, files[number], (uintptr_t)&keys[number]);
    CHECK(result == 0 || result == -EEXIST);
    if (leaves[number] == NULL)
        result = ebsd_core_give_no_leaves(core, number, 0);
    else
        result = ebsd_core_give_leaves(core, number, 0, leaves[number],
                                       128 + 40 * (size_t)leaf_chunks[number], -1, leaf_chunks[number], leaf_chunks[number],
                                       (const uint32_t *)(leaves[number] + 128), leaf_chunks[number] ? 1 : 0);
    CHECK(result == 0 || result == -EEXIST);
}

/* What Python does with a request that is handed back: it uses all layers, and has the gate lend. */
static void do_rare(void)
{
    pthread_mutex_lock(&rare);
    for (uint32_t number = 1; number < atomic_load(&head); number++)
        add_layer(number);
    ebsd_core_wrote_out(core, 0, 1);
    ebsd_core_lend(core, throw(30), INT64_MAX);
    pthread_mutex_unlock(&rare);
}

/* --- threads of a transport */

static void write_some(void *lane, uint32_t me, uint32_t *versions, unsigned char *buffer)
{
    /* One of my sectors, or whole chunks in which all is mine: those of the last THREADS chunks but one. */
    uint32_t first, count = 1;
    int result;

    if (throw(4) == 0) {
        first = (CHUNKS - 1 - THREADS + me) * 16;
        count = 16;
    } else {
        first = throw((CHUNKS - 1 - THREADS) * 16 / THREADS) * THREADS + me;
    }
    for (uint32_t at = 0; at < count; at++)
        stamp(buffer + 4096 * at, first + at, ++versions[first + at]);
    for (;;) {
        result = hot->write(hot->engine, lane, (uint64_t)first * 4096, (size_t)count * 4096, buffer);
        if (result == 0)
            break;
        /* A pwrite without space is handed back; a pread of what is copied may stumble over it here, too. */
        CHECK(result == EBSD_HOT_PUNT || result == -EIO || result == -ENOSPC);
        if (result == EBSD_HOT_PUNT) {
            atomic_fetch_add(&punts, 1);
            do_rare();
        }
        if (atomic_load(&failed))
            return;
    }
    atomic_fetch_add(&hits, 1);
    for (uint32_t at = 0; at < count; at++)
        atomic_store(&acked[first + at], versions[first + at]);
}

static void read_some(void *lane, unsigned char *buffer)
{
    uint32_t first = throw(SECTORS), count = 1 + throw(40), least[41];
    int result;

    if (first + count > SECTORS)
        count = SECTORS - first;
    for (uint32_t at = 0; at < count; at++)
        least[at] = atomic_load(&acked[first + at]);
    result = hot->read(hot->engine, lane, (uint64_t)first * 4096, (size_t)count * 4096, buffer);
    CHECK(result == 0 || result == EBSD_HOT_PUNT || result == -EIO || result == -ENOSPC);
    if (result == EBSD_HOT_PUNT) {
        atomic_fetch_add(&punts, 1);
        do_rare();
    }
    for (uint32_t at = 0; result == 0 && at < count; at++)
        CHECK(version_of(buffer + 4096 * at, first + at) >= least[at]);
    atomic_fetch_add(&hits, result == 0);
}

static void *work(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    uint32_t *versions = calloc(SECTORS, sizeof(uint32_t));
    unsigned char *buffer = malloc(41 * 4096);
    void *lane = hot->lane_new(hot->engine);

    dice = UINT64_C(0x9e3779b97f4a7c15) * (me + 7);
    CHECK(versions != NULL && buffer != NULL && lane != NULL);
    while (!atomic_load(&ended)) {
        if (throw(2))
            write_some(lane, me, versions, buffer);
        else
            read_some(lane, buffer);
    }
    hot->lane_free(hot->engine, lane);
    free(buffer);
    free(versions);
    return NULL;
}

/* --- the loop */

static ebsd_claim *claim(uint32_t first, uint32_t end, int exclusive)
{
    uint32_t blockers;
    ebsd_claim *claimed = ebsd_core_claim(core, first, end, exclusive, &blockers);
    struct pollfd bell = {.fd = ebsd_core_bell(core), .events = POLLIN};
    uint64_t rings;

    CHECK(claimed != NULL && bell.fd >= 0);
    while (!ebsd_core_is_held(core, claimed)) {
        CHECK(poll(&bell, 1, 10000) == 1); /* nobody rings: the grant was lost */
        if (read(bell.fd, &rings, sizeof(rings)) < 0)
            CHECK(errno == EAGAIN);
    }
    return claimed;
}

static void freeze_and_clean(void)
{
    uint32_t pages[2], also[1] = {0};
    unsigned char *copy = aligned_alloc(4096, 2 * 4096);
    uint32_t before = atomic_load(&head);
    uint64_t touched;
    int64_t count = ebsd_core_freeze(core, also, throw(2), pages, copy, throw(4) ? 2 : 0, &touched);

    CHECK(count >= -1 && count <= 1);
    if (count == 1) {
        CHECK(pages[0] == 0);
        for (uint32_t chunk = 0; chunk < CHUNKS; chunk++)
            CHECK(((uint32_t *)copy)[chunk] <= before);
    }
    if (count >= 0)
        ebsd_core_clean(core, pages, (uint32_t)count);
    free(copy);
}

static void digest(uint32_t layer, uint32_t chunk, const unsigned char *stored, unsigned char *out)
{
    unsigned char front[12 + 16 + 8] = "ebsd/1/leaf";
    EVP_MD_CTX *context = EVP_MD_CTX_new();

    memset(front + 12, (int)layer, 16);
    front[28] = (unsigned char)chunk;
    EVP_DigestInit_ex(context, EVP_sha256(), NULL);
    EVP_DigestUpdate(context, front, sizeof(front));
    EVP_DigestUpdate(context, stored, CHUNK);
    EVP_DigestFinal_ex(context, out, NULL);
    EVP_MD_CTX_free(context);
}

/* Everything is claimed: all that was answered must be there, by the map and the files alone. */
static void look_at_all(void)
{
    unsigned char *chunk = malloc(CHUNK);
    unsigned char tweak[16] = {0};

    for (uint32_t at = 0; at < CHUNKS; at++) {
        uint64_t first = (uint64_t)at * 16;

        memset(chunk, 0, CHUNK);
        if (entries[at] != 0) {
            CHECK(pread(files[entries[at]], chunk, CHUNK, (off_t)at * CHUNK) == (ssize_t)CHUNK);
            memcpy(tweak, &first, 8);
            toy_run(&keys[entries[at]], 0, chunk, chunk, CHUNK, 4096, tweak);
        }
        for (uint32_t sector = 0; sector < 16; sector++) {
            if (first + sector >= SECTORS)
                CHECK(version_of(chunk + 4096 * sector, 0) == 0);
            else
                CHECK(version_of(chunk + 4096 * sector, (uint32_t)first + sector) >= atomic_load(&acked[first + sector]));
        }
    }
    free(chunk);
}

/* Of some layers all chunks have leaves, each a run of its own; of others there are none. */
static void make_leaves(uint32_t layer)
{
    uint32_t count = 0;
    unsigned char *file, *chunk = malloc(CHUNK);

    for (uint32_t at = 0; at < CHUNKS; at++)
        count += entries[at] == layer;
    file = calloc(1, 128 + 40 * (size_t)count + 1);
    for (uint32_t at = 0, number = 0; at < CHUNKS; at++) {
        if (entries[at] != layer)
            continue;
        memcpy(file + 128 + 8 * (size_t)number, &at, 4);
        memcpy(file + 128 + 8 * (size_t)number + 4, &number, 4);
        CHECK(pread(files[layer], chunk, CHUNK, (off_t)at * CHUNK) == (ssize_t)CHUNK);
        digest(layer, at, chunk, file + 128 + 8 * (size_t)count + 32 * (size_t)number);
        number++;
    }
    leaves[layer] = file;
    leaf_chunks[layer] = count;
    free(chunk);
}

static void seal(void)
{
    uint32_t old = atomic_load(&head);
    uintptr_t key = (uintptr_t)&keys[old + 1];
    uint64_t words[64];
    ebsd_claim *everything;

    if (old + 1 > LAYERS || ebsd_core_reserve(core, 1024, old + 1) != 0)
        return;
    everything = claim(0, 1 << 30, 1);
    look_at_all();
    if (throw(3))
        make_leaves(old);
    ebsd_core_touched(core);
    ebsd_core_take(core, EBSD_CORE_CHANGED, words, 64);
    ebsd_core_take(core, EBSD_CORE_LEFT, words, 64);
    CHECK(ebsd_core_use_head(core, old + 1, &files[old + 1], &key, 1, throw(2) ? 0 : 5) == 0);
    atomic_store(&head, old + 1);
    CHECK(ebsd_core_unclaim(core, everything) == 0);
}

static void loop(void)
{
    uint32_t before = atomic_load(&head), number;

    switch (throw(6)) {
    case 0:
        if (throw(10) == 0)
            seal();
        break;
    case 1:
        for (int times = 0; times < 5 && before > 1; times++) {
            number = 1 + throw(before - 1);
            ebsd_core_was_used(core, number, 0);
            ebsd_core_drop_layer(core, number, 0);
        }
        break;
    case 2:
        ebsd_core_lend(core, 0, 0);
        break;
    case 3:
        number = throw(CHUNKS);
        ebsd_core_unclaim(core, claim(number, number + 1 + throw(5), (int)throw(2)));
        break;
    default:
        freeze_and_clean();
    }
}

static uint64_t milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS];
    uintptr_t key = (uintptr_t)&keys[1];
    uint64_t end;
    char path[4096];

    if (count != 4)
        return 2;
    dice = UINT64_C(0x9e3779b97f4a7c15) + strtoull(arguments[3], NULL, 10);
    for (uint32_t number = 1; number <= LAYERS; number++) {
        keys[number].pad = number * UINT64_C(1000003);
        snprintf(path, sizeof(path), "%s/%u", arguments[1], number);
        files[number] = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (files[number] < 0 || ftruncate(files[number], (off_t)CHUNKS * (off_t)CHUNK) != 0)
            return 2;
    }
    core = ebsd_core_new((uintptr_t)toy_run, 0, 1);
    if (core == NULL || ebsd_core_reserve(core, 1024, 1) != 0)
        return 2;
    hot = (ebsd_hot *)ebsd_core_hot(core);
    ebsd_core_use_calls(core, (uintptr_t)clumsy_pread, (uintptr_t)clumsy_pwrite);
    ebsd_core_use_map(core, (uintptr_t)entries, (uintptr_t)marks, 1024, (uint64_t)SECTORS * 4096);
    ebsd_core_use_head(core, 1, &files[1], &key, 1, 0);
    for (uintptr_t me = 0; me < THREADS; me++)
        if (pthread_create(&threads[me], NULL, work, (void *)me) != 0)
            return 2;
    end = milliseconds() + strtoull(arguments[2], NULL, 10);
    while (!atomic_load(&ended) && milliseconds() < end) {
        pthread_mutex_lock(&rare);
        loop();
        pthread_mutex_unlock(&rare);
        usleep(200);
    }
    atomic_store(&ended, 1);
    for (int me = 0; me < THREADS; me++)
        pthread_join(threads[me], NULL);
    look_at_all();
    printf("%u layers, %llu requests done, %llu handed back\n", atomic_load(&head), (unsigned long long)hits,
           (unsigned long long)punts);
    CHECK(atomic_load(&head) > 2 && atomic_load(&hits) > 100);
    CHECK(ebsd_core_claims(core) == 0);
    ebsd_core_stop(core);
    ebsd_core_free(core);
    for (uint32_t number = 1; number <= LAYERS; number++) {
        free(leaves[number]);
        close(files[number]);
    }
    return atomic_load(&failed);
}
