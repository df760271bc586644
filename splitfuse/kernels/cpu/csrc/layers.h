// A whole network but its head in one parallel region: the functions that Python calls one by one, with no return to
// Python between them.
#pragma once

#include <initializer_list>

#include "delta.h"
#include "draw.h"
#include "experts.h"
#include "mamba.h"
#include "short_conv.h"

namespace splitfuse {
namespace SF_VARIANT {

// Packs what the first product of a block reads of x, the residual stream, for weights that adapters may change.
SF_INLINE Operand pack_read(Team& team, Workspace& work, const Weight& w, const float* x, i64 rows, const Norm& norm,
                            const Adapted& adapted = {}, const Adapted& other = {}) {
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    return pack_activations(team, w, rows, work.memory(team.rank), [&](i64 row) {
        read_row(x + row * w.columns, w.columns, norm, row_buffer);
        return row_buffer;
    }, adapted, other);
}

// Says where what a block gives goes: onto x, or to a buffer of its own if it `branches`. Of either, a rank of a group that
// gathers writes its own columns.
SF_INLINE Output block_output(const Workspace& work, const Layer& layer, bool branches, i64 hidden, float* x) {
    Output out;
    out.y = branches ? reinterpret_cast<float*>(work.branch.data()) : x;
    if (gathers(work.group)) {
        out.y += work.group->rank * (hidden / work.group->size);
        out.stride = hidden;
    }
    out.residual = branches ? nullptr : out.y;
    out.scale = layer.residual_scale;
    return out;
}

// Returns whether what a block gives goes to a buffer rather than onto x: if a norm or a sum over ranks comes first.
SF_INLINE bool branches_off(const Workspace& work, const Norm& after) { return after.weight || reduces(work.group); }

// Adds to x what a block gave to the buffer, normed if there is a norm. Of an x that all ranks share, each takes a part of the
// rows.
inline void add_branch(Team& team, Workspace& work, const Norm& after, float scale, i64 rows, i64 columns, float* x) {
    const float* branch = reinterpret_cast<const float*>(work.branch.data());
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    const i64 ranks = gathers(work.group) ? work.group->size : 1, rank = gathers(work.group) ? work.group->rank : 0;
    const i64 first = rows * rank / ranks, last = rows * (rank + 1) / ranks;
    team.split(last - first, [&](i64 begin, i64 end) {
        for (i64 row = first + begin; row < first + end; ++row) {
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

// Ends a block: what all ranks of a group give is there, and what went to the buffer is added to x.
inline void end_block(Team& team, Workspace& work, bool branches, const Norm& after, float scale, i64 rows, i64 columns, float* x) {
    gather(team, work.group);
    if (!branches) return;
    reduce(team, work.group, reinterpret_cast<float*>(work.branch.data()), rows * columns);
    add_branch(team, work, after, scale, rows, columns, x);
    gather(team, work.group);
}

inline void scale_rows(Team& team, float scale, i64 rows, i64 columns, float* x) {
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 at = begin * columns; at < end * columns; ++at) x[at] *= scale;
    });
}

// Writes the queries of latent attention, [T, H, D] in bf16, whose first rope_dim elements are rotated and whose others are
// multiplied by k_b, if `queries` is not null; each token's key goes to its slot. `operand` is what qkv reads.
inline void place_latent(Team& team, Workspace& work, const Step& step, const Layer& layer, const Operand& operand, u16* queries) {
    const Latent& l = layer.latent;
    const i64 tokens = step.tokens, num_heads = layer.heads.num_heads, dim = layer.store.head_dim, width = layer.qkv->rows;
    const i64 qk_dim = l.rope_dim + l.nope_dim;
    const Memory memory = work.memory(team.rank);
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    float* compressed = reinterpret_cast<float*>(work.compressed.data());  // of queries, of keys and values, rotated keys
    const float* projected = compressed;
    i64 stride = width;
    Output out;
    out.y = compressed;
    out.bias = layer.qkv_bias;
    multiply(team, operand, *layer.qkv, out);
    if (queries && l.q_b) {
        Operand normed = pack_activations(team, *l.q_b, tokens, memory, [&](i64 row) {
            norm_row(compressed + row * width, l.q_width, l.q_norm, row_buffer);
            return row_buffer;
        });
        out.y = reinterpret_cast<float*>(work.latent_queries.data());
        out.bias = nullptr;
        multiply(team, normed, *l.q_b, out);
        projected = out.y;
        stride = num_heads * qk_dim;
    }
    auto not_rotated = [&](i64 row, i64 head) {
        const float* source = projected + row * stride + head * qk_dim + l.rope_dim;
        for (i64 d = 0; d < l.nope_dim; d += LANES) store_left(row_buffer + d, load_left(source + d, l.nope_dim - d), l.nope_dim - d);
        return row_buffer;
    };
    if (queries) linear_heads(team, *l.k_b, num_heads, tokens, memory, not_rotated, queries + l.rope_dim, dim, num_heads * dim);
    const Layout kv(layer.store);
    const i64 first_head = queries ? 0 : num_heads, per_token = num_heads + 1 - first_head;
    team.split(tokens * per_token, [&](i64 begin, i64 end) {
        alignas(64) float placed[MOST_PADDED] = {};
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 token = unit / per_token, head = first_head + unit % per_token, position = step.positions[token];
            if (head < num_heads) {
                u16* query = queries + (token * num_heads + head) * dim;
                rotate_head(projected + token * stride + head * qk_dim, l.rope_dim, layer.heads, position, placed);
                for (i64 d = 0; d < l.rope_dim; d += LANES) store_left(query + d, load(placed + d), l.rope_dim - d);
            } else if (step.slots[token] >= 0) {
                const float* source = compressed + token * width + l.q_width;
                rotate_head(source + l.kv_rank, l.rope_dim, layer.heads, position, placed);
                norm_head(source, l.kv_rank, l.kv_norm, moments_of(source, l.kv_rank, l.kv_norm), placed + l.rope_dim);
                put_kv(kv, step.slots[token], 0, placed, nullptr, false);
            }
        }
    });
}

inline void reserve_latent(Workspace& work, const Layer& layer, i64 tokens) {
    const Latent& l = layer.latent;
    work.compressed.reserve(tokens * layer.qkv->rows * 4);
    work.latent_values.reserve(tokens * layer.o->columns * 2);
    for (const Weight* w : {l.k_b, l.v_b}) work.reserve_heads(*w, tokens);
    work.reserve_rows(std::max(l.q_width, l.nope_dim));
    if (!l.q_b) return;
    work.latent_queries.reserve(tokens * l.q_b->rows * 4);
    work.reserve_operand(*l.q_b, tokens);
}

// Projects x, the residual stream, for a layer's attention: each token's keys and values go to their slots, its queries, if they
// are not null, and its gates to their buffers. `place` is that of the layer in the tables of adapters.
inline void project(Team& team, Workspace& work, const Step& step, const Layer& layer, i64 place, const float* x, u16* queries) {
    const i64 tokens = step.tokens;
    const bool gated = queries && layer.attn_gate;
    Output qkv, gate;
    qkv.y = reinterpret_cast<float*>(work.qkv.data());
    qkv.bias = layer.qkv_bias;
    qkv.adapted = work.adapted(team.rank, step.lora, tokens, place + LORA_QKV);
    if (gated) gate.adapted = work.adapted(team.rank, step.lora, tokens, place + LORA_GATE, 1);
    team.enter(QKV);
    const bool packed_once = !gated || read_alike(*layer.attn_gate, *layer.qkv);
    Operand operand = pack_read(team, work, *layer.qkv, x, tokens, layer.attn_norm, qkv.adapted, packed_once ? gate.adapted : Adapted{});
    if (layer.latent.k_b) return place_latent(team, work, step, layer, operand, queries);
    multiply(team, operand, *layer.qkv, qkv);
    if (gated) {
        if (!packed_once) operand = pack_read(team, work, *layer.attn_gate, x, tokens, layer.attn_norm, gate.adapted);
        gate.activated = reinterpret_cast<u16*>(work.attn_gate.data());
        gate.activation = SIGMOID;
        multiply(team, operand, *layer.attn_gate, gate);
    }
    team.enter(ROTATION);
    rope_store(team, step, layer.heads, layer.store, qkv.y, queries);
}

// Computes a layer's attention of x, the residual stream. `place` is as above.
inline void attention_block(Team& team, Workspace& work, const Step& step, const Layer& layer, i64 place, const float* x, Output out) {
    const Layout kv(layer.store);
    const i64 tokens = step.tokens, num_heads = layer.heads.num_heads, width = num_heads * kv.value_dim;
    const Memory memory = work.memory(team.rank);
    u16* queries = reinterpret_cast<u16*>(work.queries.data());
    u16* attn_out = reinterpret_cast<u16*>(work.attn_out.data());
    project(team, work, step, layer, place, x, queries);
    team.enter(ATTENTION);
    u16* own_out = attn_out + first_column(work.group, width);
    Attention attention{step, layer.heads, layer.store, queries, own_out, work.own[team.rank].tile.data(), place / LORA_TARGETS};
    if (gathers(work.group)) attention.out_stride = layer.o->columns;
    attend(team, attention, work.find_items(step, layer.heads, layer.store)->items, reinterpret_cast<float*>(work.partials.data()));
    gather(team, work.group);

    team.enter(O_PROJ);
    out.bias = layer.o_bias;
    out.adapted = work.adapted(team.rank, step.lora, tokens, place + LORA_O);
    if (layer.attn_gate) {
        const u16* gates = reinterpret_cast<const u16*>(work.attn_gate.data());
        u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
        Operand operand = pack_activations(team, *layer.o, tokens, memory, [&](i64 row) {
            multiply_row(attn_out + row * width, gates + row * width, width, row_buffer);
            return row_buffer;
        }, out.adapted);
        return multiply(team, operand, *layer.o, out);
    }
    const u16* heads = attn_out;
    if (layer.latent.k_b) {
        const Weight& v_b = *layer.latent.v_b;
        u16* values = reinterpret_cast<u16*>(work.latent_values.data());
        auto source = [&](i64 row, i64 head) { return attn_out + row * width + head * kv.value_dim; };
        linear_heads(team, v_b, num_heads, tokens, memory, source, values, v_b.rows, layer.o->columns);
        heads = values;
    }
    linear(team, heads, tokens, *layer.o, memory, out);
}

inline void reserve_attention_block(Workspace& work, const Step& step, const Layer& layer) {
    const Layout kv(layer.store);
    const i64 tokens = step.tokens, num_heads = layer.heads.num_heads;
    for (const Weight* w : {layer.qkv, layer.o}) work.reserve_operand(*w, tokens);
    work.queries.reserve(tokens * num_heads * kv.head_dim * 2);
    work.attn_out.reserve(tokens * num_heads * kv.value_dim * 2);
    if (layer.latent.k_b) reserve_latent(work, layer, tokens);
    else work.qkv.reserve(tokens * layer.qkv->rows * 4);
    if (layer.attn_gate) {
        work.reserve_operand(*layer.attn_gate, tokens);
        work.attn_gate.reserve(tokens * layer.o->columns * 2);
        work.reserve_rows(layer.o->columns);
    }
    work.reserve_attention(step, layer.heads, layer.store);
}

// Computes a layer's mixer with a state of x, the residual stream.
inline void recurrent_block(Team& team, Workspace& work, const Step& step, const Layer& layer, const float* x, Output out) {
    const Recurrent& r = layer.recurrent;
    const i64 tokens = step.tokens;
    u16* mixed = reinterpret_cast<u16*>(work.attn_out.data());
    Output projected, gates;
    projected.y = reinterpret_cast<float*>(work.qkv.data());
    projected.bias = r.in_proj_bias;
    Operand operand = pack_read(team, work, *r.in_proj, x, tokens, layer.attn_norm);
    multiply(team, operand, *r.in_proj, projected);
    if (r.gates) {
        if (!read_alike(*r.gates, *r.in_proj)) operand = pack_read(team, work, *r.gates, x, tokens, layer.attn_norm);
        gates.y = reinterpret_cast<float*>(work.gates.data());
        gates.bias = r.gates_bias;
        multiply(team, operand, *r.gates, gates);
        if (r.mamba.conv) mamba(team, work, step, r.mamba, r.states, projected.y, gates.y, mixed);
        else delta(team, work, step, r.delta, r.states, projected.y, gates.y, mixed);
    } else {
        short_conv(team, step, r.conv, r.states, projected.y, mixed);
    }
    out.bias = r.out_proj_bias;
    linear(team, mixed, tokens, *r.out_proj, work.memory(team.rank), out);
}

inline void reserve_recurrent_block(Workspace& work, const Step& step, const Recurrent& r) {
    const i64 tokens = step.tokens;
    for (const Weight* w : {r.in_proj, r.out_proj}) work.reserve_operand(*w, tokens);
    work.qkv.reserve(tokens * r.in_proj->rows * 4);
    work.attn_out.reserve(tokens * r.out_proj->columns * 2);
    if (!r.gates) return;
    work.reserve_operand(*r.gates, tokens);
    work.gates.reserve(tokens * r.gates->rows * 4);
    if (r.mamba.conv) reserve_mamba(work, r.mamba, tokens);
    else reserve_delta(work, r.delta);
}

// Computes an MLP of rows that are packed; `adapted` is what adapters add to `up`.
inline void mlp_block(Team& team, Workspace& work, const Mlp& mlp, const Operand& operand, Output out, const Adapted& adapted = {}) {
    u16* gated = reinterpret_cast<u16*>(work.gated.data());
    Output inner;
    inner.adapted = adapted;
    inner.activated = gated + first_column(work.group, mlp.up->gated ? mlp.up->rows / 2 : mlp.up->rows);
    inner.stride = mlp.down->columns;
    inner.bias = mlp.up_bias;
    inner.activation = mlp.activation;
    multiply(team, operand, *mlp.up, inner);
    gather(team, work.group);
    team.enter(DOWN);
    out.bias = mlp.down_bias;
    linear(team, gated, operand.rows, *mlp.down, work.memory(team.rank), out);
}

inline void reserve_mlp_block(Workspace& work, const Mlp& mlp, i64 tokens) {
    for (const Weight* w : {mlp.up, mlp.down}) work.reserve_operand(*w, tokens);
    work.gated.reserve(tokens * mlp.down->columns * 2);
}

// Returns whether a layer's experts give their sum to the buffer rather than onto x.
SF_INLINE bool experts_branch_off(const Workspace& work, const Layer& layer) {
    return branches_off(work, layer.post_mlp_norm) || layer.residual_scale != 1.0f;
}

// Writes the sum of what the experts and what the shared MLP give, each normed, plus the residual if there is one.
inline void add_normed(Team& team, Workspace& work, const Mixture& m, const float* experts, const float* shared, i64 rows, i64 columns,
                       const float* residual, float* out) {
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    team.split(rows, [&](i64 begin, i64 end) {
        for (i64 row = begin; row < end; ++row) {
            const i64 first = row * columns;
            norm_row(experts + first, columns, m.post_expert_norm, row_buffer);
            norm_row(shared + first, columns, m.post_shared_norm, row_buffer + columns);
            for (i64 c = 0; c < columns; c += LANES) {
                const i64 left = columns - c;
                Floats total = load_left(row_buffer + c, left) + load_left(row_buffer + columns + c, left);
                if (residual) total = load_left(residual + first + c, left) + total;
                store_left(out + first + c, total, left);
            }
        }
    });
}

// Computes a layer's experts of `normed`, what they read of x, the residual stream.
inline void experts_block(Team& team, Workspace& work, const Layer& layer, i64 tokens, float* x) {
    const Mixture& m = *layer.mixture;
    const i64 hidden = m.up->columns;
    const u16* normed = reinterpret_cast<const u16*>(work.normed.data());
    const u16* read = normed;
    i32* ids = reinterpret_cast<i32*>(work.ids.data());
    float* weights = reinterpret_cast<float*>(work.expert_weights.data());
    const Memory memory = work.memory(team.rank);
    Output logits, shared, gates;
    logits.y = reinterpret_cast<float*>(work.router_logits.data());
    logits.bias = m.router_bias;
    if (m.router_norm.weight) {
        multiply(team, pack_read(team, work, *m.router, x, tokens, m.router_norm), *m.router, logits);
        u16* own = reinterpret_cast<u16*>(work.expert_in.data());
        read_rows(team, x, tokens, hidden, m.expert_norm, own);
        read = own;
    } else {
        linear(team, normed, tokens, *m.router, memory, logits);
    }
    route(team, m.choice, logits.y, tokens, ids, weights);
    if (m.expert_scale) scale_choices(team, m, tokens, ids, weights);
    if (m.shared.up) {
        shared.y = reinterpret_cast<float*>(work.shared_out.data());
        mlp_block(team, work, m.shared, pack_activations(team, *m.shared.up, tokens, memory, [&](i64 row) { return normed + row * hidden; }), shared);
        gather(team, work.group);  // the experts overwrite what the ranks have read
    }
    if (m.shared_gate) {
        gates.activated = reinterpret_cast<u16*>(work.shared_gates.data());
        gates.activation = SIGMOID;
        linear(team, normed, tokens, *m.shared_gate, memory, gates);
    }
    const Output out = block_output(work, layer, experts_branch_off(work, layer), hidden, x);
    if (!m.router_norm.weight)
        return experts(team, work, m, read, tokens, ids, weights, shared.y, gates.activated, out.residual, out.y, hidden);
    float* sum = reinterpret_cast<float*>(work.expert_sum.data());
    experts(team, work, m, read, tokens, ids, weights, nullptr, nullptr, nullptr, sum, hidden);
    add_normed(team, work, m, sum, shared.y, tokens, hidden, out.residual, out.y);
}

inline void reserve_experts_block(Workspace& work, const Mixture& m, i64 tokens) {
    work.reserve_operand(*m.router, tokens);
    reserve_experts(work, m, tokens);
    work.router_logits.reserve(tokens * m.choice.num_experts * 4);
    work.ids.reserve(tokens * m.choice.top_k * 4);
    work.expert_weights.reserve(tokens * m.choice.top_k * 4);
    if (m.shared.up) {
        reserve_mlp_block(work, m.shared, tokens);
        work.shared_out.reserve(tokens * m.shared.down->rows * 4);
    }
    if (m.router_norm.weight) {
        work.expert_in.reserve(tokens * m.down->rows * 2);
        work.expert_sum.reserve(tokens * m.down->rows * 4);
        work.reserve_rows(2 * m.down->rows);
    }
    if (m.shared_gate) {
        work.reserve_operand(*m.shared_gate, tokens);
        work.shared_gates.reserve(tokens * 2);
    }
}

// Adds to x, the residual stream, what a layer makes of its own input [T, P], whose rows are `stride` apart.
inline void token_input_block(Team& team, Workspace& work, const TokenInput& t, const float* input, i64 stride, i64 tokens, float* x) {
    const i64 size = t.gate->rows;
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    Output gate, out;
    gate.activated = reinterpret_cast<u16*>(work.gated.data());
    gate.activation = t.activation;
    multiply(team, pack_read(team, work, *t.gate, x, tokens, Norm{}), *t.gate, gate);
    Operand operand = pack_activations(team, *t.out, tokens, work.memory(team.rank), [&](i64 row) {
        for (i64 c = 0; c < size; c += LANES) {
            const i64 left = size - c;
            store_left(row_buffer + c, load_left(gate.activated + row * size + c, left) * load_left(input + row * stride + c, left), left);
        }
        return row_buffer;
    });
    out.y = reinterpret_cast<float*>(work.branch.data());
    multiply(team, operand, *t.out, out);
    add_branch(team, work, t.norm, 1.0f, tokens, t.out->rows, x);
}

inline void reserve_token_input(Workspace& work, const TokenInput& t, i64 tokens) {
    for (const Weight* w : {t.gate, t.out}) work.reserve_operand(*w, tokens);
    work.gated.reserve(tokens * t.gate->rows * 2);
    work.branch.reserve(tokens * t.out->rows * 4);
    work.reserve_rows(t.gate->rows);
}

// Begins a layer: adds to x, the residual stream, what its mixer gives. `place` is that of the layer in the tables of adapters.
inline void begin_layer(Team& team, Workspace& work, const Step& step, const Layer& layer, i64 place, i64 hidden, float* x) {
    const i64 tokens = step.tokens;
    team.enter(OTHERS);
    if (layer.parallel)  // before the mixer adds to x
        read_rows(team, x, tokens, hidden, layer.mlp_norm, reinterpret_cast<u16*>(work.normed.data()));
    if (!layer.qkv && !layer.recurrent.in_proj) return;
    const bool branches = branches_off(work, layer.post_attn_norm);
    const Output out = block_output(work, layer, branches, hidden, x);
    if (layer.qkv) attention_block(team, work, step, layer, place, x, out);
    else recurrent_block(team, work, step, layer, x, out);
    end_block(team, work, branches, layer.post_attn_norm, layer.residual_scale, tokens, hidden, x);
}

// Ends a layer that has begun: adds what follows its mixer. `input` is the layer's own, if it has one.
inline void end_layer(Team& team, Workspace& work, const Step& step, const Layer& layer, i64 place, i64 hidden, const float* input,
                      i64 stride, float* x) {
    const i64 tokens = step.tokens;
    u16* normed = reinterpret_cast<u16*>(work.normed.data());
    if (layer.mixture) {
        team.enter(OTHERS);
        if (!layer.parallel) read_rows(team, x, tokens, hidden, layer.mlp_norm, normed);
        experts_block(team, work, layer, tokens, x);
        end_block(team, work, experts_branch_off(work, layer), layer.post_mlp_norm, layer.residual_scale, tokens, hidden, x);
    } else if (layer.mlp.up) {
        const Adapted adapted = work.adapted(team.rank, step.lora, tokens, place + LORA_UP);
        team.enter(GATE_UP);
        Operand operand = layer.parallel
            ? pack_activations(team, *layer.mlp.up, tokens, work.memory(team.rank), [&](i64 row) { return normed + row * hidden; }, adapted)
            : pack_read(team, work, *layer.mlp.up, x, tokens, layer.mlp_norm, adapted);
        const bool branches = branches_off(work, layer.post_mlp_norm);
        Output out = block_output(work, layer, branches, hidden, x);
        out.adapted = work.adapted(team.rank, step.lora, tokens, place + LORA_DOWN);
        mlp_block(team, work, layer.mlp, operand, out, adapted);
        end_block(team, work, branches, layer.post_mlp_norm, layer.residual_scale, tokens, hidden, x);
    }
    team.enter(OTHERS);
    if (layer.token_input.gate) token_input_block(team, work, layer.token_input, input, stride, tokens, x);
    if (layer.output_scale != 1.0f) scale_rows(team, layer.output_scale, tokens, hidden, x);
}

inline void reserve_layer(Workspace& work, const Step& step, const Layer& layer, i64 hidden) {
    const i64 tokens = step.tokens;
    if (layer.qkv) reserve_attention_block(work, step, layer);
    else if (layer.recurrent.in_proj) reserve_recurrent_block(work, step, layer.recurrent);
    if (layer.mixture) reserve_experts_block(work, *layer.mixture, tokens);
    else if (layer.mlp.up) reserve_mlp_block(work, layer.mlp, tokens);
    if (layer.token_input.gate) reserve_token_input(work, layer.token_input, tokens);
    if (layer.parallel || layer.mixture) work.normed.reserve(tokens * hidden * 2);
    const bool is_normed = layer.post_attn_norm.weight || layer.post_mlp_norm.weight;
    if (is_normed || reduces(work.group) || (layer.mixture && experts_branch_off(work, layer)))
        work.branch.reserve(tokens * hidden * 4);
}

// Returns the number of the last layer that stores anything of a token, keys and values or a state. What follows reads of other
// tokens nothing but that.
inline i64 last_storing(const Network& network) {
    i64 last = network.num_layers - 1;
    const auto stores = [](const Layer& layer) { return (layer.qkv && !layer.heads.foreign_kv) || layer.recurrent.in_proj; };
    while (last > 0 && !stores(network.layers[last])) --last;
    return last;
}

// Moves some rows of x, in their rising order, to its front: of each the columns from `first` to `last` - 1.
template <class Element>
void keep_rows(Team& team, const i32* rows, i64 count, i64 columns, i64 first, i64 last, Element* x) {
    constexpr i64 UNIT = 64 / sizeof(Element);  // a thread moves all rows of its columns: what it overwrites it has moved
    team.split(ceil_div(last - first, UNIT), [&](i64 begin, i64 end) {
        const i64 column = first + begin * UNIT, bytes = (std::min(first + end * UNIT, last) - column) * sizeof(Element);
        for (i64 row = 0; row < count; ++row)
            if (rows[row] != row) std::memcpy(x + row * columns + column, x + rows[row] * columns + column, bytes);
    });
}

// Leaves only the logit rows of all that the rest of a layer and those behind it read.
inline void keep_logit_rows(Team& team, Workspace& work, const Step& step, const Layer& layer, const Network& network, float* x) {
    const i64 hidden = network.hidden, inputs = network.num_layers * network.token_input_size;
    const i64 ranks = gathers(work.group) ? work.group->size : 1, rank = gathers(work.group) ? work.group->rank : 0;
    gather(team, work.group);  // all ranks have read x
    keep_rows(team, step.rows, step.num_rows, hidden, rank * (hidden / ranks), (rank + 1) * (hidden / ranks), x);
    gather(team, work.group);
    if (layer.parallel && !layer.qkv) keep_rows(team, step.rows, step.num_rows, hidden, 0, hidden, reinterpret_cast<u16*>(work.normed.data()));
    if (inputs) keep_rows(team, step.rows, step.num_rows, inputs, 0, inputs, reinterpret_cast<float*>(work.token_inputs.data()));
}

// Computes all layers. With `logit_step`, the step of the logit rows, other rows are left out once their keys, values and states are
// stored. Returns whether they were: x has the logit rows alone then.
inline bool run_layers(Team& team, Workspace& work, const Step& step, const Step* logit_step, const Network& network, float* x) {
    const i64 hidden = network.hidden, stride = network.num_layers * network.token_input_size, last = last_storing(network);
    const Step* now = &step;
    for (i64 i = 0; i < network.num_layers; ++i) {
        const Layer& layer = network.layers[i];
        const i64 place = i * LORA_TARGETS;
        const bool narrows = logit_step && i == last;
        if (narrows && layer.qkv) {  // begun for the keys and values of all rows, then again for queries of some
            project(team, work, step, layer, place, x, nullptr);
            keep_logit_rows(team, work, step, layer, network, x);
            now = logit_step;
        }
        if (now->tokens) begin_layer(team, work, *now, layer, place, hidden, x);
        if (narrows && !layer.qkv) {
            keep_logit_rows(team, work, step, layer, network, x);
            now = logit_step;
        }
        if (!now->tokens) break;
        const float* input = reinterpret_cast<const float*>(work.token_inputs.data()) + i * network.token_input_size;
        end_layer(team, work, *now, layer, place, hidden, input, stride, x);
    }
    return now == logit_step;
}

// Writes what the first layer reads: rows of the embedding, scaled, and of the learned positions if there are any.
inline void embed_step(Team& team, const Step& step, const Network& network, float* x) {
    const i64 hidden = network.hidden;
    team.split(step.tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token) {
            float* row = x + token * hidden;
            const i64 id = step.ids[token] - network.first_id;
            if (id < 0 || id >= network.num_ids) {  // another rank writes the row, or adds it
                if (!gathers(network.group)) std::fill(row, row + hidden, 0.0f);
                continue;
            }
            embed_row(static_cast<i32>(id), network.table, network.packed_table, hidden, row);
            if (network.embed_scale != 1.0f)
                for (i64 c = 0; c < hidden; ++c) row[c] *= network.embed_scale;
            if (network.positions)
                for (i64 c = 0; c < hidden; ++c) row[c] += widen(network.positions[step.positions[token] * hidden + c]);
        }
    });
    gather(team, network.group);
    reduce(team, network.group, x, step.tokens * hidden);
}

// Writes the input of each layer's own, [T, L, P]: what the embedding x is projected to, normed, and what is looked up.
inline void token_inputs(Team& team, Workspace& work, const Step& step, const Network& network, const float* x) {
    const i64 tokens = step.tokens, size = network.token_input_size, layers = network.num_layers, width = layers * size;
    const Floats shrink = broadcast(static_cast<float>(std::pow(static_cast<double>(network.hidden), -0.5)));
    const Floats grow = broadcast(static_cast<float>(std::pow(static_cast<double>(size), 0.5)));
    const Floats half = broadcast(static_cast<float>(std::pow(2.0, -0.5)));
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    Output out;
    out.y = reinterpret_cast<float*>(work.token_inputs.data());
    multiply(team, pack_read(team, work, *network.token_projection, x, tokens, Norm{}), *network.token_projection, out);
    team.split(tokens * layers, [&](i64 begin, i64 end) {
        for (i64 unit = begin; unit < end; ++unit) {
            float* own = out.y + unit * size;
            const u16* looked_up = network.token_inputs + step.ids[unit / layers] * width + unit % layers * size;
            for (i64 c = 0; c < size; c += LANES) store_left(own + c, load_left(own + c, size - c) * shrink, size - c);
            norm_row(own, size, network.token_input_norm, row_buffer);
            for (i64 c = 0; c < size; c += LANES) {
                const i64 left = size - c;
                store_left(own + c, (load_left(row_buffer + c, left) + load_left(looked_up + c, left) * grow) * half, left);
            }
        }
    });
}

inline void reserve_token_inputs(Workspace& work, const Network& network, i64 tokens) {
    work.reserve_operand(*network.token_projection, tokens);
    work.token_inputs.reserve(tokens * network.num_layers * network.token_input_size * 4);
    work.reserve_rows(network.token_input_size);
}

// Lets the buffers that all ranks read lie in the memory which they share. Their sizes are those of the whole network.
inline void place_shared(Workspace& work, const Step& step, const Network& network) {
    const i64 tokens = step.tokens;
    i64 attn_columns = 0, gated_columns = 0, packed_bytes = 0, at = 0;
    const auto will_pack = [&](std::initializer_list<const Weight*> weights) {
        for (const Weight* w : weights)
            if (w) packed_bytes = std::max(packed_bytes, align_up(operand_bytes(*w, tokens) + READ_BEYOND));
    };
    for (i64 i = 0; i < network.num_layers; ++i) {
        const Layer& layer = network.layers[i];
        will_pack({layer.qkv, layer.o, layer.mlp.up, layer.mlp.down});
        if (layer.o) attn_columns = std::max(attn_columns, layer.o->columns);
        if (layer.mlp.up) gated_columns = std::max(gated_columns, layer.mlp.down->columns);
        if (const Mixture* m = layer.mixture) {
            gated_columns = std::max(gated_columns, m->choice.top_k * m->down->columns);
            if (m->shared.up) gated_columns = std::max(gated_columns, m->shared.down->columns);
            will_pack({m->router, m->shared.up, m->shared.down});
        }
    }
    auto place = [&](Buffer& buffer, i64 bytes) {
        if (at + align_up(bytes) > network.group->shared_bytes) throw std::bad_alloc();
        buffer.borrow(network.group->shared + at, bytes);
        at += align_up(bytes);
    };
    place(work.hidden, tokens * network.hidden * 4);
    place(work.branch, tokens * network.hidden * 4);
    place(work.attn_out, tokens * attn_columns * 2);
    place(work.gated, tokens * gated_columns * 2);
    work.common = {};
    if (at + 2 * packed_bytes > network.group->shared_bytes) return;  // then each rank packs all rows for itself
    u8* free = network.group->shared + at;
    work.common = {{free, free + packed_bytes}, packed_bytes, network.group};
    for (Workspace::Own& each : work.own) each.turn = 0;
}

// Computes a network, from token ids to the normed rows [R, C] in bf16 that the head is applied to, or to the tokens that
// `choices` choose by them.
inline void run_network(Workspace& work, const Step& step, const Network& network, const Choices* choices, u16* rows) {
    const i64 hidden = network.hidden;
    work.begin_step();
    work.group = network.group;
    if (gathers(work.group)) place_shared(work, step, network);
    work.hidden.reserve(step.tokens * hidden * 4);
    work.reserve_rows(hidden);
    work.reserve_lora(step.lora, step.tokens);
    const Step* logit_step = work.logit_rows.select(step) ? &work.logit_rows.step : nullptr;
    for (i64 i = 0; i < network.num_layers; ++i) reserve_layer(work, step, network.layers[i], hidden);
    for (i64 i = last_storing(network); i < network.num_layers && logit_step; ++i) reserve_layer(work, *logit_step, network.layers[i], hidden);
    if (network.token_inputs) reserve_token_inputs(work, network, step.tokens);
    if (choices) {
        reserve_choices(work, *choices, step.num_rows);
        rows = reinterpret_cast<u16*>(work.normed.reserve(step.num_rows * hidden * 2));  // free behind the layers
    }
    float* x = reinterpret_cast<float*>(work.hidden.data());

    parallel(work.num_threads, [&](Team& team) {
        if (work.times) team.account_in(work.times + team.rank * NUM_OPERATORS);
        team.enter(EMBEDDING);
        embed_step(team, step, network, x);
        if (network.token_inputs) token_inputs(team, work, step, network, x);
        const bool kept = run_layers(team, work, step, logit_step, network, x);
        team.enter(HEAD);
        team.split(step.num_rows, [&](i64 begin, i64 end) {
            for (i64 row = begin; row < end; ++row)
                norm_row(x + (kept ? row : step.rows[row]) * hidden, hidden, network.norm, rows + row * hidden);
        });
        gather(team, work.group);  // the next step overwrites x
        if (choices) choose_tokens(team, work, *choices, rows, step.num_rows);
    });
    if (gathers(work.group))
        for (Buffer* each : {&work.hidden, &work.branch, &work.attn_out, &work.gated}) each->give_back();
    work.common = {};
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
