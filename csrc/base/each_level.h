// Compiles the file PGOLF_LOOPS once for each level of the CPU that computes in floats, each in a namespace of its own
// with the functions of lanes.h. There `Vec` is a vector, fused(a, b, c) is a * b + c, rounded once from avx2 on,
// tile_vecs vectors of rows by tile_columns columns are the sums that the registers hold, and PGOLF_TARGET marks every
// function. What is included here must not include anything. PGOLF_AT_LEVEL(call) calls the one for the level in use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PGOLF_X86 1
#endif

namespace pgolf {



namespace {

#define PGOLF_TARGET
namespace portable {
typedef float Vec __attribute__((vector_size(16)));
constexpr int tile_vecs = 2, tile_columns = 4;
inline Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
#include "base/lanes.h"
#include PGOLF_LOOPS
}  // namespace portable
#undef PGOLF_TARGET

#if PGOLF_X86
#define PGOLF_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
using Vec = __m256;
constexpr int tile_vecs = 2, tile_columns = 4;
PGOLF_TARGET inline Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#include "base/lanes.h"
#include PGOLF_LOOPS
}  // namespace avx2
#undef PGOLF_TARGET

#define PGOLF_TARGET __attribute__((target("avx512f,avx512bw,fma")))
namespace avx512 {
using Vec = __m512;
constexpr int tile_vecs = 2, tile_columns = 8;
PGOLF_TARGET inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#include "base/lanes.h"
#include PGOLF_LOOPS
}  // namespace avx512
#undef PGOLF_TARGET

#define PGOLF_AT_LEVEL(call)                                \
  (level() == Level::avx512vbmi ? avx512::call              \
   : level() >= Level::avx2     ? avx2::call                \
                                : portable::call)
#else
#define PGOLF_AT_LEVEL(call) portable::call
#endif

}  // namespace
}  // namespace pgolf
