// A whole network but its head in one parallel region: the functions that Python calls one by one, with no return to
// Python between them.
#pragma once

#include "delta.h"
#include "experts.h"

namespace splitfuse {
namespace SF_VARIANT {

// Packs what the first product of a block reads of x, the residual stream.
SF_INLINE Operand pack_read(Team& team, Workspace& work, const Weight& w, const float* x, i64 rows, const Norm& norm) {
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    return pack_activations(team, w, rows, work.memory(team.rank), [&](i64 row) {
        read_row(x + row * w.columns, w.columns, norm, row_buffer);
        return row_buffer;
    });
}

// Says where what a block gives goes: onto x, or, if a norm comes first, to a buffer of its own.
SF_INLINE Output block_output(const Workspace& work, const Layer& layer, const Norm& after, float* x) {
    Output out;
    out.y = after.weight ? reinterpret_cast<float*>(work.branch.data()) : x;
    out.residual = after.weight ? nullptr : x;
    out.scale = layer.residual_scale;
    return out;
}

// Adds to x what a block gave to the buffer, normed if there is a norm.
inline void add_branch(Team& team, Workspace& work, const Norm& after, float scale, i64 rows, i64 columns, float* x) {
    const float* branch = reinterpret_cast<const float*>(work.branch.data());
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) {
            const float* source = branch + row * columns;
            float* to = x + row * columns;
            if (after.weight) norm_row(source, columns, after, row_buffer);
            for (i64 c = 0; c < columns; c += LANES) {
                const i64 left = columns - c;
                Floats value = after.weight ? load_left(row_buffer + c, left) : load_left(source + c, left);
                store_left(to + c, value * broadcast(scale) + load_left(to + c, left), left);
            }
        }
    });
}

inline void scale_rows(Team& team, float scale, i64 rows, i64 columns, float* x) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 at = begin * columns; at < end * columns; ++at) x[at] *= scale;
    });
}

// Computes a layer's attention of x, the residual stream.
inline void attention_block(Team& team, Workspace& work, const Step& step, const Layer& layer, const float* x, Output out) {
    const i64 tokens = step.tokens, width = layer.o->columns;
    const Memory memory = work.memory(team.rank);
    u16* queries = reinterpret_cast<u16*>(work.queries.data());
    u16* attn_out = reinterpret_cast<u16*>(work.attn_out.data());
    Output qkv, gate;
    qkv.y = reinterpret_cast<float*>(work.qkv.data());
    qkv.bias = layer.qkv_bias;
    Operand operand = pack_read(team, work, *layer.qkv, x, tokens, layer.attn_norm);
    multiply(team, operand, *layer.qkv, qkv);
    if (layer.attn_gate) {  // packed as qkv is
        gate.activated = reinterpret_cast<u16*>(work.attn_gate.data());
        gate.activation = SIGMOID;
        multiply(team, operand, *layer.attn_gate, gate);
    }
    rope_store(team, step, layer.heads, layer.store, qkv.y, queries);
    Attention attention{step, layer.heads, layer.store, queries, attn_out, work.own[team.rank].tile.data()};
    attend(team, attention, work.find_items(layer.heads, layer.store)->items, reinterpret_cast<float*>(work.partials.data()));

    out.bias = layer.o_bias;
    if (!layer.attn_gate) return linear(team, attn_out, tokens, *layer.o, memory, out);
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    operand = pack_activations(team, *layer.o, tokens, memory, [&](i64 row) {
        multiply_row(attn_out + row * width, gate.activated + row * width, width, row_buffer);
        return row_buffer;
    });
    multiply(team, operand, *layer.o, out);
}

inline void reserve_attention_block(Workspace& work, const Step& step, const Layer& layer) {
    const i64 tokens = step.tokens;
    for (const Weight* w : {layer.qkv, layer.o}) work.reserve_operand(*w, tokens);
    work.qkv.reserve(tokens * layer.qkv->rows * 4);
    work.queries.reserve(tokens * layer.o->columns * 2);
    work.attn_out.reserve(tokens * layer.o->columns * 2);
    if (layer.attn_gate) {
        work.attn_gate.reserve(tokens * layer.o->columns * 2);
        work.reserve_rows(layer.o->columns);
    }
    work.reserve_attention(step, layer.heads, layer.store);
}

// Computes an MLP of rows that are packed.
inline void mlp_block(Team& team, Workspace& work, const Mlp& mlp, const Operand& operand, Output out) {
    Output inner;
    inner.activated = reinterpret_cast<u16*>(work.gated.data());
    inner.bias = mlp.up_bias;
    inner.activation = mlp.activation;
    multiply(team, operand, *mlp.up, inner);
    out.bias = mlp.down_bias;
    linear(team, inner.activated, operand.rows, *mlp.down, work.memory(team.rank), out);
}

inline void reserve_mlp_block(Workspace& work, const Mlp& mlp, i64 tokens) {
    for (const Weight* w : {mlp.up, mlp.down}) work.reserve_operand(*w, tokens);
    work.gated.reserve(tokens * mlp.down->columns * 2);
}

// Returns whether a layer's experts give their sum to the buffer rather than onto x.
SF_INLINE bool branches_off(const Layer& layer) { return layer.post_mlp_norm.weight || layer.residual_scale != 1.0f; }

// Computes a layer's experts of `normed`, what they read of x, the residual stream.
inline void experts_block(Team& team, Workspace& work, const Layer& layer, i64 tokens, float* x) {
    const Mixture& m = *layer.mixture;
    const u16* normed = reinterpret_cast<const u16*>(work.normed.data());
    i32* ids = reinterpret_cast<i32*>(work.ids.data());
    float* shares = reinterpret_cast<float*>(work.shares.data());
    Output scores;
    scores.y = reinterpret_cast<float*>(work.scores.data());
    linear(team, normed, tokens, *m.router, work.memory(team.rank), scores);
    route(team, scores.y, tokens, m.num_experts, m.top_k, m.renormalize, ids, shares);
    if (branches_off(layer)) experts(team, work, m, normed, tokens, ids, shares, nullptr, reinterpret_cast<float*>(work.branch.data()));
    else experts(team, work, m, normed, tokens, ids, shares, x, x);
}

inline void reserve_experts_block(Workspace& work, const Mixture& m, i64 tokens) {
    work.reserve_operand(*m.router, tokens);
    reserve_experts(work, m, tokens);
    work.scores.reserve(tokens * m.num_experts * 4);
    work.ids.reserve(tokens * m.top_k * 4);
    work.shares.reserve(tokens * m.top_k * 4);
}

// Computes a layer: adds to x, the residual stream, what its blocks give.
inline void run_layer(Team& team, Workspace& work, const Step& step, const Layer& layer, i64 hidden, float* x) {
    const i64 tokens = step.tokens;
    u16* normed = reinterpret_cast<u16*>(work.normed.data());
    if (layer.parallel) read_rows(team, x, tokens, hidden, layer.mlp_norm, normed);  // before the mixer adds to x
    if (layer.qkv) {
        attention_block(team, work, step, layer, x, block_output(work, layer, layer.post_attn_norm, x));
        if (layer.post_attn_norm.weight) add_branch(team, work, layer.post_attn_norm, layer.residual_scale, tokens, hidden, x);
    }
    if (layer.mixture) {
        if (!layer.parallel) read_rows(team, x, tokens, hidden, layer.mlp_norm, normed);
        experts_block(team, work, layer, tokens, x);
        if (branches_off(layer)) add_branch(team, work, layer.post_mlp_norm, layer.residual_scale, tokens, hidden, x);
    } else if (layer.mlp.up) {
        Operand operand = layer.parallel
            ? pack_activations(team, *layer.mlp.up, tokens, work.memory(team.rank), [&](i64 row) { return normed + row * hidden; })
            : pack_read(team, work, *layer.mlp.up, x, tokens, layer.mlp_norm);
        mlp_block(team, work, layer.mlp, operand, block_output(work, layer, layer.post_mlp_norm, x));
        if (layer.post_mlp_norm.weight) add_branch(team, work, layer.post_mlp_norm, layer.residual_scale, tokens, hidden, x);
    }
    if (layer.output_scale != 1.0f) scale_rows(team, layer.output_scale, tokens, hidden, x);
}

inline void reserve_layer(Workspace& work, const Step& step, const Layer& layer, i64 hidden) {
    const i64 tokens = step.tokens;
    if (layer.qkv) reserve_attention_block(work, step, layer);
    if (layer.mixture) reserve_experts_block(work, *layer.mixture, tokens);
    else if (layer.mlp.up) reserve_mlp_block(work, layer.mlp, tokens);
    if (layer.parallel || layer.mixture) work.normed.reserve(tokens * hidden * 2);
    if (layer.post_attn_norm.weight || layer.post_mlp_norm.weight || (layer.mixture && branches_off(layer)))
        work.branch.reserve(tokens * hidden * 4);
}

// Writes what the first layer reads: rows of the embedding, scaled, and of the learned positions if there are any.
inline void embed_step(Team& team, const Step& step, const Network& network, float* x) {
    const i64 hidden = network.hidden;
    team.split(step.tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token) {
            float* row = x + token * hidden;
            embed_row(step.ids[token], network.table, network.packed_table, hidden, row);
            if (network.embed_scale != 1.0f)
                for (i64 c = 0; c < hidden; ++c) row[c] *= network.embed_scale;
            if (network.positions)
                for (i64 c = 0; c < hidden; ++c) row[c] += widen(network.positions[step.positions[token] * hidden + c]);
        }
    });
}

// Computes a network, from token ids to the normed rows [R, C] in bf16 that the head is applied to.
inline void run_network(Workspace& work, const Step& step, const Network& network, u16* rows) {
    const i64 hidden = network.hidden;
    work.begin_step();
    work.hidden.reserve(step.tokens * hidden * 4);
    work.reserve_rows(hidden);
    for (i64 i = 0; i < network.num_layers; ++i) reserve_layer(work, step, network.layers[i], hidden);
    float* x = reinterpret_cast<float*>(work.hidden.data());

    parallel(work.num_threads, [&](Team& team) {
        embed_step(team, step, network, x);
        for (i64 i = 0; i < network.num_layers; ++i) run_layer(team, work, step, network.layers[i], hidden, x);
        team.split(step.num_rows, [&](i64 begin, i64 end) {
            for (i64 row = begin; row < end; ++row) norm_row(x + step.rows[row] * hidden, hidden, network.norm, rows + row * hidden);
        });
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
