// A causal n-gram cache over one stream of tokens: exact counts, and a probability mixed from them and a base.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ngram/hint_counts.h"
#include "ngram/ngram_counts.h"
#include "ngram/ngram_mix.h"

namespace pgolf {

// Log-probabilities are natural. Tokens are below vocab_size; the caller sees to it.
class NgramCache {
 public:
  NgramCache(const CountsConfig& counts, const MixConfig& mix)
      : counts_(std::make_unique<NgramCounts>(counts)), mix_(mix), mixer_(mix) {}

  // out[i] is the mixed log-probability of tokens[i], whose base log-probability is base[i], from the tokens before it.
  void score(const uint16_t* tokens, const double* base, double* out, int64_t count);
  // Counts without scoring; nothing is learned about the weights.
  void update(const uint16_t* tokens, int64_t count);
  // The next token's whole distribution, given the base's.
  void distribution(const double* base, double* out) const;

  int vocab_size() const { return config().vocab_size; }
  CountsStats stats() const { return counts_->stats(); }
  std::vector<uint8_t> save() const;
  bool load(const uint8_t* data, size_t size);  // false, and as before, where the bytes are no snapshot of such a cache

 private:
  CountsConfig config() const { return counts_->config(); }

  std::unique_ptr<NgramCounts> counts_;
  MixConfig mix_;
  Mixer mixer_;
};

class HintCache {
 public:
  HintCache(const CountsConfig& counts, double threshold)
      : config_(counts), threshold_(threshold), counts_(std::make_unique<HintCounts>(counts)) {}

  // hints[i] for tokens[i] from the tokens before it; gates[i] is 1 where it came in `threshold` of all cases, else 0, and
  // where there is none, both are.
  void hints(const uint16_t* tokens, uint16_t* hints, uint8_t* gates, int64_t count);
  void update(const uint16_t* tokens, int64_t count);
  bool look(uint16_t& hint) const;  // the next token's; whether its gate is open

  int vocab_size() const { return config_.vocab_size; }
  CountsStats stats() const { return counts_->stats(); }
  std::vector<uint8_t> save() const;
  bool load(const uint8_t* data, size_t size);

 private:
  bool open(const Hint& hint) const { return hint.total && hint.count >= threshold_ * hint.total; }

  CountsConfig config_;
  double threshold_;
  std::unique_ptr<HintCounts> counts_;
};

}  // namespace pgolf
