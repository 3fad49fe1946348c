/* XTS-AES-256 over many data units in one call, thread-safe per key. Declarations read by cffi: no directives here. */

typedef struct ebsd_xts ebsd_xts;

/* What every function answers. */
enum ebsd_xts_result {
    EBSD_XTS_DONE = 0,
    EBSD_XTS_EQUAL_HALVES = 1,   /* Key1 == Key2: refused, SP 800-38E and FIPS 140 IG C.I */
    EBSD_XTS_CLOSED = 2,         /* used after ebsd_xts_close */
    EBSD_XTS_BAD_UNIT = 3,       /* unit outside 16 .. 2^24 bytes, or the length is no multiple of it */
    EBSD_XTS_OVERLAP = 4,        /* the buffers overlap without being the same */
    EBSD_XTS_NO_MEMORY = 5,
    EBSD_XTS_OPENSSL = 6         /* OpenSSL refused; the destination's content is undefined */
};

/* Make a key from Key1 || Key2 (64 bytes). `plain`: all by libcrypto, whatever the processor has. *result says what
   happened; NULL unless EBSD_XTS_DONE. */
ebsd_xts *ebsd_xts_new(const unsigned char *key, int plain, int *result);

/* Whether units of multiples of 256 bytes are computed by xts_vaes_kernel.c. */
int ebsd_xts_is_wide(ebsd_xts *xts);

/* Encrypt (1) or decrypt (0) `length` bytes as data units of `unit` bytes; the 16 bytes at `tweak` are
   the first unit's tweak, a little-endian number that grows by one per unit. src == dst is allowed. */
int ebsd_xts_run(ebsd_xts *xts, int encrypt, const unsigned char *src, unsigned char *dst, size_t length,
                 size_t unit, const unsigned char *tweak);

/* Wait for running calls, then wipe every key schedule. May be called again. */
void ebsd_xts_close(ebsd_xts *xts);

/* Close and give the memory back. Nobody may be inside another call. */
void ebsd_xts_free(ebsd_xts *xts);

/* Text of the OpenSSL this module runs on. */
const char *ebsd_xts_library(void);
