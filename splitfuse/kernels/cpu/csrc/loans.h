// Loans: what the debtor and the creditor of a request tell each other, through memory that both processes share.
//
// The debtor computes the request. The creditor holds the keys and values of its leading tiles, and answers queries with what
// these tiles give, merged. One message is on its way at a time: it is written behind the channel's header, and the answer to
// queries behind them. Each side waits for a number of the other to rise: a little while busily, then asleep.
//
// No wait is without end: a creditor that makes no progress for `patience` milliseconds, or takes MOST_PATIENCE times as long
// for one answer, has lost the loan. So has one that was closed. The step goes on without it: no other request depends on
// what this one gets.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstddef>

#include "kv_store.h"

namespace splitfuse {

enum MessageKind : std::int32_t { ATTEND = 1, DEPOSIT = 2 };

struct Message {
    std::int32_t kind;
    std::int32_t index;   // of the layer; DEPOSIT: of the block in the loan
    std::int32_t tokens;  // of ATTEND
    std::int32_t tiles;   // that the queries attend to
    std::int64_t start;   // position of the first query
};

// The header of a channel, which takes CHANNEL_HEADER bytes. Python writes `number` and `closed`.
struct Channel {
    std::uint64_t number;                         // of the loan
    alignas(64) std::atomic<std::uint32_t> asked; // number of the last message
    Message message;
    alignas(64) std::atomic<std::uint32_t> answered;
    std::int32_t refused;                         // whether the message could not be answered
    alignas(64) std::atomic<std::uint32_t> beats; // rises while the creditor computes
    alignas(64) std::atomic<std::uint32_t> closed;
};
constexpr std::int64_t CHANNEL_HEADER = 4096;
static_assert(sizeof(Channel) < CHANNEL_HEADER && sizeof(std::atomic<std::uint32_t>) == 4, "two processes share it");
static_assert(offsetof(Channel, closed) == 256, "kernels/loans.py knows the place");

namespace SF_VARIANT {

constexpr int TILE = 512;           // keys
constexpr int MOST_PATIENCE = 30;
constexpr int BUSY_SPINS = 1000;    // some tens of microseconds
constexpr i64 SLEEP = 20;           // milliseconds after which a waiting thread polls what does not wake it

SF_INLINE u8* data_of(Channel& channel) { return reinterpret_cast<u8*>(&channel) + CHANNEL_HEADER; }

// Returns where the answer to queries of so many elements begins.
SF_INLINE i64 answer_offset(i64 elements) { return ceil_div(elements * 2, 64) * 64; }
SF_INLINE float* answers(Channel& channel, i64 elements) { return reinterpret_cast<float*>(data_of(channel) + answer_offset(elements)); }

// Returns the floats of an answer for each token and head: maximum, total, values.
SF_INLINE i64 lent_floats(const Layout& kv) { return 2 + kv.value_padded; }

inline void wake(std::atomic<u32>& number) {
    syscall(SYS_futex, reinterpret_cast<u32*>(&number), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}
inline void sleep_while(std::atomic<u32>& number, u32 value) {
    const timespec time{0, SLEEP * 1000000};
    syscall(SYS_futex, reinterpret_cast<u32*>(&number), FUTEX_WAIT, value, &time, nullptr, 0);
}
inline i64 milliseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * i64{1000} + now.tv_nsec / 1000000;
}

SF_INLINE void beat(Channel& channel) { channel.beats.fetch_add(1, std::memory_order_relaxed); }

// Takes the creditor to be lost, from here on and in all steps that follow. Several threads may find that out.
inline void lose(Loan& loan) {
    __atomic_store_n(&loan.lost, 1, __ATOMIC_RELAXED);
    loan.channel->closed.store(1, std::memory_order_seq_cst);
}

// Sends a message, whose data `write` writes; it and its answer take `bytes` in all.
template <class Write>
void ask(Loan& loan, const Message& message, i64 bytes, Write write) {
    Channel& channel = *loan.channel;
    if (loan.lost) return;
    if (channel.closed.load(std::memory_order_acquire) || bytes > loan.capacity) return lose(loan);
    write(data_of(channel));
    channel.message = message;
    loan.asked = channel.asked.load(std::memory_order_relaxed) + 1;
    channel.asked.store(loan.asked, std::memory_order_seq_cst);
    wake(channel.asked);
}

// Returns true once the last message is answered; false if the loan is lost.
inline bool wait_for_answer(Loan& loan) {
    if (__atomic_load_n(&loan.lost, __ATOMIC_RELAXED)) return false;
    Channel& channel = *loan.channel;
    auto is_answered = [&] { return channel.answered.load(std::memory_order_acquire) == loan.asked; };
    for (int spins = 0; spins < BUSY_SPINS && !is_answered(); ++spins) _mm_pause();
    i64 began = -1, progressed = 0;
    u32 beats = 0;
    while (!is_answered()) {
        const u32 seen = channel.answered.load(std::memory_order_acquire), now_beats = channel.beats.load(std::memory_order_relaxed);
        const i64 now = milliseconds();
        if (began < 0) began = now;
        if (began == now || beats != now_beats) progressed = now;
        beats = now_beats;
        const bool is_late = now - progressed > loan.patience || now - began > loan.patience * i64{MOST_PATIENCE};
        if (channel.closed.load(std::memory_order_acquire) || is_late) {
            lose(loan);
            return false;
        }
        if (seen != loan.asked) sleep_while(channel.answered, seen);
    }
    if (channel.refused) lose(loan);
    return !channel.refused;
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
