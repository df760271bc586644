// The creditor's side of a loan: holds leading tiles of a request of another process, and computes what its queries ask for.
//
// It runs in a thread of its own beside the engine's steps, and waits for nothing but the debtor's next message: two engines
// can lend to each other. Blocks of a loan are written by deposits alone, and read by no step.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

// Attends to the leading tiles, and writes the merged results. Returns false for a message that makes no sense.
inline bool answer_queries(Workspace& work, Channel& channel, i64 capacity, const Message& message, const Layer* layers,
                           i64 num_layers, const i32* blocks, i64 num_blocks) {
    if (message.index < 0 || message.index >= num_layers || !layers[message.index].qkv) return false;
    const Layer& layer = layers[message.index];
    const Layout kv(layer.store);
    const i64 tokens = message.tokens, tiles = message.tiles, elements = tokens * layer.heads.num_heads * kv.head_dim;
    if (tokens < 1 || tiles < 1 || tiles * TILE > num_blocks * kv.block_size) return false;
    if (message.start < tiles * TILE || message.start > INT32_MAX - tokens) return false;
    if (answer_offset(elements) + tokens * layer.heads.num_heads * lent_floats(kv) * 4 > capacity) return false;
    const i32 query_start[2] = {0, message.tokens}, seq_len = static_cast<i32>(message.start + tokens);
    Step step{};
    step.tokens = message.tokens;
    step.requests = 1;
    step.table_width = static_cast<i32>(num_blocks);
    step.query_start = query_start;
    step.seq_lens = &seq_len;
    step.tables = blocks;
    work.begin_step();
    work.reserve_attention(step, layer.heads, layer.store, tiles);
    parallel(work.num_threads, [&](Team& team) {
        Attention attention{step, layer.heads, layer.store, reinterpret_cast<const u16*>(data_of(channel)), nullptr,
                            work.own[team.rank].tile.data(), message.index, answers(channel, elements), &channel};
        attend(team, attention, work.items[0].items, reinterpret_cast<float*>(work.partials.data()));
    });
    return true;
}

// Writes a block, whose bytes of all layers with keys and values of their own lie side by side.
inline bool keep_block(Channel& channel, i64 capacity, i64 index, const Layer* layers, i64 num_layers, const i32* blocks,
                       i64 num_blocks) {
    if (index < 0 || index >= num_blocks) return false;
    const u8* from = data_of(channel);
    for (int writes = 0; writes < 2; ++writes) {  // first the size of all is looked at
        i64 offset = 0;
        for (i64 i = 0; i < num_layers; ++i) {
            if (!layers[i].qkv || layers[i].heads.foreign_kv) continue;
            const Layout kv(layers[i].store);
            const i64 bytes = kv.num_kv_heads * kv.pieces * kv.piece_bytes;
            if (writes) std::memcpy(kv.piece(blocks[index], 0, 0), from + offset, bytes);
            offset += bytes;
        }
        if (offset > capacity) return false;
    }
    return true;
}

// Answers messages until the channel is closed. `capacity` are the bytes behind its header. Python has checked that `blocks`
// are blocks of the layers' stores. What is in the channel may be changed by the debtor at any time, and is not trusted.
inline void lend(Workspace& work, Channel& channel, i64 capacity, const Layer* layers, i64 num_layers, const i32* blocks,
                 i64 num_blocks) {
    u32 done = channel.answered.load(std::memory_order_acquire);
    while (!channel.closed.load(std::memory_order_acquire)) {
        for (int spins = 0; spins < BUSY_SPINS && channel.asked.load(std::memory_order_acquire) == done; ++spins) _mm_pause();
        if (channel.asked.load(std::memory_order_acquire) == done) {
            sleep_while(channel.asked, done);
            continue;
        }
        done = channel.asked.load(std::memory_order_acquire);
        const Message message = channel.message;
        std::atomic_signal_fence(std::memory_order_seq_cst);  // what is looked at is what is used: it is not read again
        bool is_answered = false;
        if (message.kind == ATTEND) {
            is_answered = answer_queries(work, channel, capacity, message, layers, num_layers, blocks, num_blocks);
        }
        if (message.kind == DEPOSIT) {
            is_answered = keep_block(channel, capacity, message.index, layers, num_layers, blocks, num_blocks);
        }
        channel.refused = !is_answered;
        channel.answered.store(done, std::memory_order_seq_cst);
        wake(channel.answered);
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
