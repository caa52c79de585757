// Probability of a token from what its contexts' pasts say, the shortest first, and a base probability below them all:
//
//   p_0 = base(x),   p_k = w_k q_k(x) + (1 - w_k) p_(k-1)
//
// q_k is the distribution of what followed context k, and w_k does not know x, so p_k sums to one wherever base does.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "ngram/ngram_counts.h"

namespace pgolf {

enum class Mixing { adaptive, dirichlet, pyp };

struct MixConfig {
  Mixing mixing;
  uint32_t lengths;      // bit k: contexts of k tokens take part
  double concentration;  // dirichlet and pyp
  double discount;       // taken from every count; pyp
};

// dirichlet: w = n / (n + a),        q = c / n
// pyp:       w = (n - d t) / (n + a), q = (c - d) / (n - d t) where c > 0    (n times seen, t distinct successors)
// adaptive:  w learned for each length, bucket of n and bucket of t; q = c / n. After the token x is scored, w moves
//            towards the posterior probability that x came from q, as far as x came from no longer context: one online
//            step of EM for the whole chain. The chain is then mixed with the base once more; that weight is the posterior
//            of the two, so that over any stream the whole costs little more than one bit above the base alone.
class Mixer {
 public:
  explicit Mixer(const MixConfig& config) : config_(config) {
    for (auto& weight : weights_) weight = {first_weight, 0};
  }

  // What the chain of one token leaves for learning.
  struct Trace {
    double base, chain;
    int used;
    struct {
      double posterior;
      int bucket;
    } levels[most_context];
  };

  double mix(double base, const Evidence* evidence, int depth, Trace& trace) const {
    double p = base;
    int used = 0;
    for (int length = 1; length <= depth; ++length) {
      if (!(config_.lengths >> length & 1)) continue;
      const Evidence& seen = evidence[length - 1];
      const double total = seen.total, count = seen.count;
      if (config_.mixing == Mixing::dirichlet) {
        p = (count + config_.concentration * p) / (total + config_.concentration);
      } else if (config_.mixing == Mixing::pyp) {
        const double own = seen.count ? count - config_.discount : 0.0;
        p = (own + (config_.concentration + config_.discount * seen.distinct) * p) / (total + config_.concentration);
      } else {
        const int bucket = bucket_of(length, seen);
        const double part = weights_[bucket].value * (count / total);
        p = part + (1 - weights_[bucket].value) * p;
        trace.levels[used++] = {p > 0 ? part / p : weights_[bucket].value, bucket};
      }
    }
    if (config_.mixing != Mixing::adaptive || !used) {
      trace.used = 0;
      return base > 0 ? std::max(p, least_probability) : p;
    }
    trace.base = base;
    trace.chain = p;
    trace.used = used;
    return trust_ * p + (1 - trust_) * base;
  }

  void learn(const Trace& trace) {
    if (!trace.used) return;
    double share = 1;  // posterior that x came from this context or below it
    for (int i = trace.used - 1; i >= 0; --i) {
      const auto& level = trace.levels[i];
      Weight& weight = weights_[level.bucket];
      const double step = share * (weight.seen < settled ? 1 / (weight.seen + patience) : slowest);
      weight.value = 
          std::clamp(weight.value + step * (level.posterior - weight.value), least_weight, 1 - least_weight);
      weight.seen += share;
      share *= 1 - level.posterior;
    }
    const double mixed = trust_ * trace.chain + (1 - trust_) * trace.base;
    if (mixed > 0) trust_ = std::clamp(trust_ * trace.chain / mixed, least_trust, 1 - least_trust);
  }

  void save(ByteWriter& out) const {
    out.put(trust_);
    out.put(weights_);
  }

  bool load(ByteReader& in) {
    in.get(trust_);
    in.get(weights_);
    const auto within = [](double value, double least) { return value >= least && value <= 1 - least; };
    const auto right = [=](const Weight& weight) {
      return within(weight.value, least_weight) && weight.seen >= 0 && weight.seen < most_seen;
    };
    return in.good() && within(trust_, least_trust) && std::all_of(weights_.begin(), weights_.end(), right);
  }

 private:
  static constexpr int total_buckets = 12, distinct_buckets = 8;
  // Of 0.2, 0.3 and 0.5; 2, 4 and 8; 0.002 to 0.015: best on documentation and on books, none far from the others.
  static constexpr double first_weight = 0.3, patience = 4, slowest = 0.01, settled = 1 / slowest - patience;
  static constexpr double least_weight = 1e-6, least_trust = 1e-5;
  static constexpr double least_probability = std::numeric_limits<double>::min();  // small factors can end in 0
  static constexpr double most_seen = 0x1p62;  // tokens; in a snapshot

  // n in 12 classes (1, 2, 3, then two a power of two) and t in 8: exactly one, or by its share of n.
  static int bucket_of(int length, const Evidence& seen) {
    const uint32_t n = seen.total;
    int total = static_cast<int>(n) - 1;
    if (n >= 4) {
      const int log2 = 31 - __builtin_clz(n);
      total = std::min(2 * log2 - 1 + static_cast<int>(n >> (log2 - 1) & 1), total_buckets - 1);
    }
    const int diversity = seen.distinct == 1 ? 0 : static_cast<int>(1 + (7 * seen.distinct - 1) / n);
    return (length * total_buckets + total) * distinct_buckets + diversity;
  }

  struct Weight {
    double value, seen;
  };
  MixConfig config_;
  double trust_ = 0.5;
  std::array<Weight, (most_context + 1) * total_buckets * distinct_buckets> weights_;
};

}  // namespace pgolf
