// Tensor-parallel groups: processes, the ranks, that compute one network together. Each has a share of the heads, of the inner
// elements of the MLPs and experts, of the hidden elements that o and down give, and of the vocabulary.
//
// Ranks on one machine *gather*: what every rank reads of the others (the residual stream, what attention and the first
// products of MLPs give) lies in memory that all share, each rank writes columns of its own there, and they meet before
// anything is read. Each sum is computed by one rank as if it were alone: the bits are those of one process. Where nothing is
// shared ranks *reduce*: o and down are divided by columns, and `Group::reduce` adds up what all of them give.
//
// No meeting is without end: one for which a rank waits longer than `patience` milliseconds has failed, for all ranks and for
// ever. A rank that knows that another has ended breaks it at once. The step is computed to its end, without meaning.
#pragma once

#include "loans.h"
#include "team.h"

namespace splitfuse {

// Where ranks meet, at the begin of the memory that they share. Python writes `broken`.
struct Meeting {
    alignas(64) std::atomic<std::uint32_t> arrived;   // ranks that wait for the next one
    alignas(64) std::atomic<std::uint32_t> number;    // of the next meeting
    alignas(64) std::atomic<std::uint32_t> sleepers;  // ranks that wait without their core
    alignas(64) std::atomic<std::uint32_t> broken;
};
static_assert(offsetof(Meeting, broken) == 192 && sizeof(Meeting) <= 4096, "kernels/group.py knows the place");

namespace SF_VARIANT {

constexpr int MEETING_SPINS = 4000;  // about a tenth of a millisecond: ranks are seldom further apart

// Waits until all ranks have come here.
inline void meet(Group& group) {
    if (group.failed) return;
    Meeting& meeting = *group.meeting;
    const u32 number = meeting.number.load(std::memory_order_acquire);
    if (meeting.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<u32>(group.size)) {
        meeting.arrived.store(0, std::memory_order_relaxed);
        meeting.number.store(number + 1, std::memory_order_seq_cst);
        if (meeting.sleepers.load(std::memory_order_seq_cst)) wake(meeting.number);
        return;
    }
    const auto is_over = [&] { return meeting.number.load(std::memory_order_acquire) != number; };
    for (int spins = 0; spins < MEETING_SPINS; ++spins) {
        if (is_over()) return;
        _mm_pause();
    }
    const i64 end = milliseconds() + group.patience;
    meeting.sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (!is_over()) {
        if (meeting.broken.load(std::memory_order_acquire) || milliseconds() > end) {
            meeting.broken.store(1, std::memory_order_seq_cst);
            group.failed = 1;
            break;
        }
        sleep_while(meeting.number, number);
    }
    meeting.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

SF_INLINE bool gathers(const Group* group) { return group && group->meeting; }
SF_INLINE bool reduces(const Group* group) { return group && !group->meeting; }

// Waits for all ranks of a group that gathers: what each has written before can be read by all.
inline void gather(Team& team, Group* group) {
    if (gathers(group)) team.split(1, [&](i64, i64) { meet(*group); });
}

// Replaces numbers by the sum over all ranks of a group that reduces.
inline void reduce(Team& team, Group* group, float* numbers, i64 count) {
    if (!reduces(group)) return;
    team.split(1, [&](i64, i64) {
        if (!group->failed) group->failed = group->reduce(numbers, count);
    });
}

// Returns the first of the columns that this rank writes of a buffer which all share, where each writes `count`.
SF_INLINE i64 first_column(const Group* group, i64 count) { return gathers(group) ? group->rank * count : 0; }

}  // namespace SF_VARIANT
}  // namespace splitfuse
