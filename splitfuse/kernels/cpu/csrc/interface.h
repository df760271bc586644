// The structs that cross from Python, mirrored in bindings.py. Pointers are borrowed for the time of a call.
#pragma once

#include <cstdint>

namespace splitfuse {

extern bool forked;  // whether this process is a fork, which has none of the threads of its parent: it computes with one

enum Format : std::int32_t { BF16 = 0, INT8 = 1, INT4 = 2 };
enum Activation : std::int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

// A linear weight [rows, columns] in panels of 32 rows, which are columns of the product. See weights.h.
struct Weight {
    std::int32_t format;
    std::int32_t gated;      // rows are gate and up halves, interleaved by 16 in the panels
    std::int64_t rows;       // N: of both halves where gated
    std::int64_t columns;    // K
    std::int64_t group;      // columns that share a scale; not used in bf16
    std::uint8_t* data;
    std::uint8_t qvalues[16];  // int4: what the nibbles stand for, + 128
};

// The keys and values of one layer. See kv_store.h.
struct Store {
    std::uint8_t* data;
    std::int64_t num_blocks;
    std::int32_t block_size;
    std::int32_t num_kv_heads;
    std::int32_t head_dim;
    std::int32_t int8;
};

// The states of one recurrent layer, in fp32. See delta.h.
struct States {
    float* data;
    std::int64_t num_slots;
    std::int64_t slot_floats;
};

// One step: T tokens of S requests, whose hidden states are wanted in R rows. The arrays are those of RaggedBatch; a kernel
// that does not need one may be given null.
struct Step {
    std::int32_t tokens;
    std::int32_t requests;
    std::int32_t table_width;
    std::int32_t num_rows;
    const std::int32_t* ids;          // [T]
    const std::int32_t* positions;    // [T]
    const std::int32_t* slots;        // [T]
    const std::int32_t* query_start;  // [S + 1]
    const std::int32_t* seq_lens;     // [S]
    const std::int32_t* state_reads;  // [S], -1: a state of zeros
    const std::int32_t* state_writes; // [S]
    const std::int32_t* tables;       // [S, table_width]
    const std::int32_t* rows;         // [R]
};

// How heads are rotated and attended.
struct Heads {
    std::int32_t num_heads;
    std::int32_t rotary_dim;
    std::int64_t max_position;  // rows of cos and sin
    const float* cos;           // [max_position, rotary_dim / 2]
    const float* sin;
    float eps;                  // of q_norm and k_norm
    float scale;
    float softcap;              // 0: none
};

// A gated delta net. What its channels are, and the rest, is in delta.h.
struct Delta {
    const float* conv;        // [taps, channels]
    const float* decay;       // [Hv]
    const float* decay_bias;  // [Hv]
    const float* norm;        // [Dv]
    std::int32_t key_heads;
    std::int32_t value_heads;
    std::int32_t key_dim;     // of a head
    std::int32_t value_dim;
    std::int32_t taps;
    float eps;                // of norm
};

// A gated short convolution.
struct ShortConv {
    const float* conv;        // [taps, channels]
    const float* bias;        // [channels], or null
    std::int32_t channels;
    std::int32_t taps;
};

// A mixture of experts. Its experts are packed alike.
struct Mixture {
    const Weight* router;   // [E, C]
    const Weight* w13;      // [E], gated
    const Weight* w2;       // [E]
    std::int32_t num_experts;
    std::int32_t top_k;
    std::int32_t renormalize;
    std::int32_t activation;
};

// One pre-norm decoder layer; a null pointer is what the network does not have.
struct Layer {
    const float* attn_norm;          // [C]
    const Weight* qkv;
    const std::uint16_t* qkv_bias;
    const float* q_norm;             // [D]
    const float* k_norm;
    const Weight* o;
    const std::uint16_t* o_bias;
    const float* mlp_norm;
    const Weight* gate_up;
    const std::uint16_t* gate_up_bias;
    const Weight* down;
    const std::uint16_t* down_bias;
    const Mixture* mixture;          // if there is one, there is no gate_up and no down
    Store store;
    std::int32_t window;             // 0: none
    std::int32_t activation;
};

// All of a network but its output head.
struct Network {
    const Layer* layers;
    std::int64_t num_layers;
    std::int64_t hidden;
    std::int64_t vocabulary;
    const std::uint16_t* table;      // embedding [vocabulary, C], or null:
    const Weight* packed_table;      // the packed head that it is tied to
    const float* norm;               // [C]
    float eps;
};

}  // namespace splitfuse
