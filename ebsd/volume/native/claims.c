#include <errno.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "claims.h"

int ebsd_claims_init(ebsd_claims *claims)
{
    int result = pthread_mutex_init(&claims->lock, NULL);

    if (result != 0)
        return -result;
    claims->oldest = claims->newest = NULL;
    claims->count = 0;
    atomic_init(&claims->bell, -1);
    return 0;
}

int ebsd_claims_listen(ebsd_claims *claims)
{
    int bell = atomic_load(&claims->bell);

    if (bell >= 0)
        return bell;
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell < 0)
        return -errno;
    atomic_store(&claims->bell, bell);
    return bell;
}

void ebsd_claims_end(ebsd_claims *claims)
{
    if (atomic_load(&claims->bell) >= 0)
        close(atomic_load(&claims->bell));
    pthread_mutex_destroy(&claims->lock);
}

static int conflict(const ebsd_claim *one, const ebsd_claim *other)
{
    return one->first < other->end && other->first < one->end && (one->exclusive || other->exclusive);
}

static void append(ebsd_claims *claims, ebsd_claim *claim)
{
    claim->blockers = 0;
    for (const ebsd_claim *other = claims->oldest; other != NULL; other = other->next)
        if (conflict(claim, other))
            claim->blockers++;
    claim->next = NULL;
    claim->previous = claims->newest;
    if (claims->newest != NULL)
        claims->newest->next = claim;
    else
        claims->oldest = claim;
    claims->newest = claim;
    claims->count++;
}

uint32_t ebsd_claims_join(ebsd_claims *claims, ebsd_claim *claim)
{
    uint32_t blockers;

    pthread_mutex_lock(&claims->lock);
    append(claims, claim);
    blockers = claim->blockers;
    pthread_mutex_unlock(&claims->lock);
    return blockers;
}

void ebsd_claims_hold(ebsd_claims *claims, ebsd_claim *claim)
{
    pthread_mutex_lock(&claims->lock);
    append(claims, claim);
    while (claim->blockers > 0)
        pthread_cond_wait(claim->granted, &claims->lock);
    pthread_mutex_unlock(&claims->lock);
}

uint32_t ebsd_claims_leave(ebsd_claims *claims, ebsd_claim *claim)
{
    uint32_t tasks = 0;

    pthread_mutex_lock(&claims->lock);
    if (claim->previous != NULL)
        claim->previous->next = claim->next;
    else
        claims->oldest = claim->next;
    if (claim->next != NULL)
        claim->next->previous = claim->previous;
    else
        claims->newest = claim->previous;
    claims->count--;
    /* Only later ones counted this claim as a blocker. */
    for (ebsd_claim *other = claim->next; other != NULL; other = other->next) {
        if (!conflict(claim, other) || --other->blockers > 0)
            continue;
        if (other->granted == NULL)
            tasks++;
        else
            pthread_cond_signal(other->granted);
    }
    pthread_mutex_unlock(&claims->lock);
    return tasks;
}

void ebsd_claims_release(ebsd_claims *claims, ebsd_claim *claim)
{
    const uint64_t one = 1;
    uint32_t tasks = ebsd_claims_leave(claims, claim);
    int bell = atomic_load(&claims->bell);

    if (tasks == 0 || bell < 0)
        return;
    /* EAGAIN would mean that the bell rings already, 2^64 times. */
    while (write(bell, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

int ebsd_claims_is_held(ebsd_claims *claims, const ebsd_claim *claim)
{
    int held;

    pthread_mutex_lock(&claims->lock);
    held = claim->blockers == 0;
    pthread_mutex_unlock(&claims->lock);
    return held;
}
