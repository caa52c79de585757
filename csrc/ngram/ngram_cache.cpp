#include "ngram/ngram_cache.h"

#include "base/exp_log.h"

namespace pgolf {

namespace {

constexpr uint64_t snapshot_version = 0x31474e4770ULL;  // "pGNG1": the layout of a snapshot

// What must be equal in the cache that made a snapshot and the one that takes it.
void put_config(ByteWriter& out, const CountsConfig& config, const MixConfig& mix) {
  const int64_t whole[] = {config.vocab_size,   config.longest,          config.boundary,
                           config.reset,        int64_t(config.memory_bytes), int64_t(mix.mixing), mix.lengths};
  const double real[] = {mix.concentration, mix.discount};
  out.put(snapshot_version);
  out.put(whole);
  out.put(real);
}

bool same_config(ByteReader& in, const CountsConfig& config, const MixConfig& mix) {
  ByteWriter expected;
  put_config(expected, config, mix);
  std::vector<uint8_t> bytes = expected.finish();
  bytes.resize(bytes.size() - sizeof(uint64_t));
  std::vector<uint8_t> found(bytes.size());
  in.get(found.data(), found.size());
  return in.good() && found == bytes;
}

MixConfig hint_config(double threshold) { return {static_cast<Mixing>(-1), 0, threshold, 0}; }

}  // namespace

void NgramCache::score(const uint16_t* tokens, const double* base, double* out, int64_t count) {
  Mixer::Trace trace;
  counts_->observe(tokens, count, [&](int64_t i, const Evidence* evidence, int depth) {
    out[i] = base[i];
    if (depth == 0) return;
    out[i] = log_of(mixer_.mix(exp_of(base[i]), evidence, depth, trace));
    mixer_.learn(trace);
  });
}

void NgramCache::update(const uint16_t* tokens, int64_t count) {
  counts_->observe(tokens, count, [](int64_t, const Evidence*, int) {});
}

void NgramCache::distribution(const double* base, double* out) const {
  NgramCounts::Seen seen[most_context];
  Evidence evidence[most_context];
  Mixer::Trace trace;
  const int depth = counts_->look(seen);
  for (int token = 0; token < config().vocab_size; ++token) {
    for (int i = 0; i < depth; ++i) evidence[i] = counts_->evidence_of(seen[i], static_cast<uint16_t>(token));
    out[token] = depth ? mixer_.mix(base[token], evidence, depth, trace) : base[token];
  }
}

std::vector<uint8_t> NgramCache::save() const {
  ByteWriter out;
  put_config(out, config(), mix_);
  mixer_.save(out);
  counts_->save(out);
  return out.finish();
}

bool NgramCache::load(const uint8_t* data, size_t size) {
  ByteReader in(data, size);
  if (!in.good() || !same_config(in, config(), mix_)) return false;
  auto counts = std::make_unique<NgramCounts>(config());
  Mixer mixer(mix_);
  if (!mixer.load(in) || !counts->load(in) || !in.done()) return false;
  counts_ = std::move(counts);
  mixer_ = mixer;
  return true;
}

void HintCache::hints(const uint16_t* tokens, uint16_t* hints, uint8_t* gates, int64_t count) {
  counts_->observe(tokens, count, [&](int64_t i, const Hint& hint) {
    hints[i] = hint.token;
    gates[i] = open(hint);
  });
}

void HintCache::update(const uint16_t* tokens, int64_t count) {
  counts_->observe(tokens, count, [](int64_t, const Hint&) {});
}

bool HintCache::look(uint16_t& hint) const {
  const Hint found = counts_->look();
  hint = found.token;
  return open(found);
}

std::vector<uint8_t> HintCache::save() const {
  ByteWriter out;
  put_config(out, config_, hint_config(threshold_));
  counts_->save(out);
  return out.finish();
}

bool HintCache::load(const uint8_t* data, size_t size) {
  ByteReader in(data, size);
  if (!in.good() || !same_config(in, config_, hint_config(threshold_))) return false;
  auto counts = std::make_unique<HintCounts>(config_);
  if (!counts->load(in) || !in.done()) return false;
  counts_ = std::move(counts);
  return true;
}

}  // namespace pgolf
