#include "ngram/hint_counts.h"

#include <cstring>

namespace pgolf {

namespace {

constexpr double history_share = 0.08, successor_share = 0.15;  // of the memory

size_t share(const CountsConfig& config, double part) {
  return static_cast<size_t>(part * static_cast<double>(config.memory_bytes));
}

uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 3); }  // the high bits choose the bucket

}  // namespace

HintCounts::HintCounts(const CountsConfig& config)
    : config_(config),
      contexts_(share(config, 1 - history_share - successor_share)),
      successors_(share(config, successor_share)),
      stream_(config.longest, config.boundary, config.reset, share(config, history_share) / sizeof(uint16_t)) {}

// Of the `length` tokens before x: four at a time, each mixed into all bits of what came before.
uint64_t HintCounts::hash(const uint16_t* x) const {
  uint64_t sum = 0x9e3779b97f4a7c15ULL;
  const int length = stream_.longest();
  for (int done = 0; done < length; done += 4) {
    uint64_t word = 0;
    std::memcpy(&word, x - length + done, sizeof(uint16_t) * std::min(4, length - done));
    sum = (sum ^ word) * 0xff51afd7ed558ccdULL;
    sum ^= sum >> 32;
  }
  sum *= 0xc4ceb9fe1a85ec53ULL;
  return sum ^ sum >> 33;
}

HintContext* HintCounts::place(uint64_t hash, const uint16_t* x) {
  const uint32_t tag = tag_of(hash);
  const size_t length = stream_.longest();
  return contexts_.search(hash, [&](const HintContext& context) {
    return context.tag == tag &&
           std::memcmp(stream_.history() + (context.owner - 1 - length), x - length, sizeof(uint16_t) * length) == 0;
  });
}

void HintCounts::fetch(uint64_t hash, uint16_t token) {
  const uint32_t tag = tag_of(hash);
  const HintContext* context = contexts_.search(hash, [=](const HintContext& each) { return each.tag == tag; });
  if (!context || !context->owner) return;
  const uint16_t* place = stream_.history() + (context->owner - 1 - stream_.longest());
  prefetch(place);
  prefetch(place + stream_.longest() - 1);
  if (context->distinct == 1 && context->best == token) return;
  prefetch(successors_.home(hash_key(contexts_.index(context) + 1, token)));
}

void HintCounts::add(HintContext* context, uint64_t hash, uint16_t token) {
  if (!context || (!context->owner && !stream_.on_record())) {
    ++stats_.refused_contexts;
    return;
  }
  if (context->owner) {
    count(context, token);
    return;
  }
  *context = {static_cast<uint32_t>(stream_.position()) + 1, tag_of(hash), 1, 1, token, 1};
  ++stats_.contexts;
  if (stream_.resets()) contexts_.note(context);
}

void HintCounts::keep(Successor* successor, uint32_t owner, uint16_t token, uint16_t count) {
  *successor = {owner, token, count};
  ++stats_.successors;
  if (stream_.resets()) successors_.note(successor);
}

void HintCounts::count(HintContext* context, uint16_t token) {
  if (context->total == most_total) return;
  if (context->distinct == 1 && context->best == token) {
    ++context->total;
    ++context->best_count;
    return;
  }
  const uint32_t owner = contexts_.index(context) + 1;
  Successor* successor = successors_.place(owner, token);
  if (!successor) {
    ++stats_.refused_successors;
    return;
  }
  if (!successor->owner) {
    *successor = {owner, token, 0};  // taken before the search for another place
    if (context->distinct == 1) {    // from here on all are in the table, the hint too
      Successor* best = successors_.place(owner, context->best);
      if (!best) {
        *successor = {};
        ++stats_.refused_successors;
        return;
      }
      keep(best, owner, context->best, context->best_count);
    }
    keep(successor, owner, token, 0);
    ++context->distinct;
  }
  ++context->total;
  if (++successor->count <= context->best_count) return;
  context->best = token;
  context->best_count = successor->count;
}

Hint HintCounts::look() const {
  if (stream_.reach() < stream_.longest()) return {0, 0, 0};
  const uint16_t* x = stream_.recent_end();
  const HintContext* context = const_cast<HintCounts*>(this)->place(hash(x), x);
  if (!context || !context->owner) return {0, 0, 0};
  return {context->best, context->best_count, context->total};
}

CountsStats HintCounts::stats() const {
  CountsStats stats = stats_;
  stats.used_bytes = sizeof(HintContext) * stats.contexts + sizeof(Successor) * stats.successors + 2 * stream_.kept();
  return stats;
}

void HintCounts::forget() {
  contexts_.forget();
  successors_.forget();
  stats_.contexts = stats_.successors = 0;
}

void HintCounts::save(ByteWriter& out) const {
  stream_.save(out);
  out.put(stats_);
  contexts_.save(out);
  successors_.save(out);
}

// Whether a search for its tokens ends there.
bool HintCounts::is_in_place(const HintContext& context) {
  const uint16_t* x = stream_.history() + (context.owner - 1);
  const uint64_t its_hash = hash(x);
  return context.tag == tag_of(its_hash) && place(its_hash, x) == &context;
}

// Whether the successors of every context with several are as many as it says, as often as it says, the hint among them
// and none more often. They are taken from its numbers, and put back.
bool HintCounts::successors_add_up() {
  const auto all = [&](auto right) { return contexts_.count_right(right) >= 0; };
  all([](HintContext& each) {
    if (each.distinct == 1) each.distinct = each.total = 0;  // it is alone, and has none in the table
    return true;
  });
  const int64_t count = successors_.count_right([&](const Successor& successor) {
    if (successor.owner > contexts_.size() || successor.token >= config_.vocab_size) return false;
    HintContext& context = contexts_[successor.owner - 1];
    if (!context.distinct || successor.count == 0 || successor.count > context.total) return false;
    const bool is_hint = successor.token == context.best;
    if (is_hint ? successor.count != context.best_count : successor.count > context.best_count) return false;
    if (successors_.place(successor.owner, successor.token) != &successor) return false;
    --context.distinct;
    context.total -= successor.count;
    return true;
  });
  if (count < 0 || stats_.successors != static_cast<uint64_t>(count)) return false;
  if (!all([](const HintContext& each) { return each.distinct == 0 && each.total == 0; })) return false;
  successors_.count_right([&](const Successor& successor) {
    HintContext& context = contexts_[successor.owner - 1];
    ++context.distinct;
    context.total += successor.count;
    return true;
  });
  return all([&](HintContext& each) {
    if (each.distinct) return successors_.find(contexts_.index(&each) + 1, each.best) != nullptr;
    each.distinct = 1;
    each.total = each.best_count;
    return true;
  });
}

bool HintCounts::load(ByteReader& in) {
  if (!stream_.load(in, config_.vocab_size)) return false;
  in.get(stats_);
  if (!contexts_.load(in) || !successors_.load(in) || !stream_.can_have_read(stats_.tokens)) return false;
  // All positions first: a search reads the tokens before the position of every context that it passes.
  const auto can_be = [&](const HintContext& context) {
    return context.owner > static_cast<uint32_t>(stream_.longest()) && context.owner - 1 < stream_.kept() &&
           context.distinct > 0 && context.distinct <= context.total && context.best < config_.vocab_size &&
           context.best_count > 0 && (context.distinct > 1 || context.best_count == context.total);
  };
  const int64_t contexts = contexts_.count_right(can_be);
  if (contexts < 0 || stats_.contexts != static_cast<uint64_t>(contexts)) return false;
  if (contexts_.count_right([&](const HintContext& context) { return is_in_place(context); }) < 0) return false;
  if (!successors_add_up()) return false;
  if (!stream_.resets()) return true;
  contexts_.note_taken();
  successors_.note_taken();
  return true;
}

}  // namespace pgolf
