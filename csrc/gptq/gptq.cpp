#include "gptq/gptq.h"

#include "base/threads.h"

#define PGOLF_LOOPS "gptq/gptq_lanes.h"
#include "base/each_level.h"

namespace pgolf {
namespace {

// The rows of one strip of the ordered Hessian, with its diagonal; identity where there is no row.
void gather_strip(const float* h, const int64_t* order, const float* diagonal, int64_t n, int64_t r, float* strip) {
  const int64_t first = r * strip_rows, columns = first + strip_rows;
  std::memset(strip, 0, columns * strip_rows * sizeof(float));
  const float* rows[strip_rows];
  const int64_t count = std::min(strip_rows, n - first);
  for (int64_t lane = 0; lane < count; ++lane) rows[lane] = h + order[first + lane] * n;
  for (int64_t k = 0; k < first; ++k)
    for (int64_t lane = 0; lane < count; ++lane) strip[k * strip_rows + lane] = rows[lane][order[k]];
  for (int64_t lane = 0; lane < strip_rows; ++lane) {
    for (int64_t k = 0; k < lane && lane < count; ++k)
      strip[(first + k) * strip_rows + lane] = rows[lane][order[first + k]];
    strip[(first + lane) * strip_rows + lane] = lane < count ? diagonal[order[first + lane]] : 1.0f;
  }
}

// Floats that factor_one works in.
int64_t scratch_size(int64_t n) { return strip_count(n) * strip_rows * (strip_rows + 1); }

// False when the matrix is not positive definite.
bool factor_one(const float* h, const int64_t* order, const float* diagonal, int64_t n, float* factor, float* scratch,
                int threads) {
  constexpr int64_t products_a_thread = 1 << 22;  // a thread costs about as much to start
  const int64_t strips = strip_count(n);
  float *pivots = scratch, *scaled = scratch + strips * strip_rows;
  share_out(strips, n * n / 2 >= products_a_thread ? threads : 1,
            [&](int64_t r, int) { gather_strip(h, order, diagonal, n, r, factor + strip_offset(r)); });
  for (int64_t own = 0; own < strips; ++own) {
    float* diagonal_strip = factor + strip_offset(own);
    const int64_t first = own * strip_rows, others = strips - own - 1;
    if (!PGOLF_AT_LEVEL(factor_strip<true>(diagonal_strip, diagonal_strip, scaled, pivots, first))) return false;
    const int64_t worth = others * strip_rows * strip_rows * (first + strip_rows) / products_a_thread;
    share_out(others, static_cast<int>(std::clamp<int64_t>(worth, 1, threads)), [&](int64_t i, int) {
      PGOLF_AT_LEVEL(factor_strip<false>(factor + strip_offset(own + 1 + i), diagonal_strip, scaled, pivots, first));
    });
  }
  return true;
}

uint8_t flaws_of(const float* h, int64_t n, float tolerance) {
  uint32_t largest = 0, gap = 0;
  for (int64_t row = 0; row < n; row += strip_rows)
    for (int64_t column = 0; column <= row; column += strip_rows)
      PGOLF_AT_LEVEL(survey(h, n, row, std::min(row + strip_rows, n), column, std::min(strip_rows, n - column),
                            largest, gap));
  float most, difference;
  std::memcpy(&most, &largest, 4), std::memcpy(&difference, &gap, 4);
  uint8_t flaws = 0;
  if (!(most <= std::numeric_limits<float>::max())) flaws |= not_finite;
  if (!(difference <= tolerance * most)) flaws |= lopsided;
  for (int64_t i = 0; i < n; ++i)
    if (h[i * n + i] < 0) flaws |= negative_diagonal;
  return flaws;
}

}  // namespace

void check_hessians(const Hessians& hessians, float tolerance, uint8_t* flaws, int threads) {
  share_out(hessians.count, threads, [&](int64_t i, int) {
    flaws[i] = flaws_of(hessians.data + i * hessians.n * hessians.n, hessians.n, tolerance);
  });
}

void factor_hessians(const Hessians& hessians, const int64_t* order, const float* diagonal, const int64_t* which,
                     int64_t length, float* factors, uint8_t* failed, int threads) {
  const int64_t n = hessians.n;
  const int outside = length >= threads ? threads : 1;  // a thread a matrix, or all threads on one after the other
  std::vector<float> scratch(outside * scratch_size(n));
  share_out(length, outside, [&](int64_t i, int worker) {
    const int64_t at = which[i];
    float* its_scratch = scratch.data() + worker * scratch_size(n);
    failed[i] = !factor_one(hessians.data + at * n * n, order + at * n, diagonal + at * n, n,
                            factors + at * factor_size(n), its_scratch, threads / outside);
  });
}

void round_columns(const Rounding& bank, int threads) {
  const int64_t n = bank.n, strips = strip_count(n), tile_size = strips * strip_rows * strip_rows;
  const int64_t row_tiles = (bank.rows + strip_rows - 1) / strip_rows, items = bank.count * row_tiles;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, items));
  std::vector<float> scratch(workers * tile_size);
  std::vector<int8_t> rounded(workers * tile_size);
  share_out(items, threads, [&](int64_t item, int worker) {
    const int64_t matrix = item / row_tiles, first = item % row_tiles * strip_rows;
    const int64_t count = std::min(strip_rows, bank.rows - first), row = matrix * bank.rows + first;
    const int64_t* order = bank.order + matrix * n;
    const float* weight = bank.weight + row * n;
    float* x = scratch.data() + worker * tile_size;
    int8_t* q = rounded.data() + worker * tile_size;
    alignas(64) float scale[strip_rows];
    for (int64_t lane = 0; lane < strip_rows; ++lane) scale[lane] = lane < count ? bank.scale[row + lane] : 1.0f;
    if (count < strip_rows || n % strip_rows) std::memset(x, 0, tile_size * sizeof(float));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t lane = 0; lane < count; ++lane) x[i * strip_rows + lane] = weight[lane * n + order[i]];
    PGOLF_AT_LEVEL(round_strip(bank.factors + matrix * factor_size(n), x, q, scale, strips, bank.limit));
    int8_t* values = bank.values + row * n;
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t i = 0; i < n; ++i) values[lane * n + order[i]] = q[i * strip_rows + lane];
  });
}

}  // namespace pgolf
