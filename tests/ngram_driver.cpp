// The n-gram caches without Python, for test_ngram_snapshots.py: snapshots changed at random, their checksum put right.
//
//   ngram_driver SEED SNAPSHOTS MUTATIONS   prints how many mutants were refused, how many accepted, and the most CPU
//                                           seconds that one took; aborts with a line where one is wrong
//
// Each snapshot is of another stream and other settings. What must hold of one that was accepted: fuzz/ngram_checks.h. A
// build with sanitizers sees the rest.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iterator>
#include <memory>
#include <random>

#include "fuzz/ngram_checks.h"

namespace {

using fuzz::Bytes;
using fuzz::fail;
using fuzz::header_bytes;
using Random = std::mt19937_64;

uint64_t below(Random& random, uint64_t limit) { return random() % limit; }

// Phrases that come back, with noise.
std::vector<uint16_t> stream(Random& random, size_t count, int vocab_size) {
  std::vector<uint16_t> tokens;
  while (tokens.size() < count) {
    if (tokens.size() < 40 || below(random, 4) == 0) {
      tokens.push_back(static_cast<uint16_t>(below(random, vocab_size)));
      continue;
    }
    const size_t length = 2 + below(random, 20), from = below(random, tokens.size() - length);
    for (size_t i = 0; i < length; ++i) tokens.push_back(tokens[from + i]);
  }
  tokens.resize(count);
  return tokens;
}

// `parts` are where the parts of a snapshot begin, so that a short one is changed as often as a long one.
Bytes mutate(const Bytes& whole, const std::vector<size_t>& parts, Random& random) {
  Bytes data = whole;
  for (uint64_t changes = below(random, 4) ? 1 : 1 + below(random, 6); changes; --changes) {
    const size_t end = data.size() - sizeof(uint64_t);
    const size_t begin = std::min(parts[below(random, parts.size())], end - 16);
    size_t at = begin + below(random, end - begin - 15);
    if (below(random, 4)) at -= (at - begin) % 2;
    const size_t size = size_t{1} << below(random, 4);
    uint64_t value = 0;
    std::memcpy(&value, data.data() + at, size);
    const uint64_t junk[] = {0, 1, ~uint64_t{0}, 65535, random(), below(random, 4000), value + 1, value - 1,
                             value ^ uint64_t{1} << below(random, 64)};
    switch (below(random, 12)) {
      case 0:  // one record over another
        std::copy_n(data.begin() + begin + below(random, end - begin - 15), 16, data.begin() + at);
        break;
      case 1:
        data.erase(data.begin() + at, data.begin() + at + size);
        break;
      case 2:
        data.insert(data.begin() + at, size, static_cast<uint8_t>(random()));
        break;
      default:
        value = junk[below(random, std::size(junk))];
        std::memcpy(data.data() + at, &value, size);
    }
  }
  fuzz::sign(data);
  return data;
}

struct Tally {
  int64_t refused = 0, accepted = 0;
  double longest = 0;
};

// `fresh` makes an empty cache.
template <class Fresh>
void attack(Fresh fresh, std::vector<size_t> parts, int vocab_size, int mutations, Random& random, Tally& tally) {
  auto cache = fresh();
  const std::vector<uint16_t> past = stream(random, below(random, 3000), vocab_size);
  cache->update(past.data(), static_cast<int64_t>(past.size()));
  const Bytes whole = cache->save();
  parts.push_back(parts.back() + (whole.size() - parts.back()) / 2);  // the tables
  if (!fuzz::load(*cache, whole) || cache->save() != whole) fail("a snapshot is not taken back as it was");
  for (int i = 0; i < mutations; ++i) {
    const Bytes mutant = mutate(whole, parts, random);
    const std::clock_t begin = std::clock();
    auto other = fresh();
    const bool taken = fuzz::restore_and_grow(*other, mutant, stream(random, 2000, vocab_size), vocab_size);
    ++(taken ? tally.accepted : tally.refused);
    tally.longest = std::max(tally.longest, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  Random random(std::strtoull(arguments[1], nullptr, 10));
  const int snapshots = std::atoi(arguments[2]), mutations = std::atoi(arguments[3]);
  Tally tally;
  for (int i = 0; i < snapshots; ++i) {
    const int vocab_size = 2 + static_cast<int>(below(random, 80)), longest = 1 + static_cast<int>(below(random, 8));
    const bool resets = below(random, 3) == 0;
    const int boundary = resets || below(random, 2) ? 0 : -1;
    const size_t memory = pgolf::NgramCounts::least_bytes(vocab_size) + below(random, 200'000);
    const pgolf::CountsConfig config = {vocab_size, longest, boundary, resets, memory};
    if (i % 4 == 3) {
      attack([&] { return std::make_unique<pgolf::HintCache>(config, 0.5); }, {header_bytes}, vocab_size, mutations,
             random, tally);
      continue;
    }
    const pgolf::MixConfig mix = {static_cast<pgolf::Mixing>(i % 4), ~0u, 4.0, 0.7};
    attack([&] { return std::make_unique<pgolf::NgramCache>(config, mix); }, {header_bytes, fuzz::counts_at(mix)},
           vocab_size, mutations, random, tally);
  }
  std::printf("%lld %lld %.3f\n", static_cast<long long>(tally.refused), static_cast<long long>(tally.accepted),
              tally.longest);
  return 0;
}
