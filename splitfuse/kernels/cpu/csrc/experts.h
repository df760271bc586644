// Mixtures of experts: the tokens of each expert are brought together, and its weights read once.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

// x [T, C] in bf16, expert_ids and expert_weights [T, k] -> out [T, C] in fp32: for every token the sum over its experts,
// in the order of its ids. w13 [E] are gated, w2 [E].
inline void experts(Workspace& work, const u16* x, i64 tokens, i64 k, const i32* expert_ids, const float* expert_weights,
                    const Weight* w13, const Weight* w2, i64 num_experts, i32 activation, float* out) {
    const i64 hidden = w13->columns, inner = w2->columns;
    std::vector<std::vector<i32>> pairs_of(num_experts);  // token * k + choice
    size_t most = 0;
    for (i64 pair = 0; pair < tokens * k; ++pair) pairs_of[expert_ids[pair]].push_back(static_cast<i32>(pair));
    for (const auto& pairs : pairs_of) most = std::max(most, pairs.size());
    for (const Weight* w : {w13, w2}) work.reserve_operand(*w, static_cast<i64>(most));
    u16* gated = reinterpret_cast<u16*>(work.gated.reserve(static_cast<i64>(most) * inner * 2));
    float* said = reinterpret_cast<float*>(work.pairs.reserve(tokens * k * hidden * 4));

    parallel(work.num_threads, [&](Team& team) {
        const Memory memory = work.memory(team.rank);
        for (i64 expert = 0; expert < num_experts; ++expert) {
            const std::vector<i32>& pairs = pairs_of[expert];
            const i64 rows = static_cast<i64>(pairs.size());
            if (!rows) continue;
            Output first;
            first.gated = gated;
            first.activation = activation;
            Operand operand = lay_out(team, w13[expert], rows, memory, [&](i64 row) { return x + pairs[row] / k * hidden; });
            multiply(team, operand, w13[expert], first);
            Output second;
            second.y = said;
            second.rows = pairs.data();
            linear(team, gated, rows, w2[expert], memory, second);
        }
        team.split(tokens, [&](i64 begin, i64 end) {
            for (i64 token = begin; token < end; ++token)
                for (i64 c = 0; c < hidden; c += LANES) {
                    int count = static_cast<int>(std::min<i64>(hidden - c, LANES));
                    Floats sum = broadcast(0.0f);
                    for (i64 choice = 0; choice < k; ++choice) {
                        i64 pair = token * k + choice;
                        sum = fma(load(said + pair * hidden + c, count), broadcast(expert_weights[pair]), sum);
                    }
                    store(out + token * hidden + c, sum, count);
                }
        });
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
