// AVX2 and FMA. What the standard library inlines is compiled for every CPU, hence the order.
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

#pragma GCC target("avx2,fma")
#define SF_VARIANT avx2
#include "variant.h"
