// Products with packed weights: x is packed for the micro-kernels once, then multiplied panel by panel, block by block.
#pragma once

#include <algorithm>

#include "lora.h"
#include "weights.h"

namespace splitfuse {
namespace SF_VARIANT {

// The rows of x as the micro-kernels read them: in blocks of at most MAX_ROWS, as equal as possible, or for tiles of BLOCK_ROWS
// but the last; a block is slabs of [rows][SLAB_STRIDE] words. For quantized weights x is int8, with a scale for every row, or for weights in groups for
// every block of columns.
struct Operand {
    u32* words;
    float* scales;   // [rows], or null
    i32* starts;     // [rows][spans]: minus the sum of x times what quantized values are kept above (bias_of())
    XGroup* groups;  // of the first part, of the others after it; of each block [groups][rows]; null if the weight has none
    i64 rows, columns, x_steps, slabs, span_steps, num_spans;
    i64 blocks;
    i64 block_rows;  // of each block but the last; 0: they are as equal as possible
    i64 bands;       // of rows, each with as many blocks, which different threads begin with
    bool quantized;
    bool in_bytes;     // quantized x lies as bytes, not as 16 bits
    const Weight* weight;
    const i32* order;  // of elements in the row that is packed, or null
    float* sums_of_panel;  // [rows, PANEL]: this thread's buffer if a panel is multiplied in parts; else null

    i64 block_begin(i64 block) const { return block_rows ? std::min(block * block_rows, rows) : rows * block / blocks; }
    i64 block_of(i64 row) const { return block_rows ? row / block_rows : ceil_div((row + 1) * blocks, rows) - 1; }
    u32* block_words(i64 block) const { return words + block_begin(block) * slabs * SLAB_STRIDE; }
    bool scales_rows() const { return quantized && !groups; }  // as whole rows of int8
};

#ifdef SF_TILES
constexpr i64 READ_BEYOND = BLOCK_ROWS / 2 * SLAB_STRIDE * 4;  // bytes: tiles read whole, whatever follows the rows of x
#else
constexpr i64 READ_BEYOND = 0;
#endif

// Least rows of a band. It reads all panels: in int8 a core of 470 billion operations a second takes 2 GB/s of them for so many rows.
constexpr i64 BAND_ROWS = 8 * MAX_ROWS;

// Returns whether rows are divided for the weight only where threads have too few panels: each is widened for its rows, or tiles multiply
// faster than memory would give it again.
SF_INLINE bool prefers_all_rows(const Weight& w) { return BLOCK_ROWS != MAX_ROWS || w.format == GROUPED || w.format == FP8; }

#ifdef SF_PARTS
// Returns whether a panel of a row of quantized values is summed to its end as whole numbers.
SF_INLINE bool in_whole_rows(const Weight& w, const Shape& s) { return w.format == INT8 && s.num_groups == 1 && s.num_spans == 1; }

// Returns whether a panel of the weight is multiplied in parts, each with all rows. In groups few rows are not: a sum of whole
// numbers is the same without.
SF_INLINE bool in_parts(const Weight& w, i64 rows) {
    if (w.format == BF16 || w.format == FP8 || w.format == GROUPED) return true;
    const Shape s = shape_of(w);
    if (w.format == INT4) return rows > NIBBLE_ROWS;
    return s.num_groups == 1 ? in_whole_rows(w, s) : rows > MAX_ROWS;
}
#else
SF_INLINE bool in_parts(const Weight& w, i64) { return w.format != INT4; }
#endif

// Returns the bytes that the operand of `rows` rows for this weight needs.
SF_INLINE i64 operand_bytes(const Weight& w, i64 rows) {
    Shape s = shape_of(w);
    i64 bytes = align_up(rows * ceil_div(s.x_steps, SLAB_STEPS) * SLAB_STRIDE * 4) + 64;
    if (w.format != GROUPED) return bytes + align_up(rows * 4) + align_up(rows * s.num_spans * 4);
    each_part(w, [&](const Weight& part) { bytes += x_group_bytes(part, rows); });
    return bytes;
}

// Returns whether x is packed alike for two weights.
SF_INLINE bool read_alike(const Weight& a, const Weight& b) {
    const bool same = a.format == b.format && a.columns == b.columns && a.order == b.order && a.group == b.group;
    if (!same || a.format != GROUPED) return same;
    return !a.parts && !b.parts && a.bias == b.bias && (a.offset_type == NONE) == (b.offset_type == NONE) && reads_bytes(a) == reads_bytes(b);
}

// Returns the operand of `rows` rows in `memory`. `sums` is this thread's buffer for all rows of a panel.
SF_INLINE Operand make_operand(const Weight& w, i64 rows, u8* memory, float* sums, i64 bands = 1) {
    Shape s = shape_of(w);
    Operand x{};
    x.rows = rows;
    x.columns = w.columns;
    x.x_steps = s.x_steps;
    x.slabs = ceil_div(s.x_steps, SLAB_STEPS);
    x.span_steps = s.span_steps;
    x.num_spans = s.num_spans;
#ifdef SF_TILES
    x.block_rows = w.format != GROUPED && in_parts(w, rows) ? BLOCK_ROWS : 0;
#endif
    x.bands = bands;
    x.blocks = x.block_rows ? ceil_div(rows, x.block_rows) : bands * ceil_div(rows, bands * MAX_ROWS);
    x.quantized = w.format != BF16 && w.format != FP8;
    x.in_bytes = x.quantized && reads_bytes(w);
    x.weight = &w;
    x.order = w.order;
    x.words = reinterpret_cast<u32*>(memory);
    memory += align_up(rows * x.slabs * SLAB_STRIDE * 4);
    if (w.format == GROUPED) {
        x.groups = reinterpret_cast<XGroup*>(memory);
    } else {
        x.scales = reinterpret_cast<float*>(memory);
        x.starts = reinterpret_cast<i32*>(memory + align_up(rows * 4));
    }
    x.sums_of_panel = in_parts(w, rows) ? sums : nullptr;
    return x;
}

#ifdef SF_AVX512
// Quantizes as many whole 64 of `count` values as there are; returns for each lane what it adds to the sum of the quantized ones.
// Prefetches as many values from `ahead` on.
SF_INLINE Ints quantize_whole(const u16* values, i64 count, Floats inverse, i8* out, const u16* ahead) {
    Ints sums = broadcast(0);
    for (i64 k = 0; k + 4 * LANES <= count; k += 4 * LANES) {
        prefetch_line<Fetch::NEAR>(ahead + k);
        prefetch_line<Fetch::NEAR>(ahead + k + 2 * LANES);
        sums = quantize_64(values + k, inverse, out + k, sums);
    }
    return sums;
}
#endif

// Quantizes `count` values; returns the sum of the quantized ones. Prefetches as many values from `ahead` on.
SF_INLINE i32 quantize(const u16* values, i64 count, float inverse, i8* out, [[maybe_unused]] const u16* ahead) {
    Floats total = broadcast(0.0f), scale = broadcast(inverse);  // whole numbers below 2^24: exact
    i64 k = 0;
    i32 first = 0;
#ifdef SF_AVX512
    first = sum(quantize_whole(values, count, scale, out, ahead));
    k = count / (4 * LANES) * (4 * LANES);
    if (k == count) return first;
#endif
    for (; k + LANES <= count; k += LANES) {
        Floats qvalue = round(load_bf16(values + k) * scale);
        total += qvalue;
        store_i8(out + k, qvalue);
    }
    if (k < count) {
        i8 qvalues[LANES];
        Floats qvalue = round(load_bf16(values + k, static_cast<int>(count - k)) * scale);
        total += qvalue;
        store_i8(qvalues, qvalue);
        std::memcpy(out + k, qvalues, count - k);
    }
    return first + static_cast<i32>(sum(total));
}

// Quantizes a block, whose size is a multiple of LEAST_BLOCK, by its largest magnitude; returns its scale, which is NaN if
// a value is no number or infinite. Values too small for products to matter become 0.
SF_INLINE float quantize_block(const u16* values, i64 count, i8* out) {
    const u16 bits = largest_bits(values, count);
    const float most = bits < 0x7f80 ? widen(bits) : NAN;
    const Floats inverse = broadcast(most > 1e-30f ? 127.0f / most : most);
    for (i64 k = 0; k < count; k += LANES) store_i8(out + k, load_bf16(values + k) * inverse);
    return most * (1.0f / 127.0f);
}

// Packs one row of x for weights in groups. Its block has `rows` rows from `begin` on; its words begin at `place`.
inline void put_row_in_blocks(const Operand& x, i64 row, const u16* values, u32* place, i64 begin, i64 rows) {
    constexpr i64 SLAB_COLUMNS = SLAB_STEPS * 4;
    const i64 columns = block_columns(*x.weight);
    for (i64 first = 0; first < x.columns; first += SLAB_COLUMNS, place += rows * SLAB_STRIDE) {
        const i64 count = std::min(SLAB_COLUMNS, x.columns - first), whole = count / columns * columns;
        const u16* source = values + first;
        u16 ordered[SLAB_COLUMNS];
        if (x.order) {
            for (i64 k = 0; k < count; ++k) ordered[k] = values[x.order[first + k]];
            source = ordered;
        }
#ifdef SF_BYTE_DOTS
        i8* qvalues = reinterpret_cast<i8*>(place);
#else
        i8 qvalues[SLAB_COLUMNS] = {};
#endif
        float scales[SLAB_COLUMNS / LEAST_BLOCK];
        for (i64 k = 0; k < whole; k += columns) scales[k / columns] = quantize_block(source + k, columns, qvalues + k);
        if (whole < count) {
            u16 padded[MOST_GROUP] = {};
            std::memcpy(padded, source + whole, (count - whole) * sizeof(u16));
            scales[whole / columns] = quantize_block(padded, columns, qvalues + whole);
        }
        i32 sums[SLAB_COLUMNS / LEAST_GROUP];
        sum_sixteens(qvalues, count, sums);
        XGroup* groups = x.groups;
        each_part(*x.weight, [&](const Weight& part) {
            XGroup* to = groups + begin * ceil_div(x.columns, part.group) + first / part.group * rows + row - begin;
            for (i64 k = 0; k < count; k += part.group, to += rows) {
                i32 sum = 0;
                for (i64 at = k; at < std::min(count, k + part.group); at += LEAST_GROUP) sum += sums[at / LEAST_GROUP];
                to->scale = scales[k / columns];
                if (part.offset_type == NONE) to->start = -part.bias * sum;
                else to->sum = to->scale * static_cast<float>(sum);
            }
            groups += x_group_bytes(part, x.rows) / sizeof(XGroup);
        });
#ifndef SF_BYTE_DOTS
        if (x.in_bytes) std::memcpy(place, qvalues, SLAB_COLUMNS);
        else split_bytes(qvalues, SLAB_COLUMNS, place, place + SLAB_STEPS);
#endif
    }
}

// Packs one row of x, `values` [columns] in bf16. A quantized row is scaled by its largest magnitude.
SF_INLINE void put_row(const Operand& x, i64 row, const u16* values) {
    i64 block = x.block_of(row), begin = x.block_begin(block), rows = x.block_begin(block + 1) - begin;
    u32* place = x.block_words(block) + (row - begin) * SLAB_STRIDE;
    if (x.groups) return put_row_in_blocks(x, row, values, place, begin, rows);
    i64 width = x.quantized ? 4 : 2, slab_columns = SLAB_STEPS * width;  // columns of a step, and of a slab
    float inverse = 0.0f;
    if (x.quantized) {
        float most = largest(values, x.columns);
        x.scales[row] = most * (1.0f / 127.0f);
        inverse = most > 0.0f ? 127.0f / most : most;  // NaN stays NaN in the scale
    }
    const u16* following = x.rows > 1 ? values + x.columns : values;  // most often the next row that this thread packs
    i64 span = x.span_steps * 4;
    i32* starts = x.quantized ? x.starts + row * x.num_spans : nullptr;
    const i32 bias = bias_of(*x.weight);
    const bool several = x.num_spans > 1;  // of which each lies in one slab; a single one may have several slabs
    if (x.quantized) *starts = 0;
    for (i64 slab = 0; slab < x.slabs; ++slab, place += rows * SLAB_STRIDE) {
        i64 first = slab * slab_columns;
        i64 count = x.columns - first < slab_columns ? x.columns - first : slab_columns;
        i64 padded = x.x_steps - slab * SLAB_STEPS < SLAB_STEPS ? (x.x_steps - slab * SLAB_STEPS) * width : slab_columns;
        if (!x.quantized) {
            Element* elements = reinterpret_cast<Element*>(place);
            copy_elements(elements, values + first, count);
            std::memset(elements + count, 0, (padded - count) * sizeof(Element));
            continue;
        }
        i8 bytes[SLAB_STEPS * 4];
        i8* qvalues = x.in_bytes ? reinterpret_cast<i8*>(place) : bytes;
        i64 k = 0;
#ifdef SF_AVX512
        for (; several && span % (4 * LANES) == 0 && k + 4 * span <= count; k += 4 * span, starts += 4) {  // their sums at once
            Ints sums[4];
            for (int i = 0; i < 4; ++i) {
                const i64 at = k + i * span;
                sums[i] = quantize_whole(values + first + at, span, broadcast(inverse), qvalues + at, following + first + at);
            }
            store_sums(starts, sums, -bias);
        }
#endif
        for (; k < count; k += span, starts += several) {
            const i32 start = -bias * quantize(values + first + k, count - k < span ? count - k : span, inverse, qvalues + k, following + first + k);
            *starts = several ? start : *starts + start;
        }
        std::memset(qvalues + count, 0, (x.in_bytes ? padded : SLAB_STEPS * 4) - count);
#ifndef SF_BYTE_DOTS
        if (!x.in_bytes) split_bytes(qvalues, SLAB_STEPS * 4, place, place + SLAB_STEPS);
#endif
    }
}

// Computes what the ranks of a packed row of x give, whose values are `values`.
SF_INLINE void shrink_row(const Adapted& adapted, const Operand& x, i64 row, const u16* values) {
    const LoraWeight* w = adapted.of(row);
    if (!w) return;
    if (!x.scales_rows()) return shrink_bf16(*w, values, x.columns, adapted.row(row));
    const i64 block = x.block_of(row), begin = x.block_begin(block), slab_words = (x.block_begin(block + 1) - begin) * SLAB_STRIDE;
    const u32* words = x.block_words(block) + (row - begin) * SLAB_STRIDE;
    i32 start = 0;
    for (i64 span = 0; span < x.num_spans; ++span) start += x.starts[row * x.num_spans + span];
    start = start / bias_of(*x.weight) * QVALUE_BIAS;
    const auto shrink = x.in_bytes ? shrink_qvalues<true> : shrink_qvalues<false>;
    shrink(*w, words, slab_words, x.x_steps, start, x.scales[row], adapted.row(row));
}

SF_INLINE Floats activate(Floats gate, i32 kind) {
    if (kind == IDENTITY) return gate;
    if (kind == SILU) return gate * sigmoid(gate);
    if (kind == SIGMOID) return sigmoid(gate);
    if (kind == RELU || kind == RELU2) {
        Floats positive = max(broadcast(0.0f), gate);  // in this order NaN stays NaN
        return kind == RELU ? positive : positive * positive;
    }
    if (kind == GELU_TANH) {  // Hendrycks and Gimpel, arXiv 1606.08415
        Floats inner = fma(gate * gate * gate, broadcast(0.044715f), gate) * broadcast(0.7978845608028654f);
        return broadcast(0.5f) * gate * (broadcast(1.0f) + tanh(inner));
    }
    alignas(64) float lanes[LANES];
    store(lanes, gate);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.7071067811865476f));
    return load(lanes);
}

// The gate of gpt-oss: both halves clamped, the up half shifted by one.
SF_INLINE Floats clamped_swiglu(Floats gate, Floats up) {
    gate = min(broadcast(7.0f), gate);  // in this order NaN stays NaN
    up = max(broadcast(-7.0f), min(broadcast(7.0f), up));
    return gate * sigmoid(gate * broadcast(1.702f)) * (up + broadcast(1.0f));
}

// Where a product goes: y = (x w + bias) * scale + residual in fp32, without a residual y = x w + bias; or in bf16
// activation(x w + bias), of a gated weight activation(gate) * up.
struct Output {
    float* y = nullptr;              // [rows, N]; may be the residual itself
    u16* activated = nullptr;        // [rows, N], of a gated weight [rows, N / 2]
    i64 stride = 0;                  // from row to row of y or `activated`, if it is not their N
    const u16* bias = nullptr;       // [N]
    const float* residual = nullptr; // [rows, N]
    float scale = 1.0f;
    i32 activation = SILU;
    const i32* rows = nullptr;       // row of y for each row of x; null: the same
    Adapted adapted{};               // what adapters add to x w
    i64 first_panel = 0;             // of a part, in the whole weight

    i64 stride_of(i64 width) const { return stride ? stride : width; }  // of rows of `width` columns
};

// Returns how many columns a product with the weight has, and how many of them come from a panel.
SF_INLINE i64 output_width(const Weight& w) { return w.gated ? w.rows / 2 : w.rows; }
SF_INLINE i64 columns_of_panel(const Weight& w) { return w.gated ? LANES : PANEL; }

SF_INLINE void put_columns(const Output& out, Floats value, i64 row, i64 column, i64 width) {
    int count = static_cast<int>(width - column < LANES ? width - column : LANES);
    if (count <= 0) return;
    i64 at = row * out.stride_of(width) + column;
    if (count == LANES) {
        if (out.bias) value = value + load_bf16(out.bias + column);
        if (out.residual) value = value * broadcast(out.scale) + load(out.residual + at);
        store(out.y + at, value);
    } else {
        if (out.bias) value = value + load_bf16(out.bias + column, count);
        if (out.residual) value = value * broadcast(out.scale) + load(out.residual + at, count);
        store(out.y + at, value, count);
    }
}

SF_INLINE void put_activated(const Output& out, Floats value, i64 row, i64 column, i64 width) {
    int count = static_cast<int>(width - column < LANES ? width - column : LANES);
    if (count <= 0) return;
    if (out.bias) value = value + load_bf16(out.bias + column, count);
    value = activate(value, out.activation);
    u16* at = out.activated + row * out.stride_of(width) + column;
    if (count == LANES) store_bf16(at, value);
    else store_bf16(at, value, count);
}

SF_INLINE void put_gated(const Output& out, Floats gate, Floats up, i64 row, i64 column, i64 width) {
    int count = static_cast<int>(width - column < LANES ? width - column : LANES);
    if (out.bias) {
        gate = gate + load_bf16(out.bias + column, count);
        up = up + load_bf16(out.bias + width + column, count);
    }
    Floats value = out.activation == CLAMPED_SWIGLU ? clamped_swiglu(gate, up) : activate(gate, out.activation) * up;
    u16* at = out.activated + row * out.stride_of(width) + column;
    if (count == LANES) store_bf16(at, value);
    else store_bf16(at, value, count);
}

// Chooses what is prefetched while a panel is multiplied with block `index` of `count` in a row. If there is one block, its
// own panel, `ahead` of use, as it streams from memory. Of several the first does the same if no thread has prefetched this
// panel. The next two prefetch half of the next panel each, or one all of it, since their own is near.
SF_INLINE Prefetch prefetch_for(const u8* panel, const u8* next, i64 panel_bytes, i64 ahead, i64 index, i64 count, bool cold) {
    if (count == 1 || (cold && index == 0)) return {panel + ahead, STEP_BYTES};
    i64 part = index - cold, parts = count - cold;
    if (!next || part >= 2) return {panel, 0};
    if (parts == 1) return {next, STEP_BYTES};
    return {next + part * (panel_bytes / 2), STEP_BYTES / 2};
}

// Stores a whole panel's columns of `rows` rows from their sums [rows, PANEL] times their scales, with nothing in its loop that depends
// on the layer: `from` is the first row of x, and of y.
template <bool SCALES, bool BIAS, bool RESIDUAL>
SF_INLINE void put_floats(const Output& out, const float* tile, const float* scales, i64 from, int rows, i64 column, i64 stride) {
    Floats bias[2] = {}, factor = broadcast(out.scale);
    for (int v = 0; v < 2 && BIAS; ++v) bias[v] = load_bf16(out.bias + column + v * LANES);
    float* y = out.y + from * stride + column;
    const float* residual = RESIDUAL ? out.residual + from * stride + column : y;
    for (int r = 0; r < rows; ++r, tile += PANEL, y += stride, residual += stride)
        for (int v = 0; v < 2; ++v) {
            Floats value = load(tile + v * LANES);
            if constexpr (SCALES) value = value * broadcast(scales[r]);
            if constexpr (BIAS) value = value + bias[v];
            if constexpr (RESIDUAL) value = value * factor + load(residual + v * LANES);
            store(y + v * LANES, value);
        }
}
template <bool SCALES>
SF_INLINE void put_floats(const Output& out, const float* tile, const float* scales, i64 from, int rows, i64 column, i64 stride) {
    if (out.bias) {
        if (out.residual) put_floats<SCALES, true, true>(out, tile, scales, from, rows, column, stride);
        else put_floats<SCALES, true, false>(out, tile, scales, from, rows, column, stride);
    } else {
        if (out.residual) put_floats<SCALES, false, true>(out, tile, scales, from, rows, column, stride);
        else put_floats<SCALES, false, false>(out, tile, scales, from, rows, column, stride);
    }
}

// Does the same for silu(gate) * up.
template <bool SCALES>
SF_INLINE void put_silu(const Output& out, const float* tile, const float* scales, i64 from, int rows, i64 column, i64 stride) {
    u16* at = out.activated + from * stride + column;
    for (int r = 0; r < rows; ++r, tile += PANEL, at += stride) {
        Floats gate = load(tile), up = load(tile + LANES);
        if constexpr (SCALES) {
            const Floats scale = broadcast(scales[r]);
            gate = gate * scale;
            up = up * scale;
        }
        store_bf16(at, activate(gate, SILU) * up);
    }
}

// Stores the columns of one panel for the rows of x from `begin` on, from their sums [rows, PANEL], scaled.
SF_INLINE void put_tile(const Operand& x, const Weight& w, i64 panel, i64 begin, int rows, const float* tile, const Output& out) {
    const i64 width = output_width(w), columns = columns_of_panel(w), column = panel * columns, stride = out.stride_of(width);
    if (!out.adapted.lora && !out.rows && column + columns <= width) {
        const float* scales = x.scales + begin;
        if (w.gated && out.activation == SILU && !out.bias) {
            if (x.scales_rows()) return put_silu<true>(out, tile, scales, begin, rows, column, stride);
            return put_silu<false>(out, tile, scales, begin, rows, column, stride);
        }
        if (!w.gated && !out.activated) {
            if (x.scales_rows()) return put_floats<true>(out, tile, scales, begin, rows, column, stride);
            return put_floats<false>(out, tile, scales, begin, rows, column, stride);
        }
    }
    alignas(64) float added[BLOCK_ROWS * PANEL];
    if (out.adapted.lora) {
        const i64 whole = out.first_panel + panel;
        if (x.scales_rows()) expand_rows<true>(out.adapted, begin, rows, whole, added);
        else expand_rows<false>(out.adapted, begin, rows, whole, added);
    }
    for (int r = 0; r < rows; ++r) {
        Floats left = load(tile + r * PANEL), right = load(tile + r * PANEL + LANES);
        if (x.scales_rows()) {
            Floats scale = broadcast(x.scales[begin + r]);
            left = left * scale;
            right = right * scale;
        }
        if (out.adapted.lora) {
            left = left + load(added + r * PANEL);
            right = right + load(added + r * PANEL + LANES);
        }
        i64 row = out.rows ? out.rows[begin + r] : begin + r;
        if (w.gated) {
            put_gated(out, left, right, row, column, width);
        } else if (out.activated) {
            put_activated(out, left, row, column, width);
            put_activated(out, right, row, column + LANES, width);
        } else {
            put_columns(out, left, row, column, width);
            put_columns(out, right, row, column + LANES, width);
        }
    }
}

// Multiplies one panel in int8 or int4 with one block of rows. `fetch`: NEAR, or BOTH of a single block of int4.
template <int BITS>
SF_INLINE void multiply_panel(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 block, Prefetch prefetch, Fetch fetch,
                              const Output& out) {
    alignas(64) float tile[MAX_ROWS * PANEL];
    i64 begin = x.block_begin(block);
    int rows = static_cast<int>(x.block_begin(block + 1) - begin);
    const u8* data = w.data + panel * s.panel_bytes;
    const u32* words = x.block_words(block);
    const bool whole_rows = s.num_groups == 1;
    const u16* scales = nullptr;
    if (whole_rows) {
        scales = reinterpret_cast<const u16*>(data);
        data += SCALE_BYTES;
    }
    // As two numbers: a struct is loaded whole where its halves were just stored, and such a load waits until all that was
    // stored before is in the cache, the columns of the last block of rows too.
    const u8* from = prefetch.from;
    const i64 stride = prefetch.stride;
    for (i64 at = 0; at < s.x_steps;) {  // runs of equal spans in a slab
        i64 in_slab = std::min<i64>(SLAB_STEPS - at % SLAB_STEPS, s.x_steps - at);
        i64 x_steps = std::min(s.span_steps, in_slab), num_spans = in_slab / x_steps, span = at / s.span_steps;
        i64 steps = num_spans * x_steps * BITS / 8;
        const u32* place = words + at / SLAB_STEPS * rows * SLAB_STRIDE + at % SLAB_STEPS;
        Spans spans{place, data, scales, w.qvalues, num_spans, x_steps, x.starts + begin * s.num_spans + span, s.num_spans, {from, stride}, at > 0};
        if constexpr (BITS == 8) multiply<8>(rows, spans, tile);
        else multiply_int4(rows, spans, fetch, tile);
        data += steps * STEP_BYTES + (whole_rows ? 0 : num_spans * SCALE_BYTES);
        from += steps * stride;
        if (BITS == 4 && PREFETCHES_SCALES && !whole_rows) from += num_spans * (stride / 2);
        at += num_spans * x_steps;
    }
    put_tile(x, w, panel, begin, rows, tile, out);
}

// Returns what is prefetched while a part of a panel is multiplied: what lies `ahead` bytes ahead, in the next one too.
SF_INLINE Prefetch prefetch_ahead(const u8* data, const u8* end, const u8* next, i64 stride, i64 ahead = PREFETCH_BYTES) {
    const i64 beyond = data + ahead - end;
    return {next && beyond >= 0 ? next + beyond : data + ahead, stride};
}

// Widens a panel run by run, each for all rows of the blocks `first` to last - 1, and stores its columns. `widen(data, at)`
// returns the bytes of the run that begins at word `at` of x; `multiply_run` adds its products with a block to a tile.
template <class Widen, class Multiply>
SF_INLINE void multiply_runs(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                             const Output& out, Widen widen, Multiply multiply_run) {
    const u8 *data = w.data + panel * s.panel_bytes, *end = data + s.panel_bytes;
    auto tile_of = [&](i64 block) { return x.sums_of_panel + (x.block_begin(block) - x.block_begin(first)) * PANEL; };
    std::memset(tile_of(first), 0, (x.block_begin(last) - x.block_begin(first)) * PANEL * sizeof(float));
    for (i64 at = 0; at < s.x_steps; at += RUN_STEPS) {
        const i64 x_steps = std::min<i64>(RUN_STEPS, s.x_steps - at), bytes = widen(data, at);
        Prefetch prefetch = prefetch_ahead(data, end, next, ceil_div(bytes, x_steps));
        for (i64 block = first; block < last; ++block, prefetch.stride = 0) {
            const i64 begin = x.block_begin(block);
            const int rows = static_cast<int>(x.block_begin(block + 1) - begin);
            const u32* words = x.block_words(block) + at / SLAB_STEPS * rows * SLAB_STRIDE + at % SLAB_STEPS * (x.quantized ? 1 : PAIR_WORDS);
            multiply_run(words, at, x_steps, begin, rows, prefetch, tile_of(block));
        }
        data += bytes;
    }
    for (i64 block = first; block < last; ++block) {
        const i64 begin = x.block_begin(block);
        put_tile(x, w, panel, begin, static_cast<int>(x.block_begin(block + 1) - begin), tile_of(block), out);
    }
}

// Multiplies one panel of a weight in groups with the blocks `first` to last - 1.
SF_INLINE void multiply_grouped_panel(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                      const Output& out) {
    constexpr i64 MOST_GROUPS = RUN_COLUMNS / LEAST_GROUP;
    alignas(64) u8 widened[RUN_STEPS * STEP_BYTES];
    alignas(64) float scales[MOST_GROUPS * PANEL], offsets[MOST_GROUPS * PANEL];
    const u8* levels = nullptr;
#ifdef SF_BYTE_DOTS
    const int sum_steps = 0;
#else
    const int sum_steps = x.in_bytes ? sum_steps_of(w) : 0;
#endif
    auto widen = [&](const u8* data, i64 at) {
        const RunShape run = run_of(w, std::min(RUN_COLUMNS, w.columns - at * 4));
        widen_scales(w, run, data, scales, offsets);
        levels = widen_levels(w, run, data, widened);
        return run.bytes;
    };
    multiply_runs(x, w, s, panel, first, last, next, out, widen,
                  [&](const u32* words, i64 at, i64 x_steps, i64 begin, int rows, const Prefetch& prefetch, float* tile) {
        const XGroup* x_groups = x.groups + begin * ceil_div(w.columns, w.group) + at * 4 / w.group * rows;
        const float* added = w.offset_type == NONE ? nullptr : offsets;
        multiply(rows, Groups{words, levels, scales, added, x_steps, w.group / 4, x_groups, prefetch}, sum_steps, tile);
    });
}

// Does the same in FP8.
SF_INLINE void multiply_fp8_panel(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                  const Output& out) {
    alignas(64) u8 widened[FP8_COLUMNS / 2 * STEP_BYTES];
    const float* scales = nullptr;
    auto widen = [&](const u8* data, i64 at) {
        const i64 steps = ceil_div(std::min(FP8_COLUMNS, w.columns - at * 2), 4);
        scales = reinterpret_cast<const float*>(data);
        widen_fp8(data + PANEL * 4, steps, widened);
        return PANEL * 4 + steps * STEP_BYTES;
    };
    multiply_runs(x, w, s, panel, first, last, next, out, widen,
                  [&](const u32* words, i64, i64 x_steps, i64, int rows, const Prefetch& prefetch, float* tile) {
        multiply(rows, Fp8Run{words, widened, scales, x_steps, prefetch}, tile);
    });
}

// Calls body(rows, words, begin, tile) for each of the blocks `first` to last - 1: its words of x from `at` on, its first row,
// and its sums.
template <class Body>
SF_INLINE void each_block(const Operand& x, i64 first, i64 last, i64 at, Body body) {
    const i64 first_row = x.block_begin(first), in_slab = at % SLAB_STEPS * (x.quantized ? 1 : PAIR_WORDS);
    i64 begin = first_row;
    for (i64 block = first; block < last; ++block) {
        const i64 end = x.block_begin(block + 1);
        const int rows = static_cast<int>(end - begin);
        const u32* words = x.words + (begin * x.slabs + at / SLAB_STEPS * rows) * SLAB_STRIDE + in_slab;
        body(rows, words, begin, x.sums_of_panel + (begin - first_row) * PANEL);
        begin = end;
    }
}

#ifdef SF_PARTS
// Divides what is prefetched while a part of a panel is multiplied with `blocks` blocks of rows: each takes as much, but with the
// large blocks of AMX the first takes all.
SF_INLINE Prefetch share_of_block(const Prefetch& all, i64 blocks) {
    return {all.from, BLOCK_ROWS == MAX_ROWS ? all.stride / blocks : all.stride};
}
SF_INLINE void to_next_block(Prefetch& prefetch, i64 steps) {
    if constexpr (BLOCK_ROWS == MAX_ROWS) prefetch.from += steps * prefetch.stride;
    else prefetch.stride = 0;
}

// Widens quantized values of a panel of int4: words of eight nibbles to two of four bytes.
SF_INLINE void widen_nibbles(Packed table, const u8* words, i64 bytes, u8* out) {
    for (const u8* end = words + bytes; words < end; words += STEP_BYTES, out += 2 * STEP_BYTES)
        for (int at = 0; at < STEP_BYTES; at += VECTOR_BYTES) {
            const Packed both = load_packed(words + at);
            store_packed(out + at, look_up(table, low_nibbles(both)));
            store_packed(out + STEP_BYTES + at, look_up(table, high_nibbles(both)));
        }
}

// Takes a row's whole sums of quantized values + QVALUE_BIAS, in place, to weights.
SF_INLINE void scale_sums(const u16* scales, i32 first, float* sums) {
    const Ints start = broadcast(first);
    for (int at = 0; at < PANEL; at += LANES)
        store(sums + at, to_floats(load_ints(reinterpret_cast<const i32*>(sums + at)) + start) * load_bf16(scales + at));
}

// Multiplies one panel in bf16, or of whole rows in int8, with the blocks `first` to last - 1: a part of the panel
// with all of them while it lies in the first cache, or at once if there is one block.
SF_INLINE void multiply_rows_in_parts(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                      const Output& out) {
    const u8 *data = w.data + panel * s.panel_bytes, *end = data + s.panel_bytes;
    const u16* scales = reinterpret_cast<const u16*>(data);
    if (x.quantized) data += SCALE_BYTES;
    const i64 most = last == first + 1 ? s.x_steps : PART_STEPS;
    for (i64 at = 0; at < s.x_steps; at += most, data += most * STEP_BYTES) {
        const i64 steps = std::min(most, s.x_steps - at);
        Prefetch prefetch = share_of_block(prefetch_ahead(data, end, next, STEP_BYTES), last - first);
        each_block(x, first, last, at, [&](int rows, const u32* words, i64, float* tile) {
            const Segments run{&data, &prefetch.from, static_cast<int>(steps), steps, STEP_BYTES, prefetch.stride, at > 0};
            if (x.quantized) multiply_run<Dot::QVALUES>(rows, words, run, tile);
            else multiply_run<Dot::BF16>(rows, words, run, tile);
            to_next_block(prefetch, steps);
        });
    }
    each_block(x, first, last, 0, [&](int rows, const u32*, i64 begin, float* tile) {
        for (int row = 0; row < rows && x.quantized; ++row) scale_sums(scales, x.starts[begin + row], tile + row * PANEL);
        put_tile(x, w, panel, begin, rows, tile, out);
    });
}

// Does the same for a quantized panel in groups. Spans of int4 become bytes in the first cache.
SF_INLINE void multiply_groups_in_parts(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                        const Output& out) {
    alignas(64) u8 widened[GROUPS_PART_STEPS * STEP_BYTES];
    const Packed table = load_qvalues(w.qvalues);
    const u8 *data = w.data + panel * s.panel_bytes, *end = data + s.panel_bytes;
    for (i64 at = 0; at < s.x_steps;) {
        const i64 left = std::min(GROUPS_PART_STEPS, s.x_steps - at), x_steps = std::min(s.span_steps, left), count = left / x_steps;
        const i64 bytes = x_steps * STEP_BYTES / (w.format == INT4 ? 2 : 1), stride = SCALE_BYTES + bytes;
        ByteSpans spans{nullptr, data + SCALE_BYTES, data, stride, stride, count, x_steps, nullptr, s.num_spans, {}, at > 0};
        if (w.format == INT4) {
            for (i64 i = 0; i < count; ++i) widen_nibbles(table, spans.weights + i * stride, bytes, widened + i * x_steps * STEP_BYTES);
            spans.weights = widened;
            spans.weights_stride = x_steps * STEP_BYTES;
        }
        spans.prefetch = share_of_block(prefetch_ahead(data, end, next, ceil_div(stride, x_steps)), last - first);
        each_block(x, first, last, at, [&](int rows, const u32* words, i64 begin, float* tile) {
            spans.x = words;
            spans.starts = x.starts + begin * s.num_spans + at / s.span_steps;
            if (w.format == INT4) multiply<4>(rows, spans, tile);
            else multiply<8>(rows, spans, tile);
            to_next_block(spans.prefetch, count * x_steps);
        });
        data += count * stride;
        at += count * x_steps;
    }
    each_block(x, first, last, 0, [&](int rows, const u32*, i64 begin, float* tile) { put_tile(x, w, panel, begin, rows, tile, out); });
}
#else
// Multiplies a part of a panel in int8 with a block of rows. `scales`: of whole rows, or null.
SF_INLINE void multiply_int8_part(const Operand& x, const Shape& s, const u8* data, const u16* scales, const u32* words, i64 begin, int rows,
                                  i64 at, i64 steps, Fetch fetch, const u8* from, i64 stride, float* tile) {
    for (i64 end = at + steps; at < end;) {  // runs of equal spans in a slab
        const i64 in_slab = std::min<i64>(SLAB_STEPS - at % SLAB_STEPS, end - at), x_steps = std::min(s.span_steps, in_slab);
        const i64 count = scales ? 1 : in_slab / x_steps;  // a span of a whole row is what it has in the slab
        const i32* starts = x.starts + begin * s.num_spans + (scales ? at / SLAB_STEPS : at / s.span_steps);
        const Spans spans{words, data, scales, nullptr, count, x_steps, starts, s.num_spans, {from, stride}, at > 0};
        if (fetch == Fetch::NEAR) multiply<8>(rows, spans, tile);
        else multiply_part(rows, spans, fetch, tile);
        data += count * (x_steps * STEP_BYTES + (scales ? 0 : SCALE_BYTES));
        from += count * x_steps * stride;
        at += count * x_steps;
        words += at % SLAB_STEPS ? count * x_steps : rows * SLAB_STRIDE - (SLAB_STEPS - count * x_steps);
    }
}

// Prefetches where the columns of a panel are put, a cache line or two of each row, while they are computed.
SF_INLINE void prefetch_output(const Weight& w, i64 panel, i64 begin, int rows, const Output& out) {
    if (out.rows) return;
    const i64 stride = out.stride_of(output_width(w)), place = begin * stride + panel * columns_of_panel(w);
    if (out.activated) {
        const u16* at = out.activated + place;
        for (int r = 0; r < rows; ++r, at += stride) prefetch_to_write(at);
    } else {
        const float* at = out.y + place;
        for (int r = 0; r < rows; ++r, at += stride) {
            prefetch_to_write(at);
            prefetch_to_write(at + LANES);
        }
    }
}

constexpr i64 MOST_SHARED_ROWS = 19;  // with more, memory has time enough while they are multiplied
constexpr i64 MOST_SHARERS = 4;       // blocks that prefetch
constexpr i64 MOST_BLOCKS = 16;       // whose sums stay near while they wait for the next part of a panel

// Multiplies one panel in bf16 or int8 with the blocks `first` to last - 1. One block streams the panel from memory. Several
// multiply a part of it in turn, from the second cache, and the first of them prefetch a share each of the part that follows.
// `cold`: nothing has prefetched the first part.
SF_INLINE void multiply_in_parts(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                 bool cold, const Output& out) {
    const u8 *data = w.data + panel * s.panel_bytes, *end = data + s.panel_bytes;
    const u16* scales = nullptr;
    if (s.num_groups == 1) {
        scales = reinterpret_cast<const u16*>(data);
        data += SCALE_BYTES;
    }
    const i64 blocks = last - first, most = blocks == 1 || blocks > MOST_BLOCKS ? s.x_steps : std::min(PART_STEPS, s.x_steps);
    const i64 stride = STEP_BYTES + (s.num_groups > 1 ? ceil_div(SCALE_BYTES, s.span_steps) : 0);
    const i64 rows_of_all = x.block_begin(last) - x.block_begin(first);
    const bool few = rows_of_all < HALF_ROWS, shares = blocks == 2 && rows_of_all <= MOST_SHARED_ROWS && s.num_groups <= 1;
    const Fetch fetch = shares ? Fetch::SHARE : few || blocks > 1 ? Fetch::NEAR : Fetch::BOTH;
    alignas(64) float near[MAX_ROWS * PANEL];  // for sums that wait for no other part: it stays in the first cache
    for (i64 at = 0; at < s.x_steps; at += most) {
        const i64 steps = std::min(most, s.x_steps - at), ahead = blocks == 1 ? PREFETCH_BYTES : most * stride;
        // As two numbers: see multiply_panel().
        const u8* from = prefetch_ahead(data, end, next, stride, ahead).from;
        const i64 sharers = std::min(blocks, MOST_SHARERS), share = stride / sharers;
        const u8* until = from + steps * share * sharers;
        const bool at_once = steps == s.x_steps, ends = at + steps == s.x_steps;
        each_block(x, first, last, at, [&](int rows, const u32* words, i64 begin, float* sums) {
            float* tile = at_once ? near : sums;
            if (ends && blocks > 1) prefetch_output(w, panel, begin, rows, out);
            const bool missing = cold && at == 0 && blocks > 1 && begin == x.block_begin(first);
            const Fetch of_block = missing ? Fetch::BOTH : fetch;
            const i64 advance = from < until ? share : 0;
            const Segments run{&data, &from, static_cast<int>(steps), steps, STEP_BYTES, advance, at > 0};
            if (x.quantized) multiply_int8_part(x, s, data, scales, words, begin, rows, at, steps, of_block, from, advance, tile);
            else if (few) multiply(rows, words, run, tile, PANEL);
            else multiply_part(rows, words, run, of_block, tile);
            from += steps * advance;
            if (ends) put_tile(x, w, panel, begin, rows, tile, out);
        });
        data += steps * STEP_BYTES + (s.num_groups > 1 ? ceil_div(steps, s.span_steps) * SCALE_BYTES : 0);
    }
}
#endif

// Multiplies one panel in int4, or few rows of one in int8 in groups, with the blocks `first` to last - 1, one after the other.
template <int BITS>
__attribute__((noinline)) void multiply_block_by_block(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last,
                                       const u8* next, bool cold, const Output& out) {
    const u8* data = w.data + panel * s.panel_bytes;
    const Fetch fetch = BITS == 4 ? fetch_of_int4(x.block_begin(last) - x.block_begin(first)) : Fetch::NEAR;
    const i64 ahead = BITS == 4 && s.num_groups > 1 && fetch == Fetch::NEAR ? INT4_PREFETCH_BYTES : PREFETCH_BYTES;
    for (i64 block = first; block < last; ++block) {
        Prefetch prefetch = prefetch_for(data, next, s.panel_bytes, ahead, block - first, last - first, cold);
#ifndef SF_PARTS
        if (last - first > 1) prefetch_output(w, panel, x.block_begin(block), static_cast<int>(x.block_begin(block + 1) - x.block_begin(block)), out);
#endif
        multiply_panel<BITS>(x, w, s, panel, block, prefetch, fetch, out);
    }
}

// Multiplies one panel with the blocks `first` to last - 1. `next` is the panel that this thread multiplies then, or null;
// `cold` says that no thread has prefetched this one.
SF_INLINE void multiply_panel_by_all(const Operand& x, const Weight& w, const Shape& s, i64 panel, i64 first, i64 last, const u8* next,
                                     bool cold, const Output& out) {
    if (w.format == GROUPED) return multiply_grouped_panel(x, w, s, panel, first, last, next, out);
    if (w.format == FP8) return multiply_fp8_panel(x, w, s, panel, first, last, next, out);
#ifdef SF_PARTS
    if (x.sums_of_panel) {
        if (w.format == BF16 || in_whole_rows(w, s)) multiply_rows_in_parts(x, w, s, panel, first, last, next, out);
        else multiply_groups_in_parts(x, w, s, panel, first, last, next, out);
        return;
    }
    if (w.format == INT8) return multiply_block_by_block<8>(x, w, s, panel, first, last, next, cold, out);
#else
    if (w.format != INT4) return multiply_in_parts(x, w, s, panel, first, last, next, cold, out);
#endif
    multiply_block_by_block<4>(x, w, s, panel, first, last, next, cold, out);
}

constexpr i64 LEAST_PART_ROWS = 64;  // with fewer, a part of the rows takes less time than its panel takes to come from memory

// Returns into how many parts the blocks of rows are divided, equally many in each band. More than one where threads have few panels: else half
// of them would wait for the other half's last ones. With many rows x may not fit into the second cache either, and a part does.
SF_INLINE i64 parts_of(const Operand& x, const Weight& w, const Shape& s, int threads) {
    const i64 panels = x.bands * s.panels;
    i64 parts = panels >= 8 * threads ? 1 : ceil_div(8 * threads, panels);
    if (!prefers_all_rows(w)) parts = std::max(parts, std::min(x.rows / (x.bands * LEAST_PART_ROWS), ceil_div(32 * threads, panels)));
    return x.bands * std::min(parts, x.blocks / x.bands);
}

// Multiplies a packed x with a weight that is none of parts. Returns when all threads are done.
SF_INLINE void multiply_whole(Team& team, const Operand& x, const Weight& w, const Output& out) {
    if (!x.rows) return;  // as of a step without logits
    const Shape s = shape_of(w);
    const i64 parts = parts_of(x, w, s, team.size);
    // Few rows have the parts of a panel side by side, so that mostly one thread reads it; of many, each part has all panels before the next.
    const i64 beside = x.bands == 1 && (prefers_all_rows(w) || x.rows < 2 * LEAST_PART_ROWS) ? parts : 1;
    auto panel_of = [&](i64 unit) { return unit / beside % s.panels; };
    bool first_run = true;  // of this thread: no thread has prefetched what it reads
    team.share_by_node(parts / beside, s.panels, beside, [&](i64 begin, i64 end, i64 next_run) {
        bool cold = first_run;
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 panel = panel_of(unit), part = unit / (beside * s.panels) * beside + unit % beside;
            const i64 next_unit = unit + 1 < end ? unit + 1 : next_run;
            const u8* next = next_unit >= 0 && panel_of(next_unit) != panel ? w.data + panel_of(next_unit) * s.panel_bytes : nullptr;
            const i64 first = x.blocks * part / parts, last = x.blocks * (part + 1) / parts;
            multiply_panel_by_all(x, w, s, panel, first, last, next, cold, out);
            cold = false;
        }
        first_run = false;
    });
}

// Multiplies a packed x with a weight. Returns when all threads are done.
inline void multiply(Team& team, const Operand& x, const Weight& w, const Output& out) {
    if (!w.parts) return multiply_whole(team, x, w, out);
    Output of_part = out;
    of_part.stride = out.stride_of(w.rows);
    Operand read = x;
    for (i64 i = 0; i < w.num_parts; ++i) {
        const i64 rows = w.parts[i].rows;
        multiply_whole(team, read, w.parts[i], of_part);
        read.groups += x_group_bytes(w.parts[i], x.rows) / sizeof(XGroup);
        if (out.activated) of_part.activated += rows;
        else of_part.y += rows;
        if (out.bias) of_part.bias += rows;
        if (out.residual) of_part.residual += rows;
        of_part.first_panel += shape_of(w.parts[i]).panels;
    }
}

// Memory of the ranks of a group that gathers, for what all of them pack alike: two places, used in turns, so that one is written
// while a slower rank may still read the other.
struct Common {
    u8* places[2] = {};
    i64 bytes = 0;     // of a place
    Group* group = nullptr;
    i64* turn = nullptr;  // each thread's own, from 0 on in each step
};

constexpr i64 COMMON_ROWS = 32;  // fewer rows are packed by each rank sooner than ranks meet

// Memory for packed activations: shared by the team, or each thread's own for a single row, which all threads pack alike
// rather than wait for one.
struct Memory {
    u8* shared;
    u8* own;
    float* sums;  // each thread's own, for all rows of a panel; null if no panel is widened
    Common common;

    bool is_common(const Weight& w, i64 rows) const {
        return common.bytes && rows >= COMMON_ROWS && operand_bytes(w, rows) + READ_BEYOND <= common.bytes;
    }
    u8* of(i64 rows, bool in_common) const {
        return rows == 1 ? own : in_common ? common.places[++*common.turn % 2] : shared;
    }
};

inline void gather(Team& team, Group* group);  // in group.h

// Packs all rows of x [rows, columns] in bf16, row i from the address that `source(i)` returns. Returns when all threads
// are done. With adapters at the one or two weights that read x, their ranks are computed meanwhile, for all rows of an adapter
// by one thread where possible: each reads its adapter from memory once. Ranks that share memory pack a part of many rows each.
template <class Source>
SF_INLINE Operand pack_activations(Team& team, const Weight& w, i64 rows, const Memory& memory, Source source,
                                   const Adapted& adapted = {}, const Adapted& other = {}) {
    const bool in_common = memory.is_common(w, rows);
    const i64 bands = in_common || prefers_all_rows(w) ? 1 : team.bands_of(rows, BAND_ROWS);
    Operand x = make_operand(w, rows, memory.of(rows, in_common), memory.sums, bands);
    auto put = [&](i64 row) {
        const u16* values = source(row);
        put_row(x, row, values);
        if (adapted.lora) shrink_row(adapted, x, row, values);
        if (other.lora) shrink_row(other, x, row, values);
    };
    if (rows == 1) {
        put(0);
    } else if (in_common) {  // there are no adapters
        const Group& group = *memory.common.group;
        const i64 first = rows * group.rank / group.size, last = rows * (group.rank + 1) / group.size;
        team.split(last - first, [&](i64 begin, i64 end) {
            for (i64 row = first + begin; row < first + end; ++row) put(row);
        });
        gather(team, memory.common.group);
    } else if (adapted.lora) {
        team.share(rows, [&](i64 begin, i64 end, i64) {
            for (i64 i = begin; i < end; ++i) put(adapted.lora->order[i]);
        });
    } else {
        team.split(rows, [&](i64 begin, i64 end) {
            for (i64 row = begin; row < end; ++row) put(row);
        });
    }
    return x;
}

inline void linear(Team& team, const u16* x, i64 rows, const Weight& w, const Memory& memory, const Output& out) {
    Operand operand = pack_activations(team, w, rows, memory, [&](i64 row) { return x + row * w.columns; }, out.adapted);
    multiply(team, operand, w, out);
}

constexpr i64 HEAD_ROWS = 16 * MAX_ROWS;  // rows of one head that a thread packs and multiplies at once

// Multiplies each of `heads` weights [N, K], which lie one after the other from w on, with rows of its own: `source(row,
// head)` returns the address of K of them in bf16. Head h of a row goes to y + row * stride + h * head_stride, N in bf16.
// Returns when all threads are done.
template <class Source>
SF_INLINE void linear_heads(Team& team, const Weight& w, i64 heads, i64 rows, const Memory& memory, Source source, u16* y,
                            i64 head_stride, i64 stride) {
    const Shape s = shape_of(w);
    const i64 chunks = ceil_div(rows, HEAD_ROWS), parts = std::min(s.panels, ceil_div(8 * team.size, std::max<i64>(1, heads * chunks)));
    team.share(heads * chunks * parts, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 head = unit / (chunks * parts), chunk = unit / parts % chunks, part = unit % parts;
            const i64 first = rows * chunk / chunks, last_panel = s.panels * (part + 1) / parts;
            Weight of_head = w;
            of_head.data += head * s.panels * s.panel_bytes;
            Operand x = make_operand(w, rows * (chunk + 1) / chunks - first, memory.own, memory.sums);
            for (i64 row = 0; row < x.rows; ++row) put_row(x, row, source(first + row, head));
            Output out;
            out.activated = y + first * stride + head * head_stride;
            out.stride = stride;
            out.activation = IDENTITY;
            for (i64 panel = s.panels * part / parts; panel < last_panel; ++panel) {
                const u8* next = panel + 1 < last_panel ? of_head.data + (panel + 1) * s.panel_bytes : nullptr;
                multiply_panel_by_all(x, of_head, s, panel, 0, x.blocks, next, unit == begin, out);
            }
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
