// What adapters add to the products of a step: `scales * (x a)` for each row that has one, then that times b, onto the sums
// of a panel before these are stored. A row's sums run in one order, whatever the other rows have.
#pragma once

#include <cstring>
#include <utility>

#include "interface.h"
#include "multiply.h"

namespace splitfuse {
namespace SF_VARIANT {

// The adapters of a step at one weight; without any, `lora` is null. `shrunk` holds what a row's ranks give.
struct Adapted {
    const Lora* lora = nullptr;
    i64 place = 0;           // of the weight in the tables
    float* shrunk = nullptr; // [rows, stride]
    i64 stride = 0;

    const LoraWeight* of(i64 row) const {
        const i32 adapter = lora->of_row[row];
        if (adapter < 0) return nullptr;
        const LoraWeight* weight = lora->tables[adapter] + place;
        return weight->rank ? weight : nullptr;
    }
    float* row(i64 row) const { return shrunk + row * stride; }
};

constexpr int RANKS = 8;                 // of a, side by side: kernels/cpu/lora.py packs them
constexpr int PAIRED = 2 * LANES;        // columns of a for a word of each lane
constexpr int TOGETHER = WIDE_ROWS == MAX_ROWS ? RANKS : RANKS / 2;  // ranks whose sums fill the registers

constexpr i64 A_AHEAD = 16 * RANKS * PAIRED;  // elements ahead of use that a is prefetched, and panels that b is
constexpr i64 B_AHEAD = 4;

SF_INLINE Floats add_pairs(Floats total, Packed words, Floats first, Floats second) {
    return fma(second, second_of_pairs(words), fma(first, first_of_pairs(words), total));
}

template <int... J>
SF_INLINE void shrink_step(Floats (&acc)[TOGETHER], Packed x, const u16* a, std::integer_sequence<int, J...>) {
    const Floats first = first_of_pairs(x), second = second_of_pairs(x);
    (_mm_prefetch(reinterpret_cast<const u8*>(a + J * PAIRED + A_AHEAD), _MM_HINT_T0), ...);
    ((acc[J] = add_pairs(acc[J], load_packed(a + J * PAIRED), first, second)), ...);
}

template <int... J>
SF_INLINE void clear(Floats (&acc)[TOGETHER], std::integer_sequence<int, J...>) {
    ((acc[J] = broadcast(0.0f)), ...);
}

template <int... J>
SF_INLINE void put_ranks(const Floats (&acc)[TOGETHER], const float* scales, float* out, std::integer_sequence<int, J...>) {
    ((out[J] = sum(acc[J]) * scales[J]), ...);
}

// Computes what the ranks of a row give, of x [columns] in bf16.
inline void shrink_row(const Adapted& adapted, i64 row, const u16* x, i64 columns) {
    const LoraWeight* w = adapted.of(row);
    if (!w) return;
    constexpr auto ranks = std::make_integer_sequence<int, TOGETHER>{};
    const i64 whole = columns / PAIRED * PAIRED, steps = (columns + PAIRED - 1) / PAIRED;
    alignas(64) u16 rest[PAIRED] = {};
    std::memcpy(rest, x + whole, (columns - whole) * sizeof(u16));
    for (i64 rank = 0; rank < w->rank; rank += TOGETHER) {
        const u16* a = w->a + rank / RANKS * steps * RANKS * PAIRED + rank % RANKS * PAIRED;
        Floats acc[TOGETHER];
        clear(acc, ranks);
        for (i64 k = 0; k < whole; k += PAIRED, a += RANKS * PAIRED) shrink_step(acc, load_packed(x + k), a, ranks);
        if (whole < columns) shrink_step(acc, load_packed(rest), a, ranks);
        put_ranks(acc, w->scales + rank, adapted.row(row) + rank, ranks);
    }
}

// Returns a pair of ranks times 16 columns, plus a total, and prefetches what later panels read.
SF_INLINE Floats expand_pair(Floats total, const u16* b, const float* ranks, i64 ahead) {
    _mm_prefetch(reinterpret_cast<const u8*>(b + ahead), _MM_HINT_T0);
    return add_pairs(total, load_packed(b), broadcast(ranks[0]), broadcast(ranks[1]));
}

// Returns what the ranks of a row add to 16 columns.
SF_INLINE Floats expand(const LoraWeight& w, const float* shrunk, i64 vector) {
    const i64* place = w.vectors + 3 * vector;
    const i64 count = place[1], ahead = B_AHEAD * count * PAIRED;  // a panel has two vectors of count / 2 pairs
    const float* ranks = shrunk + place[0];
    const u16* b = w.b + place[2] * PAIRED;
    Floats even = broadcast(0.0f), odd = even;
    i64 j = 0;
    for (; j + 4 <= count; j += 4, b += 2 * PAIRED) {
        even = expand_pair(even, b, ranks + j, ahead);
        odd = expand_pair(odd, b + PAIRED, ranks + j + 2, ahead);
    }
    if (j < count) even = expand_pair(even, b, ranks + j, ahead);
    return even + odd;
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
