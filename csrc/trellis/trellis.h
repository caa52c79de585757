// Trellis quantisation: the search for a row's indices, and the way back from indices to weights. What the two
// quantisers, the states and the cost are is told in pgolf/ops/trellis_quantize.py.
#pragma once

#include <cstdint>

#include "trellis/parity_machine.h"

namespace pgolf {

// What an index means, in steps: 2k, or for quantiser 1 2k - sgn k.
inline int level_of(int index, int quantiser) { return 2 * index - quantiser * ((index > 0) - (index < 0)); }

struct TrellisSearch {
  const float* target;  // [rows][columns]: weights in steps of their row, columns in the order of the machine
  const float* factor;  // [columns][columns]: upper triangular, as for GPTQ
  const float* rate;    // [2][2 * limit + 1]: bits of index k under each quantiser, at k + limit
  const float* weight;  // [rows]: what a bit costs
  int8_t* indices;      // [rows][columns]: the result, of magnitude `limit` at most
  int64_t rows, columns;
  int limit;            // 1 to 127
};

// About rows * columns * (columns + 32 * states + 64 * states) FLOPs; the second and third term are those of the
// survivors, which differ in the columns of the block at work and in the few before it that are not decided yet.
// Results do not depend on `threads`, an upper limit, nor on the level (cpu_features.h).
void trellis_search(const TrellisSearch& search, int states, int threads);

struct TrellisBank {
  int64_t matrices, rows, columns;
  const int8_t* classes;  // [matrices][columns], of 0 to 3: the machine takes columns by class, in a class as they come
};

// out[..., r, j] = scale[..., r] * level of indices[..., r, j]. Reads and writes 5 bytes a weight.
void trellis_dequantize(const TrellisBank& bank, const int8_t* indices, const float* scale, float* out, int states,
                        int threads);

}  // namespace pgolf
