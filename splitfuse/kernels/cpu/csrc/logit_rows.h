// The rows of a step whose hidden states are wanted, as a step of the same requests. Behind the last keys, values and states
// that a network stores, nothing reads the other rows.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace splitfuse {
namespace SF_VARIANT {

struct LogitRows {
    Step step{};  // its tokens are the rows in their order, and are not stored again; a request may have none

    // Selects the rows of a whole step, which must live as long. Returns false if there is nothing to leave out: all rows are
    // wanted, or some that are not the last ones of their requests, as queries of attention must be.
    bool select(const Step& whole) {
        const i32 count = whole.num_rows;
        if (count == whole.tokens) return false;
        query_start_.assign(1, 0);
        i32 found = 0;
        for (i32 request = 0; request < whole.requests; ++request) {
            const i32 first = found, end = whole.query_start[request + 1];
            while (found < count && whole.rows[found] < end) ++found;
            for (i32 row = first; row < found; ++row)
                if (whole.rows[row] != end - (found - row)) return false;
            query_start_.push_back(found);
        }
        if (found < count) return false;
        positions_.resize(count);
        for (i32 row = 0; row < count; ++row) positions_[row] = whole.positions[whole.rows[row]];
        slots_.assign(count, -1);
        step = whole;
        step.tokens = count;
        step.ids = nullptr;
        step.positions = positions_.data();
        step.slots = slots_.data();
        step.query_start = query_start_.data();
        step.rows = nullptr;
        if (whole.lora) select_adapters(whole);
        return true;
    }

  private:
    std::vector<i32> positions_, slots_, query_start_, adapters_, order_;
    Lora lora_{};

    void select_adapters(const Step& whole) {
        const i32 count = whole.num_rows;
        adapters_.resize(count);
        for (i32 row = 0; row < count; ++row) adapters_[row] = whole.lora->of_row[whole.rows[row]];
        order_.resize(count);
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](i32 a, i32 b) { return adapters_[a] < adapters_[b]; });
        lora_ = *whole.lora;
        lora_.of_row = adapters_.data();
        lora_.order = order_.data();
        step.lora = &lora_;
    }
};

}  // namespace SF_VARIANT
}  // namespace splitfuse
