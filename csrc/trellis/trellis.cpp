#include "trellis/trellis.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PGOLF_X86 1
#endif

namespace pgolf {
namespace {

constexpr int block = 32;       // columns quantised before their errors are pushed on
constexpr int group_rows = 16;
constexpr int64_t values_a_thread = 1 << 12;  // to search; to decode, 256 times as many

#define PGOLF_VECTORS                                                                      \
  typedef float Floats __attribute__((vector_size(4 * PGOLF_LANES)));                      \
  typedef int32_t Ints __attribute__((vector_size(4 * PGOLF_LANES)));                      \
  PGOLF_TARGET inline Floats load(const float* from) {                                     \
    return *reinterpret_cast<const Floats*>(from);                                         \
  }                                                                                        \
  PGOLF_TARGET inline Ints load(const int32_t* from) {                                     \
    return *reinterpret_cast<const Ints*>(from);                                           \
  }                                                                                        \
  PGOLF_TARGET inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; } \
  PGOLF_TARGET inline void store(int32_t* to, Ints value) { *reinterpret_cast<Ints*>(to) = value; }

namespace portable {
#define PGOLF_LANES 8
#define PGOLF_TARGET
PGOLF_VECTORS
inline Floats pick(Floats from, Ints lane) {
  Floats to;
  for (int i = 0; i < PGOLF_LANES; ++i) to[i] = from[lane[i]];
  return to;
}
inline Ints pick(Ints from, Ints lane) {
  Ints to;
  for (int i = 0; i < PGOLF_LANES; ++i) to[i] = from[lane[i]];
  return to;
}
inline Floats look_up(const float* table, Ints at) {
  Floats to;
  for (int i = 0; i < PGOLF_LANES; ++i) to[i] = table[at[i]];
  return to;
}
inline unsigned differing(Ints a, Ints b) {
  unsigned bits = 0;
  for (int i = 0; i < PGOLF_LANES; ++i) bits |= static_cast<unsigned>(a[i] != b[i]) << i;
  return bits;
}
#include "trellis/trellis_kernel.h"
#undef PGOLF_TARGET
#undef PGOLF_LANES
}  // namespace portable

#if PGOLF_X86
namespace avx2 {
#define PGOLF_LANES 8
#define PGOLF_TARGET __attribute__((target("avx2")))
PGOLF_VECTORS
PGOLF_TARGET inline Floats pick(Floats from, Ints lane) { return _mm256_permutevar8x32_ps(from, (__m256i)lane); }
PGOLF_TARGET inline Ints pick(Ints from, Ints lane) {
  return (Ints)_mm256_permutevar8x32_epi32((__m256i)from, (__m256i)lane);
}
PGOLF_TARGET inline Floats look_up(const float* table, Ints at) { return _mm256_i32gather_ps(table, (__m256i)at, 4); }
PGOLF_TARGET inline unsigned differing(Ints a, Ints b) { return _mm256_movemask_ps((__m256)(a != b)); }
#include "trellis/trellis_kernel.h"
#undef PGOLF_TARGET
#undef PGOLF_LANES
}  // namespace avx2

namespace avx512 {
#define PGOLF_LANES 16
#define PGOLF_TARGET __attribute__((target("avx512f,avx512bw")))
PGOLF_VECTORS
PGOLF_TARGET inline Floats pick(Floats from, Ints lane) { return _mm512_permutexvar_ps((__m512i)lane, from); }
PGOLF_TARGET inline Ints pick(Ints from, Ints lane) {
  return (Ints)_mm512_permutexvar_epi32((__m512i)lane, (__m512i)from);
}
PGOLF_TARGET inline Floats look_up(const float* table, Ints at) { return _mm512_i32gather_ps((__m512i)at, table, 4); }
PGOLF_TARGET inline unsigned differing(Ints a, Ints b) {
  return _mm512_cmpneq_epi32_mask((__m512i)a, (__m512i)b);
}
#include "trellis/trellis_kernel.h"
#undef PGOLF_TARGET
#undef PGOLF_LANES
}  // namespace avx512
#endif

constexpr int most_lanes = 16;

// What search_group needs: history, base, residual, and three arrays for each bundle.
int64_t group_floats(int64_t columns, int states) {
  return group_rows * (columns + 3 * columns * states + block) + block * most_lanes;
}

template <int S>
void search_group(const TrellisSearch& s, const float* panels, const float* inverse, const float* rate, int64_t first,
                  float* space) {
#if PGOLF_X86
  if (level() == Level::avx512vbmi) return avx512::search_group<S>(s, panels, inverse, rate, first, space);
  if (level() >= Level::avx2) return avx2::search_group<S>(s, panels, inverse, rate, first, space);
#endif
  portable::search_group<S>(s, panels, inverse, rate, first, space);
}

struct Release {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float, Release>;

Memory allocate(int64_t floats) {
  return Memory(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
}

// One after another the columns [0, 32), [32, 64), ... of the factor, each from row 0 to its last on the diagonal.
Memory make_panels(const TrellisSearch& s) {
  int64_t rows = 0;
  for (int64_t start = 0; start < s.columns; start += block) rows += std::min(start + block, s.columns);
  Memory panels = allocate(rows * block);
  float* to = panels.get();
  for (int64_t start = 0; start < s.columns; start += block) {
    const int64_t end = std::min(start + block, s.columns);
    for (int64_t row = 0; row < end; ++row, to += block) {
      const float* from = s.factor + row * s.columns + start;
      std::fill(std::copy(from, from + (end - start), to), to + block, 0.0f);
    }
  }
  return panels;
}

// Calls work() in `threads` threads at most, this one among them.
template <class Work>
void in_threads(int64_t threads, Work work) {
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (int64_t i = 1; i < threads; ++i) {
    try {
      pool.emplace_back(work);
    } catch (const std::exception&) {  // no more threads, or no memory for one
      break;
    }
  }
  work();
  for (std::thread& each : pool) each.join();
}

// Calls index = visit(row, place, quantiser) for every index of the rows [first, last) of the bank, as the machine
// takes them. `order` has room for the columns.
template <class Visit>
void walk(const TrellisBank& bank, const Machine& m, int64_t first, int64_t last, int32_t* order, Visit visit) {
  for (int64_t row = first; row < last; ++row) {
    if (row == first || row % bank.rows == 0) {
      const int8_t* classes = bank.classes + row / bank.rows * bank.columns;
      int32_t* next = order;
      for (int each = 0; each < 4; ++each)
        for (int32_t j = 0; j < bank.columns; ++j)
          if ((classes[j] & 3) == each) *next++ = j;
    }
    int state = 0;
    for (int64_t i = 0; i < bank.columns; ++i)
      state = m.next[state][visit(row, row * bank.columns + order[i], m.quantiser[state]) & 1];
  }
}

}  // namespace

void trellis_search(const TrellisSearch& s, int states, int threads) {
  if (s.rows == 0 || s.columns == 0) return;
  const Memory panels = make_panels(s);
  std::vector<float> inverse(s.columns), rate(2 * (2 * s.limit + 3));
  for (int64_t j = 0; j < s.columns; ++j) inverse[j] = 1.0f / s.factor[j * s.columns + j];
  for (int q = 0; q < 2; ++q)
    std::copy_n(s.rate + q * (2 * s.limit + 1), 2 * s.limit + 1, rate.begin() + q * (2 * s.limit + 3) + 1);

  const int64_t groups = (s.rows + group_rows - 1) / group_rows;
  const int64_t floats = (group_floats(s.columns, states) + 15) / 16 * 16;
  const int64_t used = std::max<int64_t>(
      1, std::min<int64_t>({threads, groups, s.rows * s.columns / values_a_thread}));
  const Memory space = allocate(used * floats);
  std::atomic<int64_t> next_group{0}, next_space{0};
  in_threads(used, [&] {
    float* own = space.get() + floats * next_space++;
    for (int64_t group; (group = next_group++) < groups;) {
      if (states == 4)
        search_group<4>(s, panels.get(), inverse.data(), rate.data(), group * group_rows, own);
      else
        search_group<8>(s, panels.get(), inverse.data(), rate.data(), group * group_rows, own);
    }
  });
}

void trellis_dequantize(const TrellisBank& bank, const int8_t* indices, const float* scale, float* out, int states,
                        int threads) {
  const Machine& m = machine(states);
  const int64_t rows = bank.matrices * bank.rows;
  if (rows == 0 || bank.columns == 0) return;
  const int64_t parts = std::max<int64_t>(
      1, std::min<int64_t>({threads, rows, rows * bank.columns / values_a_thread / 256}));
  std::vector<int32_t> orders(parts * bank.columns);  // here, where want of memory can be told
  std::atomic<int64_t> next_part{0};
  in_threads(parts, [&] {
    for (int64_t part; (part = next_part++) < parts;) {
      int32_t* order = orders.data() + part * bank.columns;
      walk(bank, m, rows * part / parts, rows * (part + 1) / parts, order, [&](int64_t row, int64_t at, int quantiser) {
        out[at] = static_cast<float>(level_of(indices[at], quantiser)) * scale[row];
        return indices[at];
      });
    }
  });
}

}  // namespace pgolf
