// What the machine gives: the limits that every kernel is measured against, taken by the benchmarks.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr i64 READ_RUN = 1 << 16;  // bytes

// Reads all of `data`, `bytes` of it, and does nothing else with it.
inline void read_all(Team& team, const u8* data, i64 bytes) {
    team.share(bytes / READ_RUN, [&](i64 begin, i64 end, i64) {
        const float* last = reinterpret_cast<const float*>(data + end * READ_RUN);
        Floats a = broadcast(0.0f), b = a, c = a, d = a;
        for (const float* p = reinterpret_cast<const float*>(data + begin * READ_RUN); p < last; p += 4 * LANES) {
            for (int line = 0; line < 4; ++line) _mm_prefetch(reinterpret_cast<const u8*>(p) + AHEAD + 64 * line, _MM_HINT_T0);
            a = max(a, load(p));
            b = max(b, load(p + LANES));
            c = max(c, load(p + 2 * LANES));
            d = max(d, load(p + 3 * LANES));
        }
        volatile float kept = highest(max(max(a, b), max(c, d)));
        (void)kept;
    });
}

template <int ROWS, int... R>
SF_INLINE void dots(Floats (&acc)[ROWS][2], Packed a, Packed b, Packed x, std::integer_sequence<int, R...>) {
#ifdef SF_BF16_DOTS
    ((acc[R][0] = dot_bf16(acc[R][0], a, x), acc[R][1] = dot_bf16(acc[R][1], b, x)), ...);
#else
    for (int half = 0; half < 2; ++half)
        ((acc[R][0] = add_product(acc[R][0], as_floats(a), as_floats(x)),
          acc[R][1] = add_product(acc[R][1], as_floats(b), as_floats(x))), ...);
#endif
}
template <int ROWS, int... R>
SF_INLINE void dots(Ints (&acc)[ROWS][2], Packed a, Packed b, Packed x, std::integer_sequence<int, R...>) {
    ((acc[R][0] = dot_levels(acc[R][0], a, x), acc[R][1] = dot_levels(acc[R][1], b, x)), ...);
}

// Every thread does `rounds` of a tile's dot products from registers alone: MAX_ROWS * 32 lanes a round, of two bf16 or
// four levels each. Returns a number that depends on them.
template <class Accumulator>
SF_LEAF float dots_only(i64 rounds) {
    constexpr auto rows = std::make_integer_sequence<int, MAX_ROWS>{};
    alignas(64) u8 bytes[3 * 64] = {1, 2, 3, 4};
    Packed a = load_packed(bytes), b = load_packed(bytes + 64), x = load_packed(bytes + 128);
    Accumulator acc[MAX_ROWS][2];
    // Each begins with another number that the compiler does not know, or it would compute one for all.
    volatile u8 number = 1;
    for (auto& row : acc)
        for (Accumulator& each : row) std::memset(&each, number++, sizeof each);
    for (i64 i = 0; i < rounds; ++i) dots(acc, a, b, x, rows);
    float total = 0.0f;
    for (auto& row : acc) {
        float lanes[2][LANES];
        std::memcpy(lanes, &row, sizeof row);
        total += lanes[0][0] + lanes[1][0];
    }
    return total;
}

inline float dots_only(bool levels, i64 rounds) {
    return levels ? dots_only<Ints>(rounds) : dots_only<Floats>(rounds);
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
