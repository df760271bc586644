// The functions of one variant that Python calls, under names that end in it. Python checks their arguments.
#pragma once

#include "draw.h"
#include "layers.h"
#include "lending.h"
#include "limits.h"

#define SF_JOIN_(a, b, c) a##b##_##c
#define SF_JOIN(a, b, c) SF_JOIN_(a, b, c)
#define SF_EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type SF_JOIN(sf_, name, SF_VARIANT)

namespace splitfuse {
namespace SF_VARIANT {

// Runs what may need more memory than there is. Returns 0, or 1 if there was not enough. No exception crosses into Python.
template <class Body>
i32 guarded(Body body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

SF_EXPORT(void*, create)(i32 num_threads) {
    Workspace* work = nullptr;
    guarded([&] { work = new Workspace(num_threads); });
    return work;
}
SF_EXPORT(void, destroy)(void* work) { delete static_cast<Workspace*>(work); }

SF_EXPORT(i64, weight_bytes)(const Weight* w) {
    Shape s = shape_of(*w);
    return s.panels * s.panel_bytes;
}

SF_EXPORT(i64, store_bytes)(const Store* store) {
    Layout kv(*store);
    return store->num_blocks * kv.num_kv_heads * kv.pieces * kv.piece_bytes;
}

SF_EXPORT(i64, delta_floats)(const Delta* d) { return shape_of(*d).tail.slot_floats; }
SF_EXPORT(i64, conv_floats)(const ShortConv* conv) { return Tail(conv->channels, conv->taps, 0).slot_floats; }
SF_EXPORT(i64, mamba_floats)(const Mamba* m) { return shape_of(*m).tail.slot_floats; }

SF_EXPORT(void, pack)(Workspace* work, const Weight* w, const u16* source, i64 first, i64 count) {
    parallel(work->num_threads, [&](Team& team) { pack(team, *w, source, first, count); });
}

SF_EXPORT(void, pack_stored)(Workspace* work, const Weight* w, const Stored* stored, i64 first, i64 count) {
    parallel(work->num_threads, [&](Team& team) { pack_stored(team, *w, *stored, first, count); });
}

inline i32 run_linear(Workspace* work, const Weight& w, const u16* x, i64 rows, const Lora* lora, i64 place, const Output& out) {
    return guarded([&] {
        work->reserve_operand(w, rows);
        work->reserve_lora(lora, rows);
        parallel(work->num_threads, [&](Team& team) {
            Output own = out;
            own.adapted = work->adapted(team.rank, lora, rows, place);
            linear(team, x, rows, w, work->memory(team.rank), own);
        });
    });
}

SF_EXPORT(i32, linear)(Workspace* work, const Weight* w, const u16* x, i64 rows, const u16* bias, const float* residual,
                       const Lora* lora, i64 place, float* y) {
    Output out;
    out.y = y;
    out.bias = bias;
    out.residual = residual;
    return run_linear(work, *w, x, rows, lora, place, out);
}

SF_EXPORT(i32, linear_heads)(Workspace* work, const Weight* w, i64 heads, const u16* x, i64 rows, u16* y) {
    return guarded([&] {
        work->reserve_heads(*w, rows);
        parallel(work->num_threads, [&](Team& team) {
            auto source = [&](i64 row, i64 head) { return x + (row * heads + head) * w->columns; };
            linear_heads(team, *w, heads, rows, work->memory(team.rank), source, y, w->rows, heads * w->rows);
        });
    });
}

SF_EXPORT(i32, activated)(Workspace* work, const Weight* w, const u16* x, i64 rows, const u16* bias, i32 activation,
                          const Lora* lora, i64 place, u16* y) {
    Output out;
    out.activated = y;
    out.bias = bias;
    out.activation = activation;
    return run_linear(work, *w, x, rows, lora, place, out);
}

SF_EXPORT(void, norm)(Workspace* work, const float* x, i64 rows, i64 columns, const Norm* norm, u16* out) {
    parallel(rows == 1 ? 1 : work->num_threads, [&](Team& team) { read_rows(team, x, rows, columns, *norm, out); });
}

SF_EXPORT(void, embed)(Workspace* work, const i32* ids, i64 rows, const u16* table, const Weight* packed, i64 columns, float* out) {
    parallel(rows == 1 ? 1 : work->num_threads, [&](Team& team) { embed(team, ids, rows, table, packed, columns, out); });
}

SF_EXPORT(void, rope_store)(Workspace* work, const Step* step, const Heads* heads, const Store* store, const float* qkv, u16* q) {
    parallel(work->num_threads, [&](Team& team) { rope_store(team, *step, *heads, *store, qkv, q); });
}

SF_EXPORT(i32, attend)(Workspace* work, const Step* step, const Heads* heads, const Store* store, const u16* q, u16* out) {
    return guarded([&] {
        work->begin_step();
        work->reserve_attention(*step, *heads, *store);
        parallel(work->num_threads, [&](Team& team) {
            Attention attention{*step, *heads, *store, q, out, work->own[team.rank].tile.data()};
            attend(team, attention, work->items[0].items, reinterpret_cast<float*>(work->partials.data()));
        });
    });
}

SF_EXPORT(i32, delta)(Workspace* work, const Step* step, const Delta* d, const States* states, const float* x, const float* gates, u16* out) {
    return guarded([&] {
        reserve_delta(*work, *d);
        parallel(work->num_threads, [&](Team& team) { delta(team, *work, *step, *d, *states, x, gates, out); });
    });
}

SF_EXPORT(i32, mamba)(Workspace* work, const Step* step, const Mamba* m, const States* states, const float* x, const float* dt, u16* out) {
    return guarded([&] {
        reserve_mamba(*work, *m, step->tokens);
        parallel(work->num_threads, [&](Team& team) { mamba(team, *work, *step, *m, *states, x, dt, out); });
    });
}

SF_EXPORT(void, conv)(Workspace* work, const Step* step, const ShortConv* conv, const States* states, const float* x, u16* out) {
    parallel(work->num_threads, [&](Team& team) { short_conv(team, *step, *conv, *states, x, out); });
}

// Computes a network, and the normed rows [R, C] that its head is applied to; with `choices`, not for a group that reduces, the
// tokens that these choose instead. Returns 0, 1 without memory, or 2 if a rank of the network's group did not come.
SF_EXPORT(i32, network)(Workspace* work, const PackedStep* packed, const Network* network, const Choices* choices, u16* rows) {
    const i32 out_of_memory = guarded([&] { run_network(*work, unpacked(*packed), *network, choices, rows); });
    return out_of_memory ? 1 : network->group && network->group->failed ? 2 : 0;
}

// From the next network on adds up what each thread takes for each operator in `times` [threads, NUM_OPERATORS], if it is not null.
SF_EXPORT(void, account_in)(Workspace* work, OperatorTime* times) { work->times = times; }

// Applies a rank's rows of the output head to x [rows, C]; its logits go to y, whose rows are `stride` apart. When it returns,
// those of all ranks of a group that gathers are there. Returns as network() does.
SF_EXPORT(i32, head)(Workspace* work, Group* group, const Weight* head, const u16* bias, const u16* x, i64 rows, float* y, i64 stride) {
    const i32 out_of_memory = guarded([&] {
        work->reserve_operand(*head, rows);
        Output out;
        out.y = y;
        out.stride = stride;
        out.bias = bias;
        parallel(work->num_threads, [&](Team& team) {
            linear(team, x, rows, *head, work->memory(team.rank), out);
            gather(team, group);
        });
    });
    return out_of_memory ? 1 : group->failed ? 2 : 0;
}

// Answers the debtor of a loan until it is closed: see lending.h.
SF_EXPORT(i32, lend)(Workspace* work, Channel* channel, i64 capacity, const Layer* layers, i64 num_layers, const i32* blocks,
                     i64 num_blocks) {
    return guarded([&] { lend(*work, *channel, capacity, layers, num_layers, blocks, num_blocks); });
}

// Lets a creditor keep a block whose bytes, of all layers, lie side by side. Returns 0, or 1 if it does not answer.
SF_EXPORT(i32, deposit)(Loan* loan, i64 index, const u8* data, i64 bytes) {
    ask(*loan, {DEPOSIT, static_cast<i32>(index), 0, 0, 0}, bytes, [&](u8* to) { std::memcpy(to, data, bytes); });
    return !wait_for_answer(*loan);
}

SF_EXPORT(void, route)(Workspace* work, const Router* router, float* logits, i64 tokens, i32* ids, float* weights) {
    parallel(tokens == 1 ? 1 : work->num_threads, [&](Team& team) { route(team, *router, logits, tokens, ids, weights); });
}

SF_EXPORT(i32, experts)(Workspace* work, const Mixture* mixture, const u16* x, i64 tokens, const i32* ids, const float* weights, float* out) {
    return guarded([&] {
        work->group = nullptr;
        reserve_experts(*work, *mixture, tokens);
        parallel(work->num_threads, [&](Team& team) { experts(team, *work, *mixture, x, tokens, ids, weights, nullptr, nullptr, nullptr, out, mixture->down->rows); });
    });
}

// Shares units as products do, and notes which thread has taken each, and as which of its units: for tests.
SF_EXPORT(void, take_units)(Workspace* work, i64 rows, i64 places, i64 each, i32* takers, i64* turns) {
    parallel(work->num_threads, [&](Team& team) {
        i64 turn = 0;
        team.share_by_node(rows, places, each, [&](i64 begin, i64 end, i64) {
            for (i64 unit = begin; unit < end; ++unit, ++turn) takers[unit] = team.rank, turns[unit] = turn;
        });
    });
}

SF_EXPORT(void, read_all)(Workspace* work, const u8* data, i64 bytes, i32 into_second) {
    parallel(work->num_threads, [&](Team& team) { read_all(team, data, bytes, into_second); });
}

SF_EXPORT(float, dots_only)(Workspace* work, i32 qvalues, i64 rounds) {
    std::vector<float> totals(work->num_threads);
    parallel(work->num_threads, [&](Team& team) { totals[team.rank] = dots_only(qvalues, rounds); });
    return totals[0];
}

#ifdef SF_TILES
SF_EXPORT(void, tile_product)(Workspace*, i32 qvalues, const u8* a, const u8* b, u8* c) {
    const TilesInUse tiles;
    multiply_tiles_once(qvalues, a, b, c);
}
#endif

SF_EXPORT(void, topk)(Workspace* work, const float* scores, i64 rows, i64 columns, i64 count, i32* ids, float* values) {
    parallel(rows == 1 ? 1 : work->num_threads, [&](Team& team) { topk(team, scores, rows, columns, count, ids, values); });
}

SF_EXPORT(i32, draw)(Workspace* work, const void* scores, i32 in_doubles, i64 columns, const i32* rows, i64 num_rows,
                     const double* filters, const double* numbers, i64 count, i32* ids) {
    return guarded([&] {
        for (Workspace::Own& each : work->own) each.draws.reserve(draw_bytes(columns));
        const Filter* each = reinterpret_cast<const Filter*>(filters);
        parallel(num_rows == 1 ? 1 : work->num_threads, [&](Team& team) {
            if (in_doubles) draw(team, *work, static_cast<const double*>(scores), columns, rows, num_rows, each, numbers, count, ids);
            else draw(team, *work, static_cast<const float*>(scores), columns, rows, num_rows, each, numbers, count, ids);
        });
    });
}

// Applies the output head to rows x [rows, C], and chooses a token for each.
SF_EXPORT(i32, choose)(Workspace* work, const Choices* choices, const u16* x, i64 rows) {
    return guarded([&] {
        reserve_choices(*work, *choices, rows);
        parallel(work->num_threads, [&](Team& team) { choose_tokens(team, *work, *choices, x, rows); });
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
