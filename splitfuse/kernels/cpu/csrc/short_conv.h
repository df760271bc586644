// Gated short convolutions.
#pragma once

#include "states.h"

namespace splitfuse {
namespace SF_VARIANT {

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
