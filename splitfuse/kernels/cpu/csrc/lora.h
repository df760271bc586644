// What adapters add to the products of a step: `scales * (x a)` for each row that has one, then that times b, onto the sums
// of a panel before these are stored. A row's sums run in one order, whatever the other rows have.
#pragma once

#include "interface.h"
#include "multiply.h"

namespace splitfuse {
namespace SF_VARIANT {

// The adapters of a step at one weight; without any, `lora` is null. `shrunk` holds what a row's ranks give.
struct Adapted {
    const Lora* lora = nullptr;
    i64 place = 0;           // of the weight in the tables
    float* shrunk = nullptr; // [rows, stride]
    i64 stride = 0;

    const LoraWeight* of(i64 row) const {
        const i32 adapter = lora->of_row[row];
        if (adapter < 0) return nullptr;
        const LoraWeight* weight = lora->tables[adapter] + place;
        return weight->rank ? weight : nullptr;
    }
    float* row(i64 row) const { return shrunk + row * stride; }
};

// Computes scales * (x a) of COUNT ranks of one row, from rank `first` on.
template <int COUNT>
SF_INLINE void shrink_ranks(const LoraWeight& w, const u16* x, i64 columns, i64 first, float* out) {
    Floats acc[COUNT];
    for (int j = 0; j < COUNT; ++j) acc[j] = broadcast(0.0f);
    const u16* a = w.a + first * columns;
    i64 k = 0;
    for (; k + LANES <= columns; k += LANES) {
        const Floats values = load_bf16(x + k);
        for (int j = 0; j < COUNT; ++j) acc[j] = fma(values, load_bf16(a + j * columns + k), acc[j]);
    }
    if (k < columns) {
        const int left = static_cast<int>(columns - k);
        const Floats values = load_bf16(x + k, left);
        for (int j = 0; j < COUNT; ++j) acc[j] = fma(values, load_bf16(a + j * columns + k, left), acc[j]);
    }
    for (int j = 0; j < COUNT; ++j) out[first + j] = sum(acc[j]) * w.scales[first + j];
}

// Computes what the ranks of a row give, of x [columns] in bf16.
inline void shrink_row(const Adapted& adapted, i64 row, const u16* x, i64 columns) {
    const LoraWeight* w = adapted.of(row);
    if (!w) return;
    constexpr int TOGETHER = 8;
    i64 rank = 0;
    for (; rank + TOGETHER <= w->rank; rank += TOGETHER) shrink_ranks<TOGETHER>(*w, x, columns, rank, adapted.row(row));
    for (; rank < w->rank; ++rank) shrink_ranks<1>(*w, x, columns, rank, adapted.row(row));
}

// Returns what the ranks of a row add to 16 columns.
SF_INLINE Floats expand(const LoraWeight& w, const float* shrunk, i64 vector) {
    const i64* place = w.vectors + 3 * vector;
    const float* ranks = shrunk + place[0];
    const u16* b = w.b + place[2] * LANES;
    Floats total = broadcast(0.0f);
    for (i64 j = 0; j < place[1]; ++j, b += LANES) total = fma(broadcast(ranks[j]), load_bf16(b), total);
    return total;
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
