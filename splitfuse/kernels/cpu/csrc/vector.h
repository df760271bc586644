// Sixteen lanes at a time, in the instructions of one variant: the only file that knows AVX-512 from AVX2.
//
// Every function is exact or rounds as its comment says; none depends on anything but its arguments, so that code
// built from them in a fixed order gives the same bits each time.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define SF_INLINE static inline __attribute__((always_inline))

namespace splitfuse {
namespace SF_VARIANT {

using u8 = std::uint8_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using u16 = std::uint16_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

// What a product multiplies.
enum class Dot { BF16, QVALUES };

constexpr int LANES = 16;
constexpr float LOG2E = 1.4426950408889634f;
constexpr i32 QVALUE_BIAS = 128;    // weights of int8 are read as quantized value + 128, unsigned: one shift less

#ifdef SF_AVX512

#ifdef SF_BF16_DOTS
constexpr int MAX_ROWS = 14;       // of a tile: 14 x 2 accumulators, two weights and a broadcast fill 32 registers
using Element = u16;
#else
constexpr int MAX_ROWS = 13;       // of a tile: even and odd weights take two registers more
using Element = float;
#endif
constexpr int WIDE_ROWS = MAX_ROWS;      // of a tile as wide as a panel
constexpr int WIDE_BF16_ROWS = MAX_ROWS; // of one in bf16
constexpr int FEW_ROWS = MAX_ROWS / 2;   // of a tile of two panels
#define SF_BYTE_DOTS
#if defined(SF_BF16_DOTS) && !defined(SF_TILES)
#define SF_KEPT_SUMS                     // int4 has a micro-kernel of its own, see multiply_kept.h
#endif
#ifdef SF_TILES
#define SF_PARTS
constexpr int BLOCK_ROWS = 32;           // most rows that are multiplied at once: of two tiles, see tiles.h
#else
constexpr int BLOCK_ROWS = MAX_ROWS;
#endif

struct Floats { __m512 v; };       // 16 fp32
struct Ints { __m512i v; };        // 16 int32
struct Packed { __m512i v; };      // 64 bytes of weights or activations

SF_INLINE __mmask16 lane_mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }

SF_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
SF_INLINE Floats load(const float* p, int count) { return {_mm512_maskz_loadu_ps(lane_mask(count), p)}; }
SF_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
SF_INLINE void store(float* p, Floats a, int count) { _mm512_mask_storeu_ps(p, lane_mask(count), a.v); }
SF_INLINE Floats broadcast(float a) { return {_mm512_set1_ps(a)}; }
SF_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
SF_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
SF_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
SF_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
SF_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SF_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
SF_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
SF_INLINE Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
SF_INLINE Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SF_INLINE Floats fraction(Floats a) {  // a - floor(a)
    return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
SF_INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
SF_INLINE float highest(Floats a) { return _mm512_reduce_max_ps(a.v); }
// Returns the lanes from `begin` to `end` - 1 of a, the others of b.
SF_INLINE Floats between(int begin, int end, Floats a, Floats b) {
    return {_mm512_mask_blend_ps(lane_mask(end) & ~lane_mask(begin), b.v, a.v)};
}
// Returns `yes` where a > b, else `no`.
SF_INLINE Floats above(Floats a, Floats b, Floats yes, Floats no) {
    return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), yes.v)};
}
// Returns a times 2 to the power of floor(power).
SF_INLINE Floats scale_by_power(Floats a, Floats power) { return {_mm512_scalef_ps(a.v, power.v)}; }

SF_INLINE Floats load_bf16(const u16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
SF_INLINE Floats load_bf16(const u16* p, int count) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(count), p)), 16))};
}
#ifdef SF_BF16_DOTS
SF_INLINE __m256i round_bf16(__m512 a) { return (__m256i)_mm512_cvtneps_pbh(a); }
#else
SF_INLINE __m256i round_bf16(__m512 a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
}
#endif
SF_INLINE void store_bf16(u16* p, Floats a) {  // to the nearest, ties to even; NaN stays NaN
    _mm256_storeu_si256((__m256i*)p, round_bf16(a.v));
}
SF_INLINE void store_bf16(u16* p, Floats a, int count) {
    _mm256_mask_storeu_epi16(p, lane_mask(count), round_bf16(a.v));
}
SF_INLINE void store_exact_bf16(u16* p, Floats a) {  // that is a bf16 already
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}
SF_INLINE Floats load_i8(const i8* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
// Returns the bf16 of two vectors of int8. Not by vcvtne2ps2bf16, which takes turns with dot products (AMD Zen 4).
SF_INLINE Packed load_i8_pairs(const void* p) {
    alignas(64) static constexpr u16 UPPER_HALVES[2 * LANES] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                                33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const i8* values = static_cast<const i8*>(p);
    const __m512i first = _mm512_castps_si512(load_i8(values).v), second = _mm512_castps_si512(load_i8(values + LANES).v);
    return {_mm512_permutex2var_epi16(first, _mm512_load_si512(UPPER_HALVES), second)};
}
SF_INLINE void widen_i8(const i8* p, u16* out) { _mm512_storeu_si512(out, load_i8_pairs(p).v); }
SF_INLINE void store_i8(i8* p, Floats a) {  // whole numbers from -128 to 127
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

SF_INLINE Ints broadcast(i32 a) { return {_mm512_set1_epi32(a)}; }
SF_INLINE Ints load_ints(const i32* p) { return {_mm512_loadu_si512(p)}; }
SF_INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
SF_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
SF_INLINE i32 sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
// Stores the sums of the lanes of four, each times `factor`.
SF_INLINE void store_sums(i32* p, const Ints (&a)[4], i32 factor) {
    const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0].v, a[1].v), _mm512_unpackhi_epi32(a[0].v, a[1].v));
    const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2].v, a[3].v), _mm512_unpackhi_epi32(a[2].v, a[3].v));
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i*)p, _mm_mullo_epi32(sums, _mm_set1_epi32(factor)));
}

// Quantizes 64 bf16 to int8; returns `sums` plus what each lane's four give.
SF_INLINE Ints quantize_64(const u16* values, Floats inverse, i8* out, Ints sums) {
    const auto in_pairs = [&](const u16* p) {  // 32 of them, as int16
        const __m512i both = _mm512_loadu_si512(p);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<i32>(0xffff0000))));
        const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(even, inverse.v)), second = _mm512_cvtps_epi32(_mm512_mul_ps(odd, inverse.v));
        return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16));
    };
    // Packed lane by lane: eight of the first 32, then eight of the others.
    const __m512i in_turns = _mm512_packs_epi16(in_pairs(values), in_pairs(values + 32));
    const __m512i qvalues = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), in_turns);
    _mm512_storeu_si512(out, qvalues);
    return {_mm512_dpbusd_epi32(sums.v, _mm512_set1_epi8(1), qvalues)};
}

SF_INLINE Packed load_packed(const void* p) { return {_mm512_loadu_si512(p)}; }
SF_INLINE Packed broadcast_packed(u32 a) { return {_mm512_set1_epi32(static_cast<i32>(a))}; }
SF_INLINE Packed low_nibbles(Packed a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
SF_INLINE Packed high_nibbles(Packed a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
// Turns keys, [16 steps][32 tokens] words of two elements, into values, [16 pairs of tokens][32 elements] words of two tokens.
SF_INLINE void turn_pairs(const u8* keys, u8* values) {
    const __m512i swap = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int step = 0; step < 16; step += 8)
        for (int token = 0; token < 32; token += 16) {
            __m512i a[8], b[8];  // a: for each of eight pairs of tokens both elements of a step
            for (int j = 0; j < 8; ++j) a[j] = _mm512_shuffle_epi8(_mm512_loadu_si512(keys + ((step + j) * 32 + token) * 4), swap);
            for (int j = 0; j < 8; j += 2) {
                b[j] = _mm512_unpacklo_epi64(a[j], a[j + 1]);
                b[j + 1] = _mm512_unpackhi_epi64(a[j], a[j + 1]);
            }
            for (int odd = 0; odd < 2; ++odd) {  // b[odd], b[2 + odd], ...: 128 bits for each of four pairs
                const __m512i even_lanes = _mm512_shuffle_i32x4(b[odd], b[2 + odd], 0x88), odd_lanes = _mm512_shuffle_i32x4(b[odd], b[2 + odd], 0xdd);
                const __m512i even_next = _mm512_shuffle_i32x4(b[4 + odd], b[6 + odd], 0x88), odd_next = _mm512_shuffle_i32x4(b[4 + odd], b[6 + odd], 0xdd);
                auto put = [&](int pair, __m512i words) { _mm512_storeu_si512(values + ((token / 2 + pair) * 32 + 2 * step) * 4, words); };
                put(odd, _mm512_shuffle_i32x4(even_lanes, even_next, 0x88));
                put(2 + odd, _mm512_shuffle_i32x4(odd_lanes, odd_next, 0x88));
                put(4 + odd, _mm512_shuffle_i32x4(even_lanes, even_next, 0xdd));
                put(6 + odd, _mm512_shuffle_i32x4(odd_lanes, odd_next, 0xdd));
            }
        }
}
// Loads 16 quantized values, each + its bias, to look nibbles up in.
SF_INLINE Packed load_qvalues(const u8* qvalues) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)qvalues))};
}
SF_INLINE Packed look_up(Packed qvalues, Packed nibbles) { return {_mm512_shuffle_epi8(qvalues.v, nibbles.v)}; }
SF_INLINE void store_packed(void* p, Packed a) { _mm512_storeu_si512(p, a.v); }
// Returns 16-bit halves of lanes moved up by SHIFT bits, or down, of which the bits of `mask` are kept in each byte.
template <int SHIFT>
SF_INLINE Packed bits_of(Packed a, int mask) {
    const __m512i moved = SHIFT > 0 ? _mm512_slli_epi16(a.v, SHIFT > 0 ? SHIFT : 0) : _mm512_srli_epi16(a.v, SHIFT < 0 ? -SHIFT : 0);
    return {_mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask)))};
}
SF_INLINE Packed operator|(Packed a, Packed b) { return {_mm512_or_si512(a.v, b.v)}; }
SF_INLINE Floats load_f16(const u16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
SF_INLINE Floats load_u8(const u8* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
// Loads powers of two, 2^(byte - 127), of which the least is no normal fp32.
SF_INLINE Floats load_e8m0(const u8* p) {
    const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23);
    return {_mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_set1_epi32(1 << 22)))};
}
// Returns the bf16 of an e4m3 in the lower byte of each 16 bits, whose upper byte is zero: exact, but NaN is 480.
SF_INLINE __m512i widen_e4m3_16(__m512i a) {
    const __m512i subnormals = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i magnitude = _mm512_and_si512(a, _mm512_set1_epi16(0x7f));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    const __m512i widened = _mm512_mask_permutexvar_epi16(normal, small, magnitude, subnormals);
    return _mm512_or_si512(widened, _mm512_slli_epi16(_mm512_xor_si512(a, magnitude), 8));
}
// Widen the first and third, and the second and fourth e4m3 of each lane.
SF_INLINE Packed widen_even_e4m3(Packed a) { return {widen_e4m3_16(_mm512_and_si512(a.v, _mm512_set1_epi16(255)))}; }
SF_INLINE Packed widen_odd_e4m3(Packed a) { return {widen_e4m3_16(_mm512_srli_epi16(a.v, 8))}; }

// Return the first and the second bf16 of each lane.
SF_INLINE Floats first_of_pairs(Packed a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
SF_INLINE Floats second_of_pairs(Packed a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<i32>(0xffff0000))))};
}
#ifdef SF_BF16_DOTS
// Returns a + the products of each lane's two bf16, by vdpbf16ps, which takes subnormals for zero.
SF_INLINE Floats dot_bf16(Floats a, Packed weights, Packed x) {
    return {_mm512_dpbf16_ps(a.v, (__m512bh)weights.v, (__m512bh)x.v)};
}
#else
SF_INLINE Floats as_floats(Packed a) { return {_mm512_castsi512_ps(a.v)}; }
// Returns a + weights * x, rounded once. Not by the intrinsic: GCC 12 moves the sums to and fro until one has no register.
SF_INLINE Floats add_product(Floats a, Floats weights, Floats x) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(a.v) : "v"(weights.v), "v"(x.v));
    return a;
}
#endif
// Returns a + the products of each lane's four quantized values, + QVALUE_BIAS each, with four int8.
// Not by the intrinsic: around it GCC 12 keeps every accumulator twice, as two vector types, and spills them.
SF_INLINE Ints dot_qvalues(Ints a, Packed qvalues, Packed x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(a.v) : "v"(qvalues.v), "v"(x.v));
    return a;
}
// Returns the same with a word of x for all lanes.
SF_INLINE Ints dot_qvalues(Ints a, Packed qvalues, const u32* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(a.v) : "v"(qvalues.v), "m"(*x));
    return a;
}
// Returns sum + a * scale, rounded once. In place: of what the intrinsics make GCC spills some.
SF_INLINE Floats add_scaled(Floats sum, Ints a, Floats scale) {
    asm("vcvtdq2ps %1, %1\n\tvfmadd231ps %2, %1, %0" : "+v"(sum.v), "+v"(a.v) : "v"(scale.v));
    return sum;
}
// Returns two words of x in turn.
SF_INLINE Packed broadcast_two(const u32* x) {
    i64 both;
    std::memcpy(&both, x, sizeof both);
    return {_mm512_set1_epi64(both)};
}
// Returns a + the products of each lane's two int8 with the two int16 of x.
SF_INLINE Ints add_pairs_i8(Ints a, const i8* pairs, u32 x) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)pairs));
    asm("vpdpwssd %2, %1, %0" : "+v"(a.v) : "v"(wide), "v"(_mm512_set1_epi32(static_cast<i32>(x))));
    return a;
}

#else  // AVX2 and FMA

#define SF_PARTS
constexpr int MAX_ROWS = 6;        // of a tile: 6 x 2 accumulators of eight lanes, two weights, a broadcast, a product
constexpr int WIDE_ROWS = 2;       // of a tile as wide as a panel; one of more rows is half as wide
constexpr int WIDE_BF16_ROWS = 3;  // of one in bf16
constexpr int FEW_ROWS = 1;        // of a tile of two panels
constexpr int BLOCK_ROWS = MAX_ROWS;  // most rows that are multiplied at once
using Element = float;

struct Floats { __m256 lo, hi; };
struct Ints { __m256i lo, hi; };
struct Packed { __m256i lo, hi; };

SF_INLINE __m256i lane_mask8(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SF_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SF_INLINE Floats load(const float* p, int count) {
    return {_mm256_maskload_ps(p, lane_mask8(count)), _mm256_maskload_ps(p + 8, lane_mask8(count - 8))};
}
SF_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
SF_INLINE void store(float* p, Floats a, int count) {
    _mm256_maskstore_ps(p, lane_mask8(count), a.lo);
    _mm256_maskstore_ps(p + 8, lane_mask8(count - 8), a.hi);
}
SF_INLINE Floats broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
SF_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SF_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SF_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SF_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SF_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SF_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SF_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SF_INLINE Floats abs(Floats a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
SF_INLINE Floats round(Floats a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
SF_INLINE Floats fraction(Floats a) {
    return {_mm256_sub_ps(a.lo, _mm256_floor_ps(a.lo)), _mm256_sub_ps(a.hi, _mm256_floor_ps(a.hi))};
}
SF_INLINE float sum(Floats a) {
    __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
SF_INLINE float highest(Floats a) {
    __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
SF_INLINE Floats between(int begin, int end, Floats a, Floats b) {
    __m256 lo = _mm256_castsi256_ps(_mm256_andnot_si256(lane_mask8(begin), lane_mask8(end)));
    __m256 hi = _mm256_castsi256_ps(_mm256_andnot_si256(lane_mask8(begin - 8), lane_mask8(end - 8)));
    return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}
SF_INLINE Floats above(Floats a, Floats b, Floats yes, Floats no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
SF_INLINE __m256 scale_by_power8(__m256 a, __m256 power) {  // less than -127 is taken for that: the result is 0
    __m256 whole = _mm256_max_ps(_mm256_set1_ps(-127.0f), _mm256_floor_ps(power));
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
SF_INLINE Floats scale_by_power(Floats a, Floats power) {
    return {scale_by_power8(a.lo, power.lo), scale_by_power8(a.hi, power.hi)};
}

SF_INLINE __m256 widen_bf16(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
SF_INLINE Floats load_bf16(const u16* p) {
    return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
SF_INLINE Floats load_bf16(const u16* p, int count) {
    alignas(32) u16 whole[LANES] = {};
    std::memcpy(whole, p, count * sizeof(u16));
    return load_bf16(whole);
}
SF_INLINE __m256i round_bf16(__m256 a) {  // to the nearest, ties to even; NaN stays NaN
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
SF_INLINE void store_bf16(u16* p, Floats a) {
    __m256i both = _mm256_packus_epi32(round_bf16(a.lo), round_bf16(a.hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
SF_INLINE void store_exact_bf16(u16* p, Floats a) {
    const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(a.lo), 16), hi = _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8));
}
SF_INLINE void store_bf16(u16* p, Floats a, int count) {
    alignas(32) u16 whole[LANES];
    store_bf16(whole, a);
    std::memcpy(p, whole, count * sizeof(u16));
}
SF_INLINE Floats load_i8(const i8* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
SF_INLINE void widen_i8(const i8* p, u16* out) {
    store_exact_bf16(out, load_i8(p));
    store_exact_bf16(out + LANES, load_i8(p + LANES));
}
SF_INLINE void store_i8(i8* p, Floats a) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

SF_INLINE Ints broadcast(i32 a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
SF_INLINE Ints load_ints(const i32* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SF_INLINE void store(float* p, Ints a) {  // whole numbers as they are
    _mm256_storeu_si256((__m256i*)p, a.lo);
    _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}
SF_INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
SF_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }

SF_INLINE Packed load_packed(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SF_INLINE void store_packed(void* p, Packed a) {
    _mm256_storeu_si256((__m256i*)p, a.lo);
    _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}
// Does what its namesake of AVX-512 does.
SF_INLINE void turn_pairs(const u8* keys, u8* values) {
    const __m256i swap = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int step = 0; step < 16; step += 4)
        for (int token = 0; token < 32; token += 8) {
            __m256i a[4];  // for each of four pairs of tokens both elements of a step
            for (int j = 0; j < 4; ++j)
                a[j] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)(keys + ((step + j) * 32 + token) * 4)), swap);
            const __m256i even = _mm256_unpacklo_epi64(a[0], a[1]), odd = _mm256_unpackhi_epi64(a[0], a[1]);
            const __m256i even_next = _mm256_unpacklo_epi64(a[2], a[3]), odd_next = _mm256_unpackhi_epi64(a[2], a[3]);
            auto put = [&](int pair, __m256i words) { _mm256_storeu_si256((__m256i*)(values + ((token / 2 + pair) * 32 + 2 * step) * 4), words); };
            put(0, _mm256_permute2x128_si256(even, even_next, 0x20));
            put(1, _mm256_permute2x128_si256(odd, odd_next, 0x20));
            put(2, _mm256_permute2x128_si256(even, even_next, 0x31));
            put(3, _mm256_permute2x128_si256(odd, odd_next, 0x31));
        }
}
SF_INLINE Packed broadcast_packed(u32 a) {
    __m256i both = _mm256_set1_epi32(static_cast<i32>(a));
    return {both, both};
}
SF_INLINE Packed low_nibbles(Packed a) {
    __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
SF_INLINE Packed high_nibbles(Packed a) {
    return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
SF_INLINE Packed load_qvalues(const u8* qvalues) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)qvalues));
    return {both, both};
}
SF_INLINE Packed look_up(Packed qvalues, Packed nibbles) {
    return {_mm256_shuffle_epi8(qvalues.lo, nibbles.lo), _mm256_shuffle_epi8(qvalues.hi, nibbles.hi)};
}
template <int SHIFT>
SF_INLINE Packed bits_of(Packed a, int mask) {
    const __m256i kept = _mm256_set1_epi8(static_cast<char>(mask));
    constexpr int UP = SHIFT > 0 ? SHIFT : 0, DOWN = SHIFT < 0 ? -SHIFT : 0;
    if constexpr (SHIFT > 0)
        return {_mm256_and_si256(_mm256_slli_epi16(a.lo, UP), kept), _mm256_and_si256(_mm256_slli_epi16(a.hi, UP), kept)};
    else
        return {_mm256_and_si256(_mm256_srli_epi16(a.lo, DOWN), kept), _mm256_and_si256(_mm256_srli_epi16(a.hi, DOWN), kept)};
}
SF_INLINE Packed operator|(Packed a, Packed b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
SF_INLINE Floats load_f16(const u16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
SF_INLINE Floats load_u8(const u8* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
SF_INLINE Floats load_e8m0(const u8* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    const __m256i least = _mm256_set1_epi32(1 << 22);
    auto widen = [&](__m128i eight) {
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23), least));
    };
    return {widen(bytes), widen(_mm_srli_si128(bytes, 8))};
}
SF_INLINE __m256i widen_e4m3_16(__m256i a) {
    // Entries 0 to 7: the lower bytes of the bf16 of subnormals, 8 to 15: the upper ones.
    const __m256i subnormals = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, static_cast<char>(0x80), static_cast<char>(0xc0), 0, 0x20, 0x40, 0x60,
                                                                        0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c));
    const __m256i magnitude = _mm256_and_si256(a, _mm256_set1_epi16(0x7f));
    const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    const __m256i both = _mm256_or_si256(_mm256_or_si256(magnitude, _mm256_slli_epi16(magnitude, 8)), _mm256_set1_epi16(0x0800));
    const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
    const __m256i widened = _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(subnormals, both), small);
    return _mm256_or_si256(widened, _mm256_slli_epi16(_mm256_xor_si256(a, magnitude), 8));
}
SF_INLINE Packed widen_even_e4m3(Packed a) {
    __m256i mask = _mm256_set1_epi16(255);
    return {widen_e4m3_16(_mm256_and_si256(a.lo, mask)), widen_e4m3_16(_mm256_and_si256(a.hi, mask))};
}
SF_INLINE Packed widen_odd_e4m3(Packed a) {
    return {widen_e4m3_16(_mm256_srli_epi16(a.lo, 8)), widen_e4m3_16(_mm256_srli_epi16(a.hi, 8))};
}
SF_INLINE Floats first_of_pairs(Packed a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
SF_INLINE Floats second_of_pairs(Packed a) {
    __m256i second = _mm256_set1_epi32(static_cast<i32>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, second)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, second))};
}
SF_INLINE Floats as_floats(Packed a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
SF_INLINE void add_product(__m256& a, __m256 weights, __m256 x) {  // not the intrinsic, as above
    asm("vfmadd231ps %2, %1, %0" : "+x"(a) : "x"(weights), "x"(x));
}
SF_INLINE Floats add_product(Floats a, Floats weights, Floats x) {
    add_product(a.lo, weights.lo, x.lo);
    add_product(a.hi, weights.hi, x.hi);
    return a;
}
// Adds a step in bf16 to three rows of a panel, whose sums take 12 of the 16 registers: x in three, one vector of weights at a time.
// All of it is assembly that stays in this order: GCC loads ahead, and spills sums for it.
SF_INLINE __m256 broadcast_in_order(const u32& x) {
    __m256 all;
    asm volatile("vbroadcastss %1, %0" : "=x"(all) : "m"(x));
    return all;
}
template <bool SECOND>
SF_INLINE void add_three(__m256& a, __m256& b, __m256& c, const __m256i& words, const __m256 (&x)[3]) {
    alignas(32) static constexpr u32 SECOND_OF_PAIRS[8] = {~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu};
    __m256 w;
    if constexpr (SECOND)
        asm volatile("vmovdqa %8, %3\n\tvpand %4, %3, %3\n\tvfmadd231ps %5, %3, %0\n\tvfmadd231ps %6, %3, %1\n\tvfmadd231ps %7, %3, %2"
                     : "+x"(a), "+x"(b), "+x"(c), "=&x"(w) : "m"(words), "x"(x[0]), "x"(x[1]), "x"(x[2]), "m"(SECOND_OF_PAIRS));
    else
        asm volatile("vmovdqu %4, %3\n\tvpslld $16, %3, %3\n\tvfmadd231ps %5, %3, %0\n\tvfmadd231ps %6, %3, %1\n\tvfmadd231ps %7, %3, %2"
                     : "+x"(a), "+x"(b), "+x"(c), "=&x"(w) : "m"(words), "x"(x[0]), "x"(x[1]), "x"(x[2]));
}
template <bool SECOND>
SF_INLINE void add_half_to_three(Floats (&acc)[3][2], const __m256i* words, const u32* x, i64 stride) {
    const __m256 each[3] = {broadcast_in_order(x[0]), broadcast_in_order(x[stride]), broadcast_in_order(x[2 * stride])};
    add_three<SECOND>(acc[0][0].lo, acc[1][0].lo, acc[2][0].lo, words[0], each);
    add_three<SECOND>(acc[0][0].hi, acc[1][0].hi, acc[2][0].hi, words[1], each);
    add_three<SECOND>(acc[0][1].lo, acc[1][1].lo, acc[2][1].lo, words[2], each);
    add_three<SECOND>(acc[0][1].hi, acc[1][1].hi, acc[2][1].hi, words[3], each);
}
SF_INLINE void add_three_rows(Floats (&acc)[3][2], const u8* weights, const u32* x, i64 stride) {
    add_half_to_three<false>(acc, reinterpret_cast<const __m256i*>(weights), x, stride);
    add_half_to_three<true>(acc, reinterpret_cast<const __m256i*>(weights), x + 1, stride);
}
// Return the first and third, and the second and fourth byte of each lane, as 16 bits each.
SF_INLINE Packed even_bytes(Packed a) {
    __m256i mask = _mm256_set1_epi16(255);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
SF_INLINE Packed odd_bytes(Packed a) { return {_mm256_srli_epi16(a.lo, 8), _mm256_srli_epi16(a.hi, 8)}; }
// Do the same for int8.
SF_INLINE __m256i even_int8(__m256i a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
SF_INLINE __m256i odd_int8(__m256i a) { return _mm256_srai_epi16(a, 8); }
SF_INLINE Packed even_int8(Packed a) { return {even_int8(a.lo), even_int8(a.hi)}; }
SF_INLINE Packed odd_int8(Packed a) { return {odd_int8(a.lo), odd_int8(a.hi)}; }
// Does so for `count`, a multiple of 32.
SF_INLINE void split_bytes(const i8* bytes, i64 count, u32* even, u32* odd) {
    for (i64 i = 0; i < count; i += 32) {
        __m256i both = _mm256_loadu_si256((const __m256i*)(bytes + i));
        _mm256_storeu_si256((__m256i*)(even + i / 4), even_int8(both));
        _mm256_storeu_si256((__m256i*)(odd + i / 4), odd_int8(both));
    }
}
// Returns a + the products of each lane's two quantized values, + QVALUE_BIAS each, with two integers of 16 bits: exact. (vpmaddubsw
// multiplies bytes, but its sums of two stop at 16 bits.) Inline assembly: one register for the products, no more.
SF_INLINE Ints dot_qvalues(Ints a, Packed qvalues, Packed x) {
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(a.lo), "=&x"(product) : "x"(qvalues.lo), "x"(x.lo));
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(a.hi), "=&x"(product) : "x"(qvalues.hi), "x"(x.hi));
    return a;
}
// Does the same with a word of x: all of a row's work at a step in one statement, or GCC spills sums.
SF_INLINE Ints dot_qvalues(Ints a, Packed qvalues, const u32& x) {
    __m256i word, product;
    asm("vpbroadcastd %6, %2\n\tvpmaddwd %2, %4, %3\n\tvpaddd %3, %0, %0\n\tvpmaddwd %2, %5, %2\n\tvpaddd %2, %1, %1"
        : "+x"(a.lo), "+x"(a.hi), "=&x"(word), "=&x"(product)
        : "x"(qvalues.lo), "x"(qvalues.hi), "m"(x));
    return a;
}
// Returns the products of two neighbouring bytes of `levels` with two of a word of int8, in 16 bits, with ADDS + a: exact as long
// as all that is summed stays within them.
template <bool ADDS>
SF_INLINE Packed byte_pairs(Packed a, Packed levels, const u32& x) {
    if constexpr (!ADDS) {
        asm("vpbroadcastd %4, %1\n\tvpmaddubsw %1, %2, %0\n\tvpmaddubsw %1, %3, %1"
            : "=&x"(a.lo), "=&x"(a.hi) : "x"(levels.lo), "x"(levels.hi), "m"(x));
        return a;
    }
    __m256i word, product;
    asm("vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpaddw %3, %0, %0\n\tvpmaddubsw %2, %5, %2\n\tvpaddw %2, %1, %1"
        : "+x"(a.lo), "+x"(a.hi), "=&x"(word), "=&x"(product)
        : "x"(levels.lo), "x"(levels.hi), "m"(x));
    return a;
}
// Returns the sums of two neighbouring 16 bits.
SF_INLINE Ints sum_of_pairs(Packed a) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(a.lo, ones), _mm256_madd_epi16(a.hi, ones)};
}
SF_INLINE Packed broadcast_two(const u32* x) {
    i64 both;
    std::memcpy(&both, x, sizeof both);
    return {_mm256_set1_epi64x(both), _mm256_set1_epi64x(both)};
}
SF_INLINE Ints add_pairs_i8(Ints a, const i8* pairs, u32 x) {
    const Packed each = broadcast_packed(x);
    const Packed wide = {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)pairs)), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)pairs + 1))};
    return dot_qvalues(a, wide, each);
}

#endif

// Returns the largest of `count` magnitudes, a multiple of 32, as the bits of a bf16: 0x7f80 or more if one is infinite or NaN.
SF_INLINE u16 largest_bits(const u16* values, i64 count) {
    __m256i most = _mm256_setzero_si256();
    for (i64 k = 0; k < count; k += 16)
        most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(values + k)), _mm256_set1_epi16(0x7fff)));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    return static_cast<u16>(~_mm_cvtsi128_si32(least));
}

// Writes the sum of each 16 of `count` int8. Reads as many as are multiples of 32.
SF_INLINE void sum_sixteens(const i8* values, i64 count, i32* sums) {
    const __m256i ones = _mm256_set1_epi8(1), ones_16 = _mm256_set1_epi16(1);
    for (i64 k = 0; k < count; k += 32, sums += 2) {
        __m256i four = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, _mm256_loadu_si256((const __m256i*)(values + k))), ones_16);
        four = _mm256_add_epi32(four, _mm256_shuffle_epi32(four, 0xb1));
        four = _mm256_add_epi32(four, _mm256_shuffle_epi32(four, 0x4e));
        sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(four));
        sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(four, 1));
    }
}

// Loads 16 numbers of four bits, from bit `shift` of a byte each.
SF_INLINE Floats load_nibbles(const u8* p, int shift) {
    alignas(16) u8 nibbles[LANES];
    const __m128i moved = _mm_srl_epi16(_mm_loadu_si128((const __m128i*)p), _mm_cvtsi32_si128(shift));
    _mm_store_si128((__m128i*)nibbles, _mm_and_si128(moved, _mm_set1_epi8(15)));
    return load_u8(nibbles);
}

SF_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }

// x as it is multiplied with weights in bf16: pairs of bf16 for processors that multiply those, else fp32.
SF_INLINE void store_elements(u16* p, Floats a) { store_bf16(p, a); }
SF_INLINE void store_elements(float* p, Floats a) { store(p, a); }
SF_INLINE void copy_elements(u16* to, const u16* from, i64 count) {
    i64 k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES) std::memcpy(to + k, from + k, 2 * LANES * sizeof(u16));
    if (k < count) std::memcpy(to + k, from + k, (count - k) * sizeof(u16));
}
SF_INLINE void copy_elements(float* to, const u16* from, i64 count) {
    i64 k = 0;
    for (; k + LANES <= count; k += LANES) store(to + k, load_bf16(from + k));
    if (k < count) store(to + k, load_bf16(from + k, static_cast<int>(count - k)), static_cast<int>(count - k));
}

// Returns 2 to the power of a, for a from -126 on (less is taken for -126), to about 2 units in the last place; 2^0 is 1.
// Reduction to [-0.5, 0.5] (Cody and Waite, "Software Manual for the Elementary Functions", 1980), then Taylor's series.
SF_INLINE Floats exp2(Floats a) {
    a = max(broadcast(-126.0f), min(broadcast(127.0f), a));  // in this order NaN stays NaN
    Floats whole = round(a);
    Floats rest = a - whole;  // -0.5 to 0.5
    Floats p = broadcast(1.5403530393381609e-4f);
    p = fma(p, rest, broadcast(1.3333558146428443e-3f));
    p = fma(p, rest, broadcast(9.6181291076284772e-3f));
    p = fma(p, rest, broadcast(5.5504108664821580e-2f));
    p = fma(p, rest, broadcast(2.4022650695910072e-1f));
    p = fma(p, rest, broadcast(6.9314718055994531e-1f));
    p = fma(p, rest, broadcast(1.0f));
    return scale_by_power(p, whole);
}

// Returns the same to 3 parts in a million, for the weights of attention, which are rounded to bf16: less than -126 may
// give 0; 2^0 is exactly 1.
SF_INLINE Floats exp2_weight(Floats a) {
    Floats rest = fraction(a);
    Floats p = broadcast(0.013426694f);
    p = fma(p, rest, broadcast(0.052242458f));
    p = fma(p, rest, broadcast(0.24128021f));
    p = fma(p, rest, broadcast(0.69304484f));
    p = fma(p, rest, broadcast(1.0f));
    return scale_by_power(p, a);
}

SF_INLINE Floats sigmoid(Floats a) { return broadcast(1.0f) / (broadcast(1.0f) + exp2(a * broadcast(-LOG2E))); }
SF_INLINE Floats tanh(Floats a) {  // 2 sigmoid(2a) - 1
    return fma(broadcast(2.0f), sigmoid(a + a), broadcast(-1.0f));
}

SF_INLINE float widen(u16 a) {
    u32 bits = static_cast<u32>(a) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
SF_INLINE u16 narrow(float a) {
    u16 out[LANES];
    store_bf16(out, broadcast(a));
    return out[0];
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
