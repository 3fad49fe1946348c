/* XTS-AES-256 over many data units in one call, thread-safe per key.
 *
 * Why native: through the `cryptography` package each 4096-byte sector costs a new context, 4.9 us; here it costs the
 * cipher itself and one change of the IV. cffi drops the interpreter's lock around every call. Where the processor has
 * VAES, units of usual sizes are not OpenSSL's work but that of xts_vaes_kernel.c, which takes a quarter of the time.
 *
 * A context of OpenSSL may be used by one thread at a time, so a key owns
 *   - one pristine context per direction, which is only ever copied, and
 *   - a few idle copies per direction, taken and given back under the mutex.
 * AES work happens outside the mutex. The raw key is not kept: only key schedules are. OpenSSL clears one when its
 * context is freed (OPENSSL_clear_free in the provider); those of xts_vaes_kernel.c are in the key itself, for all
 * threads to read, and cleared by `close`.
 */
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "xts_kernel.h"

#define MAX_UNIT ((size_t)BLOCK << 20) /* IEEE 1619, SP 800-38E: at most 2^20 blocks in a data unit */
#define IDLE 8                         /* more threads than this on one key free their copies after use */

struct ebsd_xts {
    pthread_mutex_t lock;
    pthread_cond_t calm; /* nobody is running */
    unsigned running;
    int closed;
    int is_wide; /* and then `wide` has the round keys */
    wide_keys wide;
    EVP_CIPHER_CTX *pristine[2]; /* [0] decrypts, [1] encrypts */
    EVP_CIPHER_CTX *idle[2][IDLE];
    unsigned idle_count[2];
};

const char *ebsd_xts_library(void)
{
    return OpenSSL_version(OPENSSL_VERSION);
}

static EVP_CIPHER_CTX *new_pristine(const EVP_CIPHER *cipher, const unsigned char *key, int encrypt)
{
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();

    if (ctx == NULL)
        return NULL;
    if (EVP_CipherInit_ex(ctx, cipher, NULL, key, NULL, encrypt) != 1) {
        EVP_CIPHER_CTX_free(ctx);
        return NULL;
    }
    return ctx;
}

static int run_openssl(EVP_CIPHER_CTX *ctx, int encrypt, const unsigned char *src, unsigned char *dst, size_t length,
                       size_t unit, const unsigned char *tweak)
{
    unsigned char current[TWEAK_BYTES];

    memcpy(current, tweak, sizeof(current));
    for (size_t at = 0; at < length; at += unit) {
        int written = 0;

        /* No key: the schedule stays and only the tweak is new (76 ns). */
        if (EVP_CipherInit_ex(ctx, NULL, NULL, NULL, current, encrypt) != 1
            || EVP_CipherUpdate(ctx, dst + at, &written, src + at, (int)unit) != 1 || (size_t)written != unit) {
            ERR_clear_error();
            return EBSD_XTS_OPENSSL;
        }
        increment(current);
    }
    return EBSD_XTS_DONE;
}

/* Whether both ways of computing agree for this key: a schedule that was expanded wrongly would make data that nobody
 * else can read. The tweaks carry, and there is one more unit than tweaks are computed at a time. */
static int agrees(const wide_keys *wide, EVP_CIPHER_CTX *encrypts)
{
    static const unsigned char tweak[TWEAK_BYTES] = {0xfe, 0xff, 0xff};
    unsigned char plain[5 * WIDE_BYTES], wanted[sizeof(plain)], found[sizeof(plain)];

    for (size_t at = 0; at < sizeof(plain); at++)
        plain[at] = (unsigned char)(at ^ at >> 8);
    if (run_openssl(encrypts, 1, plain, wanted, sizeof(plain), WIDE_BYTES, tweak) != EBSD_XTS_DONE)
        return 0;
    wide_run(wide, 1, plain, found, sizeof(plain), WIDE_BYTES, tweak);
    if (memcmp(found, wanted, sizeof(found)) != 0)
        return 0;
    wide_run(wide, 0, found, found, sizeof(found), WIDE_BYTES, tweak);
    return memcmp(found, plain, sizeof(found)) == 0;
}

static int make_wide(ebsd_xts *xts, const unsigned char *key)
{
    EVP_CIPHER_CTX *copy;
    int agreed;

    if (!wide_is_there())
        return 0;
    copy = EVP_CIPHER_CTX_new(); /* the pristine ones are never used */
    if (copy == NULL || EVP_CIPHER_CTX_copy(copy, xts->pristine[1]) != 1) {
        EVP_CIPHER_CTX_free(copy);
        ERR_clear_error();
        return 0;
    }
    wide_prepare(&xts->wide, key);
    agreed = agrees(&xts->wide, copy);
    xts->idle[1][xts->idle_count[1]++] = copy;
    return agreed;
}

ebsd_xts *ebsd_xts_new(const unsigned char *key, int plain, int *result)
{
    ebsd_xts *xts;
    EVP_CIPHER *cipher;

    /* Ours, because OpenSSL 3.0 refuses equal halves for encryption only. */
    if (CRYPTO_memcmp(key, key + KEY_BYTES / 2, KEY_BYTES / 2) == 0) {
        *result = EBSD_XTS_EQUAL_HALVES;
        return NULL;
    }
    xts = OPENSSL_zalloc(sizeof(*xts));
    if (xts == NULL) {
        ERR_clear_error();
        *result = EBSD_XTS_NO_MEMORY;
        return NULL;
    }
    if (pthread_mutex_init(&xts->lock, NULL) != 0) {
        OPENSSL_free(xts);
        *result = EBSD_XTS_NO_MEMORY;
        return NULL;
    }
    if (pthread_cond_init(&xts->calm, NULL) != 0) {
        pthread_mutex_destroy(&xts->lock);
        OPENSSL_free(xts);
        *result = EBSD_XTS_NO_MEMORY;
        return NULL;
    }
    cipher = EVP_CIPHER_fetch(NULL, "AES-256-XTS", NULL);
    if (cipher != NULL) {
        xts->pristine[0] = new_pristine(cipher, key, 0);
        xts->pristine[1] = new_pristine(cipher, key, 1);
        EVP_CIPHER_free(cipher); /* the contexts hold their own references */
    }
    if (xts->pristine[0] == NULL || xts->pristine[1] == NULL) {
        /* The queue is per thread and would be read as the cause of some later failure. */
        ERR_clear_error();
        ebsd_xts_free(xts);
        *result = EBSD_XTS_OPENSSL;
        return NULL;
    }
    xts->is_wide = !plain && make_wide(xts, key);
    *result = EBSD_XTS_DONE;
    return xts;
}

int ebsd_xts_is_wide(ebsd_xts *xts)
{
    return xts->is_wide;
}

/* Begin a call; with a context, unless it needs none. */
static int take(ebsd_xts *xts, int encrypt, int is_wide, EVP_CIPHER_CTX **taken)
{
    int result = EBSD_XTS_DONE;

    pthread_mutex_lock(&xts->lock);
    if (xts->closed) {
        result = EBSD_XTS_CLOSED;
    } else if (is_wide) {
        xts->running++;
    } else if (xts->idle_count[encrypt] > 0) {
        *taken = xts->idle[encrypt][--xts->idle_count[encrypt]];
        xts->running++;
    } else {
        EVP_CIPHER_CTX *copy = EVP_CIPHER_CTX_new();

        if (copy == NULL) {
            result = EBSD_XTS_NO_MEMORY;
        } else if (EVP_CIPHER_CTX_copy(copy, xts->pristine[encrypt]) != 1) {
            EVP_CIPHER_CTX_free(copy);
            result = EBSD_XTS_OPENSSL;
        } else {
            *taken = copy;
            xts->running++;
        }
    }
    pthread_mutex_unlock(&xts->lock);
    if (result == EBSD_XTS_NO_MEMORY || result == EBSD_XTS_OPENSSL)
        ERR_clear_error();
    return result;
}

/* End a call and give its context back, if it has one; a context that failed is not used again. */
static void give(ebsd_xts *xts, int encrypt, EVP_CIPHER_CTX *ctx, int usable)
{
    pthread_mutex_lock(&xts->lock);
    if (ctx != NULL && usable && !xts->closed && xts->idle_count[encrypt] < IDLE)
        xts->idle[encrypt][xts->idle_count[encrypt]++] = ctx;
    else
        EVP_CIPHER_CTX_free(ctx);
    if (--xts->running == 0)
        pthread_cond_broadcast(&xts->calm);
    pthread_mutex_unlock(&xts->lock);
}

int ebsd_xts_run(ebsd_xts *xts, int encrypt, const unsigned char *src, unsigned char *dst, size_t length,
                 size_t unit, const unsigned char *tweak)
{
    EVP_CIPHER_CTX *ctx = NULL;
    int is_wide = xts->is_wide && unit % WIDE_BYTES == 0;
    int result;

    encrypt = encrypt != 0;
    if (unit < BLOCK || unit > MAX_UNIT || length % unit != 0)
        return EBSD_XTS_BAD_UNIT;
    /* In place is fine, a shifted copy is not: what is read would have been overwritten. */
    if (src != dst && (uintptr_t)src < (uintptr_t)dst + length && (uintptr_t)dst < (uintptr_t)src + length)
        return EBSD_XTS_OVERLAP;
    result = take(xts, encrypt, is_wide, &ctx);
    if (result != EBSD_XTS_DONE)
        return result;
    if (is_wide)
        wide_run(&xts->wide, encrypt, src, dst, length, unit, tweak);
    else
        result = run_openssl(ctx, encrypt, src, dst, length, unit, tweak);
    give(xts, encrypt, ctx, result == EBSD_XTS_DONE);
    return result;
}

void ebsd_xts_close(ebsd_xts *xts)
{
    pthread_mutex_lock(&xts->lock);
    xts->closed = 1;
    while (xts->running > 0)
        pthread_cond_wait(&xts->calm, &xts->lock);
    for (int encrypt = 0; encrypt < 2; encrypt++) {
        while (xts->idle_count[encrypt] > 0)
            EVP_CIPHER_CTX_free(xts->idle[encrypt][--xts->idle_count[encrypt]]);
        EVP_CIPHER_CTX_free(xts->pristine[encrypt]);
        xts->pristine[encrypt] = NULL;
    }
    OPENSSL_cleanse(&xts->wide, sizeof(xts->wide));
    pthread_mutex_unlock(&xts->lock);
}

void ebsd_xts_free(ebsd_xts *xts)
{
    if (xts == NULL)
        return;
    ebsd_xts_close(xts);
    pthread_cond_destroy(&xts->calm);
    pthread_mutex_destroy(&xts->lock);
    OPENSSL_clear_free(xts, sizeof(*xts));
}
