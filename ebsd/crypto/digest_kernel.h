/* What digest_kernel.c offers; cffi reads this text, so no preprocessor here. */

enum ebsd_digest_result {
    EBSD_DIGEST_DONE = 0,
    EBSD_DIGEST_BAD_LENGTH = 1, /* no pieces, a count that does not fit, or a prefix longer than PREFIX_MOST */
    EBSD_DIGEST_OPENSSL = 2     /* libcrypto failed, or had no memory */
};

/* Write SHA-256(prefix || u64 number, little endian || piece) of each of `count` pieces of `piece` bytes into `digests`,
 * 32 bytes each. Pieces follow one another from `data` on; the first has the number `first`, the next ones count up.
 * Returns an ebsd_digest_result; after anything but EBSD_DIGEST_DONE `digests` holds nothing of use. Thread-safe.
 * `plain` not 0: by libcrypto alone, whatever the processor can do. */
int ebsd_digest_pieces(const unsigned char *prefix, size_t prefix_length, uint64_t first, const unsigned char *data,
                       size_t piece, size_t count, unsigned char *digests, int plain);

/* Say whether two pieces at a time are computed with the processor's SHA instructions. */
int ebsd_digest_pairs(void);

/* Say whether sixteen pieces at a time are computed with vectors of 512 bits; of what is left over, pairs. */
int ebsd_digest_sixteens(void);
