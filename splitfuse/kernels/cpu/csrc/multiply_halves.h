// The micro-kernels of AVX2 for more rows than its registers hold sums of a panel for: tiles half as wide, whose halves
// alternate in runs that stay in the first cache. A row's sums run over K in the same order as in multiply.h.
#pragma once

#include "multiply.h"

namespace splitfuse {
namespace SF_VARIANT {

// Computes out[r][0..31] = or += sum over K of x[r][k] * weights[k][0..31]. See multiply_wide(). Between runs the sums wait in `out`.
template <Dot DOT, int ROWS>
SF_LEAF void multiply_halves(const u32* x, const Segments& segments, float* out, i64 out_stride) {
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WORDS = WORDS_OF<DOT>;
    bool adds = segments.adds;
    i64 in_slab = 0, segment = 0;
    for (i64 left = segments.total; left > 0; ++segment) {
        const u8* weights = segments.starts[segment];
        const u8* from = segments.prefetches[segment];
        i64 here = std::min<i64>(left, segments.steps);
        left -= here;
        while (here > 0) {
            const i64 run = std::min(std::min<i64>(RUN_STEPS, SLAB_STEPS - in_slab), here);
            for (int half = 0; half < 2; ++half) {
                Prefetch prefetch = half_of(Prefetch{from, segments.prefetch_stride}, run, half);
                const u8* at = weights + half * VECTOR_BYTES;
                SumOf<DOT> acc[ROWS][1];
                if (adds) load_tile(acc, out + half * LANES, out_stride, rows);
                else clear(acc, rows);
                for (const u32 *place = x, *end = x + run * WORDS; place < end; place += WORDS, at += segments.stride) {
                    prefetch_step<Fetch::NEAR, 1>(prefetch);
                    add_step<DOT>(acc, at, place, rows);
                }
                store_tile(acc, out + half * LANES, out_stride, rows);
            }
            adds = true;
            weights += run * segments.stride;
            from += run * segments.prefetch_stride;
            x += run * WORDS;
            here -= run;
            in_slab += run;
            if (in_slab == SLAB_STEPS) {
                x += ROWS * SLAB_STRIDE - SLAB_STEPS * WORDS;
                in_slab = 0;
            }
        }
    }
}

// Computes the same as multiply_qvalues(). SUM_STEPS: see add_words().
template <int SUM_STEPS, int ROWS>
SF_LEAF void multiply_spans(const ByteSpans& given, float* out) {
    const ByteSpans spans = given;  // what stores cannot change stays in registers
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    constexpr int WIDTH = width_of(ROWS);
    const u8 *weights = spans.weights, *scales = spans.scales;
    const u32* x = spans.x;
    Prefetch prefetch = spans.prefetch;
    for (i64 span = 0; span < spans.count; ++span) {
        for (int part = 0; part < 2; part += WIDTH) {
            const u16* of_columns = reinterpret_cast<const u16*>(scales) + part * LANES;
            const Prefetch lines = WIDTH == 2 ? prefetch : half_of(prefetch, spans.x_steps, part);
            Ints acc[ROWS][WIDTH];
            add_words<SUM_STEPS>(acc, weights + part * VECTOR_BYTES, x, x + spans.x_steps, lines,
                                 [&] { start_span(acc, spans.starts + span, spans.starts_stride, rows); }, rows);
            if (span || spans.adds) end_span<true>(acc, of_columns, out + part * LANES, rows);
            else end_span<false>(acc, of_columns, out + part * LANES, rows);
            asm volatile("" ::: "memory");  // else GCC keeps the tile in registers that it does not have
        }
        x += spans.x_steps;
        weights += spans.weights_stride;
        scales += spans.scales_stride;
        prefetch.from += spans.x_steps * prefetch.stride;
    }
}

using MultiplySpans = void (*)(const ByteSpans&, float*);

template <Dot DOT, int ROWS>
constexpr MultiplyBf16 multiply_part_of() {
    if constexpr (width_of(ROWS, DOT) == 2) return multiply_wide<DOT, ROWS>;
    else return multiply_halves<DOT, ROWS>;
}

template <Dot DOT, int... R>
SF_INLINE MultiplyBf16 choose_part(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyBf16 table[] = {multiply_part_of<DOT, R + 1>()...};
    return table[rows - 1];
}
template <int SUM_STEPS, int... R>
SF_INLINE MultiplySpans choose_spans(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplySpans table[] = {multiply_spans<SUM_STEPS, R + 1>...};
    return table[rows - 1];
}

// Multiplies a panel, or a part of one.
SF_INLINE void multiply(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    choose_part<Dot::BF16>(rows, ALL_ROWS)(x, segments, out, out_stride);
}
SF_INLINE void multiply_kv(int rows, const u32* x, const Segments& segments, float* out, i64 out_stride) {
    multiply(rows, x, segments, out, out_stride);
}
template <Dot DOT>
SF_INLINE void multiply_run(int rows, const u32* x, const Segments& run, float* out) {
    choose_part<DOT>(rows, ALL_ROWS)(x, run, out, PANEL);
}
template <int BITS>
SF_INLINE void multiply(int rows, const ByteSpans& spans, float* out) {
    choose_spans<BITS == 4 ? INT4_SUM_STEPS : 0>(rows, ALL_ROWS)(spans, out);
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
