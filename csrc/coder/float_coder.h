// Floats bit by bit: sign and exponent from what came before in the tensor, the mantissa from the exponent and from its
// own higher bits. Lossless for every bit pattern.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf {

struct FloatRun {
  uint8_t* values;  // little-endian
  int64_t count;
  int bytes;        // of a value: 2 or 4
  int64_t cols;     // the size of the last dimension
};

constexpr int64_t free_float_bits = int64_t{1} << 20;  // see range_coder.h

std::vector<uint8_t> encode_float_runs(const std::vector<FloatRun>& runs);
// As the decoders of int_coder.h.
bool decode_float_runs(const uint8_t* payload, size_t size, const std::vector<FloatRun>& runs);

}  // namespace pgolf
