/* SHA-256 of many pieces in one call, each behind a prefix and its number.
 *
 * Why native: one call of Python per 64 KiB takes the interpreter's lock twice; and the SHA instructions of x86 wait for
 * their own results most of the time, so that two messages side by side take little longer than one. Where vectors of
 * 512 bits are there, sixteen messages, one in each 32 bits, take two thirds of the time of eight such pairs. Pieces are
 * computed by sixteens, then in pairs, as far as the processor can; what is left, and everything elsewhere, by libcrypto.
 * ebsd.crypto.selftest compares both with known answers before a key is touched.
 */
#include <openssl/err.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <string.h>

#include "digest_kernel.h"

#define BLOCK 64
#define DIGEST 32
#define NUMBER 8
#define PREFIX_MOST 48 /* prefix and number fit into one block */

static void put_number(unsigned char to[NUMBER], uint64_t number)
{
    for (int i = 0; i < NUMBER; i++)
        to[i] = (unsigned char)(number >> 8 * i);
}

static int plain_pieces(const unsigned char *head, size_t head_length, uint64_t first, const unsigned char *data,
                        size_t piece, size_t count, unsigned char *digests)
{
    EVP_MD *md = EVP_MD_fetch(NULL, "SHA256", NULL);
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    unsigned char start[BLOCK];
    int good = md != NULL && ctx != NULL;

    memcpy(start, head, head_length);
    for (size_t i = 0; good && i < count; i++) {
        put_number(start + head_length - NUMBER, first + i);
        good = EVP_DigestInit_ex2(ctx, md, NULL) == 1 && EVP_DigestUpdate(ctx, start, head_length) == 1
               && EVP_DigestUpdate(ctx, data + i * piece, piece) == 1
               && EVP_DigestFinal_ex(ctx, digests + i * DIGEST, NULL) == 1;
    }
    EVP_MD_CTX_free(ctx);
    EVP_MD_free(md);
    if (!good)
        ERR_clear_error();
    return good ? EBSD_DIGEST_DONE : EBSD_DIGEST_OPENSSL;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

#define SHA_CODE __attribute__((target("sha,sse4.1,ssse3")))

static const uint32_t ROUND[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* The eight words of a state as the instructions want them, highest first. */
typedef struct {
    __m128i abef, cdgh;
} State;

/* One message on its way: what is left of it is `blocks` whole blocks at `at`. */
typedef struct {
    State state;
    const unsigned char *at;
} Message;

SHA_CODE static inline State initial(void)
{
    State state = {_mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c),
                   _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19)};
    return state;
}

SHA_CODE static inline __m128i load(const unsigned char *at)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);

    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)at), big_endian);
}

/* Four rounds with the four words `w` of the schedule. */
SHA_CODE static inline void rounds(State *state, __m128i w, __m128i constants)
{
    __m128i sum = _mm_add_epi32(w, constants);

    state->cdgh = _mm_sha256rnds2_epu32(state->cdgh, state->abef, sum);
    state->abef = _mm_sha256rnds2_epu32(state->abef, state->cdgh, _mm_shuffle_epi32(sum, 0x0e));
}

/* The words 16 further on, of the last sixteen: w[0] are the oldest four. */
SHA_CODE static inline __m128i further(__m128i w0, __m128i w1, __m128i w2, __m128i w3)
{
    __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));

    return _mm_sha256msg2_epu32(sum, w3);
}

/* Take `blocks` blocks of both messages, in step. */
SHA_CODE static void take_blocks(Message *one, Message *two, size_t blocks)
{
    State a = one->state, b = two->state;
    const unsigned char *from_a = one->at, *from_b = two->at;

    for (; blocks > 0; blocks--, from_a += BLOCK, from_b += BLOCK) {
        const State before_a = a, before_b = b;
        __m128i v[4], w[4];

#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m128i constants = _mm_load_si128((const __m128i *)(ROUND + 4 * i));
            const int at = i & 3;

            if (i < 4) {
                v[at] = load(from_a + 16 * i);
                w[at] = load(from_b + 16 * i);
            } else {
                v[at] = further(v[at], v[(at + 1) & 3], v[(at + 2) & 3], v[(at + 3) & 3]);
                w[at] = further(w[at], w[(at + 1) & 3], w[(at + 2) & 3], w[(at + 3) & 3]);
            }
            rounds(&a, v[at], constants);
            rounds(&b, w[at], constants);
        }
        a.abef = _mm_add_epi32(a.abef, before_a.abef);
        a.cdgh = _mm_add_epi32(a.cdgh, before_a.cdgh);
        b.abef = _mm_add_epi32(b.abef, before_b.abef);
        b.cdgh = _mm_add_epi32(b.cdgh, before_b.cdgh);
    }
    one->state = a, two->state = b;
    one->at = from_a, two->at = from_b;
}

SHA_CODE static void put_digest(unsigned char digest[DIGEST], const State *state)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i feba = _mm_shuffle_epi32(state->abef, 0x1b), dchg = _mm_shuffle_epi32(state->cdgh, 0xb1);
    __m128i dcba = _mm_blend_epi16(feba, dchg, 0xf0), hgfe = _mm_alignr_epi8(dchg, feba, 8);

    _mm_storeu_si128((__m128i *)digest, _mm_shuffle_epi8(dcba, big_endian));
    _mm_storeu_si128((__m128i *)(digest + 16), _mm_shuffle_epi8(hgfe, big_endian));
}

/* Write what follows the last whole block of a message of `length` bytes, padded; return how many blocks. */
static size_t pad(unsigned char end[2 * BLOCK], const unsigned char *rest, size_t left, uint64_t length)
{
    size_t blocks = left + 1 + 8 <= BLOCK ? 1 : 2;

    memset(end, 0, 2 * BLOCK);
    memcpy(end, rest, left);
    end[left] = 0x80;
    for (int i = 0; i < 8; i++)
        end[blocks * BLOCK - 1 - (size_t)i] = (unsigned char)(8 * length >> 8 * i);
    return blocks;
}

/* Two pieces of the same length, at least a block each. */
SHA_CODE static void pair(unsigned char *head, size_t head_length, uint64_t number, const unsigned char *data,
                          size_t piece, unsigned char *digests)
{
    const size_t front = BLOCK - head_length, whole = (piece - front) / BLOCK, left = (piece - front) % BLOCK;
    unsigned char start[2][BLOCK], end[2][2 * BLOCK];
    Message messages[2];
    size_t blocks = 0;

    for (size_t i = 0; i < 2; i++) {
        put_number(head + head_length - NUMBER, number + i);
        memcpy(start[i], head, head_length);
        memcpy(start[i] + head_length, data + i * piece, front);
        blocks = pad(end[i], data + (i + 1) * piece - left, left, head_length + piece);
        messages[i].state = initial();
        messages[i].at = start[i];
    }
    take_blocks(&messages[0], &messages[1], 1);
    for (size_t i = 0; i < 2; i++)
        messages[i].at = data + i * piece + front;
    take_blocks(&messages[0], &messages[1], whole);
    for (size_t i = 0; i < 2; i++)
        messages[i].at = end[i];
    take_blocks(&messages[0], &messages[1], blocks);
    for (size_t i = 0; i < 2; i++)
        put_digest(digests + i * DIGEST, &messages[i].state);
}

/* --- sixteen at a time: FIPS 180-4, 6.2.2, with a message in each 32 bits */

#define LANES 16
#define WIDE_CODE __attribute__((target("avx512f,avx512bw")))
#define INLINE_WIDE WIDE_CODE __attribute__((always_inline)) static inline

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

INLINE_WIDE __m512i plus(__m512i a, __m512i b)
{
    return _mm512_add_epi32(a, b);
}

/* The truth tables of `ternarylogic`: 0x96 is x ^ y ^ z, 0xca is x ? y : z, 0xe8 the majority. */
INLINE_WIDE __m512i sum_of(__m512i x, __m512i y, __m512i z)
{
    return _mm512_ternarylogic_epi32(x, y, z, 0x96);
}

/* Turn rows into columns: then words[i] has the i-th words of all messages, and not all words of the i-th message. */
INLINE_WIDE void transpose(__m512i words[LANES])
{
    __m512i t[LANES];

    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        words[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        words[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        words[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        words[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(words[i], words[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(words[i], words[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(words[i + 8], words[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(words[i + 8], words[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        words[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        words[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        words[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        words[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* The word 16 further on; w are the last sixteen, w[at] the oldest. */
INLINE_WIDE __m512i next_word(const __m512i w[LANES], int at)
{
    const __m512i early = w[(at + 1) & 15], late = w[(at + 14) & 15];
    const __m512i small0 =
        sum_of(_mm512_ror_epi32(early, 7), _mm512_ror_epi32(early, 18), _mm512_srli_epi32(early, 3));
    const __m512i small1 =
        sum_of(_mm512_ror_epi32(late, 17), _mm512_ror_epi32(late, 19), _mm512_srli_epi32(late, 10));

    return plus(plus(w[at], w[(at + 9) & 15]), plus(small0, small1));
}

/* Take `blocks` blocks of each message, which begin `stride` bytes after one another. */
WIDE_CODE static void take_wide(__m512i state[8], const unsigned char *from, size_t stride, size_t blocks)
{
    const __m512i big_endian =
        _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL));
    __m512i a = state[0], b = state[1], c = state[2], d = state[3];
    __m512i e = state[4], f = state[5], g = state[6], h = state[7];

    for (; blocks > 0; blocks--, from += BLOCK) {
        const __m512i before[8] = {a, b, c, d, e, f, g, h};
        __m512i w[LANES];

#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            w[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + (size_t)i * stride), big_endian);
        transpose(w);
#pragma GCC unroll 64
        for (int i = 0; i < 64; i++) {
            const int at = i & 15;
            const __m512i big1 = sum_of(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11), _mm512_ror_epi32(e, 25));
            const __m512i big0 = sum_of(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13), _mm512_ror_epi32(a, 22));
            const __m512i choice = _mm512_ternarylogic_epi32(e, f, g, 0xca);
            const __m512i majority = _mm512_ternarylogic_epi32(a, b, c, 0xe8);
            const __m512i with_word = plus(plus(h, _mm512_set1_epi32((int)ROUND[i])), w[at]);
            const __m512i mixed = plus(with_word, plus(choice, big1));

            h = g, g = f, f = e, e = plus(d, mixed);
            d = c, c = b, b = a, a = plus(mixed, plus(big0, majority));
            if (i < 48)
                w[at] = next_word(w, at);
        }
        a = plus(a, before[0]), b = plus(b, before[1]), c = plus(c, before[2]), d = plus(d, before[3]);
        e = plus(e, before[4]), f = plus(f, before[5]), g = plus(g, before[6]), h = plus(h, before[7]);
    }
    state[0] = a, state[1] = b, state[2] = c, state[3] = d;
    state[4] = e, state[5] = f, state[6] = g, state[7] = h;
}

/* Sixteen pieces of the same length, at least a block each. */
WIDE_CODE static void sixteen(unsigned char *head, size_t head_length, uint64_t number, const unsigned char *data,
                              size_t piece, unsigned char *digests)
{
    const size_t front = BLOCK - head_length, whole = (piece - front) / BLOCK, left = (piece - front) % BLOCK;
    unsigned char start[LANES][BLOCK], end[LANES][2 * BLOCK];
    uint32_t words[8][LANES];
    __m512i state[8];
    size_t blocks = 0;

    for (size_t i = 0; i < LANES; i++) {
        put_number(head + head_length - NUMBER, number + i);
        memcpy(start[i], head, head_length);
        memcpy(start[i] + head_length, data + i * piece, front);
        blocks = pad(end[i], data + (i + 1) * piece - left, left, head_length + piece);
    }
    for (int i = 0; i < 8; i++)
        state[i] = _mm512_set1_epi32((int)INITIAL[i]);
    take_wide(state, start[0], sizeof start[0], 1);
    take_wide(state, data + front, piece, whole);
    take_wide(state, end[0], sizeof end[0], blocks);
    for (int i = 0; i < 8; i++)
        _mm512_storeu_si512(words[i], state[i]);
    for (size_t i = 0; i < LANES; i++)
        for (int word = 0; word < 8; word++)
            for (int byte = 0; byte < 4; byte++)
                *digests++ = (unsigned char)(words[word][i] >> (24 - 8 * byte));
}

int ebsd_digest_sixteens(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

int ebsd_digest_pairs(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_SHA))
        return 0;
    return __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
}
#else
#define LANES 16

static void sixteen(unsigned char *head, size_t head_length, uint64_t number, const unsigned char *data, size_t piece,
                    unsigned char *digests)
{
    (void)head, (void)head_length, (void)number, (void)data, (void)piece, (void)digests;
}

int ebsd_digest_sixteens(void)
{
    return 0;
}

static void pair(unsigned char *head, size_t head_length, uint64_t number, const unsigned char *data, size_t piece,
                 unsigned char *digests)
{
    (void)head, (void)head_length, (void)number, (void)data, (void)piece, (void)digests;
}

int ebsd_digest_pairs(void)
{
    return 0;
}
#endif

int ebsd_digest_pieces(const unsigned char *prefix, size_t prefix_length, uint64_t first, const unsigned char *data,
                       size_t piece, size_t count, unsigned char *digests, int plain)
{
    unsigned char head[BLOCK];
    size_t head_length = prefix_length + NUMBER, done = 0;

    if (prefix_length > PREFIX_MOST || piece == 0 || count > SIZE_MAX / piece)
        return EBSD_DIGEST_BAD_LENGTH;
    memcpy(head, prefix, prefix_length);
    memset(head + prefix_length, 0, NUMBER);
    if (!plain && piece >= BLOCK && ebsd_digest_sixteens())
        for (; done + LANES <= count; done += LANES)
            sixteen(head, head_length, first + done, data + done * piece, piece, digests + done * DIGEST);
    if (!plain && piece >= BLOCK && ebsd_digest_pairs())
        for (; done + 2 <= count; done += 2)
            pair(head, head_length, first + done, data + done * piece, piece, digests + done * DIGEST);
    if (done == count)
        return EBSD_DIGEST_DONE;
    return plain_pieces(head, head_length, first + done, data + done * piece, piece, count - done,
                        digests + done * DIGEST);
}
