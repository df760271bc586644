// AVX2 and FMA. The standard library comes first, so that what it inlines is compiled for every CPU.
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

#pragma GCC target("avx2,fma,f16c")
#define SF_VARIANT avx2
#include "variant.h"
