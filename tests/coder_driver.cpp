// The coder without Python, for test_coder.py: to build it with other flags, and to feed it damaged blobs.
//
//   coder_driver encode IN OUT KIND TRELLIS BYTES COUNT ROWS COLS   KIND: 0 mix, 1 static, 2 floats of BYTES bytes
//   coder_driver fuzz SEED MUTATIONS BLOB...   prints how many were refused and the most CPU seconds that one took
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "coder.h"

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

Bytes mutate(Bytes data, std::mt19937_64& random) {
  auto below = [&](uint64_t limit) { return random() % limit; };
  for (uint64_t changes = 1 + below(3); changes > 0 && !data.empty(); --changes) {
    const uint64_t at = below(2) ? below(std::min<uint64_t>(data.size(), 24)) : below(data.size());
    switch (below(6)) {
      case 0: data[at] ^= 1 << below(8); break;
      case 1: data[at] = static_cast<uint8_t>(random()); break;
      case 2: data.resize(at); break;
      case 3: data.erase(data.begin() + at, data.begin() + std::min<uint64_t>(data.size(), at + 1 + below(9))); break;
      case 4: data.insert(data.begin() + at, 1 + below(9), static_cast<uint8_t>(random())); break;
      default: std::fill(data.begin() + at, data.end(), below(2) ? 0 : 255);
    }
  }
  return data;
}

int fuzz(int seed, int mutations, char** paths, int count) {
  std::mt19937_64 random(seed);
  int refused = 0;
  double longest = 0;
  for (int i = 0; i < count; ++i) {
    const Bytes whole = read_file(paths[i]);
    for (int j = 0; j < mutations; ++j) {
      const Bytes damaged = mutate(whole, random);
      // A copy of exactly this size on the heap, so that the sanitizer sees a byte too far.
      uint8_t* data = static_cast<uint8_t*>(std::malloc(damaged.size() + !damaged.size()));
      std::copy(damaged.begin(), damaged.end(), data);
      const std::clock_t begin = std::clock();
      pgolf::Blob blob;
      const char* problem = pgolf::read_blob(data, damaged.size(), blob);
      if (!problem && blob.bytes() <= 1 << 22) {
        Bytes values(static_cast<size_t>(blob.bytes()));
        problem = pgolf::decode_blob(blob, values.data(), 1 + j % 2);
      }
      longest = std::max(longest, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
      refused += problem != nullptr;
      std::free(data);
    }
  }
  std::printf("%d %.3f\n", refused, longest);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  if (command == "encode" && count == 10) return encode(arguments + 2);
  if (command == "fuzz" && count > 4)
    return fuzz(std::atoi(arguments[2]), std::atoi(arguments[3]), arguments + 4, count - 4);
  return 2;
}
