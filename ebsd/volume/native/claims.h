/* Locks on ranges of chunks, as in chunklocks.py: shared or exclusive, first come first served, for threads of C and
 * for tasks of Python's event loop alike.
 *
 * 1. A claim waits for every conflicting claim that came before it, granted or not: nobody starves.
 * 2. A claim covers its whole range or nothing, and who holds one enters no other: no deadlock is possible.
 * 3. A thread sleeps until its claim is held. A task is told through a descriptor that its loop watches; then it looks.
 */
#ifndef EBSD_CLAIMS_H
#define EBSD_CLAIMS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct ebsd_claim ebsd_claim;

struct ebsd_claim {
    ebsd_claim *next;
    ebsd_claim *previous;
    uint32_t first; /* chunks [first, end) */
    uint32_t end;
    uint32_t blockers; /* earlier claims that conflict with this one and are there still */
    unsigned char exclusive;
    pthread_cond_t *granted; /* of the thread that may sleep; NULL: a task of Python's */
};

typedef struct {
    pthread_mutex_t lock;
    ebsd_claim *oldest;
    ebsd_claim *newest;
    uint32_t count;
    atomic_int bell; /* eventfd: a thread has granted a task its claim; -1 until somebody listens */
} ebsd_claims;

int ebsd_claims_init(ebsd_claims *claims); /* 0 or -errno */
void ebsd_claims_end(ebsd_claims *claims); /* nobody holds one, or waits */

/* Join the queue with a claim whose first, end, exclusive and granted are set; return its blockers. */
uint32_t ebsd_claims_join(ebsd_claims *claims, ebsd_claim *claim);

/* Join, and sleep until the claim is held; for threads. */
void ebsd_claims_hold(ebsd_claims *claims, ebsd_claim *claim);

/* Leave the queue, held or not, and grant what only this claim held up; return how many tasks were granted theirs. */
uint32_t ebsd_claims_leave(ebsd_claims *claims, ebsd_claim *claim);

/* As `leave`, for threads: the loop is told of tasks that were granted theirs. */
void ebsd_claims_release(ebsd_claims *claims, ebsd_claim *claim);

int ebsd_claims_listen(ebsd_claims *claims); /* the bell, or -errno; who listens looks whether it is held after that */
int ebsd_claims_is_held(ebsd_claims *claims, const ebsd_claim *claim);

#endif
