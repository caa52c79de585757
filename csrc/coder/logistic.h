// The mathematics of the mixing coder as tables of integers, made by integer arithmetic alone so that every compiler
// and machine makes the same ones: ln(p / (1 - p)), its inverse, and the tails of a rounded Gaussian.
#pragma once

#include <cstdint>

namespace pgolf {

constexpr int unary_nodes = 22;     // node k of 1..unary_nodes - 1 asks "more than k?"; node 0 "more than 0?"
constexpr int scale_steps = 32;     // classes of scale in an octave
constexpr int scale_classes = 480;  // mean magnitudes from 2^-8 on, in half steps of the quantiser: 15 octaves
constexpr int lowest_scale = -8;
constexpr int shift_steps = 161, shift_middle = 80;  // in half steps
constexpr int shift_classes = 64, shift_octave = 8;  // mean distances from 2^-2 half steps on
constexpr int lowest_shift = -2;

struct LogisticTables {
  // ln(p / (1 - p)) in 1/4096, within +-32767, of p = (i + 1/2) / 4096.
  int16_t stretch[4096];
  // 65536 / (1 + exp(-x)) for x = (i - 384) / 32, within [16, 65520].
  int32_t squash[770];
  // 65536 / (n + 3/2): how far a counter that has seen n bits moves.
  int32_t rate[1024];
  // log2(1 + i / 1024) in 1/1024.
  uint16_t log2[1024];
  // By class of scale and node, in the units of stretch: the log-odds of "more" for a rounded Gaussian of that scale.
  // [0]: bins (k - 1/2, k + 1/2). [1]: the second trellis quantiser's, edges at 1/4, 1, 2, 3, ...
  int16_t gauss[2][scale_classes][unary_nodes];
  // The same for a Gaussian around a prediction m, by class of mean distance. more[.][i]: the log-odds of more than k,
  // given k or more, where i = 2 (k - m) + shift_middle. nonzero and negative: those of a value that is not 0, and of
  // one below 0 among these, where i = 2 m + shift_middle.
  int16_t more[shift_classes][shift_steps], nonzero[shift_classes][shift_steps], negative[shift_classes][shift_steps];
};

// Made at the first call, a few milliseconds.
const LogisticTables& logistic_tables();

// Probability of 1 in 1/65536, within [16, 65520], of log-odds in 1/4096.
inline int32_t squash(const LogisticTables& tables, int32_t log_odds) {
  const int32_t limit = 12 * 4096 - 1;
  const int32_t x = (log_odds > limit ? limit : log_odds < -limit ? -limit : log_odds) + 12 * 4096;
  const int32_t at = x >> 7, part = x & 127;
  return tables.squash[at] + (((tables.squash[at + 1] - tables.squash[at]) * part + 64) >> 7);
}

// log2(x) in 1/1024, rounded down, of x > 0.
inline int32_t log2_of(const LogisticTables& tables, uint32_t x) {
  const int top = 31 - __builtin_clz(x);
  const uint32_t part = top >= 10 ? x >> (top - 10) : x << (10 - top);
  return top * 1024 + tables.log2[part & 1023];
}

}  // namespace pgolf
