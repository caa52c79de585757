// What a snapshot must do that an n-gram cache has taken: everything that one of its own does.
#pragma once

#include <cmath>
#include <memory>

#include "ngram/ngram_cache.h"
#include "target.h"

namespace fuzz {

using Bytes = std::vector<uint8_t>;
using Tokens = std::vector<uint16_t>;

constexpr size_t header_bytes = 80;  // version and settings: a change there is refused before anything is read

inline void sign(Bytes& data) {
  const uint64_t sum = pgolf::checksum(data.data(), data.size() - sizeof sum);
  std::memcpy(data.data() + data.size() - sizeof sum, &sum, sizeof sum);
}

// Where the counts begin, behind the weights of the mixture.
inline size_t counts_at(const pgolf::MixConfig& mix) {
  pgolf::ByteWriter weights;
  pgolf::Mixer(mix).save(weights);
  return header_bytes + weights.finish().size() - sizeof(uint64_t);
}

// From a copy of exactly this size on the heap, so that the sanitizer sees a byte too far.
template <class Cache>
bool load(Cache& cache, const Bytes& data) {
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[data.size()]);
  std::copy(data.begin(), data.end(), copy.get());
  return cache.load(copy.get(), data.size());
}

inline void check_distribution(const pgolf::NgramCache& cache, int vocab_size, std::vector<double>& probabilities) {
  const std::vector<double> even(vocab_size, 1.0 / vocab_size);
  cache.distribution(even.data(), probabilities.data());
  double sum = 0;
  for (const double each : probabilities) {
    if (!(each > 0 && each <= 1)) fail("a probability is " + std::to_string(each));
    sum += each;
  }
  if (!(std::fabs(sum - 1) < 1e-9)) fail("probabilities sum to " + std::to_string(sum));
}

inline void grow(pgolf::NgramCache& cache, const Tokens& tokens, int vocab_size) {
  const std::vector<double> base(tokens.size(), -std::log(vocab_size));
  std::vector<double> found(tokens.size()), probabilities(vocab_size);
  check_distribution(cache, vocab_size, probabilities);
  cache.score(tokens.data(), base.data(), found.data(), static_cast<int64_t>(tokens.size()));
  for (const double each : found)
    if (!(each <= 0 && each >= -700)) fail("a log-probability is " + std::to_string(each));
  if (!tokens.empty() && !(std::fabs(std::log(probabilities[tokens[0]]) - found[0]) < 1e-9))
    fail("a token's score is not what the distribution said before");
  check_distribution(cache, vocab_size, probabilities);
}

inline void grow(pgolf::HintCache& cache, const Tokens& tokens, int vocab_size) {
  Tokens hints(tokens.size());
  std::vector<uint8_t> gates(tokens.size());
  uint16_t hint = 0;
  const bool open = cache.look(hint);
  cache.hints(tokens.data(), hints.data(), gates.data(), static_cast<int64_t>(tokens.size()));
  if (!tokens.empty() && (hints[0] != hint || gates[0] != open)) fail("a token's hint is not the one announced");
  for (const uint16_t each : hints)
    if (each >= vocab_size) fail("a hint is " + std::to_string(each));
  if (cache.look(hint) && hint >= vocab_size) fail("the next hint is " + std::to_string(hint));
}

// Whether the cache, which is new, takes the snapshot; then it goes on with `tokens`.
template <class Cache>
bool restore_and_grow(Cache& cache, const Bytes& snapshot, const Tokens& tokens, int vocab_size) {
  if (!load(cache, snapshot)) {
    if (cache.stats().tokens) fail("a snapshot that was refused has changed the cache");
    return false;
  }
  if (cache.save() != snapshot) fail("a snapshot that was taken is saved as another");
  grow(cache, tokens, vocab_size);
  if (!load(cache, cache.save())) fail("what grew from a snapshot that was taken is refused");
  return true;
}

}  // namespace fuzz
