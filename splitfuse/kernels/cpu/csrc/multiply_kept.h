// The micro-kernel of AVX-512 with bf16 for int4 in groups and most rows of a tile: half a panel at a time, so that the sums in fp32
// stay in registers beside those of whole numbers, 14 x 1 of either kind. A row's sums run over K in the same order as in multiply.h.
#pragma once

#include "multiply.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr int LEAST_KEPT_ROWS = 13;  // with fewer, to have fp32 sums in memory costs less than to read x twice
constexpr i64 KEPT_WORDS = 64;       // of x, after which the halves of a panel alternate: they stay in the first cache

template <int ROWS, int... R>
SF_INLINE void add_qvalues_from(Ints (&acc)[ROWS][1], Packed qvalues, const u32* x, std::integer_sequence<int, R...>) {
    ((acc[R][0] = dot_qvalues(acc[R][0], qvalues, x + R * SLAB_STRIDE)), ...);
}
template <int ROWS, int... R>
SF_INLINE void add_scaled_sums(Floats (&sums)[ROWS][1], const Ints (&acc)[ROWS][1], Floats scale, std::integer_sequence<int, R...>) {
    ((sums[R][0] = add_scaled(sums[R][0], acc[R][0], scale)), ...);
}

// Computes the same as multiply_nibbles() for spans of int4 that begin with their own scales.
template <int ROWS>
SF_LEAF void multiply_kept(const Spans& given, float* out) {
    const Spans spans = given;  // what stores cannot change stays in registers
    constexpr auto rows = std::make_integer_sequence<int, ROWS>{};
    const Packed table = load_qvalues(spans.qvalues);
    const i64 span_bytes = SCALE_BYTES + spans.x_steps / 2 * STEP_BYTES, stride = spans.prefetch.stride / 2;
    const i64 most = std::max<i64>(1, KEPT_WORDS / spans.x_steps);
    const u8 *panel = spans.weights, *from = spans.prefetch.from;
    for (i64 first = 0; first < spans.count; first += most) {
        const i64 last = std::min(spans.count, first + most), bytes = (last - first) * span_bytes;
        for (int part = 0; part < 2; ++part) {
            const u8* weights = panel;
            const u32* x = spans.x + first * spans.x_steps;
            float* sums_out = out + part * LANES;
            Prefetch prefetch{from + part * (bytes / STEP_BYTES * stride), stride};  // each half of the lines
            Floats sums[ROWS][1];
            if (first || spans.adds) load_tile(sums, sums_out, PANEL, rows);
            else clear(sums, rows);
            for (i64 span = first; span < last; ++span) {
                const Floats scale = load_bf16(reinterpret_cast<const u16*>(weights) + part * LANES);
                prefetch_scales<Fetch::NEAR>(prefetch, weights);
                weights += SCALE_BYTES;
                Ints acc[ROWS][1];
                start_span(acc, spans.starts + span, spans.starts_stride, rows);
                const u32* end = x + spans.x_steps;
                do {
                    prefetch_step<Fetch::NEAR, 1>(prefetch);
                    const Packed words = load_packed(weights + part * VECTOR_BYTES);
                    add_qvalues_from(acc, look_up(table, low_nibbles(words)), x, rows);
                    add_qvalues_from(acc, look_up(table, high_nibbles(words)), x + 1, rows);
                    weights += STEP_BYTES;
                    x += 2;
                } while (x < end);
                add_scaled_sums(sums, acc, scale, rows);
            }
            store_tile(sums, sums_out, PANEL, rows);
        }
        panel += bytes;
        from += bytes / STEP_BYTES * 2 * stride;
    }
}

template <int... R>
SF_INLINE MultiplyQValues choose_kept(int rows, std::integer_sequence<int, R...>) {
    static constexpr MultiplyQValues table[] = {multiply_kept<LEAST_KEPT_ROWS + R>...};
    return table[rows - LEAST_KEPT_ROWS];
}
// Returns the micro-kernel for so many rows, or null if it is not of this file.
SF_INLINE MultiplyQValues choose_kept(int rows) {
    return rows < LEAST_KEPT_ROWS ? nullptr : choose_kept(rows, std::make_integer_sequence<int, MAX_ROWS - LEAST_KEPT_ROWS + 1>{});
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
