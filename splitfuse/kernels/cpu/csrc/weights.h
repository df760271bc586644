// Linear weights in panels: made once at loading, read by every product.
//
// A panel holds 32 rows of the weight [N, K] (columns of the product), 64-byte lines of one word for each of 16 rows:
//   bf16   [steps][32 rows] words of two neighbours in K
//   int8   for each group [32 bf16 scales][steps][32 rows] words of four quantized values, each + QVALUE_BIAS
//   int4   for each group [32 bf16 scales][steps][32 rows] words of eight nibbles: the low ones four neighbours in K,
//          the high ones the next four; a nibble names one of 16 quantized values
// A weight is scale * quantized value. Padding of the last panel and the last step is multiplied with zeros of x, or its
// products are never stored.
#pragma once

#include <algorithm>
#include <cmath>

#include "groups.h"
#include "team.h"

namespace splitfuse {
namespace SF_VARIANT {

// K elements of one step of x, of one step of a panel, and the sizes that follow.
struct Shape {
    i64 x_steps;       // words of x in a row
    i64 group_steps;   // words of x that share a scale
    i64 num_groups;    // 0 in bf16
    i64 span_steps;    // words of x summed as whole numbers: a group, or SPAN_STEPS where that is shorter; in tiles a whole row
    i64 num_spans;
    i64 panels;
    i64 panel_bytes;
};

SF_INLINE Shape shape_of(const Weight& w) {
    Shape s{};
    s.panels = w.gated ? ceil_div(w.rows / 2, LANES) : ceil_div(w.rows, PANEL);
    if (w.format == GROUPED) {
        s.x_steps = ceil_div(w.columns, 4);
        s.panel_bytes = grouped_panel_bytes(w);
        return s;
    }
    if (w.format == FP8) {
        s.x_steps = 2 * ceil_div(w.columns, 4);
        s.panel_bytes = fp8_panel_bytes(w);
        return s;
    }
    i64 panel_columns = w.format == BF16 ? 2 : w.format == INT8 ? 4 : 8;
    i64 steps = ceil_div(w.columns, panel_columns);
    s.x_steps = w.format == INT4 ? 2 * steps : steps;
    if (w.format != BF16) {
        i64 group = w.group ? w.group : w.columns;
        s.group_steps = ceil_div(group, 4);
        s.num_groups = ceil_div(w.columns, group);
        if (w.format == INT4 && s.group_steps % 2) ++s.group_steps;
        const bool at_once = w.format == INT8 && s.num_groups == 1 && s.group_steps <= ROW_STEPS;
        s.span_steps = at_once ? s.group_steps : std::min<i64>(s.group_steps, SPAN_STEPS);
        s.num_spans = ceil_div(s.x_steps, s.span_steps);
    }
    s.panel_bytes = steps * STEP_BYTES + s.num_groups * SCALE_BYTES;
    return s;
}

// Returns what the quantized values of a weight are kept above: they are read unsigned.
SF_INLINE i32 bias_of(const Weight& w) { return w.format == INT4 ? w.bias : QVALUE_BIAS; }

// Where a row of the weight lies: the panel, and the column in it.
struct Place { i64 panel; int column; };

SF_INLINE Place place_of(const Weight& w, i64 row) {
    if (!w.gated) return {row / PANEL, static_cast<int>(row % PANEL)};
    i64 half = w.rows / 2, unit = row < half ? row : row - half;
    return {unit / LANES, static_cast<int>(unit % LANES) + (row < half ? 0 : LANES)};
}

// Packs columns `begin` to `end` - 1 of a row; `begin` is even.
SF_INLINE void pack_bf16_row(u32* panel, int column, const u16* row, i64 begin, i64 end) {
    for (i64 k = begin; k + 1 < end; k += 2) {
        u32 pair;
        std::memcpy(&pair, row + k, sizeof pair);
        panel[k / 2 * PANEL + column] = pair;
    }
    if (end % 2) panel[end / 2 * PANEL + column] = row[end - 1];
}

// Returns the largest magnitude; NaN if any value is NaN or infinite.
SF_INLINE float largest(const u16* row, i64 count) {
    const i64 whole = count / 32 * 32;
    u16 bits = largest_bits(row, whole);
    for (i64 k = whole; k < count; ++k) bits = std::max<u16>(bits, row[k] & 0x7fff);
    return bits < 0x7f80 ? widen(bits) : NAN;
}

// Returns the smallest bf16 that is not below a positive `value`, so that nothing is clipped at the last quantized value.
SF_INLINE u16 narrow_up(float value) {
    u16 narrowed = narrow(value);
    return widen(narrowed) < value ? static_cast<u16>(narrowed + 1) : narrowed;
}

SF_INLINE int rounded(float value, int most) {
    if (std::isnan(value)) return 0;  // its scale is NaN already
    int qvalue = static_cast<int>(std::nearbyint(value));
    return qvalue > most ? most : qvalue < -most ? -most : qvalue;
}

SF_INLINE u16 int8_group(u8* steps, int column, const u16* values, i64 count) {
    u16 scale = narrow_up(largest(values, count) / 127.0f);
    float inverse = widen(scale) > 0.0f ? 1.0f / widen(scale) : 0.0f;
    for (i64 k = 0; k < ceil_div(count, 4) * 4; ++k) {
        int qvalue = k < count ? rounded(widen(values[k]) * inverse, 127) : 0;
        steps[k / 4 * STEP_BYTES + column * 4 + k % 4] = static_cast<u8>(qvalue + QVALUE_BIAS);
    }
    return scale;
}

// The 16 quantized values of int4, rising, and the points halfway between neighbours.
struct QValues {
    float qvalue[16], middle[16];  // middle[i] between i - 1 and i

    explicit QValues(const Weight& w) {
        for (int i = 0; i < 16; ++i) qvalue[i] = static_cast<float>(w.qvalues[i] - w.bias);
        for (int i = 1; i < 16; ++i) middle[i] = 0.5f * (qvalue[i - 1] + qvalue[i]);
    }
    Floats nearest(Floats value) const {
        Floats found = broadcast(qvalue[0]);
        for (int i = 1; i < 16; ++i) found = above(value, broadcast(middle[i]), broadcast(qvalue[i]), found);
        return found;
    }
    u8 index(float value) const {
        int found = 0;
        for (int i = 1; i < 16; ++i) found += value > middle[i];
        return static_cast<u8>(found);
    }
};

// Returns the squared error of `values` under a scale, and in `better` the scale that fits the same quantized values best.
SF_INLINE float int4_error(const QValues& qvalues, const u16* values, i64 count, float scale, float& better) {
    Floats inverse = broadcast(1.0f / scale), minus = broadcast(-scale);
    Floats error = broadcast(0.0f), product = error, square = error;
    for (i64 k = 0; k < count; k += LANES) {
        int here = count - k < LANES ? static_cast<int>(count - k) : LANES;
        Floats value = here < LANES ? load_bf16(values + k, here) : load_bf16(values + k);
        Floats qvalue = qvalues.nearest(value * inverse);
        if (here < LANES) qvalue = between(0, here, qvalue, broadcast(0.0f));
        Floats rest = fma(qvalue, minus, value);
        error = fma(rest, rest, error);
        product = fma(value, qvalue, product);
        square = fma(qvalue, qvalue, square);
    }
    better = sum(product) / sum(square);
    return sum(error);
}

// Chooses the scale of a group. Candidates put its largest magnitude at or beyond the last quantized value on the denser
// side, so that a scale has a sign; the one of least squared error is fitted once to the quantized values it gives. Uses no
// data but the weights themselves. Figures: docs/decisions/0010-quantization.md.
SF_INLINE u16 int4_scale(const QValues& qvalues, const u16* values, i64 count) {
    constexpr float ENDS[] = {0.8f, 0.9f, 1.0f, 1.15f};  // times the least quantized value
    float largest_value = 0.0f;
    for (i64 k = 0; k < count; ++k)
        if (std::fabs(widen(values[k])) > std::fabs(largest_value)) largest_value = widen(values[k]);
    if (std::isnan(largest(values, count))) return narrow(NAN);  // NaN in, NaN out
    if (largest_value == 0.0f) return 0;
    u16 best = narrow(largest_value / (qvalues.qvalue[0] * ENDS[1]));
    float least = INFINITY, better = 0.0f, refit = 0.0f;
    for (float end : ENDS) {
        u16 scale = narrow(largest_value / (qvalues.qvalue[0] * end));
        if (widen(scale) == 0.0f) continue;
        float error = int4_error(qvalues, values, count, widen(scale), better);
        if (error < least) least = error, best = scale, refit = better;
    }
    u16 fitted = narrow(refit);
    if (widen(fitted) != 0.0f && int4_error(qvalues, values, count, widen(fitted), better) < least) best = fitted;
    return best;
}

SF_INLINE u16 int4_group(u8* steps, int column, const u16* values, i64 count, const QValues& qvalues) {
    u16 scale = int4_scale(qvalues, values, count);
    float inverse = widen(scale) != 0.0f ? 1.0f / widen(scale) : 0.0f;
    for (i64 k = 0; k < ceil_div(count, 8) * 8; k += 4) {
        u8* word = steps + k / 8 * STEP_BYTES + column * 4;
        for (i64 j = 0; j < 4; ++j) {
            u8 nibble = qvalues.index(k + j < count ? widen(values[k + j]) * inverse : 0.0f);
            word[j] = k / 4 % 2 ? static_cast<u8>(word[j] | nibble << 4) : nibble;
        }
    }
    return scale;
}

SF_INLINE void pack_qvalues_row(const Weight& w, const Shape& s, const QValues& qvalues, u8* panel, int column, const u16* values) {
    i64 group = w.group ? w.group : w.columns;
    for (i64 k = 0; k < w.columns; k += group) {
        i64 count = w.columns - k < group ? w.columns - k : group;
        u8* steps = panel + SCALE_BYTES;
        u16 scale = w.format == INT8 ? int8_group(steps, column, values + k, count)
                                     : int4_group(steps, column, values + k, count, qvalues);
        reinterpret_cast<u16*>(panel)[column] = scale;
        panel = steps + s.group_steps / (w.format == INT4 ? 2 : 1) * STEP_BYTES;
    }
}

// Calls body(data of a panel, rows) for each panel that has some of `count` rows from `first` on; rows[column] is the number
// of a row among those, or -1. By panels: neighbours in a panel share its lines, and no two threads write the same.
template <class Body>
SF_INLINE void share_panels(Team& team, const Weight& w, i64 first, i64 count, Body body) {
    const Shape s = shape_of(w);
    i64 begin_panel = place_of(w, first).panel, end_panel = place_of(w, first + count - 1).panel + 1;
    if (w.gated) begin_panel = 0, end_panel = s.panels;
    team.share(end_panel - begin_panel, [&](i64 begin, i64 end, i64) {
        for (i64 panel = begin_panel + begin; panel < begin_panel + end; ++panel) {
            i64 rows[PANEL];
            for (int column = 0; column < PANEL; ++column) {
                i64 row = !w.gated ? panel * PANEL + column : panel * LANES + column % LANES;
                bool exists = !w.gated || row < w.rows / 2;
                if (w.gated && column >= LANES) row += w.rows / 2;
                exists = exists && row >= first && row < first + count;
                rows[column] = exists ? row - first : -1;
            }
            body(w.data + panel * s.panel_bytes, rows);
        }
    });
}

// Packs `count` rows of the weight from `first` on, read from [count, columns] bf16. The panels must be zero before.
inline void pack(Team& team, const Weight& w, const u16* source, i64 first, i64 count) {
    constexpr i64 AT_ONCE = 128;  // columns of all rows of a panel: this part of the panel stays in the first cache
    const Shape s = shape_of(w);
    const QValues qvalues(w);
    share_panels(team, w, first, count, [&](u8* data, const i64* rows) {
        if (w.format == BF16) {
            for (i64 k = 0; k < w.columns; k += AT_ONCE)
                for (int column = 0; column < PANEL; ++column)
                    if (rows[column] >= 0)
                        pack_bf16_row(reinterpret_cast<u32*>(data), column, source + rows[column] * w.columns, k, std::min(k + AT_ONCE, w.columns));
        } else {
            for (int column = 0; column < PANEL; ++column)
                if (rows[column] >= 0) pack_qvalues_row(w, s, qvalues, data, column, source + rows[column] * w.columns);
        }
    });
}

// Packs rows as a checkpoint has quantized them. The panels must be zero before.
inline void pack_stored(Team& team, const Weight& w, const Stored& stored, i64 first, i64 count) {
    share_panels(team, w, first, count, [&](u8* data, const i64* rows) {
        for (int column = 0; column < PANEL; ++column) {
            if (rows[column] < 0) continue;
            if (w.format == FP8) pack_fp8_row(w, data, column, stored, rows[column]);
            else pack_grouped_row(w, data, column, stored, rows[column]);
        }
    });
}

// Writes one row of the weight as fp32 [columns]: an embedding reads it from a packed head.
inline void unpack_row(const Weight& w, i64 row, float* out) {
    Shape s = shape_of(w);
    Place place = place_of(w, row);
    const u8* panel = w.data + place.panel * s.panel_bytes;
    if (w.format == BF16) {
        for (i64 k = 0; k < w.columns; ++k)
            out[k] = widen(reinterpret_cast<const u16*>(panel)[(k / 2 * PANEL + place.column) * 2 + k % 2]);
        return;
    }
    if (w.format == GROUPED) return unpack_grouped_row(w, panel, place.column, out);
    i64 group = w.group ? w.group : w.columns;
    for (i64 first = 0; first < w.columns; first += group) {
        float scale = widen(reinterpret_cast<const u16*>(panel)[place.column]);
        const u8* steps = panel + SCALE_BYTES;
        i64 count = w.columns - first < group ? w.columns - first : group;
        for (i64 k = 0; k < count; ++k) {
            int qvalue;
            if (w.format == INT8) {
                qvalue = steps[k / 4 * STEP_BYTES + place.column * 4 + k % 4] - QVALUE_BIAS;
            } else {
                u8 byte = steps[k / 8 * STEP_BYTES + place.column * 4 + k % 4];
                qvalue = w.qvalues[k / 4 % 2 ? byte >> 4 : byte & 15] - w.bias;
            }
            out[first + k] = scale * qvalue;
        }
        panel = steps + s.group_steps / (w.format == INT4 ? 2 : 1) * STEP_BYTES;
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
