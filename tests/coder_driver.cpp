// The coder without Python, for test_coder.py: to build it with other flags.
//
//   coder_driver IN OUT KIND TRELLIS BYTES COUNT ROWS COLS   KIND: 0 mix, 1 static, 2 floats of BYTES bytes
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "coder/coder.h"

namespace {

using Bytes = std::vector<uint8_t>;

Bytes read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

int encode(char** arguments) {
  const Bytes values = read_file(arguments[0]);
  auto number = [&](int i) { return std::atoi(arguments[i]); };
  pgolf::Blob blob;
  blob.kind = static_cast<pgolf::Kind>(number(2));
  blob.trellis_states = number(3);
  pgolf::CodedTensor tensor{{number(5), number(6), number(7)}, 0, 0, number(4)};
  Bytes coded;
  if (blob.kind == pgolf::Kind::floats) {
    blob.tensors.push_back(tensor);
    coded = pgolf::encode_floats(blob, values.data());
  } else {
    const auto* integers = reinterpret_cast<const int8_t*>(values.data());
    tensor.low = *std::min_element(integers, integers + values.size());
    tensor.high = *std::max_element(integers, integers + values.size());
    blob.tensors.push_back(tensor);
    coded = pgolf::encode_ints(blob, integers, 1);
  }
  pgolf::Blob read;
  Bytes decoded(values.size());
  if (pgolf::read_blob(coded.data(), coded.size(), read)) return 3;
  if (read.bytes() != static_cast<int64_t>(values.size())) return 3;
  if (pgolf::decode_blob(read, decoded.data(), 1) || decoded != values) return 4;
  std::ofstream(arguments[1], std::ios::binary).write(reinterpret_cast<const char*>(coded.data()), coded.size());
  return 0;
}

}  // namespace

int main(int count, char** arguments) { return count == 9 ? encode(arguments + 1) : 2; }
