// Gated delta nets.
#pragma once

#include "states.h"

namespace splitfuse {
namespace SF_VARIANT {

SF_INLINE StateShape shape_of(const Delta& d) { return {d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.taps}; }

// What a thread keeps of the tokens that it takes through the heads of one key.
struct DeltaTile {
    float* queries_keys;  // [TILE_TOKENS][2 Dk], of unit length, queries scaled
    float* values;        // [group][TILE_TOKENS][padded]
    float* gates;         // [group][TILE_TOKENS][2]

    DeltaTile(const StateShape& shape, float* memory)
        : queries_keys(memory), values(memory + ceil_div(TILE_TOKENS * 2 * shape.key_dim, LANES) * LANES),
          gates(values + shape.group * TILE_TOKENS * shape.padded) {}

    static i64 bytes(const StateShape& shape) {
        return (2 * shape.key_dim + shape.group * (shape.padded + 2)) * TILE_TOKENS * sizeof(float);
    }
};

// Convolves a query or a key of token `i` to a vector of this length.
SF_INLINE void put_unit(const Inputs& in, i64 i, i64 channel, i64 dim, const float* weights, float length, float* out) {
    const float squares = convolve(in, i, channel, dim, weights, nullptr, false, out);
    const Floats scale = broadcast(length / std::sqrt(squares + 1e-6f));
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        store(out + c, load(out + c, count) * scale, count);
    }
}

// Writes for `tokens` tokens what a head's state keeps, and how much of an error is corrected, from rows of gates.
SF_INLINE void put_gates(const Delta& d, i64 head, const float* rows, i64 tokens, float* out) {
    const i64 width = 2 * d.value_heads;
    for (i64 t = 0; t < tokens; t += LANES) {
        const int count = lanes_left(tokens, t);
        alignas(64) float beta[LANES] = {}, rate[LANES] = {};
        for (int lane = 0; lane < count; ++lane) {
            beta[lane] = rows[(t + lane) * width + head];
            rate[lane] = rows[(t + lane) * width + d.value_heads + head];
        }
        const Floats kept = softplus(load(rate) + broadcast(d.decay_bias[head])) * broadcast(d.decay[head] * -LOG2E);
        store(rate, exp2(kept));
        store(beta, sigmoid(load(beta)));
        for (int lane = 0; lane < count; ++lane) {
            out[2 * (t + lane)] = rate[lane];
            out[2 * (t + lane) + 1] = beta[lane];
        }
    }
}

// Writes a head's output, normed and gated by `z`, in bf16. Those of the next token lie z_stride and out_stride behind.
SF_INLINE void put_gated_norm(const float* x, const float* z, i64 z_stride, i64 dim, const float* weight, float eps, u16* out, i64 out_stride) {
    Floats squares = broadcast(0.0f);
    for (i64 c = 0; c < dim; c += LANES) squares = fma(load(x + c), load(x + c), squares);  // zero where it is padded
    const Floats scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + eps));
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        _mm_prefetch(reinterpret_cast<const char*>(z + AHEAD * z_stride + c), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out + AHEAD * out_stride + c), _MM_HINT_T0);
        const Floats gate = load(z + c, count);
        store_bf16(out + c, load(x + c) * scale * load(weight + c, count) * (gate * sigmoid(gate)), count);
    }
}

inline void reserve_delta(Workspace& work, const Delta& d) {
    for (Workspace::Own& own : work.own) own.state.reserve(DeltaTile::bytes(shape_of(d)));
}

// Computes a gated delta net (Yang et al., arXiv 2412.06464): projected inputs x [T, queries, keys, values, z] and gates
// [T, betas, rates] -> out [T, Hv Dv] in bf16. States go from slot to slot as the step says.
//
// A unit of work is a request's way through the heads of one key: they share it, and no other unit reads their channels. It
// takes along the chunks that go on from there.
inline void delta(Team& team, Workspace& work, const Step& step, const Delta& d, const States& states, const float* x, const float* gates, u16* out) {
    const StateShape shape = shape_of(d);
    const DeltaTile tile(shape, reinterpret_cast<float*>(work.own[team.rank].state.data()));
    const i64 width = shape.width(), key_dim = shape.key_dim, value_dim = shape.value_dim;
    const float query_length = 1.0f / std::sqrt(static_cast<float>(key_dim));
    team.share(step.requests * shape.key_heads, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 key_head = unit % shape.key_heads, head = key_head * shape.group;
            follow(step, unit / shape.key_heads, [&](i64 request) {
                const i64 row = step.query_start[request], tokens = step.query_start[request + 1] - row;
                const Inputs in = inputs_of(shape.tail, states, step, request, x, width);
                float* state = begin_state(states, step, request, head * shape.head_floats, shape.group * shape.head_floats);

                for (i64 first = 0; first < tokens; first += TILE_TOKENS) {
                    const i64 count = std::min(TILE_TOKENS, tokens - first);
                    for (i64 t = 0; t < count; ++t)
                        put_unit(in, first + t, key_head * key_dim, key_dim, d.conv, query_length, tile.queries_keys + t * 2 * key_dim);
                    for (i64 t = 0; t < count; ++t)
                        put_unit(in, first + t, shape.keys + key_head * key_dim, key_dim, d.conv, 1.0f, tile.queries_keys + (2 * t + 1) * key_dim);
                    for (i64 h = 0; h < shape.group; ++h) {
                        float *values = tile.values + h * TILE_TOKENS * shape.padded, *head_gates = tile.gates + h * TILE_TOKENS * 2;
                        for (i64 t = 0; t < count; ++t)
                            convolve(in, first + t, shape.values + (head + h) * value_dim, value_dim, d.conv, nullptr, true, values + t * shape.padded);
                        put_gates(d, head + h, gates + (row + first) * 2 * shape.value_heads, count, head_gates);
                        run_state<Correct>(shape, {tile.queries_keys, head_gates, values, count, key_dim, shape.padded, 0.0f}, state + h * shape.head_floats);
                        for (i64 t = 0; t < count; ++t) {
                            const i64 token = row + first + t;
                            put_gated_norm(values + t * shape.padded, x + token * width + shape.tail.channels + (head + h) * value_dim, width, value_dim,
                                           d.norm, d.eps, out + (token * shape.value_heads + head + h) * value_dim, shape.value_heads * value_dim);
                        }
                    }
                }

                float* tail = slot_of(states, step.state_writes[request]) + shape.tail.offset;
                put_tail(in, tokens, key_head * key_dim, key_dim, tail);
                put_tail(in, tokens, shape.keys + key_head * key_dim, key_dim, tail);
                put_tail(in, tokens, shape.values + head * value_dim, shape.group * value_dim, tail);
            });
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
