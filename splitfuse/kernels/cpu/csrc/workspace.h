// Buffers between the operations of a step. They grow when a step needs more, and are freed with the workspace.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "attention.h"
#include "group.h"
#include "logit_rows.h"

namespace splitfuse {
namespace SF_VARIANT {

class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { give_back(); }

    // Uses memory of others, which does not grow, until it is given back.
    void borrow(u8* data, i64 bytes) {
        give_back();
        data_ = data;
        size_ = bytes;
        is_borrowed_ = true;
    }
    void give_back() {
        if (!is_borrowed_) std::free(data_);
        data_ = nullptr;
        size_ = 0;
        is_borrowed_ = false;
    }

    u8* reserve(i64 bytes) {
        if (bytes > size_) {
            if (is_borrowed_) throw std::bad_alloc();
            std::free(data_);
            size_ = 0;
            data_ = static_cast<u8*>(std::aligned_alloc(64, align_up(bytes)));
            if (!data_) throw std::bad_alloc();
            size_ = align_up(bytes);
        }
        return data_;
    }
    u8* data() const { return data_; }

  private:
    u8* data_ = nullptr;
    i64 size_ = 0;
    bool is_borrowed_ = false;
};

// The pairs of one expert in their order, from `begin` to `end` - 1, and where their operand lies. See experts.h.
struct Visit {
    i32 expert, begin, end;
    i64 operand;
};

constexpr i64 VISIT_PADDING = 256;  // most bytes that the operand of a visit needs in addition to its share of one operand of all rows

// Attention's items of a step of so many tokens for all layers with these numbers of heads and of rows of an item, and how many
// of its tiles get partials.
struct HeadItems {
    i64 tokens, num_heads, num_kv_heads, rows, tiles;
    std::vector<Item> items;
};

struct Workspace {
    struct Own {  // of one thread
        Buffer operand, row, tile, sums, state, shrunk, draws;
        i64 turn = 0;
    };

    explicit Workspace(int num_threads) : num_threads(num_threads), own(num_threads) {}

    const int num_threads;
    Group* group = nullptr;  // of the network that is computed
    OperatorTime* times = nullptr;  // of networks that are computed [threads, NUM_OPERATORS], or null
    Common common;           // of its ranks, if they share memory, and there is room
    Buffer operand, hidden, normed, branch, qkv, attn_gate, queries, attn_out, gates, gated, partials, token_inputs;
    Buffer compressed, latent_queries, latent_values;  // of latent attention
    Buffer queries_keys, gated_heads;  // of Mamba
    Buffer shrunk;           // of adapters
    Buffer logits;
    Buffer router_logits, ids, expert_weights, order, expert_in, expert_out, expert_sum, shared_out, shared_gates;  // of mixtures of experts
    std::vector<Own> own;
    LogitRows logit_rows;          // of this step
    std::vector<HeadItems> items;  // the first `num_items` are of this step, or of its logit rows
    size_t num_items = 0;
    std::vector<Visit> visits;
    std::vector<i32> counts;

    void reserve_operand(const Weight& w, i64 rows) {
        operand.reserve(operand_bytes(w, rows) + READ_BEYOND);
        for (Own& each : own) {
            each.operand.reserve(operand_bytes(w, 1) + READ_BEYOND);
            if (in_parts(w, rows)) each.sums.reserve(ceil_div(rows, BLOCK_ROWS) * BLOCK_ROWS * PANEL * 4);
        }
    }
    void reserve_heads(const Weight& w, i64 rows) {  // for linear_heads()
        reserve_operand(w, std::min(rows, HEAD_ROWS));
        for (Own& each : own) each.operand.reserve(operand_bytes(w, std::min(rows, HEAD_ROWS)) + READ_BEYOND);
    }
    void reserve_rows(i64 columns) {
        for (Own& each : own) each.row.reserve(columns * 2);
    }
    void reserve_lora(const Lora* lora, i64 rows) {
        if (!lora) return;
        shrunk.reserve(rows * 2 * lora->most_ranks * 4);
        for (Own& each : own) each.shrunk.reserve(2 * lora->most_ranks * 4);
    }
    // Returns the adapters of a step at a weight. Two weights of one x have halves of the buffer of their own; a single row
    // is shrunk by each thread for itself, as it is packed.
    Adapted adapted(int rank, const Lora* lora, i64 rows, i64 place, int half = 0) const {
        if (!lora) return {};
        u8* buffer = rows == 1 ? own[rank].shrunk.data() : shrunk.data();
        return {lora, place, reinterpret_cast<float*>(buffer) + half * lora->most_ranks, 2 * lora->most_ranks};
    }
    void begin_step() { num_items = 0; }
    HeadItems* find_items(const Step& step, const Heads& heads, const Store& store) {
        const i64 rows = item_rows(Layout(store));
        for (size_t i = 0; i < num_items; ++i) {
            HeadItems& each = items[i];
            const bool same_heads = each.num_heads == heads.num_heads && each.num_kv_heads == store.num_kv_heads;
            if (each.tokens == step.tokens && same_heads && each.rows == rows) return &each;
        }
        return nullptr;
    }
    void reserve_attention(const Step& step, const Heads& heads, const Store& store, i64 most_tiles = INT64_MAX) {
        Layout kv(store);
        HeadItems* found = find_items(step, heads, store);
        if (!found) {
            if (num_items == items.size()) items.emplace_back();
            found = &items[num_items++];
            found->tokens = step.tokens;
            found->num_heads = heads.num_heads;
            found->num_kv_heads = store.num_kv_heads;
            found->rows = item_rows(kv);
            found->tiles = make_items(step, heads.num_heads, kv, num_threads, most_tiles, found->items);
        }
        partials.reserve(found->tiles * partial_floats(kv) * 4);
        if (store.int8 && !WIDENS_INT8)
            for (Own& each : own) each.tile.reserve(TILE * kv.padded * 4);
    }
    Memory memory(int rank) {
        Memory found{operand.data(), own[rank].operand.data(), reinterpret_cast<float*>(own[rank].sums.data()), common};
        found.common.turn = &own[rank].turn;
        return found;
    }
};

}  // namespace SF_VARIANT
}  // namespace splitfuse
