// Limits of the machine, which the benchmarks measure every kernel against.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr i64 READ_RUN = 1 << 20;  // bytes

// Reads `bytes` of `data`, and does nothing else with them; what lies AHEAD is prefetched into a cache.
template <Fetch FETCH, int AHEAD>
SF_INLINE void read_all(Team& team, const u8* data, i64 bytes) {
    team.share(bytes / READ_RUN, [&](i64 begin, i64 end, i64) {
        const float* last = reinterpret_cast<const float*>(data + end * READ_RUN);
        Floats a = broadcast(0.0f), b = a, c = a, d = a;
        for (const float* p = reinterpret_cast<const float*>(data + begin * READ_RUN); p < last; p += 4 * LANES) {
            for (int line = 0; line < 4; ++line) prefetch_line<FETCH>(reinterpret_cast<const u8*>(p) + AHEAD + 64 * line);
            a = max(a, load(p));
            b = max(b, load(p + LANES));
            c = max(c, load(p + 2 * LANES));
            d = max(d, load(p + 3 * LANES));
        }
        volatile float kept = highest(max(max(a, b), max(c, d)));
        (void)kept;
    });
}

// Which cache a processor reads memory faster into differs: the limit is the better of the two.
inline void read_all(Team& team, const u8* data, i64 bytes, bool into_second) {
    if (into_second) read_all<Fetch::FAR, PREFETCH_BYTES / 2>(team, data, bytes);
    else read_all<Fetch::NEAR, PREFETCH_BYTES>(team, data, bytes);
}

template <int ROWS, int WIDTH, int... R>
SF_INLINE void dots(Floats (&acc)[ROWS][WIDTH], const Packed (&weights)[WIDTH], Packed x, std::integer_sequence<int, R...>) {
#ifdef SF_BF16_DOTS
    (add_dots(acc[R], weights, x), ...);
#else
    Floats each[WIDTH];
    for (int v = 0; v < WIDTH; ++v) each[v] = as_floats(weights[v]);
    for (int half = 0; half < 2; ++half) (add_products(acc[R], each, as_floats(x)), ...);
#endif
}
template <int ROWS, int WIDTH, int... R>
SF_INLINE void dots(Ints (&acc)[ROWS][WIDTH], const Packed (&weights)[WIDTH], Packed x, std::integer_sequence<int, R...>) {
#ifdef SF_BYTE_DOTS
    (add_qvalues(acc[R], weights, x), ...);
#else
    for (int half = 0; half < 2; ++half) (add_qvalues(acc[R], weights, x), ...);
#endif
}

// Computes in every thread `rounds` of a full tile's dot products from registers alone: in each lane two of bf16 or four
// of quantized values a round, by the instructions that the micro-kernels use. Returns a number that depends on all.
template <class Accumulator>
SF_LEAF float dots_only(i64 rounds) {
    constexpr auto rows = std::make_integer_sequence<int, MAX_ROWS>{};
    constexpr int WIDTH = width_of(MAX_ROWS);
    alignas(64) u8 bytes[3 * 64] = {1, 2, 3, 4};
    const Packed two[2] = {load_packed(bytes), load_packed(bytes + 64)}, x = load_packed(bytes + 128);
    Packed weights[WIDTH];
    for (int v = 0; v < WIDTH; ++v) weights[v] = two[v];
    Accumulator acc[MAX_ROWS][WIDTH];
    // Each starts from another number that the compiler does not know, or it would compute one for all.
    volatile u8 number = 1;
    for (auto& row : acc)
        for (Accumulator& each : row) std::memset(&each, number++, sizeof each);
    for (i64 i = 0; i < rounds; ++i) dots(acc, weights, x, rows);
    float total = 0.0f;
    for (auto& row : acc)
        for (Accumulator& each : row) {
            float lanes[LANES];
            std::memcpy(lanes, &each, sizeof lanes);
            for (float lane : lanes) total += lane;
        }
    return total;
}

inline float dots_only(bool qvalues, i64 rounds) {
#ifdef SF_TILES
    return dots_in_tiles(qvalues, rounds);
#endif
    return qvalues ? dots_only<Ints>(rounds) : dots_only<Floats>(rounds);
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
