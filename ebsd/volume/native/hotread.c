/* Reads without Python: rules R1 and R2, and "a hole never meets the cipher". */
#include <errno.h>
#include <string.h>

#include "engine.h"

#define XTS_DONE 0   /* of xts_kernel.h */
#define XTS_CLOSED 2

int ebsd_read_all(ebsd_core *core, int fd, unsigned char *to, size_t length, uint64_t place)
{
    size_t done = 0;

    while (done < length) {
        ssize_t count = core->pread_call(fd, to + done, length - done, (off_t)(place + done));

        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return errno > 0 ? -errno : -EIO;
        if (count == 0)
            return EBSD_HOT_PUNT;
        done += (size_t)count;
    }
    return 0;
}

int ebsd_run_cipher(ebsd_core *core, ebsd_xts *key, int encrypt, const unsigned char *from, unsigned char *to,
                    size_t length, uint64_t offset)
{
    unsigned char tweak[16] = {0};
    uint64_t sector = offset / SECTOR;
    int result;

    if (key == NULL) {
        if (from != to)
            memcpy(to, from, length);
        return 0;
    }
    for (int at = 0; at < 8; at++)
        tweak[at] = (unsigned char)(sector >> (8 * at));
    result = core->xts_run(key, encrypt, from, to, length, SECTOR, tweak);
    if (result == XTS_DONE)
        return 0;
    return result == XTS_CLOSED ? EBSD_HOT_PUNT : -EIO;
}

/* Read and decrypt sectors of one segment of one layer. */
static int read_piece(ebsd_core *core, uint32_t number, uint64_t position, size_t length, unsigned char *out)
{
    uint32_t segment = (uint32_t)(position >> SEGMENT_SHIFT);
    uint64_t place = position & (SEGMENT - 1);
    ebsd_layer *layer;
    int result;

    if (number == core->head) {
        if (segment >= core->segments)
            return EBSD_HOT_PUNT;
        result = ebsd_read_all(core, core->head_fds[segment], out, length, place);
        if (result == 0)
            result = ebsd_run_cipher(core, core->head_keys[segment], 0, out, out, length, position);
        return result;
    }
    layer = ebsd_layers_use(&core->layers, number, segment);
    if (layer == NULL)
        return EBSD_HOT_PUNT;
    result = ebsd_read_all(core, layer->fd, out, length, place);
    if (result == 0)
        result = ebsd_run_cipher(core, layer->key, 0, out, out, length, position);
    ebsd_layers_unuse(&core->layers, layer);
    return result;
}

/* Fill `out` with whole sectors that are claimed: consecutive chunks of one layer and segment are one read. */
static int read_claimed(ebsd_core *core, uint64_t offset, size_t length, unsigned char *out)
{
    uint64_t last = (offset + length - 1) >> CHUNK_SHIFT;

    while (length > 0) {
        uint64_t following = (offset >> CHUNK_SHIFT) + 1;
        uint32_t layer = ebsd_entry(core, following - 1);
        uint64_t border = ((offset >> SEGMENT_SHIFT) + 1) << SEGMENT_SHIFT;
        uint64_t end;
        size_t run;
        int result = 0;

        while (following <= last && ebsd_entry(core, following) == layer)
            following++;
        end = following << CHUNK_SHIFT;
        if (layer != HOLE && end > border)
            end = border;
        run = end - offset < length ? (size_t)(end - offset) : length;
        if (layer == HOLE)
            memset(out, 0, run);
        else
            result = read_piece(core, layer, offset, run, out);
        if (result != 0)
            return result;
        offset += run;
        out += run;
        length -= run;
    }
    return 0;
}

int ebsd_read(void *engine, void *lane_, uint64_t offset, size_t length, unsigned char *out)
{
    ebsd_core *core = engine;
    ebsd_lane *lane = lane_;
    ebsd_claim claim;
    int result;

    if (length == 0 || ((offset | length) & (SECTOR - 1)) != 0 || offset >> 46 != 0 || length > SEGMENT)
        return EBSD_HOT_PUNT;
    claim.first = (uint32_t)(offset >> CHUNK_SHIFT);
    claim.end = (uint32_t)((offset + length - 1) >> CHUNK_SHIFT) + 1;
    claim.exclusive = 0;
    claim.granted = &lane->granted;
    ebsd_claims_hold(&core->claims, &claim);
    if (atomic_load(&core->stopped) || offset + length > core->size)
        result = EBSD_HOT_PUNT;
    else
        result = read_claimed(core, offset, length, out);
    ebsd_claims_release(&core->claims, &claim);
    if (result == 0) {
        ebsd_count(core, EBSD_CORE_READS, 1);
        ebsd_count(core, EBSD_CORE_READ_BYTES, length);
    }
    return result;
}
