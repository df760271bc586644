// What layers have in common that keep a state of one size for each request in place of keys and values: slots, chunks that
// go on from one, the inputs of a convolution, and the way of a head's state through tokens. States are in fp32: a chunk
// begins from that of one slot, and leaves its own in another or the same.
//
// A state is taken through its tokens one by one, each of its columns alone, so that no cut of the tokens into chunks, no
// neighbour and no thread changes a bit.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

#ifdef SF_AVX512
constexpr int PANEL_FLOATS = 4;  // of a row of a state's panel: 3 x 4 vectors and what they are multiplied with fill the registers
#else
constexpr int PANEL_FLOATS = 1;
#endif
constexpr i64 PANEL_COLUMNS = PANEL_FLOATS * LANES;
constexpr i64 TILE_TOKENS = 64;  // tokens whose inputs a thread keeps while it takes a state through them

// Where the last inputs of a convolution lie in a slot, [taps - 1][channels], and how long a slot is.
struct Tail {
    i64 channels, inputs;  // inputs: taps - 1
    i64 offset;            // floats of a slot before it
    i64 slot_floats;

    Tail(i64 channels, i64 taps, i64 offset)
        : channels(channels), inputs(taps - 1), offset(offset), slot_floats(ceil_div(offset + inputs * channels, LANES) * LANES) {}
};

// The heads of a layer whose states are matrices. A state, [key_dim][value_dim], is panels of PANEL_COLUMNS columns side by
// side, the last one as wide as what is left. What is convolved are queries, keys and values; some value heads share a key.
struct StateShape {
    i64 key_heads, value_heads, key_dim, value_dim;
    i64 padded;                      // values of a head
    i64 group;                       // value heads that share a key
    i64 keys, values;                // offsets among the channels
    i64 head_floats;
    Tail tail;

    StateShape(i64 key_heads, i64 value_heads, i64 key_dim, i64 value_dim, i64 taps)
        : key_heads(key_heads), value_heads(value_heads), key_dim(key_dim), value_dim(value_dim),
          padded(ceil_div(value_dim, LANES) * LANES), group(value_heads / key_heads), keys(key_heads * key_dim), values(2 * keys),
          head_floats(key_dim * padded), tail(values + value_heads * value_dim, taps, value_heads * head_floats) {}

    i64 width() const { return tail.channels + value_heads * value_dim; }  // of a row of the projected input: channels and z
};

// --- slots and chunks -------------------------------------------------------------------------------------------------------

SF_INLINE float* slot_of(const States& states, i32 slot) { return states.data + slot * states.slot_floats; }

// Returns whether a chunk goes on from the state that the one before it in the step leaves: the same thread must take both.
SF_INLINE bool goes_on(const Step& step, i64 request) {
    return request > 0 && step.state_reads[request] >= 0 && step.state_reads[request] == step.state_writes[request - 1];
}

// Calls `take` with each chunk that follows on `request`, itself first, and with none if `request` follows on another.
template <class Take>
SF_INLINE void follow(const Step& step, i64 request, Take take) {
    if (goes_on(step, request)) return;
    do take(request);
    while (++request < step.requests && goes_on(step, request));
}

// Puts what a chunk begins from, `count` floats of its state from `offset` on, into the slot that it writes, and returns them.
SF_INLINE float* begin_state(const States& states, const Step& step, i64 request, i64 offset, i64 count) {
    const i32 read = step.state_reads[request], write = step.state_writes[request];
    float* state = slot_of(states, write) + offset;
    if (read < 0) std::memset(state, 0, count * sizeof(float));
    else if (read != write) std::memcpy(state, slot_of(states, read) + offset, count * sizeof(float));
    return state;
}

// --- convolutions -----------------------------------------------------------------------------------------------------------

constexpr i64 MOST_TAPS = 16;
constexpr i64 AHEAD = 8;  // tokens that their inputs are prefetched before: a row is pages long, which hardware does not see

// The inputs of a convolution: rows of this step, and before them the tail of what the request's chunk begins from.
struct Inputs {
    const float* rows;  // [tokens, width]
    i64 width;
    const float* tail;  // [inputs, channels]; null: there was nothing
    i64 channels, inputs;

    // Writes the rows that the taps of token `i` read, and returns the first tap that there is one for.
    __attribute__((always_inline)) i64 rows_of(i64 i, const float** taps) const {
        for (i64 tap = 0; tap <= inputs; ++tap) {
            const i64 at = i - inputs + tap;
            taps[tap] = at >= 0 ? rows + at * width : tail + (at + inputs) * channels;
        }
        return tail ? 0 : std::max(inputs - i, i64{0});
    }
};

SF_INLINE Inputs inputs_of(const Tail& tail, const States& states, const Step& step, i64 request, const float* x, i64 width) {
    const i32 read = step.state_reads[request];
    return {x + step.query_start[request] * width, width, read < 0 ? nullptr : slot_of(states, read) + tail.offset, tail.channels, tail.inputs};
}

// Writes channels `begin` to end - 1 of the tail that `tokens` tokens leave, which may take the place of the one before.
template <class Value>
SF_INLINE void put_tail(const Inputs& in, i64 tokens, i64 begin, i64 end, Value value, float* tail) {
    const i64 bytes = (end - begin) * sizeof(float);
    for (i64 r = 0; r < in.inputs; ++r) {
        const i64 at = tokens - in.inputs + r;  // a row of the tail before lies behind the one whose place it takes
        float* out = tail + r * in.channels;
        if (at >= 0) for (i64 c = begin; c < end; ++c) out[c] = value(in.rows + at * in.width, c);
        else if (in.tail) std::memmove(out + begin, in.tail + (at + in.inputs) * in.channels + begin, bytes);
        else std::memset(out + begin, 0, bytes);
    }
}

// The same for channels that are convolved as they come.
SF_INLINE void put_tail(const Inputs& in, i64 tokens, i64 channel, i64 count, float* tail) {
    put_tail(in, tokens, channel, channel + count, [](const float* row, i64 c) { return row[c]; }, tail);
}

SF_INLINE int lanes_left(i64 columns, i64 c) { return static_cast<int>(std::min<i64>(columns - c, LANES)); }

// Convolves `dim` channels of token `i`, with SiLU, and returns the sum of their squares. With `padded` whole vectors are
// written, with zeros behind the channels.
SF_INLINE float convolve(const Inputs& in, i64 i, i64 channel, i64 dim, const float* weights, const float* bias, bool padded, float* out) {
    const float* rows[MOST_TAPS];
    const i64 first = in.rows_of(i, rows);
    Floats squares = broadcast(0.0f);
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        _mm_prefetch(reinterpret_cast<const char*>(in.rows + (i + AHEAD) * in.width + channel + c), _MM_HINT_T0);
        const float* weight = weights + channel + c;
        Floats value = bias ? load(bias + channel + c, count) : broadcast(0.0f);
        for (i64 tap = first; tap <= in.inputs; ++tap) {
            if (count == LANES) value = fma(load(weight + tap * in.channels), load(rows[tap] + channel + c), value);
            else value = fma(load(weight + tap * in.channels, count), load(rows[tap] + channel + c, count), value);
        }
        value = value * sigmoid(value);
        squares = fma(value, value, squares);
        if (padded || count == LANES) store(out + c, value);
        else store(out + c, value, count);
    }
    return sum(squares);
}

// --- states -----------------------------------------------------------------------------------------------------------------

// Returns log(1 + a) for a from 0 to 1, to about a unit in the last place: 2 artanh(a / (2 + a)).
SF_INLINE Floats log1p_of_fraction(Floats a) {
    Floats s = a / (broadcast(2.0f) + a), square = s * s;  // at most 1/9
    Floats p = broadcast(2.0f / 15.0f);
    p = fma(p, square, broadcast(2.0f / 13.0f));
    p = fma(p, square, broadcast(2.0f / 11.0f));
    p = fma(p, square, broadcast(2.0f / 9.0f));
    p = fma(p, square, broadcast(2.0f / 7.0f));
    p = fma(p, square, broadcast(2.0f / 5.0f));
    p = fma(p, square, broadcast(2.0f / 3.0f));
    return fma(p * square, s, s + s);
}
SF_INLINE Floats softplus(Floats a) {
    return max(a, broadcast(0.0f)) + log1p_of_fraction(exp2(abs(a) * broadcast(-LOG2E)));
}

// The tokens of one request on their way through some columns of one head's state.
struct Recurrence {
    const float* queries_keys;  // [tokens][2 Dk]: a token's query, then its key
    const float* gates;         // [tokens][2]: what the state keeps of itself, and how much of a value or its error is added
    float* values;              // [tokens][stride]: outputs take their place
    i64 tokens, key_dim, stride;
    float skip;                 // where values are added: how much of one is added to its output too
};

// For each token: S = S kept; S = S + k (v - k S) beta; out = q S. The new state is read for this token's output and for what
// the next one's key finds in it while it is in a register.
struct Correct {
    template <int WIDTH>
    SF_LEAF void run(const Recurrence& r, float* state) {
        const i64 key_dim = r.key_dim;
        const float* qk = r.queries_keys;
        Floats found[WIDTH], out[WIDTH], error[WIDTH];
        for (int w = 0; w < WIDTH; ++w) found[w] = broadcast(0.0f);
        for (i64 i = 0; i < key_dim; ++i) {
            const Floats key = broadcast(qk[key_dim + i]);
            for (int w = 0; w < WIDTH; ++w) found[w] = fma(key, load(state + (i * WIDTH + w) * LANES), found[w]);
        }
        for (i64 t = 0; t < r.tokens; ++t, qk += 2 * key_dim) {
            const Floats kept = broadcast(r.gates[2 * t]), beta = broadcast(r.gates[2 * t + 1]);
            float* values = r.values + t * r.stride;
            for (int w = 0; w < WIDTH; ++w) {
                error[w] = (load(values + w * LANES) - found[w] * kept) * beta;
                found[w] = out[w] = broadcast(0.0f);
            }
            const float *query = qk, *key = qk + key_dim, *next_key = t + 1 < r.tokens ? key + 2 * key_dim : key;
            float* row = state;
            for (i64 i = 0; i < key_dim; ++i, row += WIDTH * LANES) {
                const Floats q = broadcast(query[i]), k = broadcast(key[i]), next = broadcast(next_key[i]);
                for (int w = 0; w < WIDTH; ++w) {
                    const Floats s = fma(k, error[w], load(row + w * LANES) * kept);
                    store(row + w * LANES, s);
                    out[w] = fma(q, s, out[w]);
                    found[w] = fma(next, s, found[w]);
                }
            }
            for (int w = 0; w < WIDTH; ++w) store(values + w * LANES, out[w]);
        }
    }
};

// For each token: S = S kept; S = S + k (v beta); out = q S + v skip. Two tokens at a time, while a row is in registers.
struct Add {
    template <int WIDTH, int TOKENS>
    SF_INLINE void step(const Recurrence& r, i64 t, float* state) {
        const i64 key_dim = r.key_dim;
        const float* qk = r.queries_keys + t * 2 * key_dim;
        Floats kept[TOKENS], added[TOKENS][WIDTH], out[TOKENS][WIDTH];
        for (int n = 0; n < TOKENS; ++n) {
            kept[n] = broadcast(r.gates[2 * (t + n)]);
            for (int w = 0; w < WIDTH; ++w) {
                const Floats value = load(r.values + (t + n) * r.stride + w * LANES);
                added[n][w] = value * broadcast(r.gates[2 * (t + n) + 1]);
                out[n][w] = value * broadcast(r.skip);
            }
        }
        for (i64 i = 0; i < key_dim; ++i, state += WIDTH * LANES)
            for (int w = 0; w < WIDTH; ++w) {
                Floats s = load(state + w * LANES);
                for (int n = 0; n < TOKENS; ++n) {
                    s = fma(broadcast(qk[(2 * n + 1) * key_dim + i]), added[n][w], s * kept[n]);
                    out[n][w] = fma(broadcast(qk[2 * n * key_dim + i]), s, out[n][w]);
                }
                store(state + w * LANES, s);
            }
        for (int n = 0; n < TOKENS; ++n)
            for (int w = 0; w < WIDTH; ++w) store(r.values + (t + n) * r.stride + w * LANES, out[n][w]);
    }

    template <int WIDTH>
    SF_LEAF void run(const Recurrence& r, float* state) {
        i64 t = 0;
        for (; t + 2 <= r.tokens; t += 2) step<WIDTH, 2>(r, t, state);
        if (t < r.tokens) step<WIDTH, 1>(r, t, state);
    }
};

// Takes a head's state, all its columns, through tokens.
template <class How>
SF_INLINE void run_state(const StateShape& shape, Recurrence r, float* state) {
    float* values = r.values;
    for (i64 c = 0; c < shape.padded; c += PANEL_COLUMNS) {
        const i64 width = std::min(PANEL_COLUMNS, shape.padded - c) / LANES;
        float* panel = state + c * shape.key_dim;
        r.values = values + c;
#ifdef SF_AVX512
        if (width == 4) How::template run<4>(r, panel);
        else if (width == 3) How::template run<3>(r, panel);
        else if (width == 2) How::template run<2>(r, panel);
        else
#endif
        How::template run<1>(r, panel);
        (void)width;
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
