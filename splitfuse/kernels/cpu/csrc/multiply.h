// The one micro-kernel of each weight format: a tile of up to MAX_ROWS rows of x times a panel of 32 columns.
//
// A row's sums run over K in one order, whatever the number of rows: that is where equal bits come from. The
// accumulators are arrays indexed by constants only (pack expansions, no loops): GCC keeps them in registers then, and
// silently spills them otherwise, which costs two to three times.
#pragma once

#include <algorithm>
#include <utility>

#include "vector.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr int PANEL = 2 * LANES;          // columns of a panel
constexpr int STEP_BYTES = 4 * PANEL;     // of a panel for one step: a 32-bit word a column
constexpr int SLAB_STEPS = 256;           // steps of x kept side by side
constexpr int PAIR_WORDS = sizeof(Element) / 2;  // of x for a step in bf16
constexpr int SLAB_STRIDE = SLAB_STEPS * PAIR_WORDS + 16;  // words from row to row; no power of two: rows share no cache set
constexpr int AHEAD = 128 * STEP_BYTES;   // bytes that weights are fetched ahead of use, where they come from memory

#define SF_LEAF static __attribute__((noinline))

// What to bring nearer while a tile is multiplied: two lines at every step, from places that move on by `stride` bytes.
struct Fetch {
    const u8* from;
    i64 stride;
};

SF_INLINE void fetch_step(Fetch& fetch) {
    _mm_prefetch(fetch.from, _MM_HINT_T0);
    _mm_prefetch(fetch.from + 64, _MM_HINT_T0);
    fetch.from += fetch.stride;
}

// What a tile multiplies. x: slabs of [rows][SLAB_STRIDE] words of SLAB_STEPS steps; a step is two neighbours in K, bf16
// in one word or fp32 in two. Panels lie in `segments` of equal length, each of [steps][stride bytes].
struct Segments {
    const u8* const* starts;
    const u8* const* fetches;  // what to fetch in each
    int steps;         // of a whole segment; divides SLAB_STEPS, or there is one segment only
    i64 total;         // steps of all; the last segment may be shorter
    i64 stride;        // bytes from step to step
    i64 fetch_stride;
};

template <int ROWS, int... R>
SF_INLINE void bf16_step(Floats (&acc)[ROWS][2], const u8* weights, const u32* x, std::integer_sequence<int, R...>) {
    Packed left = load_packed(weights), right = load_packed(weights + STEP_BYTES / 2);
#ifdef SF_BF16_DOTS
    ((acc[R][0] = dot_bf16(acc[R][0], left, broadcast_packed(x[R * SLAB_STRIDE])),
      acc[R][1] = dot_bf16(acc[R][1], right, broadcast_packed(x[R * SLAB_STRIDE]))), ...);
#else
    Floats a = first_of_pairs(left), b = first_of_pairs(right);
    ((acc[R][0] = add_product(acc[R][0], a, as_floats(broadcast_packed(x[R * SLAB_STRIDE]))),
      acc[R][1] = add_product(acc[R][1], b, as_floats(broadcast_packed(x[R * SLAB_STRIDE])))), ...);
    a = second_of_pairs(left), b = second_of_pairs(right);
    ((acc[R][0] = add_product(acc[R][0], a, as_floats(broadcast_packed(x[R * SLAB_STRIDE + 1]))),
      acc[R][1] = add_product(acc[R][1], b, as_floats(broadcast_packed(x[R * SLAB_STRIDE + 1])))), ...);
#endif
}

template <int ROWS, int... R>
SF_INLINE void store_tile(const Floats (&acc)[ROWS][2], float* out, i64 stride, std::integer_sequence<int, R...>) {
    ((store(out + R * stride, acc[R][0]), store(out + R * stride + LANES, acc[R][1])), ...);
}

template <int ROWS, int... R>
SF_INLINE void clear(Floats (&acc)[ROWS][2], std::integer_sequence<int, R...>) {
    ((acc[R][0] = acc[R][1] = broadcast(0.0f)), ...);
}

// out[r][0..31] = sum over K of x[r][k] * weights[k][0..31], all bf16, summed in fp32.
template <int ROWS>
SF_LEAF void multiply_bf16(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const i64 stride = segments.stride;
    Floats acc[ROWS][2];
    clear(acc, rows);
    i64 in_slab = 0, segment = 0;
    for (i64 left = segments.total; left > 0; ++segment) {
        const u8* weights = segments.starts[segment];
        Fetch fetch{segments.fetches[segment], segments.fetch_stride};
        i64 here = left < segments.steps ? left : segments.steps;
        left -= here;
        while (here > 0) {
            i64 run = SLAB_STEPS - in_slab < here ? SLAB_STEPS - in_slab : here;
            here -= run;
            in_slab += run;
            for (const u32* end = x + run * PAIR_WORDS; x < end; x += PAIR_WORDS, weights += stride) {
                fetch_step(fetch);
                bf16_step(acc, weights, x, rows);
            }
            if (in_slab == SLAB_STEPS) {
                x += ROWS * SLAB_STRIDE - SLAB_STEPS * PAIR_WORDS;
                in_slab = 0;
            }
        }
    }
    store_tile(acc, out, out_stride, rows);
}

// The same of each segment by itself: out[r][32 s ..] for segment s. All have the same steps, of one slab.
template <int ROWS>
SF_LEAF void multiply_bf16_each(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const i64 count = segments.total / segments.steps;
    for (i64 segment = 0; segment < count; ++segment, out += PANEL) {
        const u8* weights = segments.starts[segment];
        Fetch fetch{segments.fetches[segment], segments.fetch_stride};
        Floats acc[ROWS][2];
        clear(acc, rows);
        for (const u32 *at = x, *end = x + segments.steps * PAIR_WORDS; at < end; at += PAIR_WORDS, weights += STEP_BYTES) {
            fetch_step(fetch);
            bf16_step(acc, weights, at, rows);
        }
        store_tile(acc, out, out_stride, rows);
    }
}

// With few rows there are too few sums on their way to keep the units busy, each waiting for its last product. These
// two do the work of two panels at once; each sum is the same as before.
template <int ROWS>
SF_LEAF void multiply_bf16_each_of_two(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const i64 count = segments.total / segments.steps;
    for (i64 segment = 0; segment < count; segment += 2, out += 2 * PANEL) {
        i64 other = segment + 1 < count ? segment + 1 : segment;
        const u8 *first = segments.starts[segment], *second = segments.starts[other];
        Fetch fetch_first{segments.fetches[segment], segments.fetch_stride};
        Fetch fetch_second{segments.fetches[other], segments.fetch_stride};
        Floats a[ROWS][2], b[ROWS][2];
        clear(a, rows);
        clear(b, rows);
        for (const u32 *at = x, *end = x + segments.steps * PAIR_WORDS; at < end; at += PAIR_WORDS) {
            fetch_step(fetch_first);
            fetch_step(fetch_second);
            bf16_step(a, first, at, rows);
            bf16_step(b, second, at, rows);
            first += STEP_BYTES;
            second += STEP_BYTES;
        }
        store_tile(a, out, out_stride, rows);
        if (other != segment) store_tile(b, out + PANEL, out_stride, rows);
    }
}

// Two panels side by side in memory, of one slab: out[r][0..63]. The second half of a segment's lines to fetch begins
// `steps` steps behind the first.
template <int ROWS>
SF_LEAF void multiply_bf16_two(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    Floats a[ROWS][2], b[ROWS][2];
    clear(a, rows);
    clear(b, rows);
    i64 segment = 0;
    for (i64 left = segments.total; left > 0; left -= segments.steps, ++segment) {
        const u8* weights = segments.starts[segment];
        Fetch fetch_first{segments.fetches[segment], segments.fetch_stride};
        Fetch fetch_second{segments.fetches[segment] + segments.steps * segments.fetch_stride, segments.fetch_stride};
        const u32* end = x + std::min<i64>(left, segments.steps) * PAIR_WORDS;
        for (; x < end; x += PAIR_WORDS, weights += segments.stride) {
            fetch_step(fetch_first);
            fetch_step(fetch_second);
            bf16_step(a, weights, x, rows);
            bf16_step(b, weights + STEP_BYTES, x, rows);
        }
    }
    store_tile(a, out, out_stride, rows);
    store_tile(b, out + PANEL, out_stride, rows);
}

constexpr int SCALE_BYTES = 2 * PANEL;   // of a group of a quantized panel: 32 bf16

// Spans of a quantized panel, whose x lies in one slab. A span is a group, or where a whole row shares its scales the
// part of it in this slab.
struct Spans {
    const u32* x;          // of the first row
    const u8* weights;
    const u16* scales;     // [32] bf16 of all spans; null: each span begins with its own
    const u8* levels;      // int4: the 16 levels + 128
    i64 count;
    i64 x_steps;           // of each
    const i32* sums;       // [rows, sums_stride]: the sum of each span of x
    i64 sums_stride;
    Fetch fetch;
    bool adds;             // to what earlier spans left in the tile; the first one does not
};

template <int ROWS, int... R>
SF_INLINE void start_span(Ints (&acc)[ROWS][2], const i32* sums, i64 stride, std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast(-LEVEL_BIAS * sums[R * stride]), acc[R][1] = acc[R][0]), ...);
}

template <int ROWS, int... R>
SF_INLINE void levels_step(Ints (&acc)[ROWS][2], Packed left, Packed right, const u32* x, std::integer_sequence<int, R...>) {
    ((acc[R][0] = dot_levels(acc[R][0], left, broadcast_packed(x[R * SLAB_STRIDE])),
      acc[R][1] = dot_levels(acc[R][1], right, broadcast_packed(x[R * SLAB_STRIDE]))), ...);
}

template <bool ADDS>
SF_INLINE void put_scaled(Ints value, Floats scale, float* out) {
    if constexpr (ADDS) store(out, fma(to_floats(value), scale, load(out)));
    else store(out, to_floats(value) * scale);
}

template <bool ADDS, int ROWS, int... R>
SF_INLINE void end_span(const Ints (&acc)[ROWS][2], const u16* scales, float* out, std::integer_sequence<int, R...>) {
    Floats left = load_bf16(scales), right = load_bf16(scales + LANES);
    ((put_scaled<ADDS>(acc[R][0], left, out + R * PANEL), put_scaled<ADDS>(acc[R][1], right, out + R * PANEL + LANES)), ...);
}

// out[r][0..31] = or += for each span: scale[0..31] * sum over it of x[r][k] * level[k][0..31].
// BITS is 8 (a byte of a panel is a level + 128) or 4 (a word holds eight nibbles: the low ones four neighbours in K,
// the high ones the next four; a nibble is looked up in `levels`).
template <int BITS, int ROWS>
SF_LEAF void multiply_levels(const Spans& spans, float* out) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const Packed levels = BITS == 4 ? load_levels(spans.levels) : Packed{};
    const u8* weights = spans.weights;
    const u32* x = spans.x;
    Fetch fetch = spans.fetch;
    for (i64 span = 0; span < spans.count; ++span) {
        const u16* scales = spans.scales;
        if (!scales) {
            scales = reinterpret_cast<const u16*>(weights);
            weights += SCALE_BYTES;
        }
        Ints acc[ROWS][2];
        start_span(acc, spans.sums + span, spans.sums_stride, rows);
        for (const u32* end = x + spans.x_steps; x < end; weights += STEP_BYTES) {
            fetch_step(fetch);
            if constexpr (BITS == 8) {
                levels_step(acc, as_levels(load_packed(weights)), as_levels(load_packed(weights + STEP_BYTES / 2)), x, rows);
                x += 1;
            } else {
                Packed left = load_packed(weights), right = load_packed(weights + STEP_BYTES / 2);
                levels_step(acc, look_up(levels, low_nibbles(left)), look_up(levels, low_nibbles(right)), x, rows);
                levels_step(acc, look_up(levels, high_nibbles(left)), look_up(levels, high_nibbles(right)), x + 1, rows);
                x += 2;
            }
        }
        if (span || spans.adds) end_span<true>(acc, scales, out, rows);
        else end_span<false>(acc, scales, out, rows);
        asm volatile("" ::: "memory");  // or GCC would keep the tile in registers it does not have
    }
}

using MultiplyBf16 = void (*)(const u32*, const Segments&, float*, i64);
using MultiplyLevels = void (*)(const Spans&, float*);

template <int BITS, int... R>
SF_INLINE MultiplyLevels choose_levels(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyLevels table[] = {multiply_levels<BITS, R + 1>...};
    return table[rows - 1];
}

constexpr int FEW_ROWS = MAX_ROWS / 2;
constexpr auto ALL_ROWS = std::make_integer_sequence<int, MAX_ROWS>{};
constexpr auto FEW = std::make_integer_sequence<int, FEW_ROWS>{};

template <int... R>
SF_INLINE MultiplyBf16 choose_bf16(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_bf16<R + 1>...};
    return table[rows - 1];
}
template <int... R>
SF_INLINE MultiplyBf16 choose_two(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_bf16_two<R + 1>...};
    return table[rows - 1];
}
template <int... R, int... F>
SF_INLINE MultiplyBf16 choose_each(int rows, std::integer_sequence<int, R...>, std::integer_sequence<int, F...>) {
    static constexpr MultiplyBf16 of_two[] = {multiply_bf16_each_of_two<F + 1>...};
    static constexpr MultiplyBf16 of_one[] = {multiply_bf16_each<FEW_ROWS + 1 + R>...};
    return rows <= FEW_ROWS ? of_two[rows - 1] : of_one[rows - 1 - FEW_ROWS];
}

SF_INLINE void multiply(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    choose_bf16(rows, ALL_ROWS)(x, segments, out, out_stride);
}
SF_INLINE void multiply_two(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    choose_two(rows, FEW)(x, segments, out, out_stride);
}
SF_INLINE void multiply_each(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto many = std::make_integer_sequence<int, MAX_ROWS - FEW_ROWS>{};
    choose_each(rows, many, FEW)(x, segments, out, out_stride);
}
template <int BITS>
SF_INLINE void multiply(int rows, const Spans& spans, float* out) {
    choose_levels<BITS>(rows, ALL_ROWS)(spans, out);
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
