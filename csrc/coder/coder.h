// Blobs: tensors of small integers, or of floats, as bytes that say themselves what they hold. The format is told in
// pgolf/artifact/coder.py.
//
// A blob can come from anywhere. What is wrong with it is returned as a sentence, nullptr when nothing is. Nothing of
// the size of its shapes is allocated before they are found to be within bounds, and decoding takes time and memory in
// proportion to the values and the bytes that are there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pgolf {

enum class Kind : uint8_t { mix = 0, fixed = 1, floats = 2 };

struct CodedTensor {
  std::vector<int64_t> shape;  // integers: (rows, cols) or (count, rows, cols) or fewer; floats: up to 8 sizes
  int low = 0, high = 0;       // integers: bounds of the values
  int bytes = 1;               // of a value: 1, and 2 or 4 of floats
  int64_t values() const;
};

struct Blob {
  Kind kind = Kind::mix;
  bool is_list = false;  // made from a list of tensors rather than from one
  int trellis_states = 0;
  std::vector<CodedTensor> tensors;
  std::vector<std::pair<const uint8_t*, size_t>> payloads;
  int64_t bytes() const;  // of all values
};

constexpr int most_tensors = 4096;
constexpr int64_t most_bytes = int64_t{1} << 28;  // of the values of a blob

// `values`: int8, one tensor after another, within their bounds.
std::vector<uint8_t> encode_ints(const Blob& what, const int8_t* values, int threads);
// `values`: little-endian floats of 2 or 4 bytes, one tensor after another.
std::vector<uint8_t> encode_floats(const Blob& what, const uint8_t* values);

const char* read_blob(const uint8_t* data, size_t size, Blob& blob);
// `values`: blob.bytes() bytes.
const char* decode_blob(const Blob& blob, uint8_t* values, int threads);

}  // namespace pgolf
