/* XTS-AES-256 over many data units in one call, thread-safe per key.
 *
 * Why native: through the `cryptography` package each 4096-byte sector costs a new context, 4.9 us; here it costs the
 * cipher itself and one change of the IV. cffi drops the interpreter's lock around every call.
 *
 * A context of OpenSSL may be used by one thread at a time, so a key owns
 *   - one pristine context per direction, which is only ever copied, and
 *   - a few idle copies per direction, taken and given back under the mutex.
 * AES work happens outside the mutex. The raw key is not kept: only OpenSSL's key schedules are, and OpenSSL clears a
 * schedule when its context is freed (OPENSSL_clear_free in the provider).
 */
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "xts_kernel.h"

#define KEY_BYTES 64
#define TWEAK_BYTES 16
#define BLOCK 16
#define MAX_UNIT ((size_t)BLOCK << 20) /* IEEE 1619, SP 800-38E: at most 2^20 blocks in a data unit */
#define IDLE 8                         /* more threads than this on one key free their copies after use */

struct ebsd_xts {
    pthread_mutex_t lock;
    pthread_cond_t calm; /* nobody is running */
    unsigned running;
    int closed;
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

ebsd_xts *ebsd_xts_new(const unsigned char *key, int *result)
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
    *result = EBSD_XTS_DONE;
    return xts;
}

/* Take a context for one call. */
static int take(ebsd_xts *xts, int encrypt, EVP_CIPHER_CTX **taken)
{
    int result = EBSD_XTS_DONE;

    pthread_mutex_lock(&xts->lock);
    if (xts->closed) {
        result = EBSD_XTS_CLOSED;
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

/* Give the context back; a context that failed is not used again. */
static void give(ebsd_xts *xts, int encrypt, EVP_CIPHER_CTX *ctx, int usable)
{
    pthread_mutex_lock(&xts->lock);
    if (usable && !xts->closed && xts->idle_count[encrypt] < IDLE)
        xts->idle[encrypt][xts->idle_count[encrypt]++] = ctx;
    else
        EVP_CIPHER_CTX_free(ctx);
    if (--xts->running == 0)
        pthread_cond_broadcast(&xts->calm);
    pthread_mutex_unlock(&xts->lock);
}

static void increment(unsigned char tweak[TWEAK_BYTES])
{
    for (int i = 0; i < TWEAK_BYTES && ++tweak[i] == 0; i++)
        ;
}

int ebsd_xts_run(ebsd_xts *xts, int encrypt, const unsigned char *src, unsigned char *dst, size_t length,
                 size_t unit, const unsigned char *tweak)
{
    EVP_CIPHER_CTX *ctx = NULL;
    unsigned char current[TWEAK_BYTES];
    int result;

    encrypt = encrypt != 0;
    if (unit < BLOCK || unit > MAX_UNIT || length % unit != 0)
        return EBSD_XTS_BAD_UNIT;
    /* In place is fine, a shifted copy is not: OpenSSL would read what it has already overwritten. */
    if (src != dst && (uintptr_t)src < (uintptr_t)dst + length && (uintptr_t)dst < (uintptr_t)src + length)
        return EBSD_XTS_OVERLAP;
    memcpy(current, tweak, sizeof(current));

    result = take(xts, encrypt, &ctx);
    if (result != EBSD_XTS_DONE)
        return result;
    for (size_t at = 0; at < length; at += unit) {
        int written = 0;

        /* No key: the schedule stays and only the tweak is new (76 ns). */
        if (EVP_CipherInit_ex(ctx, NULL, NULL, NULL, current, encrypt) != 1
            || EVP_CipherUpdate(ctx, dst + at, &written, src + at, (int)unit) != 1 || (size_t)written != unit) {
            ERR_clear_error();
            result = EBSD_XTS_OPENSSL;
            break;
        }
        increment(current);
    }
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
