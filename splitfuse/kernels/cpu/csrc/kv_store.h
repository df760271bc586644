// Keys and values in the layout that the micro-kernel multiplies: nothing is repacked when they are read.
//
// A store is [blocks][kv heads][pieces of 32 tokens]; a piece holds, side by side,
//   keys    [D / 2 steps][32 tokens] words of two neighbours in D        (a panel of 32 columns = tokens)
//   values  [16 steps][D] words of the same element of two tokens       (panels of 32 columns = elements)
// in bf16, with D padded to a multiple of 32. In int8 bytes take the place of bf16 (a word is two bytes), followed by 32
// fp32 scales of the keys and 32 of the values: one for each token and head, so that no token changes another.
//
// Of latent attention, in bf16 alone, a value is the last part of its key: a piece is keys, which are turned into values
// when they are read (turn_pairs).
#pragma once

#include "elementwise.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr int PIECE = PANEL;         // tokens
constexpr int MOST_HEAD_DIM = 1024;
constexpr int MOST_PADDED = MOST_HEAD_DIM + PANEL;  // see Layout

struct Layout {
    i64 head_dim;                    // D
    i64 value_from;                  // the element of a key that its value begins at; 0: values are kept apart
    i64 value_dim, value_padded;     // of a value; padded to whole panels
    i64 padded;                      // D padded, to whole panels of the value's elements too
    i64 half_bytes;                  // of the keys of a piece, or of its values
    i64 piece_bytes, pieces, num_kv_heads, block_size;
    bool int8;
    u8* data;

    explicit Layout(const Store& store)
        : head_dim(store.head_dim), value_from(store.value_from), value_dim(head_dim - value_from),
          value_padded(ceil_div(value_dim, PANEL) * PANEL), padded(ceil_div(value_from + value_padded, PANEL) * PANEL),
          half_bytes(PIECE * padded * (store.int8 ? 1 : 2)),
          piece_bytes((value_from ? 1 : 2) * half_bytes + (store.int8 ? 2 * PIECE * sizeof(float) : 0)),
          pieces(store.block_size / PIECE), num_kv_heads(store.num_kv_heads), block_size(store.block_size),
          int8(store.int8), data(store.data) {}

    // Returns the piece of one head that has `offset` of a block.
    u8* piece(i64 block, i64 head, i64 offset) const {
        return data + ((block * num_kv_heads + head) * pieces + offset / PIECE) * piece_bytes;
    }
    // Returns the scales of an int8 piece: 32 of the keys, then 32 of the values.
    float* scales(u8* piece) const { return reinterpret_cast<float*>(piece + 2 * half_bytes); }
    const float* scales(const u8* piece) const { return reinterpret_cast<const float*>(piece + 2 * half_bytes); }
};

// Writes the quantized values of x [count] for an int8 store, count being a multiple of LANES; returns their scale.
SF_INLINE float to_qvalues(const float* x, i64 count, i8* qvalues) {
    Floats most = broadcast(0.0f), poison = broadcast(0.0f);
    for (i64 c = 0; c < count; c += LANES) {
        most = max(most, abs(load(x + c)));
        poison = fma(load(x + c), broadcast(0.0f), poison);
    }
    float largest = highest(most) + sum(poison);
    Floats inverse = broadcast(largest > 0.0f ? 127.0f / largest : 0.0f);
    for (i64 c = 0; c < count; c += LANES) store_i8(qvalues + c, round(load(x + c) * inverse));
    return largest * (1.0f / 127.0f);
}

// Writes one token's key and value of one head, [padded] with zeros after D, to its place. A value at an even place
// clears its odd neighbour, unless that is written in the same step: the pair is read together, and the neighbour may
// be NaN. A value that is part of its key is not given.
SF_INLINE void put_kv(const Layout& kv, i64 slot, i64 head, const float* key, const float* value, bool clear_next) {
    u8* piece = kv.piece(slot / kv.block_size, head, slot % kv.block_size);
    i64 place = slot % PIECE;
    if (kv.int8) {
        alignas(64) i8 qvalues[MOST_PADDED];
        i8* keys = reinterpret_cast<i8*>(piece);
        kv.scales(piece)[place] = to_qvalues(key, kv.padded, qvalues);
        for (i64 d = 0; d < kv.padded; d += 2) std::memcpy(keys + (d / 2 * PIECE + place) * 2, qvalues + d, 2);
        i8* values = keys + kv.half_bytes + place / 2 * kv.padded * 2;
        kv.scales(piece)[PIECE + place] = to_qvalues(value, kv.padded, qvalues);
        for (i64 d = 0; d < kv.padded; ++d) values[2 * d + place % 2] = qvalues[d];
        return;  // any byte of its neighbour is a number
    }
    alignas(64) u16 narrowed[MOST_PADDED];
    for (i64 d = 0; d < kv.padded; d += LANES) store_bf16(narrowed + d, load(key + d));
    u32* keys = reinterpret_cast<u32*>(piece);
    for (i64 d = 0; d < kv.padded; d += 2) std::memcpy(keys + d / 2 * PIECE + place, narrowed + d, 4);
    if (kv.value_from) return;
    for (i64 d = 0; d < kv.padded; d += LANES) store_bf16(narrowed + d, load(value + d));
    u8* values = piece + kv.half_bytes + place / 2 * kv.padded * 4;
    if (clear_next) {
        u32* pairs = reinterpret_cast<u32*>(values);
        for (i64 d = 0; d < kv.padded; ++d) pairs[d] = narrowed[d];
    } else {
        u16* halves = reinterpret_cast<u16*>(values) + place % 2;
        for (i64 d = 0; d < kv.padded; ++d) halves[2 * d] = narrowed[d];
    }
}

// Rotates the first rotary_dim elements of x [head_dim], element i with i + rotary_dim / 2.
SF_INLINE void rotate_head(const float* x, i64 head_dim, const Heads& heads, i64 position, float* out) {
    i64 half = heads.rotary_dim / 2;
    const float *cos = heads.cos + position * half, *sin = heads.sin + position * half;
    for (i64 d = 0; d < half; d += LANES) {
        int count = static_cast<int>(half - d < LANES ? half - d : LANES);
        Floats a = load(x + d, count), b = load(x + half + d, count), c = load(cos + d, count), s = load(sin + d, count);
        store(out + d, a * c - b * s, count);
        store(out + half + d, fma(b, c, a * s), count);
    }
    for (i64 d = heads.rotary_dim; d < head_dim; ++d) out[d] = x[d];
}

// Writes a head's norm, which is rounded to bf16. `out` may be x.
SF_INLINE void norm_head(const float* x, i64 head_dim, const Norm& norm, Moments moments, float* out) {
    alignas(64) u16 narrowed[MOST_HEAD_DIM];
    put_normed(x, head_dim, norm, moments, narrowed);
    for (i64 d = 0; d < head_dim; ++d) out[d] = widen(narrowed[d]);
}

// Norms and rotates a head of queries or keys; `whole` are the moments of the token's row, if it is normed as one.
SF_INLINE void place_head(const float* x, i64 head_dim, const Norm& norm, const Moments* whole, const Heads& heads, i64 position, float* out) {
    alignas(64) float normed[MOST_HEAD_DIM];
    if (norm.weight && !heads.norms_last) {
        norm_head(x, head_dim, norm, whole ? *whole : moments_of(x, head_dim, norm), normed);
        x = normed;
    }
    rotate_head(x, head_dim, heads, position, out);
    if (norm.weight && heads.norms_last) norm_head(out, head_dim, norm, moments_of(out, head_dim, norm), out);
}

// Returns the part of a norm that is for the elements from `first` on.
SF_INLINE Norm part_of(Norm norm, i64 first) {
    norm.weight += first;
    if (norm.bias) norm.bias += first;
    return norm;
}

// Returns the factor of a query at `position`: 1 + beta log(1 + floor((position + offset) / length)).
SF_INLINE float query_scale(const Heads& heads, i64 position) {
    if (!heads.query_length) return 1.0f;
    i64 lengths = (position + heads.query_offset) / heads.query_length;
    return static_cast<float>(1.0 + heads.query_beta * std::log1p(static_cast<double>(lengths)));
}

// Norms and rotates queries and keys: qkv [T, (H + 2 Hk) D] -> q [T, H, D] in bf16, if it is not null; keys and values go to
// their slots. Values that are parts of their keys are not in qkv.
inline void rope_store(Team& team, const Step& step, const Heads& heads, const Store& store, const float* qkv, u16* q) {
    const Layout kv(store);
    const i64 num_kv_heads = heads.foreign_kv ? 0 : kv.num_kv_heads;
    const i64 dim = kv.head_dim, width = (heads.num_heads + (kv.value_from ? 1 : 2) * num_kv_heads) * dim;
    const i64 first_head = q ? 0 : heads.num_heads, per_token = heads.num_heads + num_kv_heads - first_head;
    // By token and head, so that a step of one token has work for all threads.
    team.split(step.tokens * per_token, [&](i64 begin, i64 end) {
        alignas(64) float placed[MOST_PADDED] = {}, value[MOST_PADDED] = {};
        i64 known_row = -1;  // whose moments these are
        Moments moments{};
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 token = unit / per_token, head = first_head + unit % per_token, slot = step.slots[token], position = step.positions[token];
            const bool is_key = head >= heads.num_heads;
            if (is_key && slot < 0) continue;
            const float* row = qkv + token * width + (is_key ? heads.num_heads * dim : 0);
            const i64 index = is_key ? head - heads.num_heads : head;
            const Norm& norm = is_key ? heads.k_norm : heads.q_norm;
            if (heads.whole_rows && known_row != 2 * token + is_key) {
                known_row = 2 * token + is_key;
                moments = moments_of(row, (is_key ? kv.num_kv_heads : heads.num_heads) * dim, norm);
            }
            place_head(row + index * dim, dim, heads.own_norms ? part_of(norm, index * dim) : norm,
                       heads.whole_rows ? &moments : nullptr, heads, position, placed);
            if (!is_key) {
                Floats scale = broadcast(query_scale(heads, position));
                u16* out = q + (token * heads.num_heads + head) * dim;
                for (i64 d = 0; d < dim; d += LANES) store_left(out + d, load(placed + d) * scale, dim - d);
                continue;
            }
            if (kv.value_from) {
                put_kv(kv, slot, index, placed, nullptr, false);
                continue;
            }
            const float* source = row + (kv.num_kv_heads + index) * dim;
            if (heads.v_norm.weight) norm_head(source, dim, heads.v_norm, moments_of(source, dim, heads.v_norm), value);
            else std::memcpy(value, source, dim * sizeof(float));
            const bool next_too = token + 1 < step.tokens && step.slots[token + 1] == slot + 1;
            put_kv(kv, slot, index, placed, value, slot % 2 == 0 && !next_too);
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
