// The tile registers of AMX: the only file that knows their instructions, and an emulation of them by those of AVX-512,
// so that layouts, tails and bits are tested where there is no AMX.
//
// All eight tiles are configured alike for the time of a parallel region: 16 rows of 64 bytes. A product C += A B takes
//   A   16 rows of x, 16 words each: two bf16, or four int8
//   B   16 steps of a panel, words of 16 columns each: a panel's lines are B's rows as they are
//   C   16 rows of x by 16 columns, fp32 or int32
// Row r of C depends on row r of A alone: rows of A that are not of x may hold anything, and x's bits come from x.
#pragma once

#include "interface.h"
#include "vector.h"

namespace splitfuse {
namespace SF_VARIANT {

constexpr int TILE_ROWS = 16;       // of A and C, and steps of B
constexpr int TILE_ROW_BYTES = 64;
constexpr int NUM_TILES = 8;

#ifdef SF_TILE_INSTRUCTIONS
// The five instructions. Assembly, since the intrinsics of GCC do not say that they read and write memory.
struct HardwareTiles {
    template <int TILE>
    SF_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
    template <int TILE>
    SF_INLINE void load(const void* p, i64 stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(p), "r"(stride) : "memory");
    }
    template <int TILE>
    SF_INLINE void store(void* p, i64 stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(p), "r"(stride) : "memory");
    }
    // Adds A times B to C: pairs of bf16, or four int8 of A with four quantized values, + QVALUE_BIAS each, of B.
    template <Dot DOT, int C, int A, int B>
    SF_INLINE void dot() {
        if constexpr (DOT == Dot::BF16) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
        else asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }

    static void configure() {
        alignas(64) u8 config[64] = {1};  // the palette; then the bytes of a row of each tile, and its rows
        for (int tile = 0; tile < NUM_TILES; ++tile) {
            config[16 + 2 * tile] = TILE_ROW_BYTES;
            config[48 + tile] = TILE_ROWS;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    static void release() { asm volatile("tilerelease"); }
};
#endif

// Has subnormal numbers taken for zero, as operands and as results, while it lives: the instructions for bf16 do so.
class SubnormalsAsZero {
  public:
    SubnormalsAsZero() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & ~ROUNDING) | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
    ~SubnormalsAsZero() { _mm_setcsr(saved_); }

  private:
    static constexpr unsigned DENORMALS_ARE_ZERO = 1 << 6, ROUNDING = 3 << 13, FLUSH_TO_ZERO = 1 << 15;
    const unsigned saved_;
};

struct alignas(64) Tile { u8 row[TILE_ROWS][TILE_ROW_BYTES]; };
static_assert(LANES * 4 == TILE_ROW_BYTES);

// Multiplies tiles of pairs of bf16. The first elements of all pairs are summed, then the second ones, each addition rounded
// once with its product; then the two sums are added, and what that gives to C. Never inlined: its arithmetic stays within
// the mode.
static __attribute__((noinline)) void emulate_dot_bf16(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < TILE_ROWS; ++m) {
        u32 x[TILE_ROWS];
        std::memcpy(x, a.row[m], sizeof x);
        Floats first = broadcast(0.0f), second = first;
        for (int k = 0; k < TILE_ROWS; ++k) {
            const Packed pairs = load_packed(b.row[k]), of_x = broadcast_packed(x[k]);
            first = fma(first_of_pairs(of_x), first_of_pairs(pairs), first);
            second = fma(second_of_pairs(of_x), second_of_pairs(pairs), second);
        }
        float* sums = reinterpret_cast<float*>(c.row[m]);
        store(sums, load(sums) + (first + second));
    }
}

// Multiplies tiles of four quantized values, as they are, with four int8. A sum that overflows wraps.
static __attribute__((noinline)) void emulate_dot_qvalues(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < TILE_ROWS; ++m) {
        u32 x[TILE_ROWS];
        std::memcpy(x, a.row[m], sizeof x);
        Ints total = load_ints(reinterpret_cast<const i32*>(c.row[m]));
        for (int k = 0; k < TILE_ROWS; ++k) total = dot_qvalues(total, load_packed(b.row[k]), broadcast_packed(x[k]));
        std::memcpy(c.row[m], &total, sizeof total);
    }
}

// What the five instructions do, as Intel's manual has it ("Intel 64 and IA-32 Architectures Software Developer's Manual",
// volume 2, TDPBF16PS and TDPBSUD).
struct EmulatedTiles {
    static Tile* tiles() {
        static thread_local Tile registers[NUM_TILES];
        return registers;
    }

    template <int TILE>
    SF_INLINE void zero() { std::memset(tiles() + TILE, 0, sizeof(Tile)); }
    template <int TILE>
    SF_INLINE void load(const void* p, i64 stride) {
        const u8* from = static_cast<const u8*>(p);
        for (int r = 0; r < TILE_ROWS; ++r) std::memcpy(tiles()[TILE].row[r], from + r * stride, TILE_ROW_BYTES);
    }
    template <int TILE>
    SF_INLINE void store(void* p, i64 stride) {
        u8* to = static_cast<u8*>(p);
        for (int r = 0; r < TILE_ROWS; ++r) std::memcpy(to + r * stride, tiles()[TILE].row[r], TILE_ROW_BYTES);
    }
    template <Dot DOT, int C, int A, int B>
    SF_INLINE void dot() {
        if constexpr (DOT == Dot::BF16) {
            const SubnormalsAsZero mode;
            emulate_dot_bf16(tiles()[C], tiles()[A], tiles()[B]);
        } else {
            emulate_dot_qvalues(tiles()[C], tiles()[A], tiles()[B]);
        }
    }
};

// Keeps the tiles configured while it lives: without, the system would save them at every change of threads.
class TilesInUse {
  public:
#ifdef SF_TILE_INSTRUCTIONS
    TilesInUse() { if (!emulates_tiles) HardwareTiles::configure(); }
    ~TilesInUse() { if (!emulates_tiles) HardwareTiles::release(); }
#endif
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
#ifndef SF_TILE_INSTRUCTIONS
    TilesInUse() = default;
#endif
};

// Calls body(tiles), an object of the type whose functions are to be called.
template <class Body>
SF_INLINE void with_tiles(Body body) {
#ifdef SF_TILE_INSTRUCTIONS
    if (!emulates_tiles) return body(HardwareTiles{});
#endif
    body(EmulatedTiles{});
}

}  // namespace SF_VARIANT
}  // namespace splitfuse
