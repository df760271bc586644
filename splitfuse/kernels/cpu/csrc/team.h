// The threads of one parallel region: how they divide work, and how they wait for each other.
//
// Which thread computes a unit of work, and when, never changes the result.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>

#include "interface.h"
#include "vector.h"
#ifdef SF_TILES
#include "tiles.h"
#endif

namespace splitfuse {
namespace SF_VARIANT {

constexpr i32 MOST_PARTS = MOST_NODES;  // of the units of a sharing: each thread's, or each node's

// How far a team has come. Sharings are numbered from 0; one ends when all its units are done, by whichever threads. A
// thread that was descheduled holds up the others only for what it has claimed, and skips sharings that ended without it.
struct Progress {
    struct alignas(64) Claims { std::atomic<i64> word{0}; };  // number of the current sharing << 32 | units of it that are claimed

    Claims claims[MOST_PARTS];             // of the units of each part
    alignas(64) std::atomic<i64> done{0};  // units of the sharing that are done
    std::atomic<i32> sleepers{0};          // threads that wait for its end without their core

    // The first part's comes last: a thread that has seen it finds all others renewed.
    void end(i64 number, i32 num_parts) {
        for (i32 part = num_parts - 1; part > 0; --part) claims[part].word.store((number + 1) << 32, std::memory_order_release);
        claims[0].word.store((number + 1) << 32, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) syscall(SYS_futex, word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    // Waits for the end of a sharing: a little while busily, then asleep. The thread that it waits for may not be running,
    // and to spin meanwhile would use up this thread's share of a busy core, which it needs once they can both run.
    void wait_for_end(i64 number) {
        for (int spins = 0; spins < PATIENCE; ++spins) {
            if (is_over(number)) return;
            _mm_pause();
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (!is_over(number))
            syscall(SYS_futex, word(), FUTEX_WAIT_PRIVATE, static_cast<u32>(number), nullptr, nullptr, 0);
        sleepers.fetch_sub(1, std::memory_order_relaxed);
    }

  private:
    static constexpr int PATIENCE = 1000;  // spins before sleeping: some tens of microseconds

    bool is_over(i64 number) const { return claims[0].word.load(std::memory_order_acquire) >> 32 != number; }
    u32* word() { return reinterpret_cast<u32*>(&claims[0].word) + 1; }  // where the number is, on x86
};

class Team {
  public:
    Team(Progress& progress, int rank, int size)
        : rank(rank), size(size), progress_(progress), by_node_(nodes.count > 1 && size == nodes.num_threads),
          num_parts_(by_node_ ? nodes.count : std::min(size, MOST_PARTS)),
          part_(by_node_ ? nodes.of(rank) : static_cast<i32>(i64{rank} * num_parts_ / size)) {
        if (by_node_) bind_thread(part_);
    }

    const int rank;
    const int size;

    // From now on adds up the time of this thread in `times` [NUM_OPERATORS], unless it is null.
    void account_in(OperatorTime* times) {
        times_ = times;
        if (times) last_ = nanoseconds();
    }
    // What this thread does next is part of an operator.
    void enter(Operator next) { operator_ = next; }

    // Calls body(begin, end, next) for contiguous runs of 0 .. units - 1, each claimed by a free thread, of its own part
    // of the units as long as there are some: long runs first, single units at the end. A run is claimed one ahead, so
    // that `next`, its first unit, can be prefetched meanwhile; -1: there is none. Returns when all units are done.
    template <class Body>
    void share(i64 units, Body body) {
        if (size == 1) {
            if (units > 0) body(i64{0}, units, i64{-1});
            return count(&OperatorTime::claimed);
        }
        run_all({1, units, 1}, true, body);
    }

    // Does the same for rows of places of `each` units, of which those at the same place read the same panel: threads take the
    // places of their own node first, and of others when these are done.
    template <class Body>
    void share_by_node(i64 rows, i64 places, i64 each, Body body) {
        if (!by_node_) return share(rows * places * each, body);
        run_all({rows, places, each}, true, body);
    }

    // Returns into how many bands of at least `least` rows an operator's rows are divided: at most one for each thread. Where nodes have
    // panels of their own it is one, of all rows.
    i64 bands_of(i64 rows, i64 least) const { return by_node_ ? 1 : std::max<i64>(1, std::min<i64>(size, rows / least)); }

    // Divides the units into equal parts, one for each thread, for work too small to claim often. Of fewer units than threads the
    // last threads have one each.
    template <class Body>
    void split(i64 units, Body body) {
        if (size == 1) {
            if (units > 0) body(i64{0}, units);
            return count(&OperatorTime::split);
        }
        run_all({1, units, 1}, false, [&](i64 begin, i64 end, i64) { body(begin, end); });
    }

  private:
    struct Run { i64 begin, end; };  // of units; empty: there is nothing left to claim
    struct Work { i64 rows, places, each; };

    template <class Body>
    void run_all(const Work& work, bool in_runs, Body body) {
        const i64 units = work.rows * work.places * work.each;
        if (units == 0) return;
        i64 mine = 0;
        i32 turn = 0;  // of the parts, from this thread's own on
        for (Run run = claim(work, in_runs, turn); run.begin < run.end;) {
            const Run following = in_runs ? claim(work, in_runs, turn) : Run{0, 0};
            body(run.begin, run.end, following.begin < following.end ? following.begin : i64{-1});
            mine += run.end - run.begin;
            run = in_runs ? following : claim(work, in_runs, turn);
        }
        count(in_runs ? &OperatorTime::claimed : &OperatorTime::split);
        if (mine && progress_.done.fetch_add(mine, std::memory_order_acq_rel) + mine == units) {
            progress_.done.store(0, std::memory_order_relaxed);
            progress_.end(number_, num_parts_);
        } else {
            progress_.wait_for_end(number_);
        }
        ++number_;
        count(in_runs ? &OperatorTime::after_claimed : &OperatorTime::after_split);
    }

    // Adds the time since it was last called to a part of that of the operator.
    void count(i64 OperatorTime::*part) {
        if (!times_) return;
        const i64 now = nanoseconds();
        times_[operator_].*part += now - last_;
        last_ = now;
    }
    static i64 nanoseconds() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * i64{1000000000} + now.tv_nsec;
    }

    // Claims a run of what is left, of this thread's part, then of the next ones: `turn` of them are done. In runs it is a third of
    // what each thread of the part would get of what is left; else what each would get of the whole part. Nothing if the sharing is over.
    Run claim(const Work& work, bool in_runs, i32& turn) const {
        for (; turn < num_parts_; ++turn) {
            const i32 part = (part_ + turn) % num_parts_;
            const i64 first = first_place(part, work.places) * work.each, width = first_place(part + 1, work.places) * work.each - first;
            const Run run = claim_of(progress_.claims[part], work.rows * width, in_runs, first_thread(part + 1) - first_thread(part), width);
            if (run.begin == run.end) continue;
            const i64 begin = run.begin / width * work.places * work.each + first + run.begin % width;
            return {begin, begin + run.end - run.begin};
        }
        return {0, 0};
    }

    // Claims a run of a part that `threads` threads begin with, which does not go beyond a row of `width` units.
    Run claim_of(Progress::Claims& claims, i64 units, bool in_runs, i64 threads, i64 width) const {
        i64 word = claims.word.load(std::memory_order_acquire), begin, end;
        do {
            if (word >> 32 != number_) return {0, 0};
            begin = word & 0xffffffff;
            if (begin >= units) return {0, 0};
            const i64 length = in_runs ? (units - begin) / (3 * threads) : (units + threads - 1) / threads;
            end = std::min(begin + std::max<i64>(length, 1), (begin / width + 1) * width);
        } while (!claims.word.compare_exchange_weak(word, number_ << 32 | end, std::memory_order_acq_rel));
        return {begin, end};
    }

    i64 first_thread(i32 part) const { return by_node_ ? nodes.first_thread[part] : (i64{part} * size + num_parts_ - 1) / num_parts_; }
    i64 first_place(i32 part, i64 places) const { return by_node_ ? nodes.first_place(part, places) : places * first_thread(part) / size; }

    Progress& progress_;
    const bool by_node_;   // whether this team is divided among NUMA nodes
    const i32 num_parts_;  // of the units of a sharing: one for each node, or for each thread
    const i32 part_;       // that this thread claims first
    i64 number_ = 0;       // number of this thread's next sharing
    OperatorTime* times_ = nullptr;
    Operator operator_ = OTHERS;
    i64 last_ = 0;         // when count() was last called
};

template <class Body>
void parallel(int num_threads, Body body) {
    Progress progress;
    if (num_threads == 1 || forked) {
#ifdef SF_TILES
        const TilesInUse tiles;
#endif
        Team team(progress, 0, 1);
        body(team);
        return;
    }
#pragma omp parallel num_threads(num_threads)
    {
#ifdef SF_TILES
        const TilesInUse tiles;
#endif
        Team team(progress, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
