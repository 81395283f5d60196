/* Leaves: copied and hashed in one call, so that Python's interpreter lock is given up once for many.
 *
 *   scatter   packed ──copy──> leaf ──hash the leaf──> next leaf ...     (get)
 *   gather    leaf ──copy──> packed ──hash what is packed──> ...         (put)
 *   digest    hash the leaf where it lies                                (sockets)
 *
 * A leaf is `heads` stretches of `head_bytes`, `head_stride` apart; packed they lie one behind the
 * other. Its digest is XXH3-64 over the heads in order, seeded. What is hashed is always the copy,
 * read back a moment later: hashing the source beside the copy accepts what tears on the way.
 *
 * kvstore/leaves.py is the only caller: it checks every bound, and has a twin of each function.
 * native/compile.py compiles this file once for every processor, and on x86-64 once more with AVX2,
 * with which hashing is faster; nobody may call into that library but where leaf_has_avx2 says so.
 */

#include <stdint.h>
#include <string.h>

#define XXH_INLINE_ALL
#include "xxhash.h"

/* Raised whenever a signature, a structure or a meaning here changes. */
#define LEAF_VERSION 1

/* A piece that is copied and then hashed must still be in the cache of one core. */
#define PIECE_BYTES ((uint64_t)(64 << 10))

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

static uint64_t move(const leaf *one, enum direction direction) {
    XXH3_state_t state;
    uint8_t *packed = one->packed;
    begin(&state, one->seed);
    for (uint64_t head = 0; head < one->heads; head++) {
        uint8_t *apart = one->start + (int64_t)head * one->head_stride;
        for (uint64_t at = 0; at < one->head_bytes; at += PIECE_BYTES) {
            uint64_t left = one->head_bytes - at;
            uint64_t size = left < PIECE_BYTES ? left : PIECE_BYTES;
            uint8_t *target = direction == SCATTER ? apart + at : packed;
            memcpy(target, direction == SCATTER ? packed : apart + at, size);
            XXH3_64bits_update(&state, target, size);
            packed += size;
        }
    }
    return XXH3_64bits_digest(&state);
}

/* Asked in the library for every processor. */
int leaf_has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

int leaf_version(void) {
    return LEAF_VERSION;
}

void leaf_scatter(const leaf *leaves, uint64_t count, uint64_t *digests) {
    for (uint64_t i = 0; i < count; i++)
        digests[i] = move(&leaves[i], SCATTER);
}

void leaf_gather(const leaf *leaves, uint64_t count, uint64_t *digests) {
    for (uint64_t i = 0; i < count; i++)
        digests[i] = move(&leaves[i], GATHER);
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
