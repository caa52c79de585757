// Coordinate descent on the values of a bank, with the scales refitted in between. The mathematics is told in
// pgolf/ops/gptq_refine.py. Results depend on the level of the CPU by rounding only, and on nothing else.
#pragma once

#include <cstdint>

namespace pgolf {

struct Refinement {
  const float* weight;    // [count][rows][n]
  const float* hessians;  // [count][n][n], symmetric
  int8_t* values;         // [count][rows][n], in and out
  float* scale;           // [count][rows], in and out: numbers that float16 has
  int64_t count, rows, n;
  int limit, sweeps, refits;
};

void refine(const Refinement& bank, int threads);

}  // namespace pgolf
