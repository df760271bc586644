// Operations token by token: norms, embedding rows, the choice of the likeliest token.
#pragma once

#include "linear.h"

namespace splitfuse {
namespace SF_VARIANT {

// Load and store the lanes that are left of a vector, at most all.
SF_INLINE Floats load_left(const float* p, i64 left) { return left < LANES ? load(p, static_cast<int>(left)) : load(p); }
SF_INLINE Floats load_left(const u16* p, i64 left) { return left < LANES ? load_bf16(p, static_cast<int>(left)) : load_bf16(p); }
SF_INLINE void store_left(float* p, Floats a, i64 left) {
    if (left < LANES) store(p, a, static_cast<int>(left));
    else store(p, a);
}
SF_INLINE void store_left(u16* p, Floats a, i64 left) {
    if (left < LANES) store_bf16(p, a, static_cast<int>(left));
    else store_bf16(p, a);
}

// What a norm subtracts from all elements of a vector, and then multiplies them by.
struct Moments { float mean, scale; };

SF_INLINE Moments moments_of(const float* x, i64 columns, const Norm& norm) {
    Floats squares = broadcast(0.0f), zero = broadcast(0.0f);
    float mean = 0.0f;
    if (norm.centered) {
        Floats total = zero;
        for (i64 c = 0; c < columns; c += LANES) total += load_left(x + c, columns - c);
        mean = sum(total) / static_cast<float>(columns);
        for (i64 c = 0; c < columns; c += LANES) {
            Floats value = load_left(x + c, columns - c) - broadcast(mean);
            if (columns - c < LANES) value = between(0, static_cast<int>(columns - c), value, zero);
            squares = fma(value, value, squares);
        }
    } else {
        for (i64 c = 0; c < columns; c += LANES) {
            Floats value = load_left(x + c, columns - c);
            squares = fma(value, value, squares);
        }
    }
    return {mean, 1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + norm.eps)};
}

// Writes the norm of x [columns], computed in fp32 and rounded to bf16 once at the end.
SF_INLINE void put_normed(const float* x, i64 columns, const Norm& norm, Moments moments, u16* out) {
    Floats mean = broadcast(moments.mean), scale = broadcast(moments.scale);
    for (i64 c = 0; c < columns; c += LANES) {
        const i64 left = columns - c;
        Floats value = load_left(x + c, left);
        if (norm.centered) value = value - mean;
        value = value * scale * load_left(norm.weight + c, left);
        if (norm.bias) value = value + load_left(norm.bias + c, left);
        store_left(out + c, value, left);
    }
}

SF_INLINE void norm_row(const float* x, i64 columns, const Norm& norm, u16* out) {
    put_normed(x, columns, norm, moments_of(x, columns, norm), out);
}

// Writes what a block reads of x [columns] in bf16: its norm, if there is one.
SF_INLINE void read_row(const float* x, i64 columns, const Norm& norm, u16* out) {
    if (norm.weight) return norm_row(x, columns, norm, out);
    for (i64 c = 0; c < columns; c += LANES) store_left(out + c, load_left(x + c, columns - c), columns - c);
}

inline void read_rows(Team& team, const float* x, i64 rows, i64 columns, const Norm& norm, u16* out) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) read_row(x + row * columns, columns, norm, out + row * columns);
    });
}

// Writes x times y, both [columns] in bf16.
SF_INLINE void multiply_row(const u16* x, const u16* y, i64 columns, u16* out) {
    for (i64 c = 0; c < columns; c += LANES)
        store_left(out + c, load_left(x + c, columns - c) * load_left(y + c, columns - c), columns - c);
}

// Writes a row of an embedding [vocabulary, columns] in fp32, from a table in bf16 or from the packed head that it is tied to.
SF_INLINE void embed_row(i32 id, const u16* table, const Weight* packed, i64 columns, float* x) {
    if (packed) unpack_row(*packed, id, x);
    else for (i64 c = 0; c < columns; ++c) x[c] = widen(table[id * columns + c]);
}

inline void embed(Team& team, const i32* ids, i64 rows, const u16* table, const Weight* packed, i64 columns, float* out) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) embed_row(ids[row], table, packed, columns, out + row * columns);
    });
}

// Writes the `count` largest of a row of scores x [columns] in falling order, equal ones by column, and their columns; NaN as
// the first value if any of the row is NaN. 0 < count <= columns.
inline void topk_row(const float* x, i64 columns, i64 count, i32* best, float* top) {
    constexpr i64 BLOCK = 16 * LANES;  // looked at one by one only if its largest is among those of the row so far
    i64 found = 0;
    Floats poison = broadcast(0.0f);
    for (i64 first = 0; first < columns; first += BLOCK) {
        const i64 last = std::min(columns, first + BLOCK);
        Floats most = broadcast(-INFINITY);
        for (i64 c = first; c < last; c += LANES) {
            Floats value = last - c < LANES ? load(x + c, static_cast<int>(last - c)) : load(x + c);
            poison = poison + (value - value);  // NaN for NaN and the infinities
            if (last - c < LANES) value = between(0, static_cast<int>(last - c), value, broadcast(-INFINITY));
            most = max(value, most);
        }
        if (found == count && highest(most) <= top[count - 1]) continue;
        for (i64 c = first; c < last; ++c) {
            if (found == count && !(x[c] > top[count - 1])) continue;
            i64 place = found < count ? found++ : count - 1;
            for (; place > 0 && x[c] > top[place - 1]; --place) {
                top[place] = top[place - 1];
                best[place] = best[place - 1];
            }
            top[place] = x[c];
            best[place] = static_cast<i32>(c);
        }
    }
    if (std::isnan(sum(poison)))
        for (i64 c = 0; c < columns; ++c)
            if (std::isnan(x[c])) top[0] = x[c];
}

inline void topk(Team& team, const float* scores, i64 rows, i64 columns, i64 count, i32* ids, float* values) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) topk_row(scores + row * columns, columns, count, ids + row * count, values + row * count);
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
