// Layers that keep a state of one size for each request in place of keys and values: a gated delta net, and a short
// convolution. States lie in slots, in fp32: a chunk begins from that of one slot, and leaves its own in another or the same.
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

// Where the last inputs of a convolution lie in a slot, [taps - 1][channels], and how long a slot is.
struct Tail {
    i64 channels, inputs;  // inputs: taps - 1
    i64 offset;            // floats of a slot before it
    i64 slot_floats;

    Tail(i64 channels, i64 taps, i64 offset)
        : channels(channels), inputs(taps - 1), offset(offset), slot_floats(ceil_div(offset + inputs * channels, LANES) * LANES) {}
};

// The state of a head, [Dk][Dv], is panels of PANEL_COLUMNS columns side by side, the last one as wide as what is left.
struct DeltaShape {
    i64 key_dim, value_dim, padded;  // of a head; padded: values
    i64 key_heads, value_heads, group;
    i64 keys;                        // offset of keys among the channels
    i64 values;
    i64 panels;                      // of a head
    i64 head_floats;
    Tail tail;

    explicit DeltaShape(const Delta& d)
        : key_dim(d.key_dim), value_dim(d.value_dim), padded(ceil_div(d.value_dim, LANES) * LANES), key_heads(d.key_heads),
          value_heads(d.value_heads), group(d.value_heads / d.key_heads), keys(d.key_heads * d.key_dim), values(2 * keys),
          panels(ceil_div(padded, PANEL_COLUMNS)), head_floats(d.key_dim * padded),
          tail(values + d.value_heads * d.value_dim, d.taps, d.value_heads * head_floats) {}

    i64 width() const { return tail.channels + value_heads * value_dim; }  // of a row of the projected input
};

SF_INLINE float* slot_of(const States& states, i32 slot) { return states.data + slot * states.slot_floats; }

constexpr i64 MOST_TAPS = 16;

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

SF_INLINE int lanes_left(i64 columns, i64 c) { return static_cast<int>(std::min<i64>(columns - c, LANES)); }

// The tokens of one request on their way through some columns of one head's state.
struct Recurrence {
    const float* queries_keys;  // [tokens][2 Dk]: a token's query, then its key, both of unit length, the query scaled
    const float* gates;         // [tokens][2]: what the state keeps of itself, and how much of an error is corrected
    float* values;              // [tokens][stride]: outputs take their place
    i64 tokens, key_dim, stride;
};

// For each token: S = S e^g; error = (v - k S) beta; S = S + k error; out = q S. The new state is read for this token's output
// and for what the next one's key finds in it while it is in a register.
template <int WIDTH>
SF_LEAF void run_panel(const Recurrence& r, float* state) {
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

SF_INLINE void run_panel(const Recurrence& r, i64 width, float* state) {
#ifdef SF_AVX512
    if (width == 4) return run_panel<4>(r, state);
    if (width == 3) return run_panel<3>(r, state);
    if (width == 2) return run_panel<2>(r, state);
#endif
    (void)width;
    run_panel<1>(r, state);
}

// What a thread keeps of the tokens that it takes through the heads of one key.
constexpr i64 DELTA_TOKENS = 64;
struct DeltaTile {
    float* queries_keys;  // [DELTA_TOKENS][2 Dk]
    float* values;        // [group][DELTA_TOKENS][padded]
    float* gates;         // [group][DELTA_TOKENS][2]

    DeltaTile(const DeltaShape& shape, float* memory)
        : queries_keys(memory), values(memory + ceil_div(DELTA_TOKENS * 2 * shape.key_dim, LANES) * LANES),
          gates(values + shape.group * DELTA_TOKENS * shape.padded) {}

    static i64 bytes(const DeltaShape& shape) {
        return (2 * shape.key_dim + shape.group * (shape.padded + 2)) * DELTA_TOKENS * sizeof(float);
    }
};

SF_INLINE Inputs inputs_of(const Tail& tail, const States& states, const Step& step, i64 request, const float* x, i64 width) {
    const i32 read = step.state_reads[request];
    return {x + step.query_start[request] * width, width, read < 0 ? nullptr : slot_of(states, read) + tail.offset, tail.channels, tail.inputs};
}

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

constexpr i64 AHEAD = 8;  // tokens that their inputs are prefetched before: a row is pages long, which hardware does not see

// Convolves `dim` channels of token `i`, with SiLU, padded with zeros; with `scale` it makes a vector of that length.
SF_INLINE void convolve(const Inputs& in, i64 i, i64 channel, i64 dim, const float* weights, float scale, float* out) {
    const float* rows[MOST_TAPS];
    const i64 first = in.rows_of(i, rows);
    Floats squares = broadcast(0.0f);
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        _mm_prefetch(reinterpret_cast<const char*>(in.rows + (i + AHEAD) * in.width + channel + c), _MM_HINT_T0);
        const float* weight = weights + channel + c;
        Floats value = broadcast(0.0f);
        for (i64 tap = first; tap <= in.inputs; ++tap) {
            if (count == LANES) value = fma(load(weight + tap * in.channels), load(rows[tap] + channel + c), value);
            else value = fma(load(weight + tap * in.channels, count), load(rows[tap] + channel + c, count), value);
        }
        value = value * sigmoid(value);
        squares = fma(value, value, squares);
        if (scale == 0.0f || count == LANES) store(out + c, value);
        else store(out + c, value, count);
    }
    if (scale == 0.0f) return;
    const Floats length = broadcast(scale / std::sqrt(sum(squares) + 1e-6f));
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        store(out + c, load(out + c, count) * length, count);
    }
}

// Writes for `tokens` tokens what a head's state keeps, and how much of an error is corrected, from rows of gates.
SF_INLINE void put_gates(const Delta& d, i64 head, const float* rows, i64 tokens, float* out) {
    const i64 width = 2 * d.value_heads;
    for (i64 t = 0; t < tokens; t += LANES) {
        const int count = lanes_left(tokens, t);
        alignas(64) float beta[LANES] = {}, rate[LANES] = {};
        for (int lane = 0; lane < count; ++lane) {
            beta[lane] = rows[(t + lane) * width + head];
            rate[lane] = rows[(t + lane) * width + d.value_heads + head];
        }
        const Floats kept = softplus(load(rate) + broadcast(d.decay_bias[head])) * broadcast(d.decay[head] * -LOG2E);
        store(rate, exp2(kept));
        store(beta, sigmoid(load(beta)));
        for (int lane = 0; lane < count; ++lane) {
            out[2 * (t + lane)] = rate[lane];
            out[2 * (t + lane) + 1] = beta[lane];
        }
    }
}

// Writes a head's output, normed and gated by `z`, in bf16. Those of the next token lie z_stride and out_stride behind.
SF_INLINE void put_gated_norm(const float* x, const float* z, i64 z_stride, i64 dim, const float* weight, float eps, u16* out, i64 out_stride) {
    Floats squares = broadcast(0.0f);
    for (i64 c = 0; c < dim; c += LANES) squares = fma(load(x + c), load(x + c), squares);  // zero where it is padded
    const Floats scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + eps));
    for (i64 c = 0; c < dim; c += LANES) {
        const int count = lanes_left(dim, c);
        _mm_prefetch(reinterpret_cast<const char*>(z + AHEAD * z_stride + c), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out + AHEAD * out_stride + c), _MM_HINT_T0);
        const Floats gate = load(z + c, count);
        store_bf16(out + c, load(x + c) * scale * load(weight + c, count) * (gate * sigmoid(gate)), count);
    }
}

inline void reserve_delta(Workspace& work, const Delta& d) {
    for (Workspace::Own& own : work.own) own.delta.reserve(DeltaTile::bytes(DeltaShape(d)));
}

// Computes a gated delta net (Yang et al., arXiv 2412.06464): projected inputs x [T, queries, keys, values, z] and gates
// [T, betas, rates] -> out [T, Hv Dv] in bf16. States go from slot to slot as the step says.
//
// A unit of work is a request's way through the heads of one key: they share it, and no other unit reads their channels. It
// takes along the chunks that go on from there.
inline void delta(Team& team, Workspace& work, const Step& step, const Delta& d, const States& states, const float* x, const float* gates, u16* out) {
    const DeltaShape shape(d);
    const DeltaTile tile(shape, reinterpret_cast<float*>(work.own[team.rank].delta.data()));
    const i64 width = shape.width(), key_dim = shape.key_dim, value_dim = shape.value_dim;
    const float query_length = 1.0f / std::sqrt(static_cast<float>(key_dim));
    team.share(step.requests * shape.key_heads, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 key_head = unit % shape.key_heads, head = key_head * shape.group;
            follow(step, unit / shape.key_heads, [&](i64 request) {
                const i64 row = step.query_start[request], tokens = step.query_start[request + 1] - row;
                const i32 read = step.state_reads[request], write = step.state_writes[request];
                const Inputs in = inputs_of(shape.tail, states, step, request, x, width);
                float *slot = slot_of(states, write), *state = slot + head * shape.head_floats;
                const i64 bytes = shape.group * shape.head_floats * sizeof(float);
                if (read < 0) std::memset(state, 0, bytes);
                else if (read != write) std::memcpy(state, slot_of(states, read) + head * shape.head_floats, bytes);

                for (i64 first = 0; first < tokens; first += DELTA_TOKENS) {
                    const i64 count = std::min(DELTA_TOKENS, tokens - first);
                    for (i64 t = 0; t < count; ++t)
                        convolve(in, first + t, key_head * key_dim, key_dim, d.conv, query_length, tile.queries_keys + t * 2 * key_dim);
                    for (i64 t = 0; t < count; ++t)
                        convolve(in, first + t, shape.keys + key_head * key_dim, key_dim, d.conv, 1.0f, tile.queries_keys + (2 * t + 1) * key_dim);
                    for (i64 h = 0; h < shape.group; ++h) {
                        float *values = tile.values + h * DELTA_TOKENS * shape.padded, *head_gates = tile.gates + h * DELTA_TOKENS * 2;
                        for (i64 t = 0; t < count; ++t)
                            convolve(in, first + t, shape.values + (head + h) * value_dim, value_dim, d.conv, 0.0f, values + t * shape.padded);
                        put_gates(d, head + h, gates + (row + first) * 2 * shape.value_heads, count, head_gates);
                        for (i64 c = 0; c < shape.padded; c += PANEL_COLUMNS)
                            run_panel({tile.queries_keys, head_gates, values + c, count, key_dim, shape.padded},
                                      std::min(PANEL_COLUMNS, shape.padded - c) / LANES, state + h * shape.head_floats + c * key_dim);
                        for (i64 t = 0; t < count; ++t) {
                            const i64 token = row + first + t;
                            put_gated_norm(values + t * shape.padded, x + token * width + shape.tail.channels + (head + h) * value_dim, width, value_dim,
                                           d.norm, d.eps, out + (token * shape.value_heads + head + h) * value_dim, shape.value_heads * value_dim);
                        }
                    }
                }

                const i64 channels[3][2] = {{key_head * key_dim, key_dim}, {shape.keys + key_head * key_dim, key_dim},
                                            {shape.values + head * value_dim, shape.group * value_dim}};
                for (auto [channel, many] : channels)
                    put_tail(in, tokens, channel, channel + many, [](const float* at, i64 c) { return at[c]; }, slot + shape.tail.offset);
            });
        }
    });
}

constexpr i64 CONV_CHANNELS = 256;  // of a unit of work

// Computes a gated short convolution: projected inputs x [T, b, c, u] -> out [T, C] = c * convolution(b * u) in bf16.
inline void short_conv(Team& team, const Step& step, const ShortConv& conv, const States& states, const float* x, u16* out) {
    const Tail tail(conv.channels, conv.taps, 0);
    const i64 channels = conv.channels, width = 3 * channels, parts = ceil_div(channels, CONV_CHANNELS);
    team.share(step.requests * parts, [&](i64 begin, i64 end, i64) {
        for (i64 unit = begin; unit < end; ++unit) {
            const i64 left = unit % parts * CONV_CHANNELS, right = std::min(left + CONV_CHANNELS, channels);
            follow(step, unit / parts, [&](i64 request) {
                const i64 row = step.query_start[request], tokens = step.query_start[request + 1] - row;
                const Inputs in = inputs_of(tail, states, step, request, x, width);
                for (i64 t = 0; t < tokens; ++t) {
                    const float* rows[MOST_TAPS];
                    const i64 first = in.rows_of(t, rows), own = std::max(in.inputs - t, i64{0});  // own: the first tap on a row of this step
                    for (i64 c = left; c < right; c += LANES) {
                        const int count = lanes_left(right, c);
                        Floats value = conv.bias ? load(conv.bias + c, count) : broadcast(0.0f);
                        for (i64 tap = first; tap <= in.inputs; ++tap) {
                            Floats input = load(rows[tap] + c, count);
                            if (tap >= own) input = input * load(rows[tap] + 2 * channels + c, count);
                            value = fma(load(conv.conv + tap * channels + c, count), input, value);
                        }
                        store_bf16(out + (row + t) * channels + c, value * load(x + (row + t) * width + channels + c, count), count);
                    }
                }
                float* slot = slot_of(states, step.state_writes[request]);
                put_tail(in, tokens, left, right, [&](const float* at, i64 c) { return at[c] * at[2 * channels + c]; }, slot);
            });
        }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
