// The threads of one parallel region: who they are, how they share work, how they meet.
//
// Who computes a unit of work, and when, never changes what is computed.
#pragma once

#include <omp.h>

#include <atomic>

#include "vector.h"

namespace splitfuse {
namespace SF_VARIANT {

// Counters of work already claimed, in turns: every sharing ends with a barrier, so that while one is in use the other,
// of the sharing before, is free to be cleared for the next.
struct Claims {
    struct alignas(64) Counter { std::atomic<i64> next{0}; };
    Counter counters[2];
};

class Team {
  public:
    Team(Claims& claims, int rank, int size) : rank(rank), size(size), claims_(claims) {}

    const int rank;
    const int size;

    void barrier() {
        if (size > 1) {
#pragma omp barrier
        }
    }

    // Calls body(begin, end, next) for contiguous runs of 0 .. units - 1, each claimed by whoever is free: long runs
    // first, single units at the end. Static halves would wait for a core that is busy with something else. A run is
    // claimed one ahead, so that `next`, its first unit, can be fetched meanwhile; -1: there is none.
    template <class Body>
    void share(i64 units, Body body) {
        if (size == 1) {
            if (units > 0) body(i64{0}, units, i64{-1});
            return;
        }
        std::atomic<i64>& next = claims_.counters[round_ % 2].next;
        if (rank == 0) claims_.counters[(round_ + 1) % 2].next.store(0, std::memory_order_relaxed);
        ++round_;
        for (Run run = claim(next, units); run.begin < units;) {
            Run following = claim(next, units);
            body(run.begin, run.end, following.begin < units ? following.begin : i64{-1});
            run = following;
        }
        barrier();
    }

    // The same in equal parts decided beforehand, for work too small to claim.
    template <class Body>
    void split(i64 units, Body body) {
        i64 begin = units * rank / size, end = units * (rank + 1) / size;
        if (begin < end) body(begin, end);
        barrier();
    }

  private:
    struct Run { i64 begin, end; };

    Run claim(std::atomic<i64>& next, i64 units) const {
        i64 begin = next.load(std::memory_order_relaxed), end;
        do {
            if (begin >= units) return {units, units};
            i64 length = (units - begin) / (3 * size);
            end = begin + (length > 1 ? length : 1);
        } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return {begin, end};
    }

    Claims& claims_;
    int round_ = 0;
};

template <class Body>
void parallel(int num_threads, Body body) {
    Claims claims;
    if (num_threads == 1) {
        Team team(claims, 0, 1);
        body(team);
        return;
    }
#pragma omp parallel num_threads(num_threads)
    {
        Team team(claims, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
