// Mixtures of experts: which experts each token visits, and the products of all experts, divided among the threads together.
//
// A pair is a token and one of its choices, token * k + choice. Pairs are grouped by expert, so that each weight is read
// once; which pairs share a group changes no row of any of them.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

// Finds in one row of scores [E] the k best experts, best first and of equal ones the lower first, and their shares of the
// softmax over all experts; with `renormalize`, over the k. A NaN among the scores makes all shares NaN.
SF_INLINE void route_row(const float* scores, i64 num_experts, i64 k, bool renormalize, i32* ids, float* shares) {
    i64 found = 0;
    for (i64 expert = 0; expert < num_experts; ++expert) {
        if (found == k && !(scores[expert] > scores[ids[k - 1]])) continue;
        i64 place = found < k ? found++ : k - 1;
        for (; place > 0 && scores[expert] > scores[ids[place - 1]]; --place) ids[place] = ids[place - 1];
        ids[place] = static_cast<i32>(expert);
    }
    const Floats most = broadcast(scores[ids[0]]), log2e = broadcast(LOG2E);
    Floats totals = broadcast(0.0f);
    for (i64 e = 0; e < num_experts; e += LANES) {
        int count = static_cast<int>(std::min<i64>(num_experts - e, LANES));
        Floats power = exp2((load(scores + e, count) - most) * log2e);
        totals += count < LANES ? between(0, count, power, broadcast(0.0f)) : power;
    }
    float total = sum(totals), chosen = 0.0f;
    for (i64 choice = 0; choice < k; ++choice) {
        alignas(64) float lanes[LANES];
        store(lanes, exp2((broadcast(scores[ids[choice]]) - most) * log2e));
        shares[choice] = lanes[0] / total;
        chosen += shares[choice];
    }
    if (renormalize)
        for (i64 choice = 0; choice < k; ++choice) shares[choice] /= chosen;
}

// Routes all tokens: scores [T, E] -> ids and shares [T, k].
inline void route(Team& team, const float* scores, i64 tokens, i64 num_experts, i64 k, bool renormalize, i32* ids, float* shares) {
    team.split(tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token)
            route_row(scores + token * num_experts, num_experts, k, renormalize, ids + token * k, shares + token * k);
    });
}

// The most experts that a step of so many pairs can visit.
SF_INLINE i64 most_visits(i64 pairs, i64 num_experts) { return std::min(pairs, num_experts); }

// Reserves buffers for one mixture. This happens before the parallel region, when it is not known which tokens visit which experts.
inline void reserve_experts(Workspace& work, const Mixture& m, i64 tokens) {
    const i64 pairs = tokens * m.top_k, visits = most_visits(pairs, m.num_experts);
    for (const Weight* w : {m.w13, m.w2}) work.reserve_operand(*w, pairs);
    work.operand.reserve(std::max(operand_bytes(*m.w13, pairs), operand_bytes(*m.w2, pairs)) + visits * VISIT_PADDING);
    work.gated.reserve(pairs * m.w2->columns * 2);
    work.expert_out.reserve(pairs * m.w2->rows * 4);
    work.order.reserve(pairs * 4);
    work.visits.resize(std::max<size_t>(work.visits.size(), visits));
    work.counts.resize(std::max<size_t>(work.counts.size(), m.num_experts));
}

// Sorts the pairs by expert, and notes which of them each expert has and where its operand will lie.
inline void gather_visits(Workspace& work, const Mixture& m, i64 pairs, const i32* ids) {
    const i64 most = most_visits(pairs, m.num_experts);
    i32* counts = work.counts.data();
    i32* order = reinterpret_cast<i32*>(work.order.data());
    std::fill(counts, counts + m.num_experts, 0);
    for (i64 pair = 0; pair < pairs; ++pair) ++counts[ids[pair]];
    i32 first = 0;
    i64 visit = 0, place = 0;
    for (i32 expert = 0; expert < m.num_experts; ++expert) {
        const i32 count = counts[expert];
        counts[expert] = first;
        if (!count) continue;
        work.visits[visit++] = Visit{expert, first, first + count, place};
        place += std::max(operand_bytes(*m.w13, count), operand_bytes(*m.w2, count));
        first += count;
    }
    for (; visit < most; ++visit) work.visits[visit] = Visit{0, 0, 0, 0};
    for (i64 pair = 0; pair < pairs; ++pair) order[counts[ids[pair]]++] = static_cast<i32>(pair);
}

// Returns the operand of an expert's pairs. In a step of one token each thread packs it once, for all experts.
SF_INLINE Operand operand_of(Workspace& work, const Memory& memory, const Weight& w, const Visit& visit, bool own) {
    Operand x = make_operand(w, visit.end - visit.begin, own ? memory.own : work.operand.data() + visit.operand);
    x.sums_of_panel = x.quantized && x.blocks >= WIDENED_BLOCKS ? memory.sums : nullptr;
    return x;
}

// Packs the activations of all pairs, in order, from `source(place in the order)`.
template <class Source>
SF_INLINE void pack_visits(Team& team, Workspace& work, const Weight& w, i64 pairs, Source source) {
    const Memory memory = work.memory(team.rank);
    team.split(pairs, [&](i64 begin, i64 end) {
        const Visit* visit = work.visits.data();
        while (visit->end <= begin) ++visit;
        for (i64 at = begin; at < end; ++visit) {
            Operand x = operand_of(work, memory, w, *visit, false);
            for (; at < end && at < visit->end; ++at) put_row(x, at - visit->begin, source(at));
        }
    });
}

// Multiplies every visited expert's weight with its pairs. `output_of(visit)` says what becomes of the products.
template <class OutputOf>
SF_INLINE void multiply_visits(Team& team, Workspace& work, const Weight* weights, i64 most, bool own, OutputOf output_of) {
    const Shape s = shape_of(weights[0]);
    const Memory memory = work.memory(team.rank);
    const Visit* visits = work.visits.data();
    bool first_run = true;  // of this thread: no thread has prefetched what it reads
    team.share(most * s.panels, [&](i64 begin, i64 end, i64 next_run) {
        bool cold = first_run;
        auto data_of = [&](i64 unit) -> const u8* {
            const Visit& visit = visits[unit / s.panels];
            return visit.begin < visit.end ? weights[visit.expert].data + unit % s.panels * s.panel_bytes : nullptr;
        };
        for (i64 unit = begin; unit < end;) {
            const Visit& visit = visits[unit / s.panels];
            if (visit.begin == visit.end) return;  // the remaining ones are not visited either
            const Weight& w = weights[visit.expert];
            const Operand x = operand_of(work, memory, w, visit, own);
            const Output out = output_of(visit);
            const i64 last = std::min(end, (unit / s.panels + 1) * s.panels);
            for (; unit < last; ++unit) {
                const i64 next = unit + 1 < end ? unit + 1 : next_run;
                multiply_panel_by_all(x, w, s, unit % s.panels, 0, x.blocks, next < 0 ? nullptr : data_of(next), cold, out);
                cold = false;
            }
        }
        first_run = false;
    });
}

// Computes a mixture: x [T, C] in bf16, ids and shares [T, k] -> out [T, C] in fp32. For every token it sums over its
// experts in the order of its ids, and adds the residual last, if there is one; out may be the residual itself.
inline void experts(Team& team, Workspace& work, const Mixture& m, const u16* x, i64 tokens, const i32* ids, const float* shares,
                    const float* residual, float* out) {
    const i64 k = m.top_k, pairs = tokens * k, most = most_visits(pairs, m.num_experts);
    const i64 hidden = m.w2->rows, inner = m.w2->columns;
    const i32* order = reinterpret_cast<const i32*>(work.order.data());
    u16* gated = reinterpret_cast<u16*>(work.gated.data());
    float* expert_out = reinterpret_cast<float*>(work.expert_out.data());
    team.split(std::min<i64>(tokens, 1), [&](i64, i64) { gather_visits(work, m, pairs, ids); });

    const bool one = tokens == 1;
    if (one) put_row(make_operand(*m.w13, 1, work.memory(team.rank).own), 0, x);
    else pack_visits(team, work, *m.w13, pairs, [&](i64 at) { return x + order[at] / k * hidden; });
    multiply_visits(team, work, m.w13, most, one, [&](const Visit& visit) {
        Output first;
        first.activated = gated + visit.begin * inner;
        first.activation = m.activation;
        return first;
    });
    pack_visits(team, work, *m.w2, pairs, [&](i64 at) { return gated + at * inner; });
    multiply_visits(team, work, m.w2, most, false, [&](const Visit& visit) {
        Output second;
        second.y = expert_out;
        second.rows = order + visit.begin;
        return second;
    });
    team.split(tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token)
            for (i64 c = 0; c < hidden; c += LANES) {
                int count = static_cast<int>(std::min<i64>(hidden - c, LANES));
                Floats total = broadcast(0.0f);
                for (i64 pair = token * k; pair < (token + 1) * k; ++pair)
                    total = fma(load(expert_out + pair * hidden + c, count), broadcast(shares[pair]), total);
                if (residual) total = load(residual + token * hidden + c, count) + total;
                store(out + token * hidden + c, total, count);
            }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
