// The one micro-kernel of each weight format: a tile of up to MAX_ROWS rows of x times a panel of 32 columns, or with
// the few registers of AVX2 times half of one.
//
// A row's sums run over K in one order, whatever the number of rows: equal bits come from that. The
// accumulators are arrays indexed by constants only (pack expansions, no loops): GCC keeps them in registers then, and
// silently spills them otherwise, which costs two to three times.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr int PANEL = 2 * LANES;          // columns of a panel
constexpr int STEP_BYTES = 4 * PANEL;     // of a panel for one step: a 32-bit word a column
constexpr int VECTOR_BYTES = 4 * LANES;
constexpr int SLAB_STEPS = 256;           // steps of x kept side by side
constexpr int PAIR_WORDS = sizeof(Element) / 2;  // of x for a step in bf16
constexpr int SLAB_STRIDE = SLAB_STEPS * PAIR_WORDS + 16;  // words from row to row; no power of two: rows share no cache set
constexpr int RUN_STEPS = 64;             // steps after which the halves of a panel alternate
constexpr int SPAN_STEPS = WIDE_ROWS == MAX_ROWS ? SLAB_STEPS : RUN_STEPS;  // most words of x that are summed as whole numbers
#ifdef SF_PARTS
constexpr i64 ROW_STEPS = 1 << 14;        // the same of a row whose columns all share a scale: 2^31 is more than their sum
#else
constexpr i64 ROW_STEPS = SPAN_STEPS;
#endif
#ifdef SF_PARTS
// Words of x for a part of a panel that all blocks of rows multiply in turn. No longer than what is prefetched ahead.
constexpr i64 PART_STEPS = SLAB_STEPS / 2;
constexpr i64 GROUPS_PART_STEPS = BLOCK_ROWS == MAX_ROWS ? RUN_STEPS : PART_STEPS;  // the same of quantized values in groups
#else
// The same, but parts that lie in the second cache with the next one, which is prefetched meanwhile.
constexpr i64 PART_STEPS = 2 * SLAB_STEPS;
#endif
constexpr int PREFETCH_BYTES = 128 * STEP_BYTES;   // how far ahead of use weights are prefetched that come from memory
constexpr int NEAR_BYTES = 32 * STEP_BYTES;        // the same into the first cache, if the second one has them already
#if defined(SF_AVX512) && !defined(SF_TILES)
constexpr int INT4_PREFETCH_BYTES = 32 * STEP_BYTES;  // the same of int4, of few rows
constexpr bool PREFETCHES_SCALES = true;              // see prefetch_scales()
constexpr bool WIDENS_INT8 = true;                    // keys and values of int8 become bf16 as they are multiplied, else before
#else
constexpr int INT4_PREFETCH_BYTES = PREFETCH_BYTES;
constexpr bool PREFETCHES_SCALES = false;
constexpr bool WIDENS_INT8 = false;
#endif

// Aligned, so that no change elsewhere moves their loops in the lines of code: int4 of one row was 10 % slower for that.
#define SF_LEAF static __attribute__((noinline, aligned(64)))

// Vectors of columns in a tile: a panel, or half of a panel, whose halves are then multiplied one after the other.
constexpr int width_of(int rows, Dot dot = Dot::QVALUES) { return rows <= (dot == Dot::BF16 ? WIDE_BF16_ROWS : WIDE_ROWS) ? 2 : 1; }

// What to prefetch while a tile is multiplied: at every step as many lines as it is vectors wide, or what Fetch says, from
// addresses that advance by `stride` bytes.
struct Prefetch {
    const u8* from;
    i64 stride;
};

// Where that goes. Weights are used soon after. But each line on its way from memory to the first cache takes one of the few places for
// misses of that cache, and x, which comes from the second, waits for one: so where there are many products for each line, lines from
// memory go to the second cache. Keys and values do so too: they are used so much later that the first cache has lost them again, and
// blocks in random places come to it at two thirds of the speed at which they come to the second one (AMD Zen 4).
enum class Fetch {
    NEAR,   // the first cache
    FAR,    // the second
    BOTH,   // the second, and to the first what lies NEAR_BYTES ahead in the tile's own panel
    SHARE,  // the second, one line a step: another block of rows prefetches the other
};

template <Fetch FETCH>
SF_INLINE void prefetch_line(const void* line) { _mm_prefetch(line, FETCH == Fetch::NEAR ? _MM_HINT_T0 : _MM_HINT_T1); }

// Prefetches what a step of a tile does that is WIDTH vectors wide. `weights`: of the step in the tile's own panel, with BOTH.
template <Fetch FETCH, int WIDTH>
SF_INLINE void prefetch_step(Prefetch& prefetch, [[maybe_unused]] const u8* weights = nullptr) {
    prefetch_line<FETCH>(prefetch.from);
    if constexpr (WIDTH == 2 && FETCH != Fetch::SHARE) prefetch_line<FETCH>(prefetch.from + 64);
    if constexpr (FETCH == Fetch::BOTH) {
        prefetch_line<Fetch::NEAR>(weights + NEAR_BYTES);
        prefetch_line<Fetch::NEAR>(weights + NEAR_BYTES + 64);
    }
    prefetch.from += prefetch.stride;
}

// Prefetches as much more as the scales of a group of int4 are, `scales` in the tile's own panel: they lie among the lines of its steps.
template <Fetch FETCH>
SF_INLINE void prefetch_scales([[maybe_unused]] Prefetch& prefetch, [[maybe_unused]] const u8* scales) {
    if constexpr (PREFETCHES_SCALES) {
        prefetch_line<FETCH>(prefetch.from);
        if constexpr (FETCH == Fetch::BOTH) prefetch_line<Fetch::NEAR>(scales + NEAR_BYTES);
        prefetch.from += prefetch.stride / 2;
    }
}

// Prefetches a line that is written soon, to the first cache, from other cores' too.
SF_INLINE void prefetch_to_write(const void* p) { asm volatile("prefetchw %0" ::"m"(*static_cast<const u8*>(p))); }

SF_INLINE void prefetch_lines(const u8* from, i64 bytes) {
    for (i64 at = 0; at < bytes; at += 64) prefetch_line<Fetch::FAR>(from + at);
}

// Returns what each half of a panel prefetches in a run of steps: one half, then the other.
SF_INLINE Prefetch half_of(const Prefetch& prefetch, i64 steps, int half) {
    return {prefetch.from + half * steps * (prefetch.stride / 2), prefetch.stride / 2};
}

// The operands of a tile. x: slabs of [rows][SLAB_STRIDE] words of SLAB_STEPS steps; a step is two neighbours in K, bf16
// in one word or fp32 in two. Panels lie in `segments` of equal length, each of [steps][stride bytes].
struct Segments {
    const u8* const* starts;
    const u8* const* prefetches;  // what to prefetch in each
    int steps;         // of a whole segment; divides SLAB_STEPS, or there is one segment only
    i64 total;         // steps of all; the last segment may be shorter
    i64 stride;        // bytes from step to step
    i64 prefetch_stride;
    bool adds = false; // to the sums in the tile
    bool int8 = false; // each number is an int8 in place of a bf16, and a step half as long: with WIDENS_INT8
};

#ifdef SF_BF16_DOTS
template <int WIDTH>
SF_INLINE void add_dots(Floats (&acc)[WIDTH], const Packed (&weights)[WIDTH], Packed x) {
    acc[0] = dot_bf16(acc[0], weights[0], x);
    if constexpr (WIDTH == 2) acc[1] = dot_bf16(acc[1], weights[1], x);
}
#else
template <int WIDTH>
SF_INLINE void add_products(Floats (&acc)[WIDTH], const Floats (&weights)[WIDTH], Floats x) {
    acc[0] = add_product(acc[0], weights[0], x);
    if constexpr (WIDTH == 2) acc[1] = add_product(acc[1], weights[1], x);
}
#endif
template <int WIDTH>
SF_INLINE void add_qvalues(Ints (&acc)[WIDTH], const Packed (&qvalues)[WIDTH], Packed x) {
    acc[0] = dot_qvalues(acc[0], qvalues[0], x);
    if constexpr (WIDTH == 2) acc[1] = dot_qvalues(acc[1], qvalues[1], x);
}

// Bytes of a panel in bf16 for one step, or in int8 in place of it.
template <bool INT8>
constexpr int PAIRS_BYTES = INT8 ? STEP_BYTES / 2 : STEP_BYTES;

// Loads a vector of a step of such a panel, as bf16.
template <bool INT8>
SF_INLINE Packed load_pairs(const u8* weights, int vector) {
#ifdef SF_AVX512
    if constexpr (INT8) return load_i8_pairs(weights + vector * VECTOR_BYTES / 2);
#endif
    return load_packed(weights + vector * VECTOR_BYTES);
}

template <bool INT8 = false, int ROWS, int WIDTH, int... R>
SF_INLINE void bf16_step(Floats (&acc)[ROWS][WIDTH], const u8* weights, const u32* x, std::integer_sequence<int, R...>) {
#ifndef SF_AVX512
    if constexpr (ROWS == 3 && WIDTH == 2) return add_three_rows(acc, weights, x, SLAB_STRIDE);
#endif
    Packed words[WIDTH];
    for (int v = 0; v < WIDTH; ++v) words[v] = load_pairs<INT8>(weights, v);
#ifdef SF_BF16_DOTS
    (add_dots(acc[R], words, broadcast_packed(x[R * SLAB_STRIDE])), ...);
#else
    Floats each[WIDTH];
    for (int v = 0; v < WIDTH; ++v) each[v] = first_of_pairs(words[v]);
    (add_products(acc[R], each, as_floats(broadcast_packed(x[R * SLAB_STRIDE]))), ...);
    for (int v = 0; v < WIDTH; ++v) each[v] = second_of_pairs(words[v]);
    (add_products(acc[R], each, as_floats(broadcast_packed(x[R * SLAB_STRIDE + 1]))), ...);
#endif
    if constexpr (INT8) asm volatile("" ::: "memory");  // else GCC widens the next words too early, and spills sums
}

template <class Sum, int WIDTH>
SF_INLINE void store_row(const Sum (&acc)[WIDTH], float* out) {
    store(out, acc[0]);
    if constexpr (WIDTH == 2) store(out + LANES, acc[1]);
}
template <class Sum, int ROWS, int WIDTH, int... R>
SF_INLINE void store_tile(const Sum (&acc)[ROWS][WIDTH], float* out, i64 stride, std::integer_sequence<int, R...>) {
    (store_row(acc[R], out + R * stride), ...);
}

template <int ROWS, int WIDTH, int... R>
SF_INLINE void load_tile(Floats (&acc)[ROWS][WIDTH], const float* out, i64 stride, std::integer_sequence<int, R...>) {
    ((acc[R][0] = load(out + R * stride), acc[R][WIDTH - 1] = load(out + R * stride + (WIDTH - 1) * LANES)), ...);
}
template <int ROWS, int WIDTH, int... R>
SF_INLINE void load_tile(Ints (&acc)[ROWS][WIDTH], const float* out, i64 stride, std::integer_sequence<int, R...>) {
    auto at = [&](i64 column) { return reinterpret_cast<const i32*>(out + column); };
    ((acc[R][0] = load_ints(at(R * stride)), acc[R][WIDTH - 1] = load_ints(at(R * stride + (WIDTH - 1) * LANES))), ...);
}
template <int ROWS, int WIDTH, int... R>
SF_INLINE void clear(Floats (&acc)[ROWS][WIDTH], std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast(0.0f), acc[R][WIDTH - 1] = acc[R][0]), ...);
}
template <int ROWS, int WIDTH, int... R>
SF_INLINE void clear(Ints (&acc)[ROWS][WIDTH], std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast(0), acc[R][WIDTH - 1] = acc[R][0]), ...);
}
template <int ROWS, int WIDTH, int... R>
SF_INLINE void clear(Packed (&acc)[ROWS][WIDTH], std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast_packed(0), acc[R][WIDTH - 1] = acc[R][0]), ...);
}

#ifndef SF_TILES
template <Dot DOT>
using SumOf = std::conditional_t<DOT == Dot::BF16, Floats, Ints>;
template <Dot DOT>
constexpr int WORDS_OF = DOT == Dot::BF16 ? PAIR_WORDS : 1;  // of x for a step

template <Dot DOT, bool INT8 = false, class Sum, int ROWS, int WIDTH, int... R>
SF_INLINE void add_step(Sum (&acc)[ROWS][WIDTH], const u8* weights, const u32* x, std::integer_sequence<int, R...> rows) {
    if constexpr (DOT == Dot::BF16) {
        bf16_step<INT8>(acc, weights, x, rows);
    } else {
        Packed words[WIDTH];
        for (int v = 0; v < WIDTH; ++v) words[v] = load_packed(weights + v * VECTOR_BYTES);
        qvalues_step(acc, words, x, rows);
    }
}

// Computes out[r][0..31] = or += sum over K of x[r][k] * weights[k][0..31]: bf16 summed in fp32, or quantized values + QVALUE_BIAS
// summed in int32.
template <Dot DOT, int ROWS, Fetch FETCH = Fetch::NEAR, bool INT8 = false>
SF_LEAF void multiply_wide(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WORDS = WORDS_OF<DOT>;
    const i64 stride = segments.stride;
    SumOf<DOT> acc[ROWS][2];
    if (segments.adds) load_tile(acc, out, out_stride, rows);
    else clear(acc, rows);
    i64 in_slab = 0, segment = 0;
    for (i64 left = segments.total; left > 0; ++segment) {
        const u8* weights = segments.starts[segment];
        Prefetch prefetch{segments.prefetches[segment], segments.prefetch_stride};
        i64 here = left < segments.steps ? left : segments.steps;
        left -= here;
        while (here > 0) {
            i64 run = SLAB_STEPS - in_slab < here ? SLAB_STEPS - in_slab : here;
            here -= run;
            in_slab += run;
            for (const u32* end = x + run * WORDS; x < end; x += WORDS, weights += stride) {
                prefetch_step<FETCH, 2>(prefetch, weights);
                add_step<DOT, INT8>(acc, weights, x, rows);
            }
            if (in_slab == SLAB_STEPS) {
                x += ROWS * SLAB_STRIDE - SLAB_STEPS * WORDS;
                in_slab = 0;
            }
        }
    }
    store_tile(acc, out, out_stride, rows);
}

// Computes the same for each segment by itself: out[r][32 s ..] for segment s. All have the same steps, of one slab.
template <int ROWS, bool INT8>
SF_LEAF void multiply_bf16_each(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WIDTH = width_of(ROWS, Dot::BF16);
    const i64 count = segments.total / segments.steps;
    for (i64 segment = 0; segment < count; ++segment) {
        for (int part = 0; part < 2; part += WIDTH, out += WIDTH * LANES) {
            const u8* weights = segments.starts[segment] + part * VECTOR_BYTES;
            Prefetch prefetch{segments.prefetches[segment], segments.prefetch_stride};
            if constexpr (WIDTH == 1) prefetch = half_of(prefetch, segments.steps, part);
            Floats acc[ROWS][WIDTH];
            clear(acc, rows);
            for (const u32 *at = x, *end = x + segments.steps * PAIR_WORDS; at < end; at += PAIR_WORDS, weights += PAIRS_BYTES<INT8>) {
                prefetch_step<Fetch::FAR, WIDTH>(prefetch);
                bf16_step<INT8>(acc, weights, at, rows);
            }
            store_tile(acc, out, out_stride, rows);
        }
    }
}

// With few rows there are too few independent sums to keep the units busy, since each waits for its last product. This
// and the next function do the work of two panels at once; each sum is the same as before.
template <int ROWS, bool INT8>
SF_LEAF void multiply_bf16_each_of_two(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const i64 count = segments.total / segments.steps;
    for (i64 segment = 0; segment < count; segment += 2, out += 2 * PANEL) {
        i64 other = segment + 1 < count ? segment + 1 : segment;
        const u8 *first = segments.starts[segment], *second = segments.starts[other];
        Prefetch prefetch_first{segments.prefetches[segment], segments.prefetch_stride};
        Prefetch prefetch_second{segments.prefetches[other], segments.prefetch_stride};
        Floats a[ROWS][2], b[ROWS][2];
        clear(a, rows);
        clear(b, rows);
        for (const u32 *at = x, *end = x + segments.steps * PAIR_WORDS; at < end; at += PAIR_WORDS) {
            prefetch_step<Fetch::FAR, 2>(prefetch_first);
            prefetch_step<Fetch::FAR, 2>(prefetch_second);
            bf16_step<INT8>(a, first, at, rows);
            bf16_step<INT8>(b, second, at, rows);
            first += PAIRS_BYTES<INT8>;
            second += PAIRS_BYTES<INT8>;
        }
        store_tile(a, out, out_stride, rows);
        if (other != segment) store_tile(b, out + PANEL, out_stride, rows);
    }
}

// Multiplies two panels side by side in memory, of one slab: out[r][0..63]. The second half of a segment's lines to
// prefetch begins `steps` steps after the first.
template <int ROWS, bool INT8>
SF_LEAF void multiply_bf16_two(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    Floats a[ROWS][2], b[ROWS][2];
    clear(a, rows);
    clear(b, rows);
    i64 segment = 0;
    for (i64 left = segments.total; left > 0; left -= segments.steps, ++segment) {
        const u8* weights = segments.starts[segment];
        Prefetch prefetch_first{segments.prefetches[segment], segments.prefetch_stride};
        Prefetch prefetch_second{segments.prefetches[segment] + segments.steps * segments.prefetch_stride, segments.prefetch_stride};
        const u32* end = x + std::min<i64>(left, segments.steps) * PAIR_WORDS;
        for (; x < end; x += PAIR_WORDS, weights += segments.stride) {
            prefetch_step<Fetch::FAR, 2>(prefetch_first);
            prefetch_step<Fetch::FAR, 2>(prefetch_second);
            bf16_step<INT8>(a, weights, x, rows);
            bf16_step<INT8>(b, weights + PAIRS_BYTES<INT8>, x, rows);
        }
    }
    store_tile(a, out, out_stride, rows);
    store_tile(b, out + PANEL, out_stride, rows);
}
#endif

constexpr int SCALE_BYTES = 2 * PANEL;   // of a group of a quantized panel: 32 bf16

// Spans of a quantized panel, whose x lies in one slab. A span is a group, or SPAN_STEPS of a row whose columns all share
// their scales.
struct Spans {
    const u32* x;          // of the first row
    const u8* weights;
    const u16* scales;     // [32] bf16 of all spans; null: each span begins with its own
    const u8* qvalues;      // int4: the 16 quantized values + their bias
    i64 count;
    i64 x_steps;           // of each
    const i32* starts;     // [rows, starts_stride]: of each span -bias times the sum of x
    i64 starts_stride;
    Prefetch prefetch;
    bool adds;             // to the sums of earlier spans in the tile; the first span does not
};

#ifdef SF_PARTS
// Spans of a quantized panel whose quantized values lie there as bytes, and x that lies in one slab. See Spans.
struct ByteSpans {
    const u32* x;
    const u8* weights;
    const u8* scales;      // of the first span: 32 bf16
    i64 weights_stride;    // bytes from span to span
    i64 scales_stride;     // 0: all spans share theirs
    i64 count;
    i64 x_steps;
    const i32* starts;
    i64 starts_stride;
    Prefetch prefetch;
    bool adds;
};
#endif

template <int ROWS, int WIDTH, int... R>
SF_INLINE void start_span(Ints (&acc)[ROWS][WIDTH], const i32* starts, i64 stride, std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast(starts[R * stride]), acc[R][WIDTH - 1] = acc[R][0]), ...);
}

// Adds to each row its word of x times a vector or two of quantized values.
template <int ROWS, int WIDTH, int... R>
SF_INLINE void add_qvalues_of_rows(Ints (&acc)[ROWS][WIDTH], const Packed (&qvalues)[WIDTH], const u32* x,
                                  std::integer_sequence<int, R...>) {
#ifndef SF_AVX512
    if constexpr (WIDTH == 1) return void(((acc[R][0] = dot_qvalues(acc[R][0], qvalues[0], x[R * SLAB_STRIDE])), ...));
#endif
    (add_qvalues(acc[R], qvalues, broadcast_packed(x[R * SLAB_STRIDE])), ...);
}

template <int ROWS, int WIDTH, int... R>
SF_INLINE void qvalues_step(Ints (&acc)[ROWS][WIDTH], const Packed (&qvalues)[WIDTH], const u32* x,
                           std::integer_sequence<int, R...> rows) {
#ifdef SF_BYTE_DOTS
    add_qvalues_of_rows(acc, qvalues, x, rows);
#else
    Packed each[WIDTH];
    for (int v = 0; v < WIDTH; ++v) each[v] = even_bytes(qvalues[v]);
    add_qvalues_of_rows(acc, each, x, rows);
    for (int v = 0; v < WIDTH; ++v) each[v] = odd_bytes(qvalues[v]);
    add_qvalues_of_rows(acc, each, x + SLAB_STEPS, rows);
#endif
}

#ifndef SF_BYTE_DOTS
// Multiplies for each lane's pairs of bytes a vector or two of levels with a word of x of each row, in 16 bits; with ADDS adds that.
template <bool ADDS, int ROWS, int WIDTH, int... R>
SF_INLINE void multiply_levels(Packed (&acc)[ROWS][WIDTH], const Packed (&levels)[WIDTH], const u32* x, std::integer_sequence<int, R...>) {
    ((acc[R][0] = byte_pairs<ADDS>(acc[R][0], levels[0], x[R * SLAB_STRIDE])), ...);
    if constexpr (WIDTH == 2) ((acc[R][1] = byte_pairs<ADDS>(acc[R][1], levels[1], x[R * SLAB_STRIDE])), ...);
}

template <int ROWS, int WIDTH, int... R>
SF_INLINE void add_pair_sums(const Packed (&acc)[ROWS][WIDTH], Ints (&sums)[ROWS][WIDTH], std::integer_sequence<int, R...>) {
    ((sums[R][0] = sums[R][0] + sum_of_pairs(acc[R][0])), ...);
    if constexpr (WIDTH == 2) ((sums[R][1] = sums[R][1] + sum_of_pairs(acc[R][1])), ...);
}

// Sums in 16 bits the products of the words of x from `place` to `stop` with the levels at `at`, and goes on behind both.
template <int ROWS, int WIDTH, int... R>
SF_INLINE void sum_pairs(Packed (&acc)[ROWS][WIDTH], const u8*& at, const u32*& place, const u32* stop, Prefetch& lines,
                         std::integer_sequence<int, R...> rows) {
    auto step = [&](auto adds) {
        prefetch_step<Fetch::NEAR, WIDTH>(lines);
        Packed words[WIDTH];
        for (int v = 0; v < WIDTH; ++v) words[v] = load_packed(at + v * VECTOR_BYTES);
        multiply_levels<decltype(adds)::value>(acc, words, place, rows);
        at += STEP_BYTES;
        ++place;
    };
    step(std::false_type{});
    while (place < stop) step(std::true_type{});
}
#endif

// Adds to `acc`, which `start` begins, the products of the words of x from `place` to `end` with the bytes at `at`. SUM_STEPS: how
// many words of x are summed in 16 bits before they are widened, of levels so small that these sums stay within them, and x in
// bytes; 0: none.
template <int SUM_STEPS, int ROWS, int WIDTH, class Start, int... R>
SF_INLINE void add_words(Ints (&acc)[ROWS][WIDTH], const u8* at, const u32* place, const u32* end, Prefetch lines, Start start,
                         std::integer_sequence<int, R...> rows) {
    if constexpr (SUM_STEPS == 0) {
        start();
        do {  // a loop that may have no step makes GCC keep every sum twice
            prefetch_step<Fetch::NEAR, WIDTH>(lines);
            Packed words[WIDTH];
            for (int v = 0; v < WIDTH; ++v) words[v] = load_packed(at + v * VECTOR_BYTES);
            qvalues_step(acc, words, place, rows);
            at += STEP_BYTES;
        } while (++place < end);
    } else {
#ifndef SF_BYTE_DOTS
        Packed pairs[ROWS][WIDTH];
        sum_pairs(pairs, at, place, std::min(place + SUM_STEPS, end), lines, rows);
        start();
        add_pair_sums(pairs, acc, rows);
        while (place < end) {
            asm volatile("" : "+m"(acc));  // they wait in memory: registers are for what is summed in 16 bits
            sum_pairs(pairs, at, place, std::min(place + SUM_STEPS, end), lines, rows);
            add_pair_sums(pairs, acc, rows);
        }
#endif
    }
}

#ifdef SF_AVX512
constexpr int NIBBLE_ROWS = MAX_ROWS;   // most that are multiplied with int4 as it is
#else
constexpr int NIBBLE_ROWS = WIDE_ROWS;  // the same: with more, nibbles become bytes once for all
constexpr int INT4_SUM_STEPS = 6;       // words of x times values of int4 that are summed in 16 bits: these span no more than 21

// Adds to `acc` the products of the words of x from `place` to `end` with nibbles at `at`, words of eight of them.
template <int ROWS, int WIDTH, int... R>
SF_INLINE void add_nibbles(Ints (&acc)[ROWS][WIDTH], Packed table, const u8* at, const u32* place, const u32* end, Prefetch lines,
                           std::integer_sequence<int, R...> rows) {
    while (place < end) {
        const u32* stop = std::min(place + INT4_SUM_STEPS, end);
        Packed pairs[ROWS][WIDTH];
        auto step = [&](auto adds) {
            prefetch_step<Fetch::NEAR, WIDTH>(lines);
            Packed words[WIDTH], levels[WIDTH];
            for (int v = 0; v < WIDTH; ++v) words[v] = load_packed(at + v * VECTOR_BYTES);
            for (int v = 0; v < WIDTH; ++v) levels[v] = look_up(table, low_nibbles(words[v]));
            multiply_levels<decltype(adds)::value>(pairs, levels, place, rows);
            for (int v = 0; v < WIDTH; ++v) levels[v] = look_up(table, high_nibbles(words[v]));
            multiply_levels<true>(pairs, levels, place + 1, rows);
            at += STEP_BYTES;
            place += 2;
        };
        step(std::false_type{});
        while (place < stop) step(std::true_type{});
        add_pair_sums(pairs, acc, rows);
    }
}
#endif

template <bool ADDS>
SF_INLINE void put_scaled(Ints value, Floats scale, float* out) {
    if constexpr (ADDS) store(out, fma(to_floats(value), scale, load(out)));
    else store(out, to_floats(value) * scale);
}

template <bool ADDS, int ROWS, int WIDTH, int... R>
SF_INLINE void end_span(const Ints (&acc)[ROWS][WIDTH], const u16* scales, float* out, std::integer_sequence<int, R...>) {
    Floats left = load_bf16(scales);
    if constexpr (WIDTH == 1) {
        (put_scaled<ADDS>(acc[R][0], left, out + R * PANEL), ...);
    } else {
        Floats right = load_bf16(scales + LANES);
        ((put_scaled<ADDS>(acc[R][0], left, out + R * PANEL), put_scaled<ADDS>(acc[R][1], right, out + R * PANEL + LANES)), ...);
    }
}

#ifdef SF_BYTE_DOTS
// Adds to `acc` the products of the last two words of x of a span and puts its sums, row by row. A store takes two cycles: the stores of all
// rows, one after the other, would fill the window in which the processor looks for products to compute (AMD Zen 4).
template <bool ADDS, int ROWS, int... R>
SF_INLINE void end_span_by_row(Ints (&acc)[ROWS][2], const Packed (&first)[2], const Packed (&second)[2], const u32* x, const u16* scales,
                               float* out, std::integer_sequence<int, R...>) {
    const Floats left = load_bf16(scales), right = load_bf16(scales + LANES);
    auto end_row = [&](Ints (&sums)[2], const u32* words, float* to) {
        add_qvalues(sums, first, broadcast_packed(words[0]));
        add_qvalues(sums, second, broadcast_packed(words[1]));
        put_scaled<ADDS>(sums[0], left, to);
        put_scaled<ADDS>(sums[1], right, to + LANES);
    };
    (end_row(acc[R], x + R * SLAB_STRIDE, out + R * PANEL), ...);
}

// Computes out[r][0..31] = or += for each span of int4: scale[0..31] * sum over it of x[r][k] * qvalue[k][0..31]. A word of a panel holds
// eight nibbles: the low ones four neighbours in K, the high ones the next four; each is looked up in `qvalues`.
template <int ROWS, Fetch FETCH = Fetch::NEAR>
SF_LEAF void multiply_nibbles(const Spans& given, float* out) {
    const Spans spans = given;  // what stores cannot change stays in registers
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const Packed table = load_qvalues(spans.qvalues);
    const u8* weights = spans.weights;
    const u32* x = spans.x;
    Prefetch prefetch = spans.prefetch;
    for (i64 span = 0; span < spans.count; ++span) {
        const u16* scales = spans.scales;
        if (!scales) {
            scales = reinterpret_cast<const u16*>(weights);
            prefetch_scales<FETCH>(prefetch, weights);
            weights += SCALE_BYTES;
        }
        Packed words[2], low[2], high[2];
        auto unpack_low = [&] {
            prefetch_step<FETCH, 2>(prefetch, weights);
            for (int v = 0; v < 2; ++v) words[v] = load_packed(weights + v * VECTOR_BYTES);
            for (int v = 0; v < 2; ++v) low[v] = look_up(table, low_nibbles(words[v]));
            weights += STEP_BYTES;
        };
        auto unpack_high = [&] {
            for (int v = 0; v < 2; ++v) high[v] = look_up(table, high_nibbles(words[v]));
        };
        Ints acc[ROWS][2];
        start_span(acc, spans.starts + span, spans.starts_stride, rows);
        for (const u32* last = x + spans.x_steps - 2; x < last; x += 2) {
            unpack_low();
            qvalues_step(acc, low, x, rows);
            unpack_high();
            qvalues_step(acc, high, x + 1, rows);
        }
        unpack_low();
        unpack_high();
        if (span || spans.adds) end_span_by_row<true>(acc, low, high, x, scales, out, rows);
        else end_span_by_row<false>(acc, low, high, x, scales, out, rows);
        asm volatile("" ::: "memory");  // else GCC keeps the tile in registers that it does not have
        x += 2;
    }
}
#endif

// Computes out[r][0..31] = or += for each span: scale[0..31] * sum over it of x[r][k] * qvalue[k][0..31].
// BITS is 8 (a byte of a panel is a quantized value + its bias) or, without multiply_nibbles(), 4.
template <int BITS, int ROWS, Fetch FETCH = Fetch::NEAR>
SF_LEAF void multiply_qvalues(const Spans& spans, float* out) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WIDTH = width_of(ROWS);
    [[maybe_unused]] const Packed table = BITS == 4 ? load_qvalues(spans.qvalues) : Packed{};
    const u8* weights = spans.weights;
    const u32* x = spans.x;
    Prefetch prefetch = spans.prefetch;
    for (i64 span = 0; span < spans.count; ++span) {
        const u16* scales = spans.scales;
        if (!scales) {
            scales = reinterpret_cast<const u16*>(weights);
            weights += SCALE_BYTES;
        }
        const i64 steps = BITS == 8 ? spans.x_steps : spans.x_steps / 2;
        for (int part = 0; part < 2; part += WIDTH) {
            const u8* at = weights + part * VECTOR_BYTES;
            Prefetch lines = WIDTH == 2 ? prefetch : half_of(prefetch, steps, part);
            Ints acc[ROWS][WIDTH];
            start_span(acc, spans.starts + span, spans.starts_stride, rows);
#ifndef SF_BYTE_DOTS
            if constexpr (BITS == 4) add_nibbles(acc, table, at, x, x + spans.x_steps, lines, rows);
            else
#endif
            for (const u32 *place = x, *end = x + spans.x_steps; place < end; ++place, at += STEP_BYTES) {
                prefetch_step<FETCH, WIDTH>(lines, at);
                Packed words[WIDTH];
                for (int v = 0; v < WIDTH; ++v) words[v] = load_packed(at + v * VECTOR_BYTES);
                qvalues_step(acc, words, place, rows);
            }
            if (span || spans.adds) end_span<true>(acc, scales + part * LANES, out + part * LANES, rows);
            else end_span<false>(acc, scales + part * LANES, out + part * LANES, rows);
            asm volatile("" ::: "memory");  // else GCC keeps the tile in registers that it does not have
        }
        x += spans.x_steps;
        weights += steps * STEP_BYTES;
        prefetch.from += steps * prefetch.stride;
    }
}

// What a weight in groups must know of a group of a row of x.
struct XGroup {
    float scale;
    union {
        i32 start;  // -bias times the sum of its quantized values
        float sum;  // of its elements: of kernels with OFFSETS
    };
};

// Groups of a panel whose levels lie there as bytes, and x that lies in one slab.
struct Groups {
    const u32* x;          // of the first row
    const u8* levels;      // [x_steps][PANEL] words of four
    const float* scales;   // [groups][PANEL]
    const float* offsets;  // [groups][PANEL], of kernels with OFFSETS
    i64 x_steps;           // of all groups
    i64 group_steps;       // of each but the last, which may have fewer
    const XGroup* x_groups;  // [groups][rows]
    Prefetch prefetch;
};

template <bool OFFSETS>
SF_INLINE void put_group(Ints value, Floats scale, Floats offset, const XGroup& x, float* out) {
    Floats total = fma(to_floats(value) * broadcast(x.scale), scale, load(out));
    if constexpr (OFFSETS) total = fma(broadcast(x.sum), offset, total);
    store(out, total);
}

// Ends a group in vector V of a tile. `at` is its first column in the scales.
template <bool OFFSETS, int V, int ROWS, int WIDTH, int... R>
SF_INLINE void end_group(const Ints (&acc)[ROWS][WIDTH], const Groups& g, i64 at, const XGroup* x, float* out,
                         std::integer_sequence<int, R...>) {
    const Floats scale = load(g.scales + at), offset = OFFSETS ? load(g.offsets + at) : scale;
    (put_group<OFFSETS>(acc[R][V], scale, offset, x[R], out + R * PANEL), ...);
}

template <bool OFFSETS, int ROWS, int WIDTH, int... R>
SF_INLINE void start_group(Ints (&acc)[ROWS][WIDTH], const XGroup* x, std::integer_sequence<int, R...>) {
    ((acc[R][0] = broadcast(OFFSETS ? 0 : x[R].start), acc[R][WIDTH - 1] = acc[R][0]), ...);
}

// Computes out[r][0..31] += for each group: scale[0..31] * x's scale[r] * sum over it of x[r][k] * (level[k][0..31] - bias),
// and with OFFSETS + offset[0..31] * x's sum[r]. SUM_STEPS: see add_words().
template <bool OFFSETS, int SUM_STEPS, int ROWS>
SF_LEAF void multiply_groups(const Groups& given, float* out) {
    const Groups g = given;  // what stores cannot change stays in registers
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WIDTH = width_of(ROWS);
    const u8* levels = g.levels;
    const u32* x = g.x;
    const XGroup* x_group = g.x_groups;
    Prefetch prefetch = g.prefetch;
    i64 group = 0;
    for (i64 left = g.x_steps; left > 0; left -= g.group_steps, ++group, x_group += ROWS) {
        const i64 steps = std::min(left, g.group_steps);
        for (int part = 0; part < 2; part += WIDTH) {
            const u8* at = levels + part * VECTOR_BYTES;
            Prefetch lines = WIDTH == 2 ? prefetch : half_of(prefetch, steps, part);
            Ints acc[ROWS][WIDTH];
            add_words<SUM_STEPS>(acc, at, x, x + steps, lines, [&] { start_group<OFFSETS>(acc, x_group, rows); }, rows);
            const i64 columns = group * PANEL + part * LANES;
            end_group<OFFSETS, 0>(acc, g, columns, x_group, out + part * LANES, rows);
            if constexpr (WIDTH == 2) end_group<OFFSETS, 1>(acc, g, columns + LANES, x_group, out + LANES, rows);
            asm volatile("" ::: "memory");  // else GCC keeps the tile in registers that it does not have
        }
        x += steps;
        levels += steps * STEP_BYTES;
        prefetch.from += steps * prefetch.stride;
    }
}

// A run of a panel in FP8 that was widened to bf16, and x that lies in one slab.
struct Fp8Run {
    const u32* x;         // of the first row
    const u8* weights;    // [steps][STEP_BYTES]
    const float* scales;  // [PANEL]
    i64 steps;            // even
    Prefetch prefetch;
};

#ifndef SF_TILES
SF_INLINE void put_fp8(Floats first, Floats second, Floats scale, float* out) { store(out, fma(first + second, scale, load(out))); }

template <int V, int ROWS, int WIDTH, int... R>
SF_INLINE void put_fp8_rows(const Floats (&a)[ROWS][WIDTH], const Floats (&b)[ROWS][WIDTH], Floats scale, float* out,
                            std::integer_sequence<int, R...>) {
    (put_fp8(a[R][V], b[R][V], scale, out + R * PANEL), ...);
}
template <int V, int ROWS, int WIDTH, int... R>
SF_INLINE void put_fp8_rows(const float* a, const Floats (&b)[ROWS][WIDTH], Floats scale, float* out, std::integer_sequence<int, R...>) {
    (put_fp8(load(a + R * PANEL), b[R][V], scale, out + R * PANEL), ...);
}

// Computes out[r][0..31] += scale[0..31] * (sum over the first half of the run + sum over the second) of x[r][k] *
// weights[k][0..31]. With few rows both halves at once, so that enough sums are under way.
template <int ROWS>
SF_LEAF void multiply_fp8(const Fp8Run& run, float* out) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const i64 half = run.steps / 2, x_half = half * PAIR_WORDS;
    Prefetch prefetch = run.prefetch;
    if constexpr (ROWS <= FEW_ROWS) {
        prefetch.stride *= 2;  // two steps at a time
        Floats a[ROWS][2], b[ROWS][2];
        clear(a, rows);
        clear(b, rows);
        const u8* weights = run.weights;
        for (const u32 *x = run.x, *end = x + x_half; x < end; x += PAIR_WORDS, weights += STEP_BYTES) {
            prefetch_step<Fetch::NEAR, 2>(prefetch);
            bf16_step(a, weights, x, rows);
            bf16_step(b, weights + half * STEP_BYTES, x + x_half, rows);
        }
        put_fp8_rows<0>(a, b, load(run.scales), out, rows);
        put_fp8_rows<1>(a, b, load(run.scales + LANES), out + LANES, rows);
    } else {
        constexpr int WIDTH = width_of(ROWS, Dot::BF16);
        alignas(64) float first[ROWS * PANEL];
        for (int part = 0; part < 2; part += WIDTH) {
            const u8* weights = run.weights + part * VECTOR_BYTES;
            Floats acc[ROWS][WIDTH];
            for (int n = 0; n < 2; ++n) {
                clear(acc, rows);
                for (const u32 *x = run.x + n * x_half, *end = x + x_half; x < end; x += PAIR_WORDS, weights += STEP_BYTES) {
                    if (part == 0) prefetch_step<Fetch::NEAR, 1>(prefetch);
                    bf16_step(acc, weights, x, rows);
                }
                if (n == 0) store_tile(acc, first, PANEL, rows);
            }
            put_fp8_rows<0>(first, acc, load(run.scales + part * LANES), out + part * LANES, rows);
            if constexpr (WIDTH == 2) put_fp8_rows<1>(first + LANES, acc, load(run.scales + LANES), out + LANES, rows);
        }
    }
}
#endif

using MultiplyQValues = void (*)(const Spans&, float*);

constexpr auto ALL_ROWS = std::make_integer_sequence<int, MAX_ROWS>{};

#ifndef SF_TILES
using MultiplyBf16 = void (*)(const u32*, const Segments&, float*, i64);

constexpr auto FEW = std::make_integer_sequence<int, FEW_ROWS>{};

template <bool INT8, int... R>
SF_INLINE MultiplyBf16 choose_two(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_bf16_two<R + 1, INT8>...};
    return table[rows - 1];
}
template <bool INT8, int... R, int... F>
SF_INLINE MultiplyBf16 choose_each(int rows, std::integer_sequence<int, R...>, std::integer_sequence<int, F...>) {
    static constexpr MultiplyBf16 of_two[] = {multiply_bf16_each_of_two<F + 1, INT8>...};
    static constexpr MultiplyBf16 of_one[] = {multiply_bf16_each<FEW_ROWS + 1 + R, INT8>...};
    return rows <= FEW_ROWS ? of_two[rows - 1] : of_one[rows - 1 - FEW_ROWS];
}

#ifdef SF_AVX512
template <Fetch FETCH, bool INT8 = false, int... R>
SF_INLINE MultiplyBf16 choose_bf16(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_wide<Dot::BF16, R + 1, FETCH, INT8>...};
    return table[rows - 1];
}
SF_INLINE void multiply(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    choose_bf16<Fetch::NEAR>(rows, ALL_ROWS)(x, segments, out, out_stride);
}
// Does the same with keys and values. For <WIDENS_INT8>, here and below: where that is false no micro-kernels of int8 are compiled.
SF_INLINE void multiply_kv(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    if (WIDENS_INT8 && segments.int8) choose_bf16<Fetch::FAR, WIDENS_INT8>(rows, ALL_ROWS)(x, segments, out, out_stride);
    else choose_bf16<Fetch::FAR>(rows, ALL_ROWS)(x, segments, out, out_stride);
}
#endif
#if defined(SF_AVX512) && !defined(SF_TILES)
constexpr int LEAST_BOTH_ROWS = 4, MOST_BOTH_ROWS = 11;  // with which int4 is prefetched to the second cache, see fetch_of_int4()
static_assert(MOST_BOTH_ROWS <= MAX_ROWS, "they are a single block");
constexpr int HALF_ROWS = (MAX_ROWS + 1) / 2;  // least of one of several blocks of rows
constexpr auto FROM_HALF = std::make_integer_sequence<int, MAX_ROWS - HALF_ROWS + 1>{};

template <Fetch FETCH, int... R>
SF_INLINE MultiplyBf16 choose_bf16_part(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_wide<Dot::BF16, HALF_ROWS + R, FETCH>...};
    return table[rows - HALF_ROWS];
}
// Multiplies a panel in bf16, or a part of one, with at least HALF_ROWS rows.
SF_INLINE void multiply_part(int rows, const u32* x, const Segments& part, Fetch fetch, float* out) {
    if (fetch == Fetch::BOTH) return choose_bf16_part<Fetch::BOTH>(rows, FROM_HALF)(x, part, out, PANEL);
    if (fetch == Fetch::SHARE) return choose_bf16_part<Fetch::SHARE>(rows, FROM_HALF)(x, part, out, PANEL);
    multiply(rows, x, part, out, PANEL);
}
#endif
SF_INLINE void multiply_two(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    if (WIDENS_INT8 && segments.int8) choose_two<WIDENS_INT8>(rows, FEW)(x, segments, out, out_stride);
    else choose_two<false>(rows, FEW)(x, segments, out, out_stride);
}
SF_INLINE void multiply_each(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto many = std::make_integer_sequence<int, MAX_ROWS - FEW_ROWS>{};
    if (WIDENS_INT8 && segments.int8) choose_each<WIDENS_INT8>(rows, many, FEW)(x, segments, out, out_stride);
    else choose_each<false>(rows, many, FEW)(x, segments, out, out_stride);
}
#endif

template <int BITS, int ROWS, Fetch FETCH>
constexpr MultiplyQValues micro_kernel() {
#ifdef SF_BYTE_DOTS
    if constexpr (BITS == 4) return multiply_nibbles<ROWS, FETCH>;
    else
#endif
    return multiply_qvalues<BITS, ROWS, FETCH>;
}
template <int BITS, int... R>
SF_INLINE MultiplyQValues choose_qvalues(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyQValues table[] = {micro_kernel<BITS, R + 1, Fetch::NEAR>()...};
    return table[rows - 1];
}
#ifdef SF_KEPT_SUMS
SF_INLINE MultiplyQValues choose_kept(int rows);  // in multiply_kept.h
#endif
template <int BITS>
SF_INLINE void multiply(int rows, const Spans& spans, float* out) {
#ifdef SF_KEPT_SUMS
    if (const MultiplyQValues kept = BITS == 4 && !spans.scales ? choose_kept(rows) : nullptr) return kept(spans, out);
#endif
    choose_qvalues<BITS>(rows, std::make_integer_sequence<int, BITS == 4 ? NIBBLE_ROWS : MAX_ROWS>{})(spans, out);
}
#if defined(SF_AVX512) && !defined(SF_TILES)
template <int BITS, Fetch FETCH, int LEAST, int... R>
SF_INLINE MultiplyQValues choose_qvalues_part(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyQValues table[] = {micro_kernel<BITS, LEAST + R, FETCH>()...};
    return table[rows - LEAST];
}
// Does the same in int8, with at least HALF_ROWS rows.
SF_INLINE void multiply_part(int rows, const Spans& spans, Fetch fetch, float* out) {
    if (fetch == Fetch::BOTH) choose_qvalues_part<8, Fetch::BOTH, HALF_ROWS>(rows, FROM_HALF)(spans, out);
    else choose_qvalues_part<8, Fetch::SHARE, HALF_ROWS>(rows, FROM_HALF)(spans, out);
}
#endif

// Returns where int4 is prefetched to that streams from memory as a single block of so many rows of x is multiplied with it.
SF_INLINE Fetch fetch_of_int4([[maybe_unused]] i64 rows) {
#if defined(SF_AVX512) && !defined(SF_TILES)
    if (LEAST_BOTH_ROWS <= rows && rows <= MOST_BOTH_ROWS) return Fetch::BOTH;
#endif
    return Fetch::NEAR;
}
// Multiplies spans of int4 that are prefetched to where fetch_of_int4() says.
SF_INLINE void multiply_int4(int rows, const Spans& spans, [[maybe_unused]] Fetch fetch, float* out) {
#if defined(SF_AVX512) && !defined(SF_TILES)
    constexpr auto both = std::make_integer_sequence<int, MOST_BOTH_ROWS - LEAST_BOTH_ROWS + 1>{};
    if (fetch == Fetch::BOTH) return choose_qvalues_part<4, Fetch::BOTH, LEAST_BOTH_ROWS>(rows, both)(spans, out);
#endif
    multiply<4>(rows, spans, out);
}
using MultiplyGroups = void (*)(const Groups&, float*);

template <bool OFFSETS, int SUM_STEPS, int... R>
SF_INLINE MultiplyGroups choose_groups(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyGroups table[] = {multiply_groups<OFFSETS, SUM_STEPS, R + 1>...};
    return table[rows - 1];
}
template <bool OFFSETS>
SF_INLINE MultiplyGroups choose_groups(int rows, [[maybe_unused]] int sum_steps) {
#ifndef SF_BYTE_DOTS
    if (sum_steps >= 8) return choose_groups<OFFSETS, 8>(rows, ALL_ROWS);
    if (sum_steps >= 4) return choose_groups<OFFSETS, 4>(rows, ALL_ROWS);
    if (sum_steps >= 2) return choose_groups<OFFSETS, 2>(rows, ALL_ROWS);
#endif
    return choose_groups<OFFSETS, 0>(rows, ALL_ROWS);
}
// `sum_steps`: how many words of x may be multiplied before sums of pairs leave 16 bits; 0: x is packed as 16 bits.
SF_INLINE void multiply(int rows, const Groups& groups, int sum_steps, float* out) {
    (groups.offsets ? choose_groups<true>(rows, sum_steps) : choose_groups<false>(rows, sum_steps))(groups, out);
}

#ifndef SF_TILES
using MultiplyFp8 = void (*)(const Fp8Run&, float*);

template <int... R>
SF_INLINE MultiplyFp8 choose_fp8(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyFp8 table[] = {multiply_fp8<R + 1>...};
    return table[rows - 1];
}
SF_INLINE void multiply(int rows, const Fp8Run& run, float* out) { choose_fp8(rows, ALL_ROWS)(run, out); }
#endif

}  // namespace SF_VARIANT
}  // namespace splitfuse

#if defined(SF_TILES)
#include "multiply_tiles.h"
#elif !defined(SF_AVX512)
#include "multiply_halves.h"
#elif defined(SF_KEPT_SUMS)
#include "multiply_kept.h"
#endif
