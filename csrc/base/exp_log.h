// exp and log whose bits depend on no library and no CPU: additions, products and one division, each rounded on its own
// (-ffp-contract=off). Those of glibc differ in the last bit between CPUs with and without fused products.
//
// Errors are below 1 unit in the last place, by trial.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace pgolf {

constexpr double ln2_high = 0x1.62e42fefp-1;  // its last 20 bits are 0, so products with an exponent are exact
constexpr double ln2_low = 0x1.473de6af278edp-34;

inline double power_of_two(int64_t exponent) {  // -1022 to 1023
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x), -700 <= x <= 700: 2^k exp(r), k whole and |r| <= ln(2) / 2, by exp's series to r^13.
inline double exp_of(double x) {
  constexpr double to_whole = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to nearest
  const double k = (x * 1.4426950408889634 + to_whole) - to_whole;
  const double r = (x - k * ln2_high) - k * ln2_low;
  constexpr double factor[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320,
                               1. / 5040,       1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2};
  double sum = 0;  // 1/2 + r/3! + r^2/4! + ...
  for (const double each : factor) sum = sum * r + each;
  return (1 + (r + r * r * sum)) * power_of_two(static_cast<int64_t>(k));
}

// log(x), x >= 0: x = 2^k (1 + f), f within (sqrt(1/2) - 1, sqrt(2) - 1]; with s = f / (2 + f)
// log(1 + f) = 2 (s + s^3/3 + s^5/5 + ...) = f - s (f - 2 (s^2/3 + s^4/5 + ...)).
inline double log_of(double x) {
  if (x == 0) return -std::numeric_limits<double>::infinity();
  int64_t k = 0;
  if (x < std::numeric_limits<double>::min()) {
    x *= power_of_two(54);
    k = -54;
  }
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  k += static_cast<int64_t>(bits >> 52) - 1023;
  double f = x * power_of_two(-(static_cast<int64_t>(bits >> 52) - 1023));  // 1 to 2
  if (f > 1.4142135623730951) {
    f *= 0.5;
    ++k;
  }
  f -= 1;
  const double s = f / (2 + f), z = s * s;
  constexpr double factor[] = {2. / 23, 2. / 21, 2. / 19, 2. / 17, 2. / 15, 2. / 13,
                               2. / 11, 2. / 9,  2. / 7,  2. / 5,  2. / 3};
  double series = 0;
  for (const double each : factor) series = (series + each) * z;
  const double whole = static_cast<double>(k);
  return whole * ln2_high + (f - (s * (f - series) - whole * ln2_low));
}

}  // namespace pgolf
