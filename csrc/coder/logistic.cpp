#include "coder/logistic.h"

#include <algorithm>
#include <memory>

namespace pgolf {
namespace {

// Fixed point: numbers with 30 bits after the point where they are within [0, 2), with 24 elsewhere.
constexpr int64_t one30 = int64_t{1} << 30, one24 = int64_t{1} << 24;
constexpr int64_t ln2_30 = 744261118;      // ln 2
constexpr int64_t inv_ln2_30 = 1549082005;  // 1 / ln 2
constexpr int64_t ln_root_2pi_24 = 15417238;  // ln(sqrt(2 pi))

int64_t square_root(int64_t x) {  // the largest r with r * r <= x
  int64_t root = 0;
  for (int64_t bit = int64_t{1} << 31; bit > 0; bit >>= 1) {
    const int64_t next = root + bit;
    if (next <= x / next) root = next;
  }
  return root;
}

// ln(x), 24 bits, of x > 0 with 30 bits: the bits of log2 one by one, by squaring.
int64_t ln(int64_t x) {
  int64_t whole = 0;
  for (; x >= 2 * one30; x >>= 1) ++whole;
  for (; x < one30; x <<= 1) --whole;
  int64_t log2 = 0;
  for (int i = 0; i < 24; ++i) {
    x = (x * x) >> 30;
    log2 <<= 1;
    if (x >= 2 * one30) {
      x >>= 1;
      ++log2;
    }
  }
  return ((whole * one24 + log2) * ln2_30) >> 30;
}

struct Exp {
  int64_t power[25];  // 2^(-2^-i), 30 bits
  Exp() {
    power[0] = one30 / 2;
    for (int i = 1; i < 25; ++i) power[i] = square_root(power[i - 1] << 30);
  }
  // exp(-x), 30 bits, of x >= 0 with 24 bits
  int64_t operator()(int64_t x) const {
    if (x >= 40 * one24) return 0;
    const int64_t log2 = (x * inv_ln2_30) >> 30, whole = log2 >> 24;
    int64_t result = one30;
    for (int i = 1; i <= 24; ++i)
      if (log2 >> (24 - i) & 1) result = (result * power[i]) >> 30;
    return whole > 31 ? 0 : result >> whole;
  }
};

// The logarithm of the Gaussian's upper tail, ln(P(X > x)), x in 1/64 from 0 to 20.
class Tail {
 public:
  Tail() {
    // Mills' ratio M(x) = P(X > x) / density(x), from far out inwards: M(x) = integral of exp(-x u - u u / 2) over
    // one step (Simpson) + exp(-x h - h h / 2) M(x + h).
    int64_t mills = one30 / 20 - one30 / 8000;
    for (int64_t i = size; i-- > 0;) {
      const int64_t x = i * (one24 / 64);
      auto kernel = [&](int64_t u) { return exp_((x >> 12) * (u >> 12) + (((u >> 12) * (u >> 12)) >> 1)); };
      const int64_t middle = kernel(one24 / 128), end = kernel(one24 / 64);
      mills = (one30 + 4 * middle + end) / (6 * 64) + ((end * mills) >> 30);
      log_[i] = ln(mills) - (((x >> 12) * (x >> 12)) >> 1) - ln_root_2pi_24;
    }
  }
  // x >= 0 and the result with 24 bits
  int64_t log(int64_t x) const {
    const int64_t at = x >> 18, part = x & ((1 << 18) - 1);
    if (at >= size - 1) return -((x >> 12) * (x >> 12)) >> 1;  // steep, which is all that matters out there
    return log_[at] + (((log_[at + 1] - log_[at]) * part) >> 18);
  }
  // The same for x of either sign.
  int64_t signed_log(int64_t x) const { return x >= 0 ? log(x) : ln(one30 - exp_(-log(-x))); }
  int64_t probability(int64_t x) const { return exp_(-log(x)); }
  const Exp& exp() const { return exp_; }

 private:
  static constexpr int64_t size = 20 * 64;
  Exp exp_;
  int64_t log_[size];
};

int16_t clip(int64_t x) { return static_cast<int16_t>(std::clamp<int64_t>(x, -32767, 32767)); }

// Log-odds, in 1/4096, of an event whose probability has the logarithm `log` < 0 (24 bits).
int16_t log_odds(const Exp& exp, int64_t log) {
  const int64_t rest = one30 - exp(-log);
  return clip((log - ln(std::max<int64_t>(rest, 1))) >> 12);
}

// The lower edge of "more than k" for quantiser q, in quarters of a step.
int64_t edge(int q, int k) { return q == 0 ? 4 * k + 2 : k == 0 ? 1 : 4 * k; }

// The mean magnitude, 24 bits and in half steps, of a rounded Gaussian with standard deviation 1 / inverse.
int64_t mean_magnitude(const Tail& tail, int64_t inverse) {
  int64_t total = 0;
  for (int k = 0; k < 256; ++k) {
    const int64_t x = (inverse * edge(0, k)) >> 2;
    if (x >= 8 * one24) break;
    total += tail.probability(x) >> 4;  // times 2 (sides) times 2 (half steps), 30 to 24 bits
  }
  return total;
}

// 1 / the standard deviation that has the mean magnitude `wanted` (24 bits), within [low, high] where rounding counts.
int64_t inverse_of_mean(const Tail& tail, int64_t wanted, int64_t low, int64_t high) {
  if (wanted > 5 * one24) return (one24 * int64_t{26774307}) / wanted;  // 2 sqrt(2 / pi) / mean, the mean in half steps
  while (high - low > (high >> 14) + 1) {
    const int64_t middle = (low + high) / 2;
    (mean_magnitude(tail, middle) > wanted ? low : high) = middle;
  }
  return high;
}

// 2^(x + offset) with 24 bits, x >= 0 with 24 bits.
int64_t power_of_two(const Exp& exp, int64_t x, int offset) {
  const int64_t power = exp(((one24 - (x & (one24 - 1))) * ln2_30) >> 30) >> 6;  // 2^(fraction - 1)
  const int shift = static_cast<int>(x >> 24) + offset + 1;
  return shift >= 0 ? power << shift : power >> -shift;
}

void make_shifted(LogisticTables& tables, const Tail& tail) {
  for (int c = 0; c < shift_classes; ++c) {
    // mean distance in half steps; see inverse_of_mean
    const int64_t distance = power_of_two(tail.exp(), ((2 * c + 1) * one24) / (2 * shift_octave), lowest_shift);
    const int64_t inverse = (one24 * int64_t{26774307}) / distance;
    for (int i = 0; i < shift_steps; ++i) {
      const int64_t half_steps = i - shift_middle;
      auto log_above = [&](int64_t half) { return tail.signed_log((inverse * half) / 2); };
      const int64_t over = log_above(half_steps + 1) - log_above(half_steps - 1);
      tables.more[c][i] = log_odds(tail.exp(), std::min<int64_t>(over, -1));
      const int64_t above = log_above(1 - half_steps), below = log_above(1 + half_steps);
      const int64_t most = std::max(above, below), least = std::min(above, below);
      const int64_t either = most + ln(one30 + tail.exp()(most - least));
      tables.nonzero[c][i] = log_odds(tail.exp(), std::min<int64_t>(either, -1));
      tables.negative[c][i] = clip((below - above) >> 12);
    }
  }
}

std::unique_ptr<const LogisticTables> make_tables() {
  auto tables = std::make_unique<LogisticTables>();
  for (int i = 0; i < 4096; ++i) {
    const int64_t p = (2 * i + 1) * (one30 >> 13);
    tables->stretch[i] = clip((ln(p) - ln(one30 - p)) >> 12);
  }
  const Tail tail;
  for (int i = 0; i < 770; ++i) {
    const int64_t e = tail.exp()(std::abs(i - 384) * (one24 / 32));
    const int64_t p = (one30 << 16) / (one30 + e);
    tables->squash[i] = static_cast<int32_t>(std::clamp<int64_t>(i < 384 ? 65536 - p : p, 16, 65520));
  }
  for (int i = 0; i < 1024; ++i) {
    tables->rate[i] = 2 * 65536 / (2 * i + 3);
    tables->log2[i] = static_cast<uint16_t>((ln(one30 + i * (one30 >> 10)) * inv_ln2_30 >> 30) >> 14);
  }
  int64_t inverse = 0;
  for (int c = 0; c < scale_classes; ++c) {
    const int64_t wanted = power_of_two(tail.exp(), ((2 * c + 1) * one24) / (2 * scale_steps), lowest_scale);
    inverse = inverse_of_mean(tail, wanted, inverse / 2, c == 0 ? one24 << 10 : inverse);
    for (int q = 0; q < 2; ++q) {
      int64_t before = ln(one30) - ln(2 * one30);
      for (int k = 0; k < unary_nodes; ++k) {
        const int64_t after = tail.log((inverse * edge(q, k)) >> 2);
        tables->gauss[q][c][k] = log_odds(tail.exp(), std::min<int64_t>(after - before, -1));
        before = after;
      }
    }
  }
  make_shifted(*tables, tail);
  return tables;
}

}  // namespace

const LogisticTables& logistic_tables() {
  static const std::unique_ptr<const LogisticTables> tables = make_tables();
  return *tables;
}

}  // namespace pgolf
