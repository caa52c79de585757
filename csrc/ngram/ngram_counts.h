// Exact counts of what followed every context of 1 to `longest` tokens in a stream that is read once.
//
// The contexts form a trie: one of k tokens is known by the context of its k-1 newest tokens and its oldest token, and
// both are stored and compared, so no two contexts are taken for one another. A context seen once is a leaf that holds the
// position of the token that followed; it stands for all longer contexts of that place as well, which are made when it
// is seen again. So a stream costs one leaf a token and few look-ups: a search ends at the first leaf or missing node.
//
// Memory is fixed at the start. A context or successor that finds no place in its table is not counted, now or later, and
// its refusals are counted; all other counts stay right, and the counts of a context's successors always add up to its
// total. A context whose total reaches `most_total` counts no more.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ngram/bucket_table.h"
#include "ngram/token_stream.h"

namespace pgolf {

constexpr int most_context = 15;       // tokens
constexpr uint32_t most_total = 65535;  // of a context; its counts stop together

// What a context's past says of one token.
struct Evidence {
  uint32_t total;     // times the context was seen
  uint32_t distinct;  // different tokens that followed
  uint32_t count;     // times that this token followed
};

struct Context {
  uint32_t owner;        // id of the context one token shorter; 0: free
  uint16_t token;        // oldest token of this one
  uint16_t distinct;     // 0: a leaf
  uint32_t total;        // of a leaf, the position of what followed
  uint16_t first;        // first successor; the others are in the table of successors
  uint16_t first_count;
};

struct Successor {
  uint32_t owner;  // id of a context
  uint16_t token;
  uint16_t count;
};

static_assert(sizeof(Context) == 16 && sizeof(Successor) == 8, "whole numbers of them fill a cache line");

struct CountsConfig {
  int vocab_size;
  int longest;   // tokens of the longest context
  int boundary;  // contexts go back to this token and no further; -1: none
  bool reset;    // forget everything at a boundary
  size_t memory_bytes;
};

struct CountsStats {
  uint64_t tokens, contexts, successors, refused_contexts, refused_successors, used_bytes;
};

class NgramCounts {
 public:
  explicit NgramCounts(const CountsConfig& config);

  static size_t least_bytes(int vocab_size);

  // For each of `count` tokens: visit(i, evidence, depth), where evidence[k] is of the context of k + 1 tokens, from the
  // tokens before; contexts of more than `depth` tokens are new. Then the token is counted.
  template <class Visit>
  void observe(const uint16_t* tokens, int64_t count, Visit visit);

  // The contexts that the next token has, as `evidence_of` wants them; returns how many were seen before.
  struct Seen {
    const Context* context;  // null: one seen once, with this successor
    uint16_t only;
  };
  int look(Seen* seen) const;
  Evidence evidence_of(const Seen& seen, uint16_t token) const;

  CountsStats stats() const;
  const CountsConfig& config() const { return config_; }
  void save(ByteWriter& out) const;
  // Into new counts of the same config. False where the bytes are none that observe() could have left, as far as that
  // takes to stay in bounds and to sum to one: every count adds up, every entry is found where it lies.
  bool load(ByteReader& in);

 private:
  struct Ahead {  // a position whose contexts are being fetched
    Context* found[most_context + 1];
    uint64_t hash;  // of the context after the last one found
    int reach;      // tokens of its longest possible context
    int depth;      // contexts found
    enum { done, search, leaf } next;
  };
  static constexpr int spacing = 2;  // positions between the look-ups of two contexts of one position
  static constexpr int ring = 32;    // more than are under way
  static_assert(ring > spacing * (most_context - 1) + 1, "positions under way do not share a place");
  static constexpr uint32_t no_owner = ~0u;  // of contexts of one token; no id is as large

  template <class Visit>
  void observe_block(const uint16_t* x, int64_t count, Visit visit);
  void fetch(int length, const uint16_t* x, Ahead& ahead);
  void fetch_split(const uint16_t* x, Ahead& ahead);
  int take(const uint16_t* x, const Ahead& ahead, Evidence* evidence);
  void split(const uint16_t* x, Context* leaf, int length, int agreeing);
  Evidence add(Context* context, uint16_t token);
  void keep_leaf(Context* leaf, uint32_t owner, uint16_t token, uint64_t position);
  bool keep(Context* node, uint32_t owner, uint16_t token);
  int agreement(uint32_t position, const uint16_t* x, int length, int reach) const;
  void forget();
  bool can_be(const Context& context) const;
  bool stands_for_its_tokens(const Context& context);
  bool successors_add_up();

  uint32_t id(const Context* context) const {
    return context >= direct_.data() && context < direct_.data() + direct_.size()
               ? static_cast<uint32_t>(context - direct_.data()) + 1
               : static_cast<uint32_t>(direct_.size()) + contexts_.index(context) + 1;
  }
  Context* node_of(uint32_t id);  // null where there is none

  CountsConfig config_;
  ZeroedArray<Context> direct_;  // of one token, by that token
  BucketTable<Context> contexts_;  // where boundaries reset, entries are noted: what to clear
  BucketTable<Successor> successors_;
  TokenStream stream_;
  CountsStats stats_{};
};

template <class Visit>
void NgramCounts::observe(const uint16_t* tokens, int64_t count, Visit visit) {
  stream_.feed(
      tokens, count,
      [&](int64_t begin, const uint16_t* x, int64_t size) {
        observe_block(x, size, [&](int64_t i, const Evidence* evidence, int depth) { visit(begin + i, evidence, depth); });
      },
      [&] { forget(); });
}

template <class Visit>
void NgramCounts::observe_block(const uint16_t* x, int64_t count, Visit visit) {
  Ahead ahead[ring];
  Evidence evidence[most_context];
  const int longest = stream_.longest();
  const int64_t far = spacing * (longest - 1) + 1;
  int reach = stream_.reach();
  // The context of one token is looked up `far` positions ahead, that of k tokens `spacing` positions after that of k - 1,
  // in a line which was asked for then.
  for (int64_t now = -far; now < count; ++now) {
    const int64_t newest = now + far;
    if (newest < count) {
      Ahead& first = ahead[newest % ring];
      first.reach = reach;
      first.depth = 0;
      first.next = reach > 0 ? Ahead::search : Ahead::done;
      reach = stream_.longer(reach, x[newest]);
    }
    for (int length = 1; length <= longest; ++length) {
      const int64_t at = newest - spacing * (length - 1);
      if (at >= 0 && at < count && ahead[at % ring].next) fetch(length, x + at, ahead[at % ring]);
    }
    if (now < 0) continue;
    const int depth = take(x + now, ahead[now % ring], evidence);
    visit(now, static_cast<const Evidence*>(evidence), depth);
    stream_.next(x[now]);
  }
  stats_.tokens += count;
}

}  // namespace pgolf
