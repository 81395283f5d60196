/* Leaves: copied and hashed in one call, so that Python's interpreter lock is given up once for many.
 *
 *   scatter   packed ──copy──> leaf ──hash the leaf──> next leaf ...     (get)
 *   gather    leaf ──copy──> packed ──hash what is packed──> ...         (put)
 *     far     source ──copy──> buffer ──hash the buffer──> target ──> a little more ...
 *   digest    hash the leaf where it lies                                (put over sockets)
 *   receive   socket ──> buffer ──hash the buffer──> leaves ──> more ... (get over sockets)
 *
 * A leaf is `heads` stretches of `head_bytes`, `head_stride` apart; packed they lie one behind the
 * other. Its digest is XXH3-64 over the heads in order, seeded. What is hashed is always the copy,
 * read back a moment later, or that which is then copied on: hashing the source beside the copy
 * accepts what tears on the way.
 *
 * A far copy is one that no cache can keep until somebody reads it. It goes straight to memory,
 * which need not be read first to be overwritten then: that is a third of what there is to move.
 * For the same reason the kernel fills a buffer, and not the leaves, with what comes from a socket.
 *
 * kvstore/leaves.py is the only caller: it checks every bound, and has a twin of each function.
 * native/compile.py compiles this file once for every processor, and on x86-64 again with AVX2 and
 * with AVX-512, with which hashing is faster; nobody may call into those libraries but where
 * leaf_has_avx2 and leaf_has_avx512 say so.
 */

#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define XXH_INLINE_ALL
#include "xxhash.h"

/* Raised whenever a signature, a structure or a meaning here changes. */
#define LEAF_VERSION 4

/* A piece that is copied, and then hashed, must still be in the cache of one core. */
#define PIECE_BYTES ((uint64_t)(64 << 10))

/* Of a far copy: so little at a time that the processor reads the next lot from memory while it
 * hashes this one. It is told which, so far ahead: by itself it looks no further than a page. */
enum { BUFFER_BYTES = 2 << 10, AHEAD_BYTES = 4 << 10, LINE_BYTES = 64 };

/* How late a call may notice that its time is over. */
#define REARM_NS ((int64_t)50000000)

/* What is received at a time: much, for what a system call costs, and still in that cache. */
#define RECEIVED_BYTES ((uint64_t)(256 << 10))

/* A receiver sleeps until so much has come. One that is woken by every packet takes the processor
 * away from a sender on the same machine, who then has the next one to send, and so on. */
enum { WAKE_BYTES = 1 << 20 };

typedef struct {
    uint8_t *start;
    int64_t head_stride;
    uint64_t heads;
    uint64_t head_bytes;
    uint8_t *packed;
    uint64_t seed;
} leaf;

enum direction { SCATTER, GATHER };

static void begin(XXH3_state_t *state, uint64_t seed) {
    XXH3_INITSTATE(state);
    XXH3_64bits_reset_withSeed(state, seed);
}

/* Into the buffer, while what comes later is asked of the memory. */
static void take_up(uint8_t *buffer, const uint8_t *source, uint64_t size, const uint8_t *later) {
    uint64_t at = 0;
    for (; at + LINE_BYTES <= size; at += LINE_BYTES) {
        __builtin_prefetch(later + at);
        memcpy(buffer + at, source + at, LINE_BYTES);
    }
    memcpy(buffer + at, source + at, size - at);
}

/* Out of the buffer, and past the caches where processor and target allow that. */
static void put_down(uint8_t *target, const uint8_t *buffer, uint64_t size) {
    uint64_t at = 0;
#if defined(__SSE2__)
    if ((uintptr_t)target % sizeof(__m128i) == 0)
        for (; at + sizeof(__m128i) <= size; at += sizeof(__m128i))
            _mm_stream_si128((__m128i *)(target + at),
                             _mm_loadu_si128((const __m128i *)(buffer + at)));
#endif
    memcpy(target + at, buffer + at, size - at);
}

/* Where to read AHEAD_BYTES later. Behind the last head it is anything: it is only prefetched. */
static const uint8_t *ahead(const leaf *one, uint64_t head, uint64_t at) {
    at += AHEAD_BYTES;
    if (at >= one->head_bytes) {
        at -= one->head_bytes;
        head++;
    }
    return one->start + (int64_t)head * one->head_stride + at;
}

/* What went past the caches is there before anybody says so. */
static void await_stores(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

static uint64_t move(const leaf *one, enum direction direction, int is_far) {
    _Alignas(LINE_BYTES) uint8_t buffer[BUFFER_BYTES];
    XXH3_state_t state;
    uint8_t *packed = one->packed;
    const uint64_t step = is_far ? (uint64_t)BUFFER_BYTES : PIECE_BYTES;
    begin(&state, one->seed);
    for (uint64_t head = 0; head < one->heads; head++) {
        uint8_t *apart = one->start + (int64_t)head * one->head_stride;
        for (uint64_t at = 0; at < one->head_bytes; at += step) {
            uint64_t left = one->head_bytes - at;
            uint64_t size = left < step ? left : step;
            uint8_t *target = direction == SCATTER ? apart + at : packed;
            const uint8_t *source = direction == SCATTER ? packed : apart + at;
            if (is_far) {
                take_up(buffer, source, size,
                        direction == SCATTER ? packed + AHEAD_BYTES : ahead(one, head, at));
                XXH3_64bits_update(&state, buffer, size);
                put_down(target, buffer, size);
            } else {
                memcpy(target, source, size);
                XXH3_64bits_update(&state, target, size);
            }
            packed += size;
        }
    }
    return XXH3_64bits_digest(&state);
}

static void move_all(const leaf *leaves, uint64_t count, uint64_t *digests,
                     enum direction direction, int is_far) {
    for (uint64_t i = 0; i < count; i++)
        digests[i] = move(&leaves[i], direction, is_far);
    await_stores();
}

/* Asked in the library for every processor. */
int leaf_has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

/* Not on the first processors that have it: with wide registers in use these slow down. */
int leaf_has_avx512(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vbmi2");
#else
    return 0;
#endif
}

int leaf_version(void) {
    return LEAF_VERSION;
}

void leaf_scatter(const leaf *leaves, uint64_t count, uint64_t *digests, int is_far) {
    move_all(leaves, count, digests, SCATTER, is_far);
}

void leaf_gather(const leaf *leaves, uint64_t count, uint64_t *digests, int is_far) {
    move_all(leaves, count, digests, GATHER, is_far);
}

void leaf_digests(const leaf *leaves, uint64_t count, uint64_t *digests) {
    for (uint64_t i = 0; i < count; i++) {
        const leaf *one = &leaves[i];
        XXH3_state_t state;
        begin(&state, one->seed);
        for (uint64_t head = 0; head < one->heads; head++)
            XXH3_64bits_update(&state, one->start + (int64_t)head * one->head_stride,
                               one->head_bytes);
        digests[i] = XXH3_64bits_digest(&state);
    }
}

/* Where the next byte goes, and the hash of what has come of its leaf. */
typedef struct {
    const leaf *leaves;
    uint64_t count;
    uint64_t *digests;
    int is_far;
    uint64_t coming;
    uint64_t done;
    uint64_t head;
    uint64_t at;
    XXH3_state_t state;
} arrival;

/* Digests every leaf of which nothing is missing. */
static void settle(arrival *here) {
    while (here->done < here->count) {
        const leaf *one = &here->leaves[here->done];
        if (here->head < one->heads && one->head_bytes)
            return;
        here->digests[here->done++] = XXH3_64bits_digest(&here->state);
        here->head = here->at = 0;
        if (here->done < here->count)
            begin(&here->state, one[1].seed);
    }
}

/* Out of the buffer into the leaves, so little at a time that it is still near when it is copied. */
static void unload(arrival *here, const uint8_t *buffer, uint64_t size_bytes) {
    while (size_bytes) {
        const leaf *one = &here->leaves[here->done];
        uint64_t left = one->head_bytes - here->at;
        uint64_t size = left < size_bytes ? left : size_bytes;
        if (size > BUFFER_BYTES)
            size = BUFFER_BYTES;
        uint8_t *target = one->start + (int64_t)here->head * one->head_stride + here->at;
        XXH3_64bits_update(&here->state, buffer, size);
        if (here->is_far)
            put_down(target, buffer, size);
        else
            memcpy(target, buffer, size);
        buffer += size;
        size_bytes -= size;
        here->coming -= size;
        here->at += size;
        if (here->at == one->head_bytes) {
            here->head++;
            here->at = 0;
        }
        settle(here);
    }
}

static int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Lets the kernel wait as long as there is time, and no longer; an error number or 0. */
static int arm(int socket, int64_t end_ns, int64_t *armed_ns) {
    int64_t now_ns = monotonic_ns();
    if (now_ns >= end_ns)
        return ETIMEDOUT;
    if (now_ns - *armed_ns < REARM_NS)
        return 0;
    *armed_ns = now_ns;
    int64_t left_us = end_ns - now_ns < 1000 ? 1 : (end_ns - now_ns) / 1000; /* 0 is forever */
    struct timeval left = {left_us / 1000000, left_us % 1000000};
    return setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &left, sizeof left) ? errno : 0;
}

/* Lets the kernel wake us late while `coming` is far more than a piece, else at the first byte. */
static void sleep_well(int socket, uint64_t coming, int *wake_bytes) {
    int wanted = coming >= WAKE_BYTES + RECEIVED_BYTES ? WAKE_BYTES : 1;
    if (wanted == *wake_bytes)
        return;
    *wake_bytes = wanted;
    /* Where it is refused we wake more often, and nothing else. */
    setsockopt(socket, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted);
}

static int receive_some(int socket, arrival *here, uint8_t *buffer) {
    uint64_t size = here->coming < RECEIVED_BYTES ? here->coming : RECEIVED_BYTES;
    ssize_t came = recv(socket, buffer, size, MSG_WAITALL);
    if (came > 0)
        unload(here, buffer, (uint64_t)came);
    else if (came == 0)
        return ECONNRESET;
    else if (errno == EAGAIN || errno == EWOULDBLOCK)
        return ETIMEDOUT;
    else if (errno != EINTR)
        return errno;
    return 0;
}

/* Fills leaves from a blocking socket for at most `time_ns`. 0, or the error number that ended it:
 * ETIMEDOUT for the time, ECONNRESET for a peer that closed. Either way `done` leaves have come
 * whole and have their digests. Of leaves that have all come, the socket wakes at the first byte. */
int leaf_receive(int socket, int64_t time_ns, const leaf *leaves, uint64_t count,
                 uint64_t *digests, uint64_t *done, int is_far) {
    arrival here = {.leaves = leaves, .count = count, .digests = digests, .is_far = is_far};
    int64_t start_ns = monotonic_ns(), armed_ns = start_ns - REARM_NS;
    uint8_t *buffer = aligned_alloc(LINE_BYTES, RECEIVED_BYTES);
    int fault = buffer ? 0 : ENOMEM, wake_bytes = 1;
    for (uint64_t i = 0; i < count; i++)
        here.coming += leaves[i].heads * leaves[i].head_bytes;
    if (count)
        begin(&here.state, leaves[0].seed);
    settle(&here);
    while (!fault && here.done < count) {
        sleep_well(socket, here.coming, &wake_bytes);
        fault = arm(socket, start_ns + time_ns, &armed_ns);
        if (!fault)
            fault = receive_some(socket, &here, buffer);
    }
    await_stores();
    free(buffer);
    *done = here.done;
    return fault;
}
