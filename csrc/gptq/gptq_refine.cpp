#include "gptq/gptq_refine.h"

#include <cmath>

#include "gptq/gptq.h"
#include "base/threads.h"

#define PGOLF_LOOPS "gptq/gptq_refine_lanes.h"
#include "base/each_level.h"

namespace pgolf {
namespace {

constexpr float least_step = 0.501f;  // of an improving move, in units of the scale; 0.5 would move on rounding errors
constexpr float smallest_half = 5.9604644775390625e-8f, largest_half = 65504.0f;
constexpr int columns_at_once = 8;

// The float16 next to a positive number; half to even.
float to_half(float value) {
  if (value < 6.103515625e-5f) return std::nearbyint(value / smallest_half) * smallest_half;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~uint32_t{0x1fff};
  std::memcpy(&value, &bits, 4);
  return value;
}

// The best scale of a row for its values, unless the one it has is as good: closed-form least squares under the
// Hessian.
float refit(const float* q, const float* whole, float* pushed, int64_t width, float scale) {
  float of_whole, of_pushed;
  PGOLF_AT_LEVEL(moments(q, whole, pushed, width, of_whole, of_pushed));
  const float best = of_whole * scale / (of_whole - of_pushed);  // q H wᵀ / q H qᵀ
  if (!(best > 0) || !(best <= largest_half)) return scale;
  const float rounded = std::max(to_half(best), smallest_half);
  if (!(std::fabs(rounded - best) < std::fabs(scale - best))) return scale;
  PGOLF_AT_LEVEL(rescale(whole, pushed, width, rounded / scale));
  return rounded;
}

// What one worker holds of 32 rows.
struct Rows {
  std::vector<float> whole_strip, error_strip;   // weights and weights - scale * values, [n][32]
  std::vector<float> whole, pushed, values;      // the two times the Hessian, and the values, [32][width]
  Rows(int64_t n, int64_t width)
      : whole_strip(n * strip_rows), error_strip(n * strip_rows), whole(width * strip_rows),
        pushed(width * strip_rows), values(width * strip_rows) {}
};

void pack_panel(const float* h, int64_t n, int64_t first, float* packed) {
  const int64_t columns = std::min<int64_t>(columns_at_once, n - first);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = 0; j < columns_at_once; ++j)
      packed[k * columns_at_once + j] = j < columns ? h[k * n + first + j] : 0.0f;
}

// `count` rows from `row` on, of all matrices' rows.
void refine_rows(const Refinement& bank, const float* h, const float* packed, const float* inverse, int64_t row,
                 int64_t count, int64_t width, Rows& mine) {
  const int64_t n = bank.n;
  for (int64_t lane = 0; lane < strip_rows; ++lane) {
    const bool is_row = lane < count;
    const float* weight = bank.weight + (row + lane) * n;
    const int8_t* values = bank.values + (row + lane) * n;
    for (int64_t k = 0; k < n; ++k) {
      mine.whole_strip[k * strip_rows + lane] = is_row ? weight[k] : 0.0f;
      mine.error_strip[k * strip_rows + lane] = is_row ? weight[k] - bank.scale[row + lane] * values[k] : 0.0f;
      mine.values[lane * width + k] = is_row ? values[k] : 0.0f;
    }
  }
  for (int64_t first = 0; first < n; first += columns_at_once) {
    const float* panel = packed + first * n;
    PGOLF_AT_LEVEL(multiply_panel(mine.error_strip.data(), panel, n, mine.pushed.data() + first, width));
    if (bank.refits)
      PGOLF_AT_LEVEL(multiply_panel(mine.whole_strip.data(), panel, n, mine.whole.data() + first, width));
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    float *q = mine.values.data() + lane * width, *pushed = mine.pushed.data() + lane * width;
    float& scale = bank.scale[row + lane];
    for (int round = 0; round <= bank.refits; ++round) {
      for (int i = 0; i < bank.sweeps; ++i)
        if (!PGOLF_AT_LEVEL(sweep(h, inverse, n, width, scale, bank.limit, least_step, q, pushed))) break;
      if (round == bank.refits) break;
      const float before = scale;
      scale = refit(q, mine.whole.data() + lane * width, pushed, width, scale);
      if (scale == before) break;
    }
    for (int64_t k = 0; k < n; ++k) bank.values[(row + lane) * n + k] = static_cast<int8_t>(q[k]);
  }
}

}  // namespace

void refine(const Refinement& bank, int threads) {
  if (bank.count == 0 || bank.rows == 0) return;  // there need be no Hessian
  const int64_t n = bank.n, width = strip_count(n) * strip_rows, tiles = (bank.rows + strip_rows - 1) / strip_rows;
  const int64_t panels = (n + columns_at_once - 1) / columns_at_once;
  std::vector<float> packed(panels * columns_at_once * n), inverse(width);
  std::vector<Rows> workers(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)), Rows(n, width));
  for (int64_t matrix = 0; matrix < bank.count; ++matrix) {
    const float* h = bank.hessians + matrix * n * n;
    for (int64_t i = 0; i < n; ++i) inverse[i] = h[i * n + i] > 0 ? 1 / h[i * n + i] : 0.0f;
    share_out(panels, threads, [&](int64_t i, int) {
      pack_panel(h, n, i * columns_at_once, packed.data() + i * columns_at_once * n);
    });
    share_out(tiles, threads, [&](int64_t tile, int worker) {
      const int64_t first = tile * strip_rows;
      refine_rows(bank, h, packed.data(), inverse.data(), matrix * bank.rows + first,
                  std::min(strip_rows, bank.rows - first), width, workers[worker]);
    });
  }
}

}  // namespace pgolf
