/* What a transport may ask of an engine from any thread, without Python.
 *
 * One struct per engine; Python hands its address on as an int (``NativeEngine.hot``), and whoever is given none punts
 * every request. A range lies inside the volume and its length is not 0: what ends or lies behind the end is the
 * transport's to punt. The struct and the engine live until no transport calls any more.
 */
#ifndef EBSD_HOT_H
#define EBSD_HOT_H

#include <stddef.h>
#include <stdint.h>

/* Not something the hot path can do: hand the request to the Python engine, whole. Nothing has changed. */
#define EBSD_HOT_PUNT 1

typedef struct {
    void *engine; /* first argument of every call */

    /* The buffers of one thread of a transport: touched and locked into memory. NULL: there is no memory. */
    void *(*lane_new)(void *engine);
    void (*lane_free)(void *engine, void *lane); /* cleared, and given back; NULL is allowed */

    /* Both answer 0 (done), -errno (of this request and no other), or EBSD_HOT_PUNT. They may wait for other requests of
     * the same chunks. After an error of a write each of its sectors holds old or new bytes; what `out` holds after
     * anything but 0 is undefined. */
    int (*read)(void *engine, void *lane, uint64_t offset, size_t length, unsigned char *out);
    int (*write)(void *engine, void *lane, uint64_t offset, size_t length, const unsigned char *data);
} ebsd_hot;

#endif
