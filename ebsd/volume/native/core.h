/* The native engine, as Python sees it. Declarations read by cffi: no directives here. Everything but the hot calls is
 * for the thread of the event loop; `use_map`, `use_head` and `reserve` besides only while everything is claimed, or
 * before the first request. What returns int returns 0 or -errno unless it says something else. */

typedef struct ebsd_core ebsd_core;
typedef struct ebsd_claim ebsd_claim;

/* `xts_run`: address of ebsd_xts_run, 0 for a volume without a cipher. NULL: no memory, or no descriptor. */
ebsd_core *ebsd_core_new(uintptr_t xts_run, int read_only, int checks_leaves);
void ebsd_core_free(ebsd_core *core); /* nobody may be in a hot call any more; claims may still be given back */
void ebsd_core_stop(ebsd_core *core); /* hot calls punt from now on, for ever */
uintptr_t ebsd_core_hot(ebsd_core *core); /* an ebsd_hot, see hot.h */
int ebsd_core_bell(ebsd_core *core); /* eventfd, made at first: a task was granted its claim by a thread; or -errno */

/* For tests: what stands for pread and pwrite. */
void ebsd_core_use_calls(ebsd_core *core, uintptr_t pread_call, uintptr_t pwrite_call);

/* --- maps and head */

int ebsd_core_reserve(ebsd_core *core, uint64_t chunks, uint32_t head);
void ebsd_core_use_map(ebsd_core *core, uintptr_t entries, uintptr_t marks, uint64_t chunks, uint64_t size);
int ebsd_core_use_head(ebsd_core *core, uint32_t number, const int *fds, const uintptr_t *keys, uint32_t segments,
                       uint32_t preallocated);
void ebsd_core_wrote_out(ebsd_core *core, uint32_t extent, int is_written_out); /* of the durable map */
uint64_t ebsd_core_next_stored(ebsd_core *core, uint64_t first, uint64_t end); /* the first chunk that is no hole */

/* --- claims */

ebsd_claim *ebsd_core_claim(ebsd_core *core, uint32_t first, uint32_t end, int exclusive, uint32_t *blockers);
int ebsd_core_is_held(ebsd_core *core, ebsd_claim *claim);
uint32_t ebsd_core_unclaim(ebsd_core *core, ebsd_claim *claim); /* how many tasks were granted theirs by this */
uint32_t ebsd_core_claims(ebsd_core *core);

/* --- sealed layers: see layers.h and leaves.h */

int ebsd_core_add_layer(ebsd_core *core, uint32_t number, uint32_t segment, const unsigned char *uuid, int fd,
                        uintptr_t key);
int ebsd_core_give_leaves(ebsd_core *core, uint32_t number, uint32_t segment, const unsigned char *whole,
                          size_t length, int fd, uint32_t runs, uint32_t chunks, const uint32_t *index,
                          uint32_t pages);
int ebsd_core_give_no_leaves(ebsd_core *core, uint32_t number, uint32_t segment);
int ebsd_core_drop_layer(ebsd_core *core, uint32_t number, uint32_t segment);
int ebsd_core_was_used(ebsd_core *core, uint32_t number, uint32_t segment); /* 0 or 1 */

/* --- space: how many new chunks hot writes may take, until a time of CLOCK_MONOTONIC in nanoseconds */

void ebsd_core_lend(ebsd_core *core, int64_t chunks, int64_t until);

/* --- changes: see changes.h */

enum ebsd_core_set { EBSD_CORE_CHANGED = 0, EBSD_CORE_LEFT = 1 };

int64_t ebsd_core_freeze(ebsd_core *core, const uint32_t *also, uint32_t count, uint32_t *pages,
                         unsigned char *copies, uint32_t room, uint64_t *touched);
void ebsd_core_clean(ebsd_core *core, const uint32_t *pages, uint32_t count);
uint64_t ebsd_core_touched(ebsd_core *core); /* segments of the head, which are not touched any more then */
uint32_t ebsd_core_dirty_pages(ebsd_core *core);
int ebsd_core_needs_flush(ebsd_core *core);
size_t ebsd_core_words(ebsd_core *core, int set);
void ebsd_core_take(ebsd_core *core, int set, uint64_t *words, size_t count);

enum ebsd_core_count { EBSD_CORE_READS, EBSD_CORE_READ_BYTES, EBSD_CORE_WRITES, EBSD_CORE_WRITTEN_BYTES,
                       EBSD_CORE_COPIED, EBSD_CORE_COUNTS };

void ebsd_core_counts(ebsd_core *core, uint64_t *counts);

/* --- the hot calls, for tests and benchmarks: what a transport does with `hot` */

void *ebsd_hot_lane_new(uintptr_t hot);
void ebsd_hot_lane_free(uintptr_t hot, void *lane);
int ebsd_hot_read(uintptr_t hot, void *lane, uint64_t offset, size_t length, unsigned char *out);
int ebsd_hot_write(uintptr_t hot, void *lane, uint64_t offset, size_t length, const unsigned char *data);
