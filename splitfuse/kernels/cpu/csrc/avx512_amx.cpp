// AMX, and AVX-512 with VNNI and bf16. The standard library comes first, so that what it inlines is compiled for every CPU.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,prefer-vector-width=512")
#define SF_AVX512
#define SF_BF16_DOTS
#define SF_TILES
#define SF_VARIANT avx512_amx
#include "variant.h"
