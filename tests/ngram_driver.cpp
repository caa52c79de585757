// The n-gram caches without Python, for test_ngram_cache.py: snapshots changed at random, with their checksum put right.
//
//   ngram_driver SEED SNAPSHOTS MUTATIONS   prints how many mutants were refused, how many accepted, and the most CPU
//                                           seconds that one took; status 1 and a line where one is wrong
//
// Each snapshot is of another stream and other settings. It must be taken back as it is, as must be whatever grows from a
// mutant that was accepted, whose probabilities must be such. A build with sanitizers sees the rest.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iterator>
#include <memory>
#include <random>
#include <string>

#include "ngram_cache.h"

namespace {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937_64;

constexpr size_t header_bytes = 80;  // version and settings: a change there is refused before anything is read

uint64_t below(Random& random, uint64_t limit) { return random() % limit; }

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

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

void sign(Bytes& data) {
  const uint64_t sum = pgolf::checksum(data.data(), data.size() - sizeof sum);
  std::memcpy(data.data() + data.size() - sizeof sum, &sum, sizeof sum);
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
  sign(data);
  return data;
}

// A copy of exactly this size on the heap, so that the sanitizer sees a byte too far.
template <class Cache>
bool load(Cache& cache, const Bytes& data) {
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[data.size()]);
  std::copy(data.begin(), data.end(), copy.get());
  return cache.load(copy.get(), data.size());
}

void grow(pgolf::NgramCache& cache, const std::vector<uint16_t>& tokens, int vocab_size) {
  const std::vector<double> base(tokens.size(), -std::log(vocab_size)), even(vocab_size, 1.0 / vocab_size);
  std::vector<double> found(tokens.size()), probabilities(vocab_size);
  for (int turn = 0; turn < 2; ++turn) {
    cache.distribution(even.data(), probabilities.data());
    double sum = 0;
    for (const double each : probabilities) {
      if (!(each > 0 && each <= 1)) fail("a probability is " + std::to_string(each));
      sum += each;
    }
    if (!(std::fabs(sum - 1) < 1e-9)) fail("probabilities sum to " + std::to_string(sum));
    if (turn) return;
    cache.score(tokens.data(), base.data(), found.data(), static_cast<int64_t>(tokens.size()));
    for (const double each : found)
      if (!(each <= 0 && each >= -700)) fail("a log-probability is " + std::to_string(each));
  }
}

void grow(pgolf::HintCache& cache, const std::vector<uint16_t>& tokens, int vocab_size) {
  std::vector<uint16_t> hints(tokens.size());
  std::vector<uint8_t> gates(tokens.size());
  cache.hints(tokens.data(), hints.data(), gates.data(), static_cast<int64_t>(tokens.size()));
  for (const uint16_t each : hints)
    if (each >= vocab_size) fail("a hint is " + std::to_string(each));
  uint16_t hint = 0;
  if (cache.look(hint) && hint >= vocab_size) fail("the next hint is " + std::to_string(hint));
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
  if (!load(*cache, whole) || cache->save() != whole) fail("a snapshot is not taken back as it was");
  for (int i = 0; i < mutations; ++i) {
    const Bytes mutant = mutate(whole, parts, random);
    const std::clock_t begin = std::clock();
    auto other = fresh();
    if (load(*other, mutant)) {
      ++tally.accepted;
      grow(*other, stream(random, 2000, vocab_size), vocab_size);
      if (!load(*other, other->save())) fail("what grew from a snapshot that was accepted is refused");
    } else {
      ++tally.refused;
      if (other->stats().tokens) fail("a snapshot that was refused has changed the cache");
    }
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
    pgolf::ByteWriter weights;
    pgolf::Mixer(mix).save(weights);
    const size_t counts_at = header_bytes + weights.finish().size() - sizeof(uint64_t);
    attack([&] { return std::make_unique<pgolf::NgramCache>(config, mix); }, {header_bytes, counts_at}, vocab_size,
           mutations, random, tally);
  }
  std::printf("%lld %lld %.3f\n", static_cast<long long>(tally.refused), static_cast<long long>(tally.accepted),
              tally.longest);
  return 0;
}
