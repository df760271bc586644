// Operations token by token: norms, embedding rows, the choice of the likeliest token.
#pragma once

#include "linear.h"

namespace splitfuse {
namespace SF_VARIANT {

// Writes the RMS norm of x [columns], computed in fp32 and rounded to bf16 once at the end.
template <class Load>
SF_INLINE void norm_row(Load x, i64 columns, const float* weight, float eps, u16* out) {
    Floats squares = broadcast(0.0f);
    for (i64 c = 0; c < columns; c += LANES) {
        Floats value = x(c, static_cast<int>(columns - c < LANES ? columns - c : LANES));
        squares = fma(value, value, squares);
    }
    Floats scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + eps));
    for (i64 c = 0; c < columns; c += LANES) {
        int count = static_cast<int>(columns - c < LANES ? columns - c : LANES);
        Floats value = x(c, count) * scale;
        if (count == LANES) store_bf16(out + c, value * load(weight + c));
        else store_bf16(out + c, value * load(weight + c, count), count);
    }
}

SF_INLINE auto floats_of(const float* x) {
    return [x](i64 column, int count) { return count == LANES ? load(x + column) : load(x + column, count); };
}

inline void norm(Team& team, const float* x, i64 rows, i64 columns, const float* weight, float eps, u16* out) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) norm_row(floats_of(x + row * columns), columns, weight, eps, out + row * columns);
    });
}

// Writes rows of an embedding [vocabulary, columns] in fp32, from a table in bf16 or from the packed head that it is tied to.
inline void embed(Team& team, const i32* ids, i64 rows, const u16* table, const Weight* packed, i64 columns, float* out) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) {
            float* x = out + row * columns;
            if (packed) unpack_row(*packed, ids[row], x);
            else for (i64 c = 0; c < columns; ++c) x[c] = widen(table[ids[row] * columns + c]);
        }
    });
}

// Writes for each row of scores [rows, columns] its largest, and the lowest column that has it; NaN and any column if any
// of them is NaN.
inline void argmax(Team& team, const float* scores, i64 rows, i64 columns, i32* ids, float* peaks) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) {
            const float* x = scores + row * columns;
            Floats most = broadcast(-INFINITY), poison = broadcast(0.0f);
            for (i64 c = 0; c < columns; c += LANES) {
                Floats value = columns - c < LANES ? load(x + c, static_cast<int>(columns - c)) : load(x + c);
                poison = poison + (value - value);  // NaN for NaN and the infinities
                if (columns - c < LANES) value = between(0, static_cast<int>(columns - c), value, broadcast(-INFINITY));
                most = max(value, most);
            }
            float peak = highest(most);
            if (std::isnan(sum(poison)))
                for (i64 c = 0; c < columns; ++c)
                    if (std::isnan(x[c])) peak = x[c];
            i64 best = 0;
            while (best < columns - 1 && x[best] != peak) ++best;
            ids[row] = static_cast<i32>(best);
            peaks[row] = peak;
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
