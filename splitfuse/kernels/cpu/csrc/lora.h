// What adapters add to the products of a step: `scales * (x a)` for each row that has one, then that times b, onto the sums
// of a panel before these are stored. A row's sums run in one order, whatever the other rows have. Where x is quantized to int8
// so are a and b, and what the ranks of a row give becomes int16: with whole numbers half the bytes are read, and a fraction of
// the instructions.
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
    float* shrunk = nullptr; // [rows, stride]; int16 [rank] and then their scale where x is quantized
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

constexpr i64 A_AHEAD = 8192;  // bytes ahead of use that a is prefetched, and panels that b is
constexpr i64 B_AHEAD = 4;

SF_INLINE Floats add_pairs(Floats total, Packed words, Floats first, Floats second) {
    return fma(second, second_of_pairs(words), fma(first, first_of_pairs(words), total));
}

template <int... J>
SF_INLINE void shrink_step(Floats (&acc)[TOGETHER], Packed x, const u16* a, std::integer_sequence<int, J...>) {
    const Floats first = first_of_pairs(x), second = second_of_pairs(x);
    (_mm_prefetch(reinterpret_cast<const u8*>(a + J * PAIRED) + A_AHEAD, _MM_HINT_T0), ...);
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
inline void shrink_bf16(const LoraWeight& w, const u16* x, i64 columns, float* out) {
    constexpr auto ranks = std::make_integer_sequence<int, TOGETHER>{};
    const i64 whole = columns / PAIRED * PAIRED, steps = (columns + PAIRED - 1) / PAIRED;
    alignas(64) u16 rest[PAIRED] = {};
    std::memcpy(rest, x + whole, (columns - whole) * sizeof(u16));
    for (i64 rank = 0; rank < w.rank; rank += TOGETHER) {
        const u16* a = static_cast<const u16*>(w.a) + rank / RANKS * steps * RANKS * PAIRED + rank % RANKS * PAIRED;
        Floats acc[TOGETHER];
        clear(acc, ranks);
        for (i64 k = 0; k < whole; k += PAIRED, a += RANKS * PAIRED) shrink_step(acc, load_packed(x + k), a, ranks);
        if (whole < columns) shrink_step(acc, load_packed(rest), a, ranks);
        put_ranks(acc, w.scales + rank, out + rank, ranks);
    }
}

// Returns totals + 8 columns of each of eight ranks times two words of x. IN_BYTES: it lies as bytes.
template <bool IN_BYTES>
SF_INLINE Ints add_columns(Ints totals, const u8* a, const u32* x) {
    _mm_prefetch(a + A_AHEAD, _MM_HINT_T0);
    const Packed qvalues = load_packed(a);
#ifdef SF_BYTE_DOTS
    return dot_qvalues(totals, qvalues, broadcast_two(x));
#else
    const Packed both = broadcast_two(x);
    totals = dot_qvalues(totals, even_bytes(qvalues), IN_BYTES ? even_int8(both) : both);
    return dot_qvalues(totals, odd_bytes(qvalues), IN_BYTES ? odd_int8(both) : broadcast_two(x + SLAB_STEPS));
#endif
}

// Computes the same of a quantized x: `steps` words in slabs, each `slab_words` after the last. `start` is -QVALUE_BIAS
// times the sum of its values, `scale` that of x.
template <bool IN_BYTES>
inline void shrink_qvalues(const LoraWeight& w, const u32* x, i64 slab_words, i64 steps, i32 start, float scale, float* out) {
    constexpr i64 BYTES = RANKS * 8;
    const u8* a = static_cast<const u8*>(w.a);
    float most = 0.0f, poison = 0.0f;
    for (i64 rank = 0; rank < w.rank; rank += RANKS) {
        Ints first = broadcast(0), second = first, third = first, fourth = first;  // whole numbers: any order is the same
        for (i64 slab = 0; slab * SLAB_STEPS < steps; ++slab) {
            const u32* place = x + slab * slab_words;
            const u32* end = place + std::min<i64>(SLAB_STEPS, steps - slab * SLAB_STEPS);
            for (; place + 8 <= end; place += 8, a += 4 * BYTES) {
                first = add_columns<IN_BYTES>(first, a, place);
                second = add_columns<IN_BYTES>(second, a + BYTES, place + 2);
                third = add_columns<IN_BYTES>(third, a + 2 * BYTES, place + 4);
                fourth = add_columns<IN_BYTES>(fourth, a + 3 * BYTES, place + 6);
            }
            for (; place < end; place += 2, a += BYTES) first = add_columns<IN_BYTES>(first, a, place);
        }
        const Ints totals = (first + second) + (third + fourth);
        i32 lanes[LANES];
        std::memcpy(lanes, &totals, sizeof lanes);
        for (int j = 0; j < RANKS; ++j) {
            const float value = static_cast<float>(lanes[2 * j] + lanes[2 * j + 1] + start) * scale * w.scales[rank + j];
            most = std::max(most, std::fabs(value));
            poison += value * 0.0f;  // NaN if a value is no number or infinite
            out[rank + j] = value;
        }
    }
    const float inverse = most > 1e-30f ? 32767.0f / most : 0.0f;
    for (i64 rank = 0; rank < w.rank; ++rank) {  // each in place of what was read before
        const i16 level = static_cast<i16>(_mm_cvtss_si32(_mm_set_ss(out[rank] * inverse)));
        std::memcpy(reinterpret_cast<u8*>(out) + rank * sizeof level, &level, sizeof level);
    }
    out[w.rank / 2] = most * (1.0f / 32767.0f) + poison;
}

// Returns a pair of ranks times 16 columns, plus a total, and prefetches what later panels read.
SF_INLINE Floats expand_pair(Floats total, const u16* b, const float* ranks, i64 ahead) {
    _mm_prefetch(reinterpret_cast<const u8*>(b + ahead), _MM_HINT_T0);
    return add_pairs(total, load_packed(b), broadcast(ranks[0]), broadcast(ranks[1]));
}

// Returns what the ranks of a row add to 16 columns: `place` is their entry in the table of vectors.
SF_INLINE Floats expand_bf16(const LoraWeight& w, const float* shrunk, const i32* place) {
    const i64 count = place[1], ahead = B_AHEAD * count * PAIRED;  // a panel has two vectors of count / 2 pairs
    const float* ranks = shrunk + place[0];
    const u16* b = static_cast<const u16*>(w.b) + i64{place[2]} * PAIRED;
    Floats even = broadcast(0.0f), odd = even;
    i64 j = 0;
    for (; j + 4 <= count; j += 4, b += 2 * PAIRED) {
        even = expand_pair(even, b, ranks + j, ahead);
        odd = expand_pair(odd, b + PAIRED, ranks + j + 2, ahead);
    }
    if (j < count) even = expand_pair(even, b, ranks + j, ahead);
    return even + odd;
}

// Returns the same of a quantized b.
SF_INLINE Floats expand_qvalues(const LoraWeight& w, const float* shrunk, const i32* place) {
    const i64 pairs = static_cast<u32>(place[1]) / 2, ahead = 4 * B_AHEAD * pairs * LANES;
    const u32* ranks = reinterpret_cast<const u32*>(shrunk) + static_cast<u32>(place[0]) / 2;
    const i8* b = static_cast<const i8*>(w.b) + i64{place[2]} * PAIRED;
    Ints even = broadcast(0), odd = even;
    i64 j = 0;
    for (; j + 2 <= pairs; j += 2, b += 2 * PAIRED) {
        _mm_prefetch(reinterpret_cast<const u8*>(b + ahead), _MM_HINT_T0);
        even = add_pairs_i8(even, b, ranks[j]);
        odd = add_pairs_i8(odd, b + PAIRED, ranks[j + 1]);
    }
    if (j < pairs) even = add_pairs_i8(even, b, ranks[j]);
    return to_floats(even + odd) * broadcast(shrunk[w.rank / 2]);
}

// Computes what adapters add to a panel of `rows` rows from `begin` on, to `added` [rows, PANEL].
template <bool QUANTIZED>
SF_LEAF void expand_rows(const Adapted& adapted, i64 begin, int rows, i64 panel, float* added) {
    for (int r = 0; r < rows; ++r, added += PANEL) {
        const LoraWeight* w = adapted.of(begin + r);
        if (!w) {
            store(added, broadcast(-0.0f));  // changes no sum's bits
            store(added + LANES, broadcast(-0.0f));
            continue;
        }
        const float* shrunk = adapted.row(begin + r);
        const i32* place = w->vectors + 6 * panel;
        store(added, QUANTIZED ? expand_qvalues(*w, shrunk, place) : expand_bf16(*w, shrunk, place));
        store(added + LANES, QUANTIZED ? expand_qvalues(*w, shrunk, place + 3) : expand_bf16(*w, shrunk, place + 3));
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
