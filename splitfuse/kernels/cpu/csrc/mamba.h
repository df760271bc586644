// Mamba-2 mixers.
#pragma once

#include "states.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr i64 SHARED_CHANNELS = 64;  // of a unit of work: all heads wait for these

SF_INLINE StateShape shape_of(const Mamba& m) { return {m.groups, m.heads, m.state_dim, m.head_dim, m.taps}; }

// Writes for `tokens` tokens what a head's state keeps of itself, and the time step, from rows of [H].
SF_INLINE void put_steps(const Mamba& m, i64 head, const float* rows, i64 tokens, float* out) {
    for (i64 t = 0; t < tokens; t += LANES) {
        const int count = lanes_left(tokens, t);
        alignas(64) float step[LANES] = {}, kept[LANES];
        for (int lane = 0; lane < count; ++lane) step[lane] = rows[(t + lane) * m.heads + head];
        const Floats whole = softplus(load(step) + broadcast(m.decay_bias[head]));
        const Floats limited = min(broadcast(m.dt_max), max(broadcast(m.dt_min), whole));  // in this order NaN stays
        store(kept, exp2(limited * broadcast(m.decay[head] * -LOG2E)));
        store(step, limited);
        for (int lane = 0; lane < count; ++lane) {
            out[2 * (t + lane)] = kept[lane];
            out[2 * (t + lane) + 1] = step[lane];
        }
    }
}

// Writes a head's output times SiLU of `z`. Those of the next token lie z_stride and out_stride behind.
SF_INLINE void put_gated(const float* x, const float* z, i64 z_stride, i64 dim, float* out, i64 out_stride) {
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        _mm_prefetch(reinterpret_cast<const char*>(z + AHEAD * z_stride + c), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out + AHEAD * out_stride + c), _MM_HINT_T0);
        const Floats gate = load(z + c, count);
        store(out + c, load(x + c) * (gate * sigmoid(gate)), count);
    }
}

inline void reserve_mamba(Workspace& work, const Mamba& m, i64 tokens) {
    const StateShape shape = shape_of(m);
    for (Workspace::Own& own : work.own) own.state.reserve((shape.padded + 2) * TILE_TOKENS * sizeof(float));
    work.queries_keys.reserve(tokens * 2 * shape.keys * sizeof(float));
    work.gated_heads.reserve(tokens * m.heads * m.head_dim * sizeof(float));
}

// Computes a Mamba-2 mixer (Dao and Gu, arXiv 2405.21060): projected inputs x [T, c, b, v, z] and time steps dt [T, H] -> out
// [T, H P] in bf16. States go from slot to slot as the step says.
//
// Units of work are first a request's way through some channels of c or b, then its way through a head; no other unit reads
// their channels. They take along the chunks that go on from there. A norm is over all heads of a group, and comes last.
inline void mamba(Team& team, Workspace& work, const Step& step, const Mamba& m, const States& states, const float* x, const float* dt, u16* out) {
    const StateShape shape = shape_of(m);
    const i64 width = shape.width(), state_dim = shape.key_dim, dim = shape.value_dim, all_heads = m.heads * dim;
    float *queries_keys = reinterpret_cast<float*>(work.queries_keys.data()), *gated = reinterpret_cast<float*>(work.gated_heads.data());
    float* values = reinterpret_cast<float*>(work.own[team.rank].state.data());
    float* gates = values + TILE_TOKENS * shape.padded;
    const auto shared_of = [&](i64 group, i64 token) { return queries_keys + (group * step.tokens + token) * 2 * state_dim; };
    const i64 blocks = ceil_div(state_dim, SHARED_CHANNELS), parts = 2 * m.groups * blocks;
    team.share(step.requests * parts, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 part = unit % parts / blocks, group = part % m.groups, left = unit % blocks * SHARED_CHANNELS;
            const i64 channel = part * state_dim + left, count = std::min(SHARED_CHANNELS, state_dim - left);
            const i64 place = part / m.groups * state_dim + left;  // b lies behind c
            follow(step, unit / parts, [&](i64 request) {
                const i64 row = step.query_start[request], tokens = step.query_start[request + 1] - row;
                const Inputs in = inputs_of(shape.tail, states, step, request, x, width);
                for (i64 t = 0; t < tokens; ++t) convolve(in, t, channel, count, m.conv, m.conv_bias, false, shared_of(group, row + t) + place);
                put_tail(in, tokens, channel, count, slot_of(states, step.state_writes[request]) + shape.tail.offset);
            });
        }
    });
    team.share(step.requests * m.heads, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 head = unit % m.heads, channel = shape.values + head * dim;
            follow(step, unit / m.heads, [&](i64 request) {
                const i64 row = step.query_start[request], tokens = step.query_start[request + 1] - row;
                const Inputs in = inputs_of(shape.tail, states, step, request, x, width);
                float* state = begin_state(states, step, request, head * shape.head_floats, shape.head_floats);
                for (i64 first = 0; first < tokens; first += TILE_TOKENS) {
                    const i64 count = std::min(TILE_TOKENS, tokens - first), token = row + first;
                    for (i64 t = 0; t < count; ++t) convolve(in, first + t, channel, dim, m.conv, m.conv_bias, true, values + t * shape.padded);
                    put_steps(m, head, dt + token * m.heads, count, gates);
                    run_state<Add>(shape, {shared_of(head / shape.group, token), gates, values, count, state_dim, shape.padded, m.skip[head]}, state);
                    for (i64 t = 0; t < count; ++t)
                        put_gated(values + t * shape.padded, x + (token + t) * width + shape.tail.channels + head * dim, width, dim,
                                  gated + (token + t) * all_heads + head * dim, all_heads);
                }
                put_tail(in, tokens, channel, dim, slot_of(states, step.state_writes[request]) + shape.tail.offset);
            });
        }
    });
    const i64 normed = all_heads / m.groups;
    team.split(step.tokens * m.groups, [&](i64 begin, i64 end) {
        for (i64 unit = begin; unit < end; ++unit)
            norm_row(gated + unit * normed, normed, {m.norm + unit % m.groups * normed, nullptr, m.eps, 0}, out + unit * normed);
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
