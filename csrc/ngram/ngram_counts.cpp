#include "ngram/ngram_counts.h"

#include <cstring>

namespace pgolf {

namespace {

// Of the memory left after contexts of one token, as English text of 4 to 7 million tokens fills it evenly.
constexpr double history_share = 1.0 / 16, successor_share = 0.27;

size_t share(const CountsConfig& config, double part) {
  const size_t direct = static_cast<size_t>(config.vocab_size) * sizeof(Context);
  return static_cast<size_t>(part * static_cast<double>(config.memory_bytes - direct));
}

}  // namespace

size_t NgramCounts::least_bytes(int vocab_size) {
  return static_cast<size_t>(vocab_size) * sizeof(Context) + (1 << 16);
}

NgramCounts::NgramCounts(const CountsConfig& config)
    : config_(config),
      direct_(static_cast<size_t>(config.vocab_size)),
      contexts_(share(config, 1 - history_share - successor_share)),
      successors_(share(config, successor_share)),
      stream_(config.longest, config.boundary, config.reset, share(config, history_share) / sizeof(uint16_t)) {}

// Finds the context of `length` tokens, if that is what comes next for x[0], and asks for what will be looked at then.
void NgramCounts::fetch(int length, const uint16_t* x, Ahead& ahead) {
  if (ahead.next == Ahead::leaf) {
    fetch_split(x, ahead);
    return;
  }
  Context* context = length == 1 ? &direct_[x[-1]] : contexts_.place_at(ahead.hash, id(ahead.found[length - 1]), x[-length]);
  ahead.next = Ahead::done;
  if (!context || !context->owner) return;
  ahead.found[length] = context;
  ahead.depth = length;
  const uint32_t owner = id(context);
  if (context->distinct == 0) {
    prefetch(stream_.history() + context->total);
    if (length == ahead.reach) prefetch(successors_.home(hash_key(owner, x[0])));
    if (length < ahead.reach) ahead.next = Ahead::leaf;
    return;
  }
  if (context->first != x[0]) prefetch(successors_.home(hash_key(owner, x[0])));
  if (length == ahead.reach) return;
  ahead.next = Ahead::search;
  ahead.hash = hash_key(owner, x[-length - 1]);
  prefetch(contexts_.home(ahead.hash));
}

// Asks for what split() will write, if the leaf's place and this one have no more in common than its tokens.
void NgramCounts::fetch_split(const uint16_t* x, Ahead& ahead) {
  const Context* leaf = ahead.found[ahead.depth];
  ahead.next = Ahead::done;
  if (leaf->distinct) return;  // another position split it meanwhile
  const uint32_t owner = id(leaf), position = leaf->total;
  const int length = ahead.depth;
  prefetch(contexts_.home(hash_key(owner, x[-length - 1])));
  if (static_cast<uint32_t>(length) < position)
    prefetch(contexts_.home(hash_key(owner, stream_.history()[position - length - 1])));
  if (stream_.history()[position] != x[0]) prefetch(successors_.home(hash_key(owner, x[0])));
}

// Counts x[0] in all its contexts. Fills the evidence that there was before, and returns for how many contexts.
int NgramCounts::take(const uint16_t* x, const Ahead& ahead, Evidence* evidence) {
  if (ahead.reach == 0) return 0;
  Context* context = &direct_[x[-1]];
  uint32_t owner = no_owner;
  for (int length = 1;; ++length) {
    if (!context->owner) {
      keep_leaf(context, owner, x[-length], stream_.position());
      return length - 1;
    }
    if (context->distinct == 0) {
      const uint32_t position = context->total;
      const int agreeing = agreement(position, x, length, ahead.reach);
      const Evidence once = {1, 1, stream_.history()[position] == x[0]};
      for (int each = length; each <= agreeing; ++each) evidence[each - 1] = once;
      split(x, context, length, agreeing);
      return agreeing;
    }
    evidence[length - 1] = add(context, x[0]);
    if (length == ahead.reach) return length;
    owner = id(context);
    context = length < ahead.depth ? ahead.found[length + 1] : contexts_.place(owner, x[-length - 1]);
    if (!context) {
      ++stats_.refused_contexts;
      return length;
    }
  }
}

// The longest context that a leaf's place and this one have in common, at least `length` tokens.
int NgramCounts::agreement(uint32_t position, const uint16_t* x, int length, int reach) const {
  const int most = static_cast<int>(std::min<uint32_t>(reach, position));
  while (length < most && stream_.history()[position - length - 1] == x[-length - 1]) ++length;
  return length;
}

// A leaf was seen again: it and the longer contexts that both places share become nodes, and where they part each gets a
// leaf of its own.
void NgramCounts::split(const uint16_t* x, Context* leaf, int length, int agreeing) {
  const uint32_t position = leaf->total;
  uint32_t owner = 0;
  for (Context* node = leaf;; ++length) {
    node->distinct = 1;
    node->total = 1;
    node->first = stream_.history()[position];
    node->first_count = 1;
    add(node, x[0]);
    owner = id(node);
    if (length == agreeing) break;
    node = contexts_.place(owner, x[-length - 1]);
    if (!keep(node, owner, x[-length - 1])) return;
  }
  if (agreeing == stream_.longest() || stream_.is_boundary(x[-agreeing])) return;
  if (static_cast<uint32_t>(agreeing) < position) {
    const uint16_t older = stream_.history()[position - agreeing - 1];
    keep_leaf(contexts_.place(owner, older), owner, older, position);
  }
  if (static_cast<uint64_t>(agreeing) < stream_.position()) {
    const uint16_t older = x[-agreeing - 1];
    keep_leaf(contexts_.place(owner, older), owner, older, stream_.position());
  }
}

Evidence NgramCounts::add(Context* context, uint16_t token) {
  Evidence before = {context->total, context->distinct, 0};
  const bool full = context->total == most_total;
  if (context->first == token) {
    before.count = context->first_count;
    context->first_count += !full;
    context->total += !full;
    return before;
  }
  const uint32_t owner = id(context);
  Successor* successor = successors_.place(owner, token);
  if (!successor) {
    ++stats_.refused_successors;
    return before;
  }
  before.count = successor->count;
  if (full) return before;
  if (!successor->owner) {
    successor->owner = owner;
    successor->token = token;
    ++context->distinct;
    ++stats_.successors;
    if (stream_.resets()) successors_.note(successor);
  }
  ++successor->count;
  ++context->total;
  return before;
}

bool NgramCounts::keep(Context* node, uint32_t owner, uint16_t token) {
  if (!node) {
    ++stats_.refused_contexts;
    return false;
  }
  node->owner = owner;
  node->token = token;
  ++stats_.contexts;
  if (stream_.resets() && owner != no_owner) contexts_.note(node);
  return true;
}

void NgramCounts::keep_leaf(Context* leaf, uint32_t owner, uint16_t token, uint64_t position) {
  const bool known = stream_.on_record() || position != stream_.position();  // what follows must be on record
  if (!known) leaf = nullptr;
  if (keep(leaf, owner, token)) leaf->total = static_cast<uint32_t>(position);  // a record has fewer than 2^32
}

int NgramCounts::look(Seen* seen) const {
  const int reach = stream_.reach();
  if (reach == 0) return 0;
  const uint16_t* x = stream_.recent_end();
  const Context* context = &direct_[x[-1]];
  for (int length = 1;; ++length) {
    if (!context || !context->owner) return length - 1;
    if (context->distinct == 0) {
      const int agreeing = agreement(context->total, x, length, reach);
      for (int each = length; each <= agreeing; ++each) seen[each - 1] = {nullptr, stream_.history()[context->total]};
      return agreeing;
    }
    seen[length - 1] = {context, 0};
    if (length == reach) return length;
    context = contexts_.find(id(context), x[-length - 1]);
  }
}

Evidence NgramCounts::evidence_of(const Seen& seen, uint16_t token) const {
  if (!seen.context) return {1, 1, seen.only == token};
  Evidence found = {seen.context->total, seen.context->distinct, 0};
  if (seen.context->first == token) {
    found.count = seen.context->first_count;
  } else if (seen.context->distinct > 1) {
    const Successor* successor = successors_.find(id(seen.context), token);
    if (successor) found.count = successor->count;
  }
  return found;
}

CountsStats NgramCounts::stats() const {
  CountsStats stats = stats_;
  stats.used_bytes = sizeof(Context) * stats.contexts + sizeof(Successor) * stats.successors + 2 * stream_.kept();
  return stats;
}

void NgramCounts::forget() {
  std::fill(direct_.data(), direct_.data() + direct_.size(), Context{});
  contexts_.forget();
  successors_.forget();
  stats_.contexts = stats_.successors = 0;
}

void NgramCounts::save(ByteWriter& out) const {
  stream_.save(out);
  out.put(stats_);
  out.put(direct_.data(), direct_.size());
  contexts_.save(out);
  successors_.save(out);
}

Context* NgramCounts::node_of(uint32_t id) {
  const size_t index = static_cast<size_t>(id) - 1, direct = direct_.size();  // of id 0 beyond all
  if (index >= direct && index - direct >= contexts_.size()) return nullptr;
  Context* context = index < direct ? &direct_[index] : &contexts_[index - direct];
  return context->owner && context->distinct ? context : nullptr;
}

// What a context says of itself alone.
bool NgramCounts::can_be(const Context& context) const {
  if (!context.distinct) return context.total < stream_.kept();
  return context.total <= most_total && context.distinct <= context.total && context.first < config_.vocab_size &&
         context.first_count > 0;
}

// Whether its owners are the nodes of ever fewer tokens, and where it is a leaf, its tokens lie before its position.
bool NgramCounts::stands_for_its_tokens(const Context& context) {
  uint16_t tokens[most_context];  // the oldest first
  uint32_t length = 0;
  const Context* at = &context;
  while (true) {
    tokens[length++] = at->token;
    if (at >= direct_.data() && at < direct_.data() + direct_.size()) break;
    at = node_of(at->owner);
    if (!at || length == static_cast<uint32_t>(stream_.longest())) return false;
  }
  if (context.distinct) return context.token < config_.vocab_size;
  return length <= context.total && std::equal(tokens, tokens + length, stream_.history() + context.total - length);
}

// Whether the successors of every node are as many as it says, as often as it says. They are taken from its numbers, and
// put back.
bool NgramCounts::successors_add_up() {
  const int64_t count = successors_.count_right([&](const Successor& successor) {
    Context* node = node_of(successor.owner);
    if (!node || node->distinct < 2 || successor.token >= config_.vocab_size || successor.token == node->first)
      return false;
    if (successor.count == 0 || successor.count > node->total) return false;
    if (successors_.place(successor.owner, successor.token) != &successor) return false;
    --node->distinct;
    node->total -= successor.count;
    return true;
  });
  if (count < 0 || stats_.successors != static_cast<uint64_t>(count)) return false;
  const auto alone = [](const Context& each) {
    return !each.distinct || (each.distinct == 1 && each.total == each.first_count);
  };
  if (!std::all_of(direct_.data(), direct_.data() + direct_.size(), alone)) return false;
  if (contexts_.count_right(alone) < 0) return false;
  successors_.count_right([&](const Successor& successor) {
    Context* node = node_of(successor.owner);
    ++node->distinct;
    node->total += successor.count;
    return true;
  });
  return true;
}

bool NgramCounts::load(ByteReader& in) {
  if (!stream_.load(in, config_.vocab_size)) return false;
  in.get(stats_);
  in.get(direct_.data(), direct_.size());
  if (!contexts_.load(in) || !successors_.load(in)) return false;
  uint64_t direct = 0;
  for (size_t token = 0; token < direct_.size(); ++token) {
    const Context& context = direct_[token], free = {};
    direct += context.owner != 0;
    const bool right = context.owner ? context.owner == no_owner && context.token == token && can_be(context) &&
                                           stands_for_its_tokens(context)
                                     : std::memcmp(&context, &free, sizeof free) == 0;
    if (!right) return false;
  }
  const int64_t others = contexts_.count_right([&](const Context& context) {
    return can_be(context) && stands_for_its_tokens(context) &&
           contexts_.place(context.owner, context.token) == &context;
  });
  if (others < 0 || stats_.contexts != direct + others || !stream_.can_have_read(stats_.tokens)) return false;
  if (!successors_add_up()) return false;
  if (!stream_.resets()) return true;
  contexts_.note_taken();
  successors_.note_taken();
  return true;
}

}  // namespace pgolf
