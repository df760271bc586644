// What this CPU can do, and the check of every step before a kernel trusts its numbers.

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "interface.h"

bool splitfuse::forked = false;
splitfuse::Nodes splitfuse::nodes{};
static std::vector<std::uint64_t> cores_of_nodes[splitfuse::MOST_NODES];  // a bit for each core

// If the system refuses, the thread runs where it did: slower, not wrong.
void splitfuse::bind_thread(std::int32_t node) {
    static thread_local std::int32_t bound = -1;
    if (bound == node) return;
    bound = node;
    const std::vector<std::uint64_t>& cores = cores_of_nodes[node];
    syscall(SYS_sched_setaffinity, 0, cores.size() * sizeof cores[0], cores.data());
}
[[maybe_unused]] static const int watches_forks = pthread_atfork(nullptr, nullptr, [] { splitfuse::forked = true; });

#define SF_EXPORT extern "C" __attribute__((visibility("default")))

// Returns the hash of the sources, from setup.py, by which library.py knows a library that was compiled from others.
SF_EXPORT std::uint64_t sf_sources() { return SF_SOURCES; }

SF_EXPORT int sf_supports_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

SF_EXPORT int sf_supports_avx512_bf16() { return sf_supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's cores take two cycles for what vdpbf16ps does, and half of one for an fp32 FMA, which does half as much:
// measured on Emerald Rapids, 88 against 166 billion operations a second.
SF_EXPORT int sf_prefers_avx512_bf16() { return !__builtin_cpu_is("intel"); }

SF_EXPORT int sf_supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Divides the threads of teams among nodes, of which each has bits of its cores, [count, words]. Threads are bound when they next
// compute. No team may compute meanwhile.
SF_EXPORT void sf_set_nodes(std::int32_t count, const std::int32_t* first_thread, const std::uint64_t* cores, std::int64_t words) {
    splitfuse::nodes.count = count;
    splitfuse::nodes.num_threads = first_thread[count];
    std::copy(first_thread, first_thread + count + 1, splitfuse::nodes.first_thread);
    for (std::int32_t node = 0; node < count; ++node) cores_of_nodes[node].assign(cores + node * words, cores + (node + 1) * words);
}

// Returns 0, or 1 if an id is not a row of the table.
SF_EXPORT int sf_check_ids(const std::int32_t* ids, std::int64_t count, std::int64_t rows) {
    for (std::int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return 1;
    return 0;
}

// Returns 0, or the number of the rule that the step breaks; library.py has them in words. A step for rope_store has no
// requests, one for attend no positions; one without states has -1 for their number.
SF_EXPORT int sf_check_step(const splitfuse::Step* step, std::int64_t max_position, std::int64_t num_blocks, std::int64_t block_size,
                            std::int64_t vocabulary, std::int64_t num_states) {
    for (std::int32_t t = 0; t < step->tokens && step->positions; ++t) {
        if (step->positions[t] < 0 || step->positions[t] >= max_position) return 1;
        if (step->slots[t] < -1 || step->slots[t] >= num_blocks * block_size) return 2;
    }
    if (step->ids && sf_check_ids(step->ids, step->tokens, vocabulary)) return 6;
    if (step->rows && sf_check_ids(step->rows, step->num_rows, step->tokens)) return 7;
    for (std::int32_t t = 0; t < step->tokens && step->lora; ++t)
        if (step->lora->of_row[t] < -1 || step->lora->of_row[t] >= step->lora->num_adapters) return 9;
    if (!step->query_start) return 0;
    if (step->query_start[0] != 0 || step->query_start[step->requests] != step->tokens) return 3;
    for (std::int32_t s = 0; s < step->requests; ++s) {
        std::int64_t tokens = static_cast<std::int64_t>(step->query_start[s + 1]) - step->query_start[s];
        if (tokens < 0) return 3;
        if (num_states >= 0) {
            if (step->state_reads[s] < -1 || step->state_reads[s] >= num_states) return 8;
            if (step->state_writes[s] < 0 || step->state_writes[s] >= num_states) return 8;
        }
        if (!step->seq_lens) continue;
        std::int64_t blocks = (step->seq_lens[s] + block_size - 1) / block_size;
        if (step->seq_lens[s] < tokens || blocks > step->table_width) return 4;
        for (std::int64_t b = 0; b < blocks; ++b) {
            std::int32_t block = step->tables[static_cast<std::int64_t>(s) * step->table_width + b];
            if (block < 0 || block >= num_blocks) return 5;
        }
    }
    return 0;
}

// Returns the same of a whole step for a network, as it is packed.
SF_EXPORT int sf_check_packed(const splitfuse::PackedStep* packed, const splitfuse::Network* network) {
    const splitfuse::Step step = splitfuse::unpacked(*packed);
    return sf_check_step(&step, network->num_positions, network->num_blocks, network->block_size, network->vocabulary, network->num_states);
}
