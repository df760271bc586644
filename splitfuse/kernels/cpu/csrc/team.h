// The threads of one parallel region: how they divide work, and how they wait for each other.
//
// Which thread computes a unit of work, and when, never changes the result.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>

#include "interface.h"
#include "vector.h"
#ifdef SF_TILES
#include "tiles.h"
#endif

namespace splitfuse {
namespace SF_VARIANT {

// How far a team has come. Sharings are numbered from 0; one ends when all its units are done, by whichever threads. A
// thread that was descheduled holds up the others only for what it has claimed, and skips sharings that ended without it.
struct Progress {
    alignas(64) std::atomic<i64> claimed{0};  // number of the current sharing << 32 | units of it that are claimed
    alignas(64) std::atomic<i64> done{0};     // units of it that are done
    std::atomic<i32> sleepers{0};             // threads that wait for its end without their core

    void end(i64 number) {
        claimed.store((number + 1) << 32, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) syscall(SYS_futex, word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    // Waits for the end of a sharing: a little while busily, then asleep. The thread that it waits for may not be running,
    // and to spin meanwhile would use up this thread's share of a busy core, which it needs once they can both run.
    void wait_for_end(i64 number) {
        for (int spins = 0; spins < PATIENCE; ++spins) {
            if (claimed.load(std::memory_order_acquire) >> 32 != number) return;
            _mm_pause();
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (claimed.load(std::memory_order_acquire) >> 32 == number)
            syscall(SYS_futex, word(), FUTEX_WAIT_PRIVATE, static_cast<u32>(number), nullptr, nullptr, 0);
        sleepers.fetch_sub(1, std::memory_order_relaxed);
    }

  private:
    static constexpr int PATIENCE = 1000;  // spins before sleeping: some tens of microseconds

    u32* word() { return reinterpret_cast<u32*>(&claimed) + 1; }  // where the number is, on x86
};

class Team {
  public:
    Team(Progress& progress, int rank, int size) : rank(rank), size(size), progress_(progress) {}

    const int rank;
    const int size;

    // Calls body(begin, end, next) for contiguous runs of 0 .. units - 1, each claimed by a free thread: long runs
    // first, single units at the end. A run is claimed one ahead, so that `next`, its first unit, can be
    // prefetched meanwhile; -1: there is none. Returns when all units are done.
    template <class Body>
    void share(i64 units, Body body) {
        if (size == 1) {
            if (units > 0) body(i64{0}, units, i64{-1});
            return;
        }
        run_all(units, 3 * size, true, body);
    }

    // Divides the units into equal parts, for work too small to claim often.
    template <class Body>
    void split(i64 units, Body body) {
        if (size == 1) {
            if (units > 0) body(i64{0}, units);
            return;
        }
        run_all(units, 0, false, [&](i64 begin, i64 end, i64) { body(begin, end); });
    }

  private:
    struct Run { i64 begin, end; };

    template <class Body>
    void run_all(i64 units, i64 divisor, bool ahead, Body body) {
        if (units == 0) return;
        i64 mine = 0;
        for (Run run = claim(units, divisor); run.begin < units;) {
            Run following = ahead ? claim(units, divisor) : Run{-1, -1};
            body(run.begin, run.end, following.begin < units ? following.begin : i64{-1});
            mine += run.end - run.begin;
            run = ahead ? following : claim(units, divisor);
        }
        if (mine && progress_.done.fetch_add(mine, std::memory_order_acq_rel) + mine == units) {
            progress_.done.store(0, std::memory_order_relaxed);
            progress_.end(number_);
        } else {
            progress_.wait_for_end(number_);
        }
        ++number_;
    }

    // Claims one part in `divisor` of what is left; 0: of the whole, one part for each thread. Nothing if the sharing is over.
    Run claim(i64 units, i64 divisor) const {
        i64 word = progress_.claimed.load(std::memory_order_acquire), begin, end;
        do {
            if (word >> 32 != number_) return {units, units};
            begin = word & 0xffffffff;
            if (begin >= units) return {units, units};
            i64 length = divisor ? (units - begin) / divisor : (units + size - 1) / size;
            end = begin + (length > 1 ? length : 1);
            if (end > units) end = units;
        } while (!progress_.claimed.compare_exchange_weak(word, number_ << 32 | end, std::memory_order_acq_rel));
        return {begin, end};
    }

    Progress& progress_;
    i64 number_ = 0;  // number of this thread's next sharing
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
