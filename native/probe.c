/* Looking many cells up in a key table (kvstore/table.py says what it looks like and why).
 *
 * A row goes through four steps, and thirty-two rows take each step together, so that what one row
 * needs from memory is on its way while the others are worked on. The table may be written
 * meanwhile: an entry is copied first, and only the copy is compared and believed.
 *
 * kvstore/probe.py is the only caller; `KeyTable.find_in_numpy` is the twin.
 */

#include <stdint.h>
#include <string.h>

/* Raised whenever a signature, a structure or a meaning here changes. */
#define PROBE_VERSION 1

enum { WAYS = 8, ROWS_AT_ONCE = 32, COMMITTED = 2 };

static const uint64_t MIX_FIRST = 0x9E3779B97F4A7C15u;
static const uint64_t MIX_SECOND = 0xC2B2AE3D27D4EB4Fu;
static const uint32_t FOLD_STEP = 0x9E3779B1u;

struct entry {
    uint64_t key[4];
    uint64_t generation;
    uint64_t header_digest;
    uint32_t slot;
    uint32_t length;
    uint32_t cell;
    uint32_t fold;
};

struct record {
    uint64_t generation;
    uint64_t offset;
    uint64_t span;
    uint64_t expires_ms;
    uint64_t stamp;
    uint32_t size_bytes;
    uint32_t length;
    uint32_t entry;
    uint32_t depth;
    uint16_t tokens;
    uint8_t state;
    uint8_t cell;
    uint32_t ttl_s;
};

_Static_assert(sizeof(struct entry) == 64, "an entry is one cache line");
_Static_assert(sizeof(struct record) == 64, "a slot record is one cache line");

struct table {
    const uint64_t *tags;
    const struct entry *entries;
    const struct record *records;
    uint64_t buckets;
    uint64_t slots;
};

/* One row per cell asked for; rows that are not held mean nothing. */
struct found {
    uint8_t *held;
    uint32_t *slots;
    uint64_t *generations;
    uint64_t *offsets;
    uint32_t *lengths;
    uint64_t *header_digests;
};

static uint64_t bucket_of(uint64_t mixed, uint64_t buckets) {
    return ((mixed >> 32) * buckets) >> 32;
}

static uint32_t fold(const struct entry *entry) {
    uint32_t words[16], folded = 0, factor = 1;
    memcpy(words, entry, sizeof words);
    for (int i = 0; i < 15; i++) {
        factor *= FOLD_STEP;
        uint32_t mixed = (words[i] ^ (words[i] >> 15)) * factor;
        folded ^= mixed ^ (mixed >> 13);
    }
    return folded;
}

static const uint64_t NOWHERE = UINT64_MAX;

/* Which entry has the tag, or `NOWHERE`. */
static uint64_t place_of(const struct table *table, const uint64_t *buckets, uint64_t tag) {
    for (int choice = 0; choice < 2; choice++) {
        const uint64_t *tags = table->tags + buckets[choice] * WAYS;
        for (int way = 0; way < WAYS; way++)
            if (__atomic_load_n(tags + way, __ATOMIC_ACQUIRE) == tag)
                return buckets[choice] * WAYS + way;
    }
    return NOWHERE;
}

static int holds(const struct table *table, const struct entry *entry, const uint8_t *key,
                 uint8_t cell) {
    return entry->cell == cell && entry->slot < table->slots && memcmp(entry->key, key, 32) == 0
           && fold(entry) == entry->fold;
}

static void find_some(const struct table *table, uint64_t rows, const uint8_t *keys,
                      const uint8_t *cells, const struct found *found, uint64_t at) {
    uint64_t tags[ROWS_AT_ONCE], buckets[ROWS_AT_ONCE][2], places[ROWS_AT_ONCE];
    struct entry entries[ROWS_AT_ONCE];

    for (uint64_t row = 0; row < rows; row++) {
        uint64_t words[4], cell = cells[at + row];
        memcpy(words, keys + 32 * (at + row), 32);
        tags[row] = (words[2] ^ cell * MIX_FIRST) | 1;
        buckets[row][0] = bucket_of(words[0] + cell * MIX_FIRST, table->buckets);
        buckets[row][1] = bucket_of(words[1] + cell * MIX_SECOND, table->buckets);
        __builtin_prefetch(table->tags + buckets[row][0] * WAYS);
        __builtin_prefetch(table->tags + buckets[row][1] * WAYS);
    }
    for (uint64_t row = 0; row < rows; row++) {
        places[row] = place_of(table, buckets[row], tags[row]);
        if (places[row] != NOWHERE)
            __builtin_prefetch(table->entries + places[row]);
    }
    for (uint64_t row = 0; row < rows; row++) {
        struct entry *entry = entries + row;
        found->held[at + row] = 0;
        if (places[row] == NOWHERE)
            continue;
        memcpy(entry, table->entries + places[row], sizeof *entry);
        if (!holds(table, entry, keys + 32 * (at + row), cells[at + row]))
            continue;
        found->held[at + row] = 1;
        __builtin_prefetch(table->records + entry->slot);
    }
    for (uint64_t row = 0; row < rows; row++) {
        const struct entry *entry = entries + row;
        uint64_t out = at + row;
        if (!found->held[out])
            continue;
        const struct record *record = table->records + entry->slot;
        found->held[out] = record->generation == entry->generation && record->state == COMMITTED;
        found->slots[out] = entry->slot;
        found->generations[out] = entry->generation;
        found->offsets[out] = record->offset;
        found->lengths[out] = entry->length;
        found->header_digests[out] = entry->header_digest;
    }
}

uint64_t probe_version(void) {
    return PROBE_VERSION;
}

void probe_find(const struct table *table, uint64_t rows, const uint8_t *keys, const uint8_t *cells,
                const struct found *found) {
    for (uint64_t at = 0; at < rows; at += ROWS_AT_ONCE) {
        uint64_t left = rows - at;
        find_some(table, left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE, keys, cells, found, at);
    }
}
