// Weights as checkpoints have quantized them: in groups of columns, or in FP8. Made once at loading, read by every product.
//
// GROUPED: a weight is scale * (level - bias) + offset, where scale and offset are those of its row and group, both exact in
// fp32: a group's offset is -min, or -scale * zero. A panel (see weights.h) is a row of runs, each of 256 columns, of its
//   two-level   [32 fp16] what scales are multiples of, and, where groups have mins, another [32 fp16] for those
//   scales      [groups][32]
//   offsets     [groups][32]: mins or zeros, if groups have any
//   levels      from the next cache line on, units of 32 columns: four words of eight nibbles as in int4, the lower four
//               bits of levels, or of 2 and 3 bits two words of two bits, for 16 elements each; then of 3 and 5 bits one
//               word of upper bits, bit j of byte i for element 4 j + i, of 6 bits two words of two; of 8 bits eight words
// Levels become bytes, and scales and offsets fp32, in the first cache, a run at a time for all rows of x.
//
// A row of x is quantized in blocks of as many columns as a group has, but at least LEAST_BLOCK, each with a scale.
//
// FP8 (e4m3): a panel is a row of runs, each of 128 columns: [32 fp32 scales][32 steps][32 rows] words of four, in the order
// 0, 2, 1, 3. They become bf16 in the first cache.
#pragma once

#include <algorithm>

#include "interface.h"
#include "multiply.h"

namespace splitfuse {
namespace SF_VARIANT {

SF_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
SF_INLINE i64 align_up(i64 bytes) { return ceil_div(bytes, 64) * 64; }

constexpr i64 RUN_COLUMNS = 4 * RUN_STEPS;  // of weights in groups
constexpr i64 UNIT_WORDS = 8;               // of levels that are packed together
constexpr i64 LEAST_GROUP = 16, MOST_GROUP = 128;  // columns
constexpr i64 FP8_COLUMNS = 128;            // of a run

SF_INLINE i64 bytes_of(i32 number) { return number == NONE ? 0 : number == F32 ? 4 : number == F16 || number == BFLOAT16 ? 2 : number == HIGH_BITS ? 0 : 1; }

constexpr i64 LEAST_BLOCK = 32;
static_assert(SLAB_STEPS * 4 % MOST_GROUP == 0 && RUN_COLUMNS % MOST_GROUP == 0);

// Calls body(part) for each part of a weight, or for the weight itself.
template <class Body>
SF_INLINE void each_part(const Weight& w, Body body) {
    if (!w.parts) return body(w);
    for (i64 i = 0; i < w.num_parts; ++i) body(w.parts[i]);
}

#ifndef SF_BYTE_DOTS
// Returns how many words of x can be multiplied with the levels of a weight before the sums of their pairs leave 16 bits; 0: not
// even two, so that this is not done.
inline int sum_steps_of(const Weight& w) {
    constexpr int MOST_X = 128;  // of a row with a NaN; of others 127
    const int most = w.bits == 4 ? *std::max_element(w.qvalues, w.qvalues + 16) : (1 << w.bits) - 1;
    const int steps = INT16_MAX / (2 * MOST_X * std::max(most, 1));
    return steps >= 2 ? steps : 0;
}
#endif

// Returns whether x is packed as bytes for a quantized weight.
inline bool reads_bytes([[maybe_unused]] const Weight& w) {
#ifdef SF_BYTE_DOTS
    return true;
#else
    if (w.format != GROUPED) return w.format == INT4;
    bool all = true;
    each_part(w, [&](const Weight& part) { all &= sum_steps_of(part) > 0; });
    return all;
#endif
}

// Returns the columns of x that share a scale: those of the widest group, where parts differ.
SF_INLINE i64 block_columns(const Weight& w) {
    i64 columns = LEAST_BLOCK;
    each_part(w, [&](const Weight& part) { columns = std::max(columns, part.group); });
    return columns;
}

// Returns the bytes of all XGroup of `rows` rows of x.
SF_INLINE i64 x_group_bytes(const Weight& w, i64 rows) {
    return align_up(rows * ceil_div(w.columns, w.group) * static_cast<i64>(sizeof(XGroup)));
}

// Bytes of a run from its beginning to its parts and its end.
struct RunShape { i64 x_steps, groups, scales, offsets, levels, bytes; };

SF_INLINE RunShape run_of(const Weight& w, i64 columns) {
    RunShape run{};
    run.x_steps = ceil_div(columns, 4);
    run.groups = ceil_div(columns, w.group);
    run.scales = w.two_level ? PANEL * 2 * (w.offset_type == NONE ? 1 : 2) : 0;
    run.offsets = run.scales + run.groups * PANEL * bytes_of(w.scale_type);
    run.levels = align_up(run.offsets + run.groups * PANEL * bytes_of(w.offset_type));
    run.bytes = run.levels + ceil_div(run.x_steps, UNIT_WORDS) * w.bits * STEP_BYTES;
    return run;
}

SF_INLINE i64 grouped_panel_bytes(const Weight& w) {
    const i64 rest = w.columns % RUN_COLUMNS;
    return w.columns / RUN_COLUMNS * run_of(w, RUN_COLUMNS).bytes + (rest ? run_of(w, rest).bytes : 0);
}

SF_INLINE i64 fp8_panel_bytes(const Weight& w) {
    return ceil_div(w.columns, FP8_COLUMNS) * PANEL * 4 + ceil_div(w.columns, 4) * STEP_BYTES;
}

// What checkpoints hold of some rows of a weight: levels [rows, columns] + bias, one in a byte, or e4m3; scales and offsets
// [rows, groups], and the numbers that they are multiples of, [rows, ceil(columns / RUN_COLUMNS)].
struct Stored {
    const u8* levels;
    const u8* scales;
    const u8* offsets;
    const u16* scale_units;
    const u16* offset_units;
};

SF_INLINE void put_bytes(u8* to, const u8* from, i64 count) { std::memcpy(to, from, count); }

// Bits of a level that lie in the first words of a unit, as many words as these are.
constexpr i32 lower_bits(i32 bits) { return bits < 4 ? 2 : 4; }

// Packs the levels of a unit of a row. `unit` is the address of the row's first word in it.
SF_INLINE void pack_unit(u8* unit, i32 bits, const u8* levels, i64 count) {
    u32 words[UNIT_WORDS] = {};
    std::memcpy(words, levels, std::min<i64>(count, sizeof words));
    auto put = [&](i64 word, u32 value) { std::memcpy(unit + word * STEP_BYTES, &value, sizeof value); };
    if (bits == 8) {
        for (i64 i = 0; i < UNIT_WORDS; ++i) put(i, words[i]);
        return;
    }
    auto put_pairs = [&](i64 word, int shift) {
        u32 pairs[2] = {};
        for (i64 i = 0; i < UNIT_WORDS; ++i) pairs[i / 4] |= (words[i] >> shift & 0x03030303) << i % 4 * 2;
        for (i64 i = 0; i < 2; ++i) put(word + i, pairs[i]);
    };
    const i32 lower = lower_bits(bits);
    if (lower == 2) put_pairs(0, 0);
    else for (i64 i = 0; i < UNIT_WORDS; i += 2) put(i / 2, (words[i] & 0x0f0f0f0f) | (words[i + 1] & 0x0f0f0f0f) << 4);
    if (bits - lower == 2) put_pairs(lower, lower);
    if (bits - lower != 1) return;
    u32 upper = 0;
    for (i64 i = 0; i < UNIT_WORDS; ++i) upper |= (words[i] >> lower & 0x01010101) << i;
    put(lower, upper);
}

// Packs row `row` of what is stored as a column of a panel.
inline void pack_grouped_row(const Weight& w, u8* panel, int column, const Stored& stored, i64 row) {
    const i64 groups = ceil_div(w.columns, w.group), runs = ceil_div(w.columns, RUN_COLUMNS);
    const i64 scale_bytes = bytes_of(w.scale_type), offset_bytes = bytes_of(w.offset_type);
    const u8* levels = stored.levels + row * w.columns;
    for (i64 number = 0, first = 0; number < runs; ++number, first += RUN_COLUMNS) {
        const i64 columns = std::min(RUN_COLUMNS, w.columns - first), group = row * groups + first / w.group;
        const RunShape run = run_of(w, columns);
        if (w.two_level) {
            put_bytes(panel + column * 2, reinterpret_cast<const u8*>(stored.scale_units + row * runs + number), 2);
            if (w.offset_type != NONE)
                put_bytes(panel + (PANEL + column) * 2, reinterpret_cast<const u8*>(stored.offset_units + row * runs + number), 2);
        }
        for (i64 g = 0; g < run.groups; ++g) {
            put_bytes(panel + run.scales + (g * PANEL + column) * scale_bytes, stored.scales + (group + g) * scale_bytes, scale_bytes);
            if (offset_bytes)
                put_bytes(panel + run.offsets + (g * PANEL + column) * offset_bytes, stored.offsets + (group + g) * offset_bytes, offset_bytes);
        }
        u8* unit = panel + run.levels + column * 4;
        for (i64 k = 0; k < columns; k += UNIT_WORDS * 4, unit += w.bits * STEP_BYTES) pack_unit(unit, w.bits, levels + first + k, columns - k);
        panel += run.bytes;
    }
}

// Does the same in FP8. A NaN, which is widened as a number, makes the scale of its run NaN.
inline void pack_fp8_row(const Weight& w, u8* panel, int column, const Stored& stored, i64 row) {
    const u8* values = stored.levels + row * w.columns;
    const float* scales = reinterpret_cast<const float*>(stored.scales) + row * ceil_div(w.columns, FP8_COLUMNS);
    for (i64 first = 0; first < w.columns; first += FP8_COLUMNS) {
        const i64 columns = std::min(FP8_COLUMNS, w.columns - first);
        float& scale = reinterpret_cast<float*>(panel)[column];
        scale = scales[first / FP8_COLUMNS];
        u8* steps = panel + PANEL * 4 + column * 4;
        for (i64 k = 0; k < columns; ++k) {
            const u8 value = values[first + k];
            if ((value & 0x7f) == 0x7f) scale = NAN;
            constexpr i64 PLACE[] = {0, 2, 1, 3};
            steps[k / 4 * STEP_BYTES + PLACE[k % 4]] = value;
        }
        panel += PANEL * 4 + ceil_div(columns, 4) * STEP_BYTES;
    }
}

SF_INLINE Floats load_numbers(i32 number, const u8* from) {
    switch (number) {
        case F32: return load(reinterpret_cast<const float*>(from));
        case F16: return load_f16(reinterpret_cast<const u16*>(from));
        case BFLOAT16: return load_bf16(reinterpret_cast<const u16*>(from));
        case U8: return load_u8(from);
        case E8M0: return load_e8m0(from);
        case LOW_BITS: return load_nibbles(from, 0);
        case HIGH_BITS: return load_nibbles(from, 4);
        default: return load_i8(reinterpret_cast<const i8*>(from));
    }
}

// Widens the scales and offsets of a run: [groups][PANEL] each.
SF_INLINE void widen_scales(const Weight& w, const RunShape& run, const u8* data, float* scales, float* offsets) {
    const bool shared = w.offset_type == HIGH_BITS;
    const i64 scale_bytes = bytes_of(w.scale_type), offset_bytes = shared ? scale_bytes : bytes_of(w.offset_type);
    const u8 *scale_data = data + run.scales, *offset_data = shared ? scale_data : data + run.offsets;
    for (i64 column = 0; column < PANEL; column += LANES) {
        Floats scale_unit = broadcast(1.0f), offset_unit = scale_unit;
        if (w.two_level) {
            const u16* units = reinterpret_cast<const u16*>(data) + column;
            scale_unit = load_f16(units);
            if (offset_bytes) offset_unit = load_f16(units + PANEL);
        }
        for (i64 at = column, g = 0; g < run.groups; ++g, at += PANEL) {
            const Floats scale = load_numbers(w.scale_type, scale_data + at * scale_bytes) * scale_unit;
            store(scales + at, scale);
            if (!offset_bytes) continue;
            const Floats offset = load_numbers(w.offset_type, offset_data + at * offset_bytes);
            store(offsets + at, broadcast(0.0f) - offset * (w.zeros ? scale : offset_unit));
        }
    }
}

// Widens word WORD of a unit of levels, 16 columns of it.
template <int BITS, int WORD>
SF_INLINE void widen_word(const u8* unit, Packed table, u8* out) {
    constexpr int LOWER = lower_bits(BITS);
    Packed level;
    if constexpr (LOWER == 2) {
        level = bits_of<WORD % 4 * -2>(load_packed(unit + WORD / 4 * STEP_BYTES), 3);
    } else {
        const Packed both = load_packed(unit + WORD / 2 * STEP_BYTES);
        level = WORD % 2 ? high_nibbles(both) : low_nibbles(both);
    }
    const u8* upper = unit + LOWER * STEP_BYTES;
    if constexpr (BITS == 4) level = look_up(table, level);
    if constexpr (BITS - LOWER == 1) level = level | bits_of<LOWER - WORD>(load_packed(upper), 1 << LOWER);
    if constexpr (BITS - LOWER == 2) level = level | bits_of<LOWER - WORD % 4 * 2>(load_packed(upper + WORD / 4 * STEP_BYTES), 3 << LOWER);
    store_packed(out + WORD * STEP_BYTES, level);
}
template <int BITS, int... WORD>
SF_INLINE void widen_units(const u8* unit, i64 count, Packed table, u8* out, std::integer_sequence<int, WORD...>) {
    for (i64 i = 0; i < count; ++i, unit += BITS * STEP_BYTES, out += UNIT_WORDS * STEP_BYTES) {
        (widen_word<BITS, WORD>(unit, table, out), ...);
        (widen_word<BITS, WORD>(unit + VECTOR_BYTES, table, out + VECTOR_BYTES), ...);
    }
}

// Returns the levels of a run, a byte each: in the panel itself, or widened to `out`.
inline const u8* widen_levels(const Weight& w, const RunShape& run, const u8* data, u8* out) {
    constexpr auto words = std::make_integer_sequence<int, UNIT_WORDS>{};
    const u8* levels = data + run.levels;
    const i64 units = ceil_div(run.x_steps, UNIT_WORDS);
    const Packed table = load_qvalues(w.qvalues);
    if (w.bits == 8) return levels;
    if (w.bits == 2) widen_units<2>(levels, units, table, out, words);
    if (w.bits == 3) widen_units<3>(levels, units, table, out, words);
    if (w.bits == 4) widen_units<4>(levels, units, table, out, words);
    if (w.bits == 5) widen_units<5>(levels, units, table, out, words);
    if (w.bits == 6) widen_units<6>(levels, units, table, out, words);
    return out;
}

// Widens `steps` steps of FP8 to twice as many in bf16.
inline void widen_fp8(const u8* from, i64 steps, u8* out) {
    for (i64 i = 0; i < steps; ++i, from += STEP_BYTES, out += 2 * STEP_BYTES)
        for (int at = 0; at < STEP_BYTES; at += VECTOR_BYTES) {
            const Packed values = load_packed(from + at);
            store_packed(out + at, widen_even_e4m3(values));
            store_packed(out + STEP_BYTES + at, widen_odd_e4m3(values));
        }
}

// Writes one row of a weight, a column of a panel, as fp32 [columns].
inline void unpack_grouped_row(const Weight& w, const u8* panel, int column, float* out) {
    alignas(64) float scales[RUN_COLUMNS / LEAST_GROUP * PANEL], offsets[RUN_COLUMNS / LEAST_GROUP * PANEL];
    alignas(64) u8 widened[RUN_STEPS * STEP_BYTES];
    for (i64 first = 0; first < w.columns; first += RUN_COLUMNS) {
        const i64 columns = std::min(RUN_COLUMNS, w.columns - first);
        const RunShape run = run_of(w, columns);
        widen_scales(w, run, panel, scales, offsets);
        const u8* levels = widen_levels(w, run, panel, widened);
        for (i64 k = 0; k < columns; ++k) {
            const i64 at = k / w.group * PANEL + column;
            const float value = scales[at] * (levels[k / 4 * STEP_BYTES + column * 4 + k % 4] - w.bias);
            out[first + k] = w.offset_type == NONE ? value : value + offsets[at];
        }
        panel += run.bytes;
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
