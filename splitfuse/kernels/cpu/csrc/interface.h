// The structs that cross from Python, mirrored in structs.py and layer_structs.py. Pointers are borrowed for a call.
#pragma once

#include <cstdint>

namespace splitfuse {

#if defined(__has_include)
#if __has_include(<amxtileintrin.h>)
#define SF_TILE_INSTRUCTIONS  // the compiler, and so its assembler, knows AMX
#endif
#endif
extern const bool emulates_tiles;  // SPLITFUSE_EMULATE_AMX is set

extern bool forked;  // whether this process is a fork, which has none of the threads of its parent: it computes with one

constexpr int MOST_NODES = 16;  // kernels/cpu/nodes.py knows the number

// The NUMA nodes on which the threads of a team run, in the order of the threads: a node has some that follow each other, and the
// panels of each weight that lie as far in it as they do among all.
struct Nodes {
    std::int32_t count;        // below 2: the system places threads, and all panels are alike
    std::int32_t num_threads;  // of all nodes; teams of another size are not divided
    std::int32_t first_thread[MOST_NODES + 1];

    std::int32_t of(std::int32_t thread) const {
        std::int32_t node = 0;
        while (thread >= first_thread[node + 1]) ++node;
        return node;
    }
    std::int64_t first_place(std::int32_t node, std::int64_t places) const { return places * first_thread[node] / num_threads; }
};
extern Nodes nodes;
void bind_thread(std::int32_t node);  // lets the calling thread run on the cores of a node, as long as they are its own

enum Format : std::int32_t { BF16 = 0, INT8 = 1, INT4 = 2, GROUPED = 3, FP8 = 4 };
enum Number : std::int32_t { NONE = 0, F32 = 1, F16 = 2, BFLOAT16 = 3, U8 = 4, I8 = 5, E8M0 = 6, LOW_BITS = 7, HIGH_BITS = 8 };
enum Activation : std::int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, SIGMOID = 5, CLAMPED_SWIGLU = 6, IDENTITY = 7 };

// A linear weight [rows, columns] in panels of 32 rows, which are columns of the product. See weights.h, and groups.h for
// GROUPED.
struct Weight {
    std::int32_t format;
    std::int32_t gated;      // rows are gate and up halves, interleaved by 16 in the panels
    std::int64_t rows;       // N: of both halves where gated
    std::int64_t columns;    // K
    std::int64_t group;      // columns that share a scale; not used in bf16
    std::uint8_t* data;
    std::uint8_t qvalues[16];  // int4, and GROUPED of 4 bits: what the nibbles stand for, + bias
    std::int32_t bias;         // of int4 and GROUPED: what is added to each level as it is kept
    std::int32_t bits;         // from here on of GROUPED. 2 to 6, or 8
    std::int32_t scale_type;   // Number
    std::int32_t offset_type;  // Number, of the mins or zeros of groups; NONE: groups have none; HIGH_BITS: of the scales' bytes
    std::int32_t zeros;        // offsets are levels that stand for zero
    std::int32_t two_level;    // scales and mins are multiples of two numbers in fp16 for each 256 columns
    const std::int32_t* order; // [columns]: which element of x each column is multiplied with, or null: in order
    const Weight* parts;       // [num_parts] that are stacked by rows and read x alike, or null
    std::int64_t num_parts;
};

// The keys and values of one layer. See kv_store.h.
struct Store {
    std::uint8_t* data;
    std::int64_t num_blocks;
    std::int32_t block_size;
    std::int32_t num_kv_heads;
    std::int32_t head_dim;
    std::int32_t int8;
    std::int32_t value_from;  // the element of a key that its value begins at; 0: values are kept apart
};

// The states of one recurrent layer, in fp32. See states.h.
struct States {
    float* data;
    std::int64_t num_slots;
    std::int64_t slot_floats;
};

// What an adapter adds to a weight [N, K] of rank R, a multiple of 8: scales * (x a), times b. Eight ranks of a lie side by side,
// 32 columns of each at a time, or 8 if it is quantized. In the order of the weight's panels, b lies in vectors of 16 columns,
// each of which has only the ranks that change it, in pairs: an even number from an even one on. Both are int8, of a + 128,
// where x is, for weights in INT8 and INT4, and `scales` has the scales of their ranks; for other weights they are bf16.
struct LoraWeight {
    const void* a;                 // [R / 8][K / 32][8][32] or, quantized, [R / 8][K / 8][8][8]
    const float* scales;           // [R]
    const std::int32_t* vectors;   // [vectors][3]: the first rank, how many, and the pair in b where they begin
    const void* b;                 // [pairs][16][2]
    std::int64_t rank;             // R; 0: the weight stays as it is
};

// The adapters of a step. A table has all weights of an adapter, LORA_TARGETS of each layer.
struct Lora {
    const std::int32_t* of_row;           // [T], -1: none
    const std::int32_t* order;            // [T], of rows: those of an adapter follow each other
    const LoraWeight* const* tables;      // [num_adapters]
    std::int64_t num_adapters;
    std::int64_t most_ranks;              // of all weights
};
enum LoraTarget : std::int32_t { LORA_QKV = 0, LORA_GATE = 1, LORA_O = 2, LORA_UP = 3, LORA_DOWN = 4, LORA_TARGETS = 5 };

// A request whose leading keys and values, whole tiles of 512, a creditor holds: another process on this machine, which gives
// the merged result of these tiles through memory that both share. See loans.h.
struct Channel;
struct Loan {
    std::int32_t request;      // of the step
    std::int32_t tiles;
    Channel* channel;
    std::int64_t capacity;     // bytes of the channel behind its header
    std::int32_t lost;         // set if the creditor does not answer: what the step computes of the request is of no use
    std::uint32_t asked;       // number of the message that was sent last
    std::int32_t awaits;       // whether its answer is still to be read
    std::int32_t patience;     // milliseconds that the creditor may take without any progress
};
struct Loans {
    Loan* of;
    const std::int32_t* of_request;  // [S], the place of the request's loan, -1: it has none
    std::int64_t count;
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
    const Lora* lora;                 // or null: no row has an adapter
    const Loans* loans;               // or null: each request has all of its keys and values here
};

// The numbers of a step as Python packs them: the arrays of Step from its tables on, one behind the other, in this order:
// tables, ids, positions, slots, query_start, seq_lens, state_reads, state_writes, rows.
struct PackedStep {
    const std::int32_t* numbers;
    std::int32_t tokens;
    std::int32_t requests;
    std::int32_t table_width;
    std::int32_t num_rows;
    const Lora* lora;
    const Loans* loans;
};

inline Step unpacked(const PackedStep& packed) {
    const std::int32_t* at = packed.numbers;
    auto take = [&](std::int64_t count) {
        const std::int32_t* part = at;
        at += count;
        return part;
    };
    Step step{};
    step.tokens = packed.tokens;
    step.requests = packed.requests;
    step.table_width = packed.table_width;
    step.num_rows = packed.num_rows;
    step.tables = take(static_cast<std::int64_t>(packed.requests) * packed.table_width);
    step.ids = take(packed.tokens);
    step.positions = take(packed.tokens);
    step.slots = take(packed.tokens);
    step.query_start = take(packed.requests + 1);
    step.seq_lens = take(packed.requests);
    step.state_reads = take(packed.requests);
    step.state_writes = take(packed.requests);
    step.rows = take(packed.num_rows);
    step.lora = packed.lora;
    step.loans = packed.loans;
    return step;
}

// A norm of vectors, RMS or layer norm; without a weight there is none.
struct Norm {
    const float* weight;
    const float* bias;      // or null
    float eps;
    std::int32_t centered;  // layer norm: the mean is subtracted first
};

// How the heads of a layer are normed, rotated and attended.
struct Heads {
    std::int32_t num_heads;
    std::int32_t rotary_dim;     // 0: positions are not rotated
    const float* cos;            // [positions, rotary_dim / 2]
    const float* sin;
    Norm q_norm;                 // weights [D], or of each head [H, D]
    Norm k_norm;
    Norm v_norm;                 // weights [D]
    std::int32_t own_norms;      // each head has weights of its own
    std::int32_t whole_rows;     // all heads of a token are normed together
    std::int32_t norms_last;     // queries and keys are normed after they are rotated
    std::int32_t foreign_kv;     // keys and values are another layer's: here are queries alone
    std::int32_t window;         // 0: none
    std::int32_t chunk;          // 0: none
    float scale;
    float softcap;               // 0: none
    std::int32_t query_length;   // 0: queries are not scaled by position
    std::int32_t query_offset;
    double query_beta;
    const float* sinks;          // [H] or null
    const float* slopes;         // [H], of ALiBi, or null
};

// An MLP: down(activation(gate) * up) if `up` is gated, else down(activation(up)).
struct Mlp {
    const Weight* up;
    const std::uint16_t* up_bias;
    const Weight* down;
    const std::uint16_t* down_bias;
    std::int32_t activation;
};

// Attention to one key for all heads, whose last kv_rank elements, a normed vector, are the value; the other attention has
// no k_b. A query's last nope_dim elements are multiplied by k_b, and what a head gives by v_b: see linear_heads().
struct Latent {
    const Weight* q_b;        // [H (rope_dim + nope_dim), q_width], or null: queries lie in qkv's rows
    const Weight* k_b;        // of each head [kv_rank, nope_dim]
    const Weight* v_b;        // of each head [v_dim, kv_rank]
    Norm q_norm;
    Norm kv_norm;
    std::int32_t q_width;     // of what is read of queries in qkv's rows, before [kv_rank] and [rope_dim]
    std::int32_t kv_rank;
    std::int32_t rope_dim;
    std::int32_t nope_dim;
    std::int32_t v_dim;
};

// What a layer adds from an input of its own: norm(out(activation(gate(x)) * input)); without a gate there is none.
struct TokenInput {
    const Weight* gate;       // [P, C]
    const Weight* out;        // [C, P]
    Norm norm;                // [C]
    std::int32_t activation;
};

// A gated delta net. See delta.h.
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

// A Mamba-2 mixer. See mamba.h.
struct Mamba {
    const float* conv;        // [taps, channels]
    const float* conv_bias;   // [channels], or null
    const float* decay;       // [H]
    const float* decay_bias;  // [H]
    const float* skip;        // [H]
    const float* norm;        // [H P]
    std::int32_t groups;
    std::int32_t heads;
    std::int32_t state_dim;
    std::int32_t head_dim;    // P
    std::int32_t taps;
    float eps;                // of norm
    float dt_min;             // of time steps
    float dt_max;
};

// A mixer with a state: a short convolution if there are no gates, else the one of the two that has a convolution.
struct Recurrent {
    const Weight* in_proj;
    const std::uint16_t* in_proj_bias;
    const Weight* gates;
    const std::uint16_t* gates_bias;
    const Weight* out_proj;
    const std::uint16_t* out_proj_bias;
    Delta delta;
    ShortConv conv;
    Mamba mamba;
    States states;
};

// How tokens choose among experts by their scores. See RouterSpec in kernels/layers.py.
struct Router {
    const float* choice_bias;  // [E], or null
    std::int32_t num_experts;
    std::int32_t top_k;
    std::int32_t sigmoid;      // scores are sigmoids of the logits; else their softmax
    std::int32_t renormalize;
    std::int32_t num_groups;   // at most 64
    std::int32_t top_groups;
    std::int32_t group_best;   // 1 or 2
    float min_sum;
    float scale;
};

// A mixture of experts, which are packed alike.
struct Mixture {
    Router choice;
    const Weight* router;      // [E, C]
    const std::uint16_t* router_bias;
    const Weight* up;          // [E], gated or not
    const Weight* down;        // [E]
    const std::uint16_t* const* up_bias;    // [E], or null
    const std::uint16_t* const* down_bias;
    std::int32_t activation;
    Mlp shared;                // every token visits it, if it is there
    const Weight* shared_gate; // [1, C], or null: what it gives is not gated
    const float* expert_scale; // [E], of the weights, or null
    std::int32_t scales_input; // a weight multiplies what its expert reads
    std::int32_t one_order;    // all of `up` read columns in the same order
    Norm router_norm;          // of the layer's input, in place of mlp_norm, as is the next
    Norm expert_norm;
    Norm post_expert_norm;     // of what the experts give, and of what the shared MLP gives
    Norm post_shared_norm;
};

// One decoder layer; a null pointer is what it does not have. A block is a mixer or an MLP.
struct Layer {
    Norm attn_norm;                  // of what a block reads, [C]
    Norm post_attn_norm;             // of what a block gives, [C]
    const Weight* qkv;
    const std::uint16_t* qkv_bias;
    const Weight* attn_gate;
    const Weight* o;
    const std::uint16_t* o_bias;
    Latent latent;
    Heads heads;
    Store store;
    Recurrent recurrent;             // in place of attention
    Norm mlp_norm;
    Norm post_mlp_norm;
    Mlp mlp;
    const Mixture* mixture;          // in place of the MLP
    TokenInput token_input;
    std::int32_t parallel;           // both blocks read the layer's input
    float residual_scale;            // of what a block gives
    float output_scale;              // of what the layer gives
};

// A rank of a tensor-parallel group, in which processes compute a network together: each has a share of its weights. Ranks
// gather if there is a meeting, else they reduce. See group.h.
struct Meeting;
struct Group {
    std::int32_t rank;
    std::int32_t size;
    Meeting* meeting;            // in memory that all ranks share
    std::uint8_t* shared;        // there, for what all read of a step
    std::int64_t shared_bytes;
    std::int64_t patience;       // milliseconds that a rank waits for the others
    std::int32_t (*reduce)(float* numbers, std::int64_t count);  // returns whether it failed
    std::int32_t failed;         // set if a rank did not come: what the step has computed is of no use
};

// The choice of a token for each of some rows [R, C]: of the logits that the head gives of a row the first of the largest ones,
// or, if there are filters and that of the row has a temperature, a token that is drawn by the row's number.
struct Choices {
    const Weight* head;          // [V, C]
    const std::uint16_t* bias;   // [V], or null
    const double* filters;       // [R] of Filter, or null: see draw.h
    const double* numbers;       // [R], or null without filters
    std::int32_t* ids;           // [R], the chosen tokens
    float* peaks;                // [R], the largest logits; NaN if any of the row is
    std::int64_t vocabulary;     // V of the whole head, of which a rank of a group that gathers has rows from
    std::int64_t first_id;       // this one on; its first rank chooses
    float* logits;               // [R, vocabulary], in memory that all ranks share; else null: the kernels have a buffer
};

// All of a network but its output head.
struct Network {
    const Layer* layers;
    std::int64_t num_layers;
    std::int64_t hidden;
    std::int64_t vocabulary;
    const std::uint16_t* table;      // embedding [vocabulary, C], or null:
    const Weight* packed_table;      // the packed head that it is tied to
    const std::uint16_t* positions;  // [positions, C], added to the embedding, or null
    float embed_scale;
    Norm norm;                       // [C]
    const std::uint16_t* token_inputs;  // [rows, L P], of which each layer gets P elements, or null
    const Weight* token_projection;  // [L P, C], of the embedding
    Norm token_input_norm;           // [P]
    std::int64_t token_input_size;   // P
    Group* group;                    // or null: this process computes it alone
    std::int64_t first_id;           // of the rows of the embedding that are here
    std::int64_t num_ids;
    std::int64_t num_positions;      // those that positions are rotated for, or have embeddings
    std::int64_t num_blocks;         // of the stores of its layers, as long as it computes with these
    std::int64_t block_size;
    std::int64_t num_states;         // slots of its recurrent states; -1: it has none
};

// Parts of a step, for an account of its time. Python knows their names: OPERATORS in structs.py.
enum Operator : std::int32_t { EMBEDDING, QKV, ROTATION, ATTENTION, O_PROJ, GATE_UP, DOWN, HEAD, CHOICE, OTHERS, NUM_OPERATORS };

// Nanoseconds that a thread has taken for an operator: in sharings that were split, such as norms and packing, and in those of
// which runs were claimed, such as products; of each the work, and then the wait for other threads to end theirs.
struct OperatorTime {
    std::int64_t split, after_split;
    std::int64_t claimed, after_claimed;
};

}  // namespace splitfuse
