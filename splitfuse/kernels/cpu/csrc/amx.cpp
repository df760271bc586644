// Whether AMX can be used: a processor may announce it where the system, or the virtual machine, does not let it run.

#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "interface.h"

#define SF_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" int sf_supports_avx512_bf16();

namespace splitfuse {

const bool emulates_tiles = [] {
    const char* set = std::getenv("SPLITFUSE_EMULATE_AMX");
    return set && *set && std::strcmp(set, "0") != 0;
}();

namespace {

enum State : int { USABLE = 0, ABSENT = 1, NOT_ENABLED = 2, NOT_PERMITTED = 3, FAULTS = 4, NOT_COMPILED = 5 };

bool is_announced() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1 && d >> 24 & 1 && d >> 25 & 1)) return false;  // bf16, tile, int8
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
    return (b & 0xffff) == 64 && b >> 16 >= 8 && (c & 0xffff) >= 16;  // bytes of a row, tiles, rows
}

// Returns whether the system saves the tiles at a change of threads.
bool is_enabled() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3;
}

// Asks the system for the right to use tiles, which all threads of a process have together.
bool is_permitted() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of Linux
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#ifdef SF_TILE_INSTRUCTIONS
// Multiplies ones with ones. Returns whether each sum is right.
bool multiplies() {
    alignas(64) static std::uint8_t config[64], ones[16][64];
    alignas(64) static std::int32_t sums[16][16];
    config[0] = 1;
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    std::memset(ones, 1, sizeof ones);
    asm volatile("ldtilecfg %0" ::"m"(config));
    asm volatile("tilezero %%tmm0\n\ttileloadd (%0,%1,1), %%tmm1\n\ttileloadd (%0,%1,1), %%tmm2" ::"r"(ones), "r"(64L) : "memory");
    asm volatile("tdpbsud %%tmm2, %%tmm1, %%tmm0\n\ttilestored %%tmm0, (%0,%1,1)\n\ttilerelease" ::"r"(sums), "r"(64L) : "memory");
    for (const auto& row : sums)
        for (std::int32_t sum : row)
            if (sum != 64) return false;
    return true;
}

// Tries the instructions in a process of their own, which may end by a signal; no handler of this one learns of it.
bool works() {
    const long child = syscall(SYS_clone, 0, nullptr, nullptr, nullptr, nullptr);  // no signal at its end
    if (child == 0) {
        for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) signal(number, SIG_DFL);
        _exit(multiplies() ? 0 : 1);
    }
    int status = 1;
    while (child > 0 && waitpid(static_cast<pid_t>(child), &status, __WCLONE) < 0)
        if (errno != EINTR) return false;
    return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#endif

State find_state() {
    if (!is_announced() || !sf_supports_avx512_bf16()) return ABSENT;
#ifdef SF_TILE_INSTRUCTIONS
    return !is_enabled() ? NOT_ENABLED : !is_permitted() ? NOT_PERMITTED : !works() ? FAULTS : USABLE;
#else
    return NOT_COMPILED;
#endif
}

}  // namespace
}  // namespace splitfuse

// Returns the State, as library.py has it in words. The first call may take some milliseconds.
SF_EXPORT int sf_amx_state() {
    static const int state = splitfuse::find_state();
    return state;
}

SF_EXPORT int sf_supports_avx512_amx() {
    return splitfuse::emulates_tiles ? sf_supports_avx512_bf16() : sf_amx_state() == splitfuse::USABLE;
}

SF_EXPORT int sf_emulates_amx() { return splitfuse::emulates_tiles; }
