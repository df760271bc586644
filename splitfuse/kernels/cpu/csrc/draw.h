// Draws tokens at random from rows of scores, in fp64. Every sum has an order that depends on nothing but the row.
#pragma once

#include "elementwise.h"
#include "workspace.h"

namespace splitfuse {
namespace SF_VARIANT {

typedef double Doubles __attribute__((vector_size(64)));  // eight on every CPU, so that sums have one order
typedef i64 Integers __attribute__((vector_size(64)));
constexpr i64 DOUBLES = 8;
constexpr i64 SUMMED = 256;  // scores whose weights are added up before their sum is added to those of others

SF_INLINE Doubles all(double value) { return Doubles{} + value; }

// Returns e^a for a <= 0 to about one in the last place; 0 where that is below 1e-307. Reduction as in exp2() of vector.h.
SF_INLINE Doubles exp_negative(Doubles a) {
    constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to an integer in its low bits
    constexpr double LOG2E_ = 1.4426950408889634074, LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
    constexpr double INVERSE_FACTORIALS[] = {
        1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
        1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0};
    const Doubles shifted = a * LOG2E_ + ROUND, whole = shifted - ROUND;
    const Doubles rest = (a - whole * LN2_HIGH) - whole * LN2_LOW;
    Doubles p = all(INVERSE_FACTORIALS[0]);
    for (int i = 1; i < 14; ++i) p = p * rest + INVERSE_FACTORIALS[i];
    const Integers power = (((Integers)shifted) << 52) + (i64{1023} << 52);
    return (Doubles)((Integers)(p * (Doubles)power) & (a >= -706.0));
}

SF_INLINE Doubles load_doubles(const double* p) {
    Doubles a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
SF_INLINE Doubles load_doubles(const float* p) {
    typedef float Eight __attribute__((vector_size(32)));
    Eight a;
    std::memcpy(&a, p, sizeof a);
    return __builtin_convertvector(a, Doubles);
}

// A row of scores as weights: e^((score - largest) / temperature), the largest weight 1.
template <class T>
struct Weights {
    const T* scores;
    i64 columns;
    double largest, temperature;

    Weights(const T* scores, i64 columns, double temperature) : scores(scores), columns(columns), largest(-INFINITY), temperature(temperature) {
        T most[DOUBLES];
        std::fill(most, most + DOUBLES, static_cast<T>(-INFINITY));
        i64 c = 0;
        for (; c + DOUBLES <= columns; c += DOUBLES)
            for (i64 lane = 0; lane < DOUBLES; ++lane) most[lane] = scores[c + lane] > most[lane] ? scores[c + lane] : most[lane];
        for (; c < columns; ++c) most[0] = scores[c] > most[0] ? scores[c] : most[0];
        for (T each : most) largest = each > largest ? static_cast<double>(each) : largest;
    }

    // Returns the weights of eight columns from c on, 0 for those that there are not.
    inline __attribute__((always_inline)) Doubles at(i64 c) const {
        if (c + DOUBLES <= columns) return exp_negative((load_doubles(scores + c) - largest) / temperature);
        T left[DOUBLES];
        std::fill(left, left + DOUBLES, static_cast<T>(-INFINITY));
        std::copy(scores + c, scores + columns, left);
        return exp_negative((load_doubles(left) - largest) / temperature);
    }

    // Writes the sum of each SUMMED columns, and their weights too if `out` is given. Returns the sum of all.
    double add_up(double* sums, double* out) const {
        double total = 0.0;
        for (i64 first = 0; first < columns; first += SUMMED) {
            Doubles parts = all(0.0);
            for (i64 c = first; c < std::min(columns, first + SUMMED); c += DOUBLES) {
                const Doubles weights = at(c);
                if (out) std::memcpy(out + c, &weights, sizeof weights);
                parts += weights;
            }
            sums[first / SUMMED] = ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
            total += sums[first / SUMMED];
        }
        return total;
    }
};

// What a token of a row is drawn from: see SamplingParams. top_k 0, top_p 1 and min_p 0 keep everything.
struct Filter { double temperature, top_k, top_p, min_p; };

struct Candidate {
    double weight;  // and the sum of those up to it, once they are sorted
    i64 id;
};

// Returns the k-th largest of the weights. `kept` has space for all.
inline double kth_largest(const double* weights, i64 columns, i64 k, Candidate* kept) {
    auto heavier = [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; };
    i64 count = 0;
    double bound = -1.0;
    for (i64 c = 0; c < columns; ++c) {
        if (!(weights[c] > bound)) continue;
        kept[count++].weight = weights[c];
        if (count >= 2 * k + 64) {  // all but k are too small
            std::nth_element(kept, kept + k - 1, kept + count, heavier);
            count = k;
            bound = kept[k - 1].weight;
        }
    }
    std::nth_element(kept, kept + k - 1, kept + count, heavier);
    return kept[k - 1].weight;
}

// Writes the first column at which the weights, added up, exceed a part `numbers[i]` of their sum.
template <class T>
void draw_any(const Weights<T>& weights, double* sums, const double* numbers, i64 count, i32* out) {
    const double total = weights.add_up(sums, nullptr);
    for (i64 i = 0; i < count; ++i) {
        const double target = numbers[i] * total;
        double before = 0.0;
        i64 block = 0, last = 0;
        for (; block * SUMMED < weights.columns; ++block) {
            if (sums[block] > 0.0) last = block;
            if (before + sums[block] > target) break;
            before += sums[block];
        }
        if (block * SUMMED >= weights.columns) {  // rounding: the last one that weighs anything
            block = last;
            before = INFINITY;
        }
        i64 found = 0;
        bool past = false;
        for (i64 c = block * SUMMED; c < std::min(weights.columns, (block + 1) * SUMMED) && !past; c += DOUBLES) {
            const Doubles some = weights.at(c);
            for (i64 lane = 0; lane < DOUBLES && !past; ++lane) {
                if (!(some[lane] > 0.0)) continue;
                found = c + lane;
                if (before != INFINITY) past = (before += some[lane]) > target;
            }
        }
        out[i] = static_cast<i32>(found);
    }
}

// The same among the tokens that a filter keeps, in falling order of weight, equal ones by column.
template <class T>
void draw_kept(const Weights<T>& row, const Filter& filter, u8* memory, const double* numbers, i64 count, i32* out) {
    const i64 columns = row.columns;
    double* sums = reinterpret_cast<double*>(memory);
    double* weights = sums + (columns + SUMMED - 1) / SUMMED;
    Candidate* kept = reinterpret_cast<Candidate*>(weights + columns + DOUBLES);
    double total = row.add_up(sums, weights), kth = -1.0;
    // Tokens below (1 - top_p) / columns weigh less than 1 - top_p together; half of that is on the safe side of rounding.
    double floor = std::max((1.0 - filter.top_p) * total / (2.0 * static_cast<double>(columns)), filter.min_p);
    const i64 k = std::min(static_cast<i64>(filter.top_k), columns);
    if (k > 0) floor = kth = kth_largest(weights, columns, k, kept);
    i64 size = 0;
    for (i64 c = 0; c < columns; ++c)
        if (weights[c] >= floor) kept[size++] = {weights[c], c};
    std::sort(kept, kept + size, [](const Candidate& a, const Candidate& b) {
        return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
    });
    i64 heavy = 0, likely = 0;  // those that min_p and top_k keep
    double sum = 0.0;
    for (i64 i = 0; i < size; ++i) {
        likely += kept[i].weight >= filter.min_p;
        heavy += kept[i].weight >= kth;
        kept[i].weight = sum += kept[i].weight;
    }
    if (k > 0) total = kept[heavy - 1].weight;
    i64 nucleus = size;  // those before top_p is reached, and the one that reaches it
    if (filter.top_p < 1.0)
        for (nucleus = 1; nucleus < size && kept[nucleus - 1].weight < filter.top_p * total;) ++nucleus;
    const i64 end = std::min(std::min(heavy, likely), nucleus);
    for (i64 i = 0; i < count; ++i) {
        const double target = numbers[i] * kept[end - 1].weight;
        i64 place = 0;
        while (place + 1 < end && !(kept[place].weight > target)) ++place;
        out[i] = static_cast<i32>(kept[place].id);
    }
}

// Bytes that a thread needs for it.
inline i64 draw_bytes(i64 columns) {
    return 8 * ((columns + SUMMED - 1) / SUMMED + columns + DOUBLES) + static_cast<i64>(sizeof(Candidate)) * columns;
}

// Draws `count` tokens from a row of scores [columns], by numbers from 0 to below 1. Its largest score is finite.
template <class T>
void draw_row(u8* memory, const T* scores, i64 columns, const Filter& filter, const double* numbers, i64 count, i32* ids) {
    const Weights<T> weights(scores, columns, filter.temperature);
    if (filter.top_k > 0.0 || filter.top_p < 1.0 || filter.min_p > 0.0) draw_kept(weights, filter, memory, numbers, count, ids);
    else draw_any(weights, reinterpret_cast<double*>(memory), numbers, count, ids);
}

// Draws `count` tokens for each of some rows of scores [*, columns], by numbers [rows, count].
template <class T>
void draw(Team& team, Workspace& work, const T* scores, i64 columns, const i32* rows, i64 num_rows, const Filter* filters,
          const double* numbers, i64 count, i32* ids) {
    u8* memory = work.own[team.rank].draws.data();
    team.share(num_rows, [&](i64 begin, i64 end, i64) {
        for (i64 i = begin; i < end; ++i)
            draw_row(memory, scores + rows[i] * columns, columns, filters[i], numbers + i * count, count, ids + i * count);
    });
}

// Chooses a token for each row of logits [rows, V]: see Choices.
inline void choose(Team& team, Workspace& work, const Choices& choices, const float* logits, i64 rows) {
    const i64 columns = choices.vocabulary;
    const Filter* filters = reinterpret_cast<const Filter*>(choices.filters);
    u8* memory = work.own[team.rank].draws.data();
    team.share(rows, [&](i64 begin, i64 end, i64) {
        for (i64 row = begin; row < end; ++row) {
            const float* x = logits + row * columns;
            topk_row(x, columns, 1, choices.ids + row, choices.peaks + row);
            if (filters && filters[row].temperature > 0.0 && std::isfinite(choices.peaks[row]))
                draw_row(memory, x, columns, filters[row], choices.numbers + row, 1, choices.ids + row);
        }
    });
}

inline void reserve_choices(Workspace& work, const Choices& choices, i64 rows) {
    if (!choices.logits) work.logits.reserve(rows * choices.vocabulary * 4);
    work.reserve_operand(*choices.head, rows);
    if (choices.filters)
        for (Workspace::Own& each : work.own) each.draws.reserve(draw_bytes(choices.vocabulary));
}

// Applies the head to rows x [rows, C], and chooses a token for each, of all ranks' logits.
inline void choose_tokens(Team& team, Workspace& work, const Choices& choices, const u16* x, i64 rows) {
    float* all = choices.logits ? choices.logits : reinterpret_cast<float*>(work.logits.data());
    Output logits;
    logits.y = all + choices.first_id;
    logits.stride = choices.vocabulary;
    logits.bias = choices.bias;
    team.enter(HEAD);
    linear(team, x, rows, *choices.head, work.memory(team.rank), logits);
    if (choices.logits) gather(team, work.group);
    team.enter(CHOICE);
    if (!choices.first_id) choose(team, work, choices, all, rows);
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
