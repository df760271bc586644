// A whole network but its head in one parallel region: the functions that Python calls one by one, with no return to
// Python between them.
#pragma once

#include "delta.h"
#include "experts.h"

namespace splitfuse {
namespace SF_VARIANT {

// Packs the normed rows of x, which the first product of each half of a layer reads.
SF_INLINE Operand pack_normed_activations(Team& team, Workspace& work, const Weight& w, const float* x, i64 rows, const float* norm, float eps) {
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    return pack_activations(team, w, rows, work.memory(team.rank), [&](i64 row) {
        norm_row(floats_of(x + row * w.columns), w.columns, norm, eps, row_buffer);
        return row_buffer;
    });
}

// Computes the second half of a layer with experts: norms and routes x, the residual stream, and adds the experts' output.
inline void experts_block(Team& team, Workspace& work, const Layer& layer, i64 tokens, float eps, float* x) {
    const Mixture& m = *layer.mixture;
    u16* normed = reinterpret_cast<u16*>(work.normed.data());
    i32* ids = reinterpret_cast<i32*>(work.ids.data());
    float* shares = reinterpret_cast<float*>(work.shares.data());
    norm(team, x, tokens, m.router->columns, layer.mlp_norm, eps, normed);
    Output scores;
    scores.y = reinterpret_cast<float*>(work.scores.data());
    linear(team, normed, tokens, *m.router, work.memory(team.rank), scores);
    route(team, scores.y, tokens, m.num_experts, m.top_k, m.renormalize, ids, shares);
    experts(team, work, m, normed, tokens, ids, shares, x, x);
}

inline void reserve_experts_block(Workspace& work, const Mixture& m, i64 tokens) {
    work.reserve_operand(*m.router, tokens);
    reserve_experts(work, m, tokens);
    work.normed.reserve(tokens * m.router->columns * 2);
    work.scores.reserve(tokens * m.num_experts * 4);
    work.ids.reserve(tokens * m.top_k * 4);
    work.shares.reserve(tokens * m.top_k * 4);
}

// Computes a network, from token ids to the normed rows [R, C] in bf16 that the head is applied to.
inline void run_network(Workspace& work, const Step& step, const Heads& heads, const Network& network, u16* rows) {
    const i64 tokens = step.tokens, hidden = network.hidden, num_layers = network.num_layers;
    const Layer* layers = network.layers;
    const float eps = network.eps;
    for (i64 i = 0; i < num_layers; ++i) {
        const Layer& layer = layers[i];
        for (const Weight* w : {layer.qkv, layer.o}) work.reserve_operand(*w, tokens);
        work.reserve_rows(layer.qkv->columns);
        work.qkv.reserve(tokens * layer.qkv->rows * 4);
        work.queries.reserve(tokens * layer.o->columns * 2);
        work.attn_out.reserve(tokens * layer.o->columns * 2);
        if (layer.mixture) {
            reserve_experts_block(work, *layer.mixture, tokens);
            continue;
        }
        for (const Weight* w : {layer.gate_up, layer.down}) work.reserve_operand(*w, tokens);
        work.gated.reserve(tokens * layer.down->columns * 2);
    }
    work.hidden.reserve(tokens * hidden * 4);
    work.reserve_attention(step, heads.num_heads, layers[0].store);
    float* x = reinterpret_cast<float*>(work.hidden.data());
    float* qkv = reinterpret_cast<float*>(work.qkv.data());
    u16* queries = reinterpret_cast<u16*>(work.queries.data());
    u16* attn_out = reinterpret_cast<u16*>(work.attn_out.data());
    u16* gated = reinterpret_cast<u16*>(work.gated.data());
    float* partials = reinterpret_cast<float*>(work.partials.data());

    parallel(work.num_threads, [&](Team& team) {
        const Memory memory = work.memory(team.rank);
        embed(team, step.ids, tokens, network.table, network.packed_table, hidden, x);
        for (i64 i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            Output out;
            out.y = qkv;
            out.bias = layer.qkv_bias;
            multiply(team, pack_normed_activations(team, work, *layer.qkv, x, tokens, layer.attn_norm, eps), *layer.qkv, out);
            rope_store(team, step, heads, layer.store, qkv, layer.q_norm, layer.k_norm, queries);
            Attention attention{step, heads, layer.store, queries, nullptr, layer.window, attn_out, work.own[team.rank].tile.data()};
            attend(team, attention, work.items, partials);

            out = Output();
            out.y = x;
            out.residual = x;
            out.bias = layer.o_bias;
            linear(team, attn_out, tokens, *layer.o, memory, out);

            if (layer.mixture) {
                experts_block(team, work, layer, tokens, eps, x);
                continue;
            }
            out = Output();
            out.gated = gated;
            out.bias = layer.gate_up_bias;
            out.activation = layer.activation;
            multiply(team, pack_normed_activations(team, work, *layer.gate_up, x, tokens, layer.mlp_norm, eps), *layer.gate_up, out);

            out = Output();
            out.y = x;
            out.residual = x;
            out.bias = layer.down_bias;
            linear(team, gated, tokens, *layer.down, memory, out);
        }
        team.split(step.num_rows, [&](i64 begin, i64 end) {
            for (i64 row = begin; row < end; ++row)
                norm_row(floats_of(x + step.rows[row] * hidden), hidden, network.norm, eps, rows + row * hidden);
        });
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
