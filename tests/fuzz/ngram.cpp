// Snapshots of n-gram caches, with the right settings and the right checksum. An input is
//
//   settings | the stream that the cache has read | the stream that it goes on with | changes | counts
//
// What it saves after the first stream is changed in some places, or, where anything is left, has that for its counts.
#include "ngram_checks.h"

namespace {

using fuzz::Bytes;
using fuzz::Tokens;

constexpr size_t least_memory = 4096, memory_step = 512, most_tokens = 3000;  // small, to be full soon

// A phrase over and over, a token more of `noise` each time.
Tokens stream(fuzz::Input& input, int vocab_size) {
  const int length = input.number(0, 60), times = input.number(0, 200);
  const Bytes phrase = input.array<uint8_t>(static_cast<size_t>(length));
  const int step = input.take();
  Tokens tokens;
  for (int i = 0; i < times && tokens.size() < most_tokens; ++i) {
    for (const uint8_t each : phrase) tokens.push_back(static_cast<uint16_t>(each % vocab_size));
    if (step) tokens.push_back(static_cast<uint16_t>(i * step % vocab_size));
  }
  return tokens;
}

// `parts` are where the parts of a snapshot begin, so that a change is likely to hit a short one.
void change(Bytes& snapshot, const std::vector<size_t>& parts, fuzz::Input& input) {
  for (int changes = input.number(0, 8); changes > 0; --changes) {
    const size_t from = parts[input.take() % parts.size()], at = from + input.take<uint16_t>();
    const size_t width = size_t{1} << input.number(0, 3);
    const auto value = input.take<uint64_t>();
    if (at + width <= snapshot.size()) std::memcpy(snapshot.data() + at, &value, width);
  }
}

template <class Cache>
bool attack(Cache& past, Cache& fresh, std::vector<size_t> parts, int vocab_size, fuzz::Input input) {
  const Tokens before = stream(input, vocab_size), after = stream(input, vocab_size);
  past.update(before.data(), static_cast<int64_t>(before.size()));
  Bytes snapshot = past.save();
  const size_t counts = parts.back();
  parts.push_back(counts + (snapshot.size() - counts) / 2);  // the tables
  change(snapshot, parts, input);
  if (input.left()) {
    const Bytes rest = input.rest();
    snapshot.resize(counts);
    snapshot.insert(snapshot.end(), rest.begin(), rest.end());
    snapshot.resize(snapshot.size() + sizeof(uint64_t));
  }
  fuzz::sign(snapshot);
  return fuzz::restore_and_grow(fresh, snapshot, after, vocab_size);
}

}  // namespace

bool fuzz::read(const uint8_t* data, size_t size) {
  Input input(data, size);
  const int vocab_size = input.number(2, 40), longest = input.number(1, pgolf::most_context);
  const int kind = input.number(0, 3), boundary = input.number(-1, vocab_size - 1);
  const bool resets = boundary >= 0 && input.take() & 1;
  const size_t memory = vocab_size * sizeof(pgolf::Context) + least_memory + memory_step * input.take();
  const pgolf::CountsConfig config = {vocab_size, longest, boundary, resets, memory};
  if (kind == 3) {
    pgolf::HintCache past(config, 0.5), fresh(config, 0.5);
    return attack(past, fresh, {header_bytes}, vocab_size, input);
  }
  const pgolf::MixConfig mix = {static_cast<pgolf::Mixing>(kind), ~0u, 4.0, 0.7};
  pgolf::NgramCache past(config, mix), fresh(config, mix);
  return attack(past, fresh, {header_bytes, counts_at(mix)}, vocab_size, input);
}
