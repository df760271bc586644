// The micro-kernels of AMX, in place of those for bf16 in multiply.h: up to 32 rows of x times a panel, or up to 16 rows
// times two, so that four tiles of sums are under way. Quantized weights have both: sums of whole numbers are exact.
//
// A row's sums run over K in one order, whatever the number of rows: 16 steps at a time, in the order of the instruction.
// So all products in bf16 are made with tiles, those of one row too. What is left of K is multiplied with zeros around it,
// which add nothing: no bit depends on where the end lies.
#pragma once

#include "multiply.h"
#include "tiles.h"

namespace splitfuse {
namespace SF_VARIANT {

static_assert(BLOCK_ROWS == 2 * TILE_ROWS);
// Which registers hold what: C, of A (times 16 rows) x B (times 16 columns) tiles, comes first, then A; B takes the last two.
template <int A, int B>
struct Registers {
    static constexpr int FIRST_A = A * B, FIRST_B = NUM_TILES - 2;
    static_assert(FIRST_A + A <= FIRST_B);
};

template <class T, int A, int B, int... C>
SF_INLINE void zero_sums(std::integer_sequence<int, C...>) { (T::template zero<C>(), ...); }
template <class T, int A, int B, int... C>
SF_INLINE void load_sums(const void* sums, i64 stride, std::integer_sequence<int, C...>) {
    const u8* from = static_cast<const u8*>(sums);
    (T::template load<C>(from + C / B * TILE_ROWS * stride + C % B * TILE_ROW_BYTES, stride), ...);
}
template <class T, int A, int B, int... C>
SF_INLINE void store_sums(void* sums, i64 stride, std::integer_sequence<int, C...>) {
    u8* to = static_cast<u8*>(sums);
    (T::template store<C>(to + C / B * TILE_ROWS * stride + C % B * TILE_ROW_BYTES, stride), ...);
}

// Adds the products of the rows of A with vector V of the columns.
template <class T, Dot DOT, int A, int B, int V>
SF_INLINE void add_vector(const u8* weights, i64 stride) {
    using R = Registers<A, B>;
    constexpr int REGISTER = R::FIRST_B + V % 2;
    T::template load<REGISTER>(weights, stride);
    T::template dot<DOT, V, R::FIRST_A, REGISTER>();
    if constexpr (A == 2) T::template dot<DOT, B + V, R::FIRST_A + 1, REGISTER>();
}

// Adds 16 steps. `panels`: one, or two where there are four vectors.
template <class T, Dot DOT, int A, int B>
SF_INLINE void add_tiles(const void* x, i64 x_stride, const u8* const (&panels)[B / 2], i64 stride) {
    using R = Registers<A, B>;
    T::template load<R::FIRST_A>(x, x_stride);
    if constexpr (A == 2) T::template load<R::FIRST_A + 1>(static_cast<const u8*>(x) + TILE_ROWS * x_stride, x_stride);
    add_vector<T, DOT, A, B, 0>(panels[0], stride);
    add_vector<T, DOT, A, B, 1>(panels[0] + TILE_ROW_BYTES, stride);
    if constexpr (B == 4) {
        add_vector<T, DOT, A, B, 2>(panels[1], stride);
        add_vector<T, DOT, A, B, 3>(panels[1] + TILE_ROW_BYTES, stride);
    }
}

SF_INLINE void prefetch_tiles(Prefetch& prefetch) {
    if (!prefetch.stride) return;
    for (int step = 0; step < TILE_ROWS; ++step) prefetch_step<Fetch::NEAR, 2>(prefetch);
}

// Adds `steps` steps, of one slab, and advances the panels by as many.
template <class T, Dot DOT, int A, int B>
SF_INLINE void add_steps(const u32* x, const u8* (&panels)[B / 2], i64 stride, i64 steps, Prefetch (&prefetches)[B / 2]) {
    for (; steps >= TILE_ROWS; steps -= TILE_ROWS, x += TILE_ROWS) {
        for (Prefetch& prefetch : prefetches) prefetch_tiles(prefetch);
        add_tiles<T, DOT, A, B>(x, SLAB_STRIDE * 4, panels, stride);
        for (const u8*& panel : panels) panel += TILE_ROWS * stride;
    }
    if (!steps) return;
    alignas(64) u32 rest_of_x[A * TILE_ROWS][TILE_ROWS] = {};
    alignas(64) u8 rest[B / 2][TILE_ROWS][STEP_BYTES] = {};
    const u8* padded[B / 2];
    for (int row = 0; row < A * TILE_ROWS; ++row) std::memcpy(rest_of_x[row], x + row * SLAB_STRIDE, steps * 4);
    for (int p = 0; p < B / 2; ++p) {
        for (i64 step = 0; step < steps; ++step, panels[p] += stride) std::memcpy(rest[p][step], panels[p], STEP_BYTES);
        padded[p] = rest[p][0];
    }
    add_tiles<T, DOT, A, B>(rest_of_x, TILE_ROW_BYTES, padded, STEP_BYTES);
}

// Stores the sums of `rows` rows.
template <class T, int A, int B, int... C>
SF_INLINE void put_sums(int rows, float* out, i64 stride, std::integer_sequence<int, C...> all) {
    if (rows == A * TILE_ROWS) return store_sums<T, A, B>(out, stride * 4, all);
    alignas(64) float sums[A * TILE_ROWS][B * LANES];
    store_sums<T, A, B>(sums, sizeof sums[0], all);
    for (int row = 0; row < rows; ++row) std::memcpy(out + row * stride, sums[row], sizeof sums[0]);
}

// Computes out[r][0..31] = or += sum over K of x[r][k] * weights[k][0..31]: bf16 summed in fp32, or quantized values summed
// in int32. With two panels, which lie side by side, out[r][0..63]; the lines that the second prefetches begin `steps` steps
// after those of the first. All 32 rows of `out` can be read where it adds.
template <class T, Dot DOT, int A, int B, bool ADDS>
SF_LEAF void multiply_in_tiles(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto sums = std::make_integer_sequence<int, A * B>{};
    if constexpr (ADDS) load_sums<T, A, B>(out, out_stride * 4, sums);
    else zero_sums<T, A, B>(sums);
    i64 in_slab = 0, segment = 0;
    for (i64 left = segments.total; left > 0; ++segment) {
        const u8* panels[B / 2];
        Prefetch prefetches[B / 2];
        for (int p = 0; p < B / 2; ++p) {
            panels[p] = segments.starts[segment] + p * STEP_BYTES;
            prefetches[p] = {segments.prefetches[segment] + p * segments.steps * segments.prefetch_stride, segments.prefetch_stride};
        }
        i64 here = std::min<i64>(left, segments.steps);
        left -= here;
        while (here > 0) {
            const i64 run = std::min<i64>(SLAB_STEPS - in_slab, here);
            add_steps<T, DOT, A, B>(x, panels, segments.stride, run, prefetches);
            here -= run;
            in_slab += run;
            x += run;
            if (in_slab == SLAB_STEPS) {
                x += rows * SLAB_STRIDE - SLAB_STEPS;
                in_slab = 0;
            }
        }
    }
    put_sums<T, A, B>(rows, out, out_stride, sums);
}

// Computes the same in bf16 for each segment by itself: out[r][32 s ..] for segment s. All have the same steps, of one slab.
template <class T, int A, int B>
SF_LEAF void multiply_each_in_tiles(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    const i64 count = segments.total / segments.steps;
    i64 segment = 0;
    for (; segment + B / 2 <= count; segment += B / 2, out += B / 2 * PANEL) {
        constexpr auto sums = std::make_integer_sequence<int, A * B>{};
        const u8* panels[B / 2];
        Prefetch prefetches[B / 2];
        for (int p = 0; p < B / 2; ++p) {
            panels[p] = segments.starts[segment + p];
            prefetches[p] = {segments.prefetches[segment + p], segments.prefetch_stride};
        }
        zero_sums<T, A, B>(sums);
        add_steps<T, Dot::BF16, A, B>(x, panels, segments.stride, segments.steps, prefetches);
        put_sums<T, A, B>(rows, out, out_stride, sums);
    }
    if (segment == count) return;
    const Segments last{segments.starts + segment, segments.prefetches + segment, segments.steps, segments.steps, segments.stride,
                        segments.prefetch_stride};
    multiply_in_tiles<T, Dot::BF16, A, 2, false>(rows, x, last, out, out_stride);
}

SF_INLINE void multiply(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        if (rows > TILE_ROWS) multiply_in_tiles<T, Dot::BF16, 2, 2, false>(rows, x, segments, out, out_stride);
        else multiply_in_tiles<T, Dot::BF16, 1, 2, false>(rows, x, segments, out, out_stride);
    });
}
SF_INLINE void multiply_kv(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    multiply(rows, x, segments, out, out_stride);
}
SF_INLINE void multiply_two(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    with_tiles([&](auto tiles) { multiply_in_tiles<decltype(tiles), Dot::BF16, 1, 4, false>(rows, x, segments, out, out_stride); });
}
SF_INLINE void multiply_each(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        if (rows > TILE_ROWS) multiply_each_in_tiles<T, 2, 2>(rows, x, segments, out, out_stride);
        else multiply_each_in_tiles<T, 1, 4>(rows, x, segments, out, out_stride);
    });
}

// Multiplies a run of a panel in bf16, or of quantized values as they are, or adds it to the sums of earlier runs.
template <Dot DOT>
SF_INLINE void multiply_run(int rows, const u32* x, const Segments& run, float* out) {
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        if (rows > TILE_ROWS) {
            if (run.adds) multiply_in_tiles<T, DOT, 2, 2, true>(rows, x, run, out, PANEL);
            else multiply_in_tiles<T, DOT, 2, 2, false>(rows, x, run, out, PANEL);
        } else {
            if (run.adds) multiply_in_tiles<T, DOT, 1, 2, true>(rows, x, run, out, PANEL);
            else multiply_in_tiles<T, DOT, 1, 2, false>(rows, x, run, out, PANEL);
        }
    });
}

// Computes out[r][0..31] += scale[0..31] * sum over a run in FP8, widened to bf16, of x[r][k] * weights[k][0..31].
SF_INLINE void multiply(int rows, const Fp8Run& run, float* out) {
    alignas(64) float sums[BLOCK_ROWS * PANEL];
    const Segments whole{&run.weights, &run.prefetch.from, static_cast<int>(run.steps), run.steps, STEP_BYTES, run.prefetch.stride};
    multiply(rows, run.x, whole, sums, PANEL);
    const Floats left = load(run.scales), right = load(run.scales + LANES);
    for (int at = 0; at < rows * PANEL; at += PANEL) {
        store(out + at, fma(load(sums + at), left, load(out + at)));
        store(out + at + LANES, fma(load(sums + at + LANES), right, load(out + at + LANES)));
    }
}

// Takes the sums of a span from quantized values + QVALUE_BIAS to weights, `rows` rows of them. The same arithmetic as
// multiply_qvalues().
template <bool ADDS>
SF_INLINE void put_span(int rows, const i32* totals, const i32* starts, i64 starts_stride, const u8* scales, float* out) {
    const u16* of_columns = reinterpret_cast<const u16*>(scales);
    const Floats left = load_bf16(of_columns), right = load_bf16(of_columns + LANES);
    for (int row = 0; row < rows; ++row, totals += PANEL, out += PANEL) {
        const Ints start = broadcast(starts[row * starts_stride]);
        put_scaled<ADDS>(load_ints(totals) + start, left, out);
        put_scaled<ADDS>(load_ints(totals + LANES) + start, right, out + LANES);
    }
}

// Computes the same as multiply_qvalues().
template <class T, int A>
SF_LEAF void multiply_spans_in_tiles(int rows, const ByteSpans& spans, float* out) {
    constexpr auto all = std::make_integer_sequence<int, A * 2>{};
    alignas(64) i32 totals[A * TILE_ROWS * PANEL];
    Prefetch prefetches[1] = {spans.prefetch};
    const u32* x = spans.x;
    const u8 *weights = spans.weights, *scales = spans.scales;
    for (i64 span = 0; span < spans.count; ++span) {
        const u8* panels[1] = {weights};
        zero_sums<T, A, 2>(all);
        add_steps<T, Dot::QVALUES, A, 2>(x, panels, STEP_BYTES, spans.x_steps, prefetches);
        store_sums<T, A, 2>(totals, PANEL * 4, all);
        if (span || spans.adds) put_span<true>(rows, totals, spans.starts + span, spans.starts_stride, scales, out);
        else put_span<false>(rows, totals, spans.starts + span, spans.starts_stride, scales, out);
        x += spans.x_steps;
        weights += spans.weights_stride;
        scales += spans.scales_stride;
    }
}

template <int BITS>
SF_INLINE void multiply(int rows, const ByteSpans& spans, float* out) {
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        if (rows > TILE_ROWS) multiply_spans_in_tiles<T, 2>(rows, spans, out);
        else multiply_spans_in_tiles<T, 1>(rows, spans, out);
    });
}

// Does one product of tiles: c [16][16] += a [16][64 bytes] b [16][64 bytes]. For tests.
inline void multiply_tiles_once(bool qvalues, const u8* a, const u8* b, u8* c) {
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        T::template load<0>(c, TILE_ROW_BYTES);
        T::template load<1>(a, TILE_ROW_BYTES);
        T::template load<2>(b, TILE_ROW_BYTES);
        if (qvalues) T::template dot<Dot::QVALUES, 0, 1, 2>();
        else T::template dot<Dot::BF16, 0, 1, 2>();
        T::template store<0>(c, TILE_ROW_BYTES);
    });
}

// Does in every thread `rounds` of full tiles' products from registers alone; see dots_only() in limits.h.
inline float dots_in_tiles(bool qvalues, i64 rounds) {
    alignas(64) u8 bytes[TILE_ROWS * TILE_ROW_BYTES] = {1, 2, 3, 4};
    with_tiles([&](auto tiles) {
        using T = decltype(tiles);
        zero_sums<T, 2, 2>(std::make_integer_sequence<int, 4>{});
        T::template load<4>(bytes, TILE_ROW_BYTES);
        T::template load<5>(bytes, TILE_ROW_BYTES);
        T::template load<6>(bytes, TILE_ROW_BYTES);
        T::template load<7>(bytes, TILE_ROW_BYTES);
        auto round = [&](auto dot) {
            constexpr Dot DOT = decltype(dot)::value;
            T::template dot<DOT, 0, 4, 6>();
            T::template dot<DOT, 1, 4, 7>();
            T::template dot<DOT, 2, 5, 6>();
            T::template dot<DOT, 3, 5, 7>();
        };
        for (i64 i = 0; i < rounds; i += TILE_ROWS) {
            if (qvalues) round(std::integral_constant<Dot, Dot::QVALUES>{});
            else round(std::integral_constant<Dot, Dot::BF16>{});
        }
        T::template store<0>(bytes, TILE_ROW_BYTES);
    });
    float total;
    std::memcpy(&total, bytes, sizeof total);
    return total;
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
