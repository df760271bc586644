// Mixtures of experts: which experts each token visits, and the products of all experts, divided among the threads together.
//
// A pair is a token and one of its choices, token * k + choice. Pairs are grouped by expert, so that each weight is read
// once; which pairs share a group changes no row of any of them.
#pragma once

#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

// Returns the sum over all experts of what body(first expert, count) gives for LANES of them at a time.
template <class Body>
SF_INLINE float sum_experts(i64 num_experts, Body body) {
    Floats totals = broadcast(0.0f);
    for (i64 e = 0; e < num_experts; e += LANES) {
        const int count = static_cast<int>(std::min<i64>(num_experts - e, LANES));
        totals += between(0, count, body(e, count), broadcast(0.0f));
    }
    return sum(totals);
}

// Replaces one row of logits [E] by the scores of the experts, and returns a number that is NaN if a logit is.
SF_INLINE float score_row(const Router& r, float* row) {
    if (r.sigmoid)
        return sum_experts(r.num_experts, [&](i64 e, int count) {
            const Floats score = sigmoid(load(row + e, count));
            store(row + e, score, count);
            return score;
        });
    Floats most = broadcast(-INFINITY);
    for (i64 e = 0; e < r.num_experts; e += LANES) {
        const int count = static_cast<int>(std::min<i64>(r.num_experts - e, LANES));
        most = max(between(0, count, load(row + e, count), most), most);
    }
    most = broadcast(highest(most));
    const float total = sum_experts(r.num_experts, [&](i64 e, int count) {
        const Floats power = exp2((load(row + e, count) - most) * broadcast(LOG2E));
        store(row + e, power, count);
        return power;
    });
    for (i64 e = 0; e < r.num_experts; e += LANES) {
        const int count = static_cast<int>(std::min<i64>(r.num_experts - e, LANES));
        store(row + e, load(row + e, count) / broadcast(total), count);
    }
    return total;
}

// Returns the groups among which a token chooses, as bits: those whose best scores have the largest sums, of equal ones the
// lower. `score_of(expert)` is what the choice goes by.
template <class ScoreOf>
SF_INLINE std::uint64_t choose_groups(const Router& r, ScoreOf score_of) {
    const i64 size = r.num_experts / r.num_groups;
    float sums[64];
    for (i64 group = 0; group < r.num_groups; ++group) {
        float first = -INFINITY, second = -INFINITY;
        for (i64 expert = group * size; expert < (group + 1) * size; ++expert) {
            const float score = score_of(expert);
            if (score > first) {
                second = first;
                first = score;
            } else if (score > second) {
                second = score;
            }
        }
        sums[group] = r.group_best == 1 || size == 1 ? first : first + second;
    }
    std::uint64_t chosen = 0;
    for (i64 n = 0; n < r.top_groups; ++n) {
        i64 best = -1;
        for (i64 group = 0; group < r.num_groups; ++group)
            if (!(chosen >> group & 1) && (best < 0 || sums[group] > sums[best])) best = group;
        chosen |= std::uint64_t{1} << best;
    }
    return chosen;
}

// Finds the experts of one token and their weights, best first and of equal ones the lower first, from its row of logits [E],
// which is overwritten. A NaN among the logits makes all weights NaN.
SF_INLINE void route_row(const Router& r, float* row, i32* ids, float* weights) {
    const float total = score_row(r, row);
    const auto score_of = [&](i64 expert) { return r.choice_bias ? row[expert] + r.choice_bias[expert] : row[expert]; };
    const i64 size = r.num_experts / r.num_groups, k = r.top_k;
    const std::uint64_t groups = r.num_groups == 1 ? 1 : choose_groups(r, score_of);
    i64 found = 0;
    for (i64 expert = 0; expert < r.num_experts; ++expert) {
        if (!(groups >> expert / size & 1)) continue;
        const float score = score_of(expert);
        if (found == k && !(score > score_of(ids[k - 1]))) continue;
        i64 place = found < k ? found++ : k - 1;
        for (; place > 0 && score > score_of(ids[place - 1]); --place) ids[place] = ids[place - 1];
        ids[place] = static_cast<i32>(expert);
    }
    float chosen = 0.0f;
    for (i64 choice = 0; choice < k; ++choice) chosen += row[ids[choice]];
    const float sum = !r.renormalize ? 1.0f : std::max(chosen, r.min_sum);
    for (i64 choice = 0; choice < k; ++choice) weights[choice] = std::isnan(total) ? total : row[ids[choice]] / sum * r.scale;
}

// Routes all tokens: logits [T, E], which are overwritten -> ids and weights [T, k].
inline void route(Team& team, const Router& r, float* logits, i64 tokens, i32* ids, float* weights) {
    team.split(tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token)
            route_row(r, logits + token * r.num_experts, ids + token * r.top_k, weights + token * r.top_k);
    });
}

// The most experts that a step of so many pairs can visit.
SF_INLINE i64 most_visits(i64 pairs, i64 num_experts) { return std::min(pairs, num_experts); }

// Reserves buffers for one mixture. This happens before the parallel region, when it is not known which tokens visit which experts.
inline void reserve_experts(Workspace& work, const Mixture& m, i64 tokens) {
    const i64 pairs = tokens * m.choice.top_k, visits = most_visits(pairs, m.choice.num_experts);
    for (const Weight* w : {m.up, m.down}) work.reserve_operand(*w, pairs);
    work.operand.reserve(std::max(operand_bytes(*m.up, pairs), operand_bytes(*m.down, pairs)) + visits * VISIT_PADDING + READ_BEYOND);
    work.gated.reserve(pairs * m.down->columns * 2);
    work.expert_out.reserve(pairs * m.down->rows * 4);
    work.order.reserve(pairs * 4);
    work.visits.resize(std::max<size_t>(work.visits.size(), visits));
    work.counts.resize(std::max<size_t>(work.counts.size(), m.choice.num_experts));
}

// Sorts the pairs by expert, and notes which of them each expert has and where its operand will lie.
inline void gather_visits(Workspace& work, const Mixture& m, i64 pairs, const i32* ids) {
    const i64 num_experts = m.choice.num_experts, most = most_visits(pairs, num_experts);
    i32* counts = work.counts.data();
    i32* order = reinterpret_cast<i32*>(work.order.data());
    std::fill(counts, counts + num_experts, 0);
    for (i64 pair = 0; pair < pairs; ++pair) ++counts[ids[pair]];
    i32 first = 0;
    i64 visit = 0, place = 0;
    for (i32 expert = 0; expert < num_experts; ++expert) {
        const i32 count = counts[expert];
        counts[expert] = first;
        if (!count) continue;
        work.visits[visit++] = Visit{expert, first, first + count, place};
        place += std::max(operand_bytes(*m.up, count), operand_bytes(*m.down, count));
        first += count;
    }
    for (; visit < most; ++visit) work.visits[visit] = Visit{0, 0, 0, 0};
    for (i64 pair = 0; pair < pairs; ++pair) order[counts[ids[pair]]++] = static_cast<i32>(pair);
}

// Returns the operand of an expert's pairs. In a step of one token each thread packs it once, for all experts.
SF_INLINE Operand operand_of(Workspace& work, const Memory& memory, const Weight& w, const Visit& visit, bool own) {
    return make_operand(w, visit.end - visit.begin, own ? memory.own : work.operand.data() + visit.operand, memory.sums);
}

// Packs the activations of all pairs, in order, from `source(place in the order)`.
template <class Source>
SF_INLINE void pack_visits(Team& team, Workspace& work, const Weight* weights, i64 pairs, Source source) {
    const Memory memory = work.memory(team.rank);
    team.split(pairs, [&](i64 begin, i64 end) {
        const Visit* visit = work.visits.data();
        while (visit->end <= begin) ++visit;
        for (i64 at = begin; at < end; ++visit) {
            Operand x = operand_of(work, memory, weights[visit->expert], *visit, false);  // each may have columns in an order of its own
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
    team.share_by_node(most, s.panels, 1, [&](i64 begin, i64 end, i64 next_run) {
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

// Multiplies the weights of all choices with numbers of the experts.
inline void scale_choices(Team& team, const Mixture& m, i64 tokens, const i32* ids, float* weights) {
    team.split(tokens * m.choice.top_k, [&](i64 begin, i64 end) {
        for (i64 pair = begin; pair < end; ++pair) weights[pair] *= m.expert_scale[ids[pair]];
    });
}

// Writes x times a factor, [columns].
SF_INLINE const u16* scaled_row(const u16* x, float factor, i64 columns, u16* out) {
    for (i64 c = 0; c < columns; c += LANES)
        store_left(out + c, load_left(x + c, columns - c) * broadcast(factor), columns - c);
    return out;
}

// Computes a mixture: x [T, C] in bf16, ids and weights [T, k] -> out [T, C] in fp32. For every token it sums over its
// experts in the order of its ids, and adds last, if there are any, what the shared expert gave, times its gate [T], and the
// residual; out may be the residual itself. A rank of a group computes the columns of out that its weights give; rows of out
// and of the residual are `stride` apart.
inline void experts(Team& team, Workspace& work, const Mixture& m, const u16* x, i64 tokens, const i32* ids, const float* weights,
                    const float* shared, const u16* gates, const float* residual, float* out, i64 stride) {
    const i64 k = m.choice.top_k, pairs = tokens * k, most = most_visits(pairs, m.choice.num_experts);
    const i64 hidden = m.up->columns, inner = m.down->columns, columns = m.down->rows;
    const i32* order = reinterpret_cast<const i32*>(work.order.data());
    u16* gated = reinterpret_cast<u16*>(work.gated.data());
    float* expert_out = reinterpret_cast<float*>(work.expert_out.data());
    team.split(std::min<i64>(tokens, 1), [&](i64, i64) { gather_visits(work, m, pairs, ids); });

    // Not by what the ids are: a thread that was descheduled may see those of a later layer here.
    const bool one = tokens == 1 && !m.scales_input && m.one_order;
    u16* row_buffer = reinterpret_cast<u16*>(work.own[team.rank].row.data());
    if (one) put_row(make_operand(m.up[0], 1, work.memory(team.rank).own, nullptr), 0, x);
    else pack_visits(team, work, m.up, pairs, [&](i64 at) {
        const u16* row = x + order[at] / k * hidden;
        return m.scales_input ? scaled_row(row, weights[order[at]], hidden, row_buffer) : row;
    });
    multiply_visits(team, work, m.up, most, one, [&](const Visit& visit) {
        Output first;
        first.activated = gated + visit.begin * inner + first_column(work.group, m.up->gated ? m.up->rows / 2 : m.up->rows);
        first.stride = inner;
        first.activation = m.activation;
        if (m.up_bias) first.bias = m.up_bias[visit.expert];
        return first;
    });
    gather(team, work.group);
    pack_visits(team, work, m.down, pairs, [&](i64 at) { return gated + at * inner; });
    multiply_visits(team, work, m.down, most, false, [&](const Visit& visit) {
        Output second;
        second.y = expert_out;
        second.rows = order + visit.begin;
        if (m.down_bias) second.bias = m.down_bias[visit.expert];
        return second;
    });
    team.split(tokens, [&](i64 begin, i64 end) {
        for (i64 token = begin; token < end; ++token)
            for (i64 c = 0; c < columns; c += LANES) {
                int count = static_cast<int>(std::min<i64>(columns - c, LANES));
                Floats total = broadcast(0.0f);
                for (i64 pair = token * k; pair < (token + 1) * k; ++pair)
                    total = fma(load(expert_out + pair * columns + c, count), broadcast(m.scales_input ? 1.0f : weights[pair]), total);
                if (shared) {
                    const Floats more = load(shared + token * columns + c, count);
                    total = total + (gates ? more * broadcast(widen(gates[token])) : more);
                }
                if (residual) total = load(residual + token * stride + c, count) + total;
                store(out + token * stride + c, total, count);
            }
    });
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
