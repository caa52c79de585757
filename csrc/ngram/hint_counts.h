// For every context of exactly `length` tokens the token that followed it most often: at most one hint a position.
//
// A context is known by its first place in the stream and compared with the tokens there, so a hint never comes from
// another context. Of several tokens that followed equally often, the one that got there first is the hint. Memory,
// refusals and saturation are as in ngram_counts.h.
#pragma once

#include "ngram/bucket_table.h"
#include "ngram/ngram_counts.h"
#include "ngram/token_stream.h"

namespace pgolf {

struct HintContext {
  uint32_t owner;  // position of what first followed, + 1; 0: free
  uint32_t tag;    // part of the context's hash, so that most others are told apart without a look at the stream
  uint16_t total, distinct;
  uint16_t best, best_count;
};

static_assert(sizeof(HintContext) == 16, "whole numbers of them fill a cache line");

struct Hint {
  uint16_t token;
  uint32_t count, total;  // total 0: no hint
};

class HintCounts {
 public:
  explicit HintCounts(const CountsConfig& config);  // config.longest is the length of the contexts

  static size_t least_bytes() { return 1 << 16; }

  // For each token: visit(i, hint) from the tokens before, then the token is counted.
  template <class Visit>
  void observe(const uint16_t* tokens, int64_t count, Visit visit);

  Hint look() const;  // the next token's hint
  CountsStats stats() const;
  void save(ByteWriter& out) const;
  bool load(ByteReader& in);  // into new counts of the same config; as NgramCounts::load

 private:
  struct Ahead {
    uint64_t hash;
    bool whole;  // there are enough tokens before
  };
  static constexpr int ring = 16;
  static constexpr int far = 12, near = 6;  // positions ahead: fetch the context's line, then what the line points to

  template <class Visit>
  void observe_block(const uint16_t* x, int64_t count, Visit visit);
  uint64_t hash(const uint16_t* x) const;
  HintContext* place(uint64_t hash, const uint16_t* x);
  void fetch(uint64_t hash, uint16_t token);
  void add(HintContext* context, uint64_t hash, uint16_t token);
  void count(HintContext* context, uint16_t token);
  void keep(Successor* successor, uint32_t owner, uint16_t token, uint16_t count);
  void forget();
  bool is_in_place(const HintContext& context);
  bool successors_add_up();

  CountsConfig config_;
  BucketTable<HintContext> contexts_;
  BucketTable<Successor> successors_;  // of contexts with several; the hint among them
  TokenStream stream_;
  CountsStats stats_{};
};

template <class Visit>
void HintCounts::observe(const uint16_t* tokens, int64_t count, Visit visit) {
  stream_.feed(
      tokens, count,
      [&](int64_t begin, const uint16_t* x, int64_t size) {
        observe_block(x, size, [&](int64_t i, const Hint& hint) { visit(begin + i, hint); });
      },
      [&] { forget(); });
}

template <class Visit>
void HintCounts::observe_block(const uint16_t* x, int64_t count, Visit visit) {
  Ahead ahead[ring];
  int reach = stream_.reach();
  for (int64_t now = -far; now < count; ++now) {
    const int64_t newest = now + far, middle = now + near;
    if (newest < count) {
      Ahead& next = ahead[newest % ring];
      next.whole = reach == stream_.longest();
      if (next.whole) {
        next.hash = hash(x + newest);
        prefetch(contexts_.home(next.hash));
      }
      reach = stream_.longer(reach, x[newest]);
    }
    if (middle >= 0 && middle < count && ahead[middle % ring].whole) fetch(ahead[middle % ring].hash, x[middle]);
    if (now < 0) continue;
    Hint hint = {0, 0, 0};
    const Ahead& here = ahead[now % ring];
    if (here.whole) {
      HintContext* context = place(here.hash, x + now);
      if (context && context->owner) hint = {context->best, context->best_count, context->total};
      add(context, here.hash, x[now]);
    }
    visit(now, hint);
    stream_.next(x[now]);
  }
  stats_.tokens += count;
}

}  // namespace pgolf
