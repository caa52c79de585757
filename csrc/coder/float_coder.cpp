#include "coder/float_coder.h"

#include <algorithm>
#include <memory>

#include "coder/mixer.h"
#include "coder/range_coder.h"

namespace pgolf {
namespace {

// The bits of a value from the highest down. Each is mixed from counters that know: its place; all bits above it, to
// some depth; the same with the values before and before that; with the value above; and how the value before went on.
template <class Coder>
class FloatModel {
 public:
  explicit FloatModel(Coder& coder) : coder_(coder), tables_(logistic_tables()), counters_(kinds << index_bits) {
    for (auto& set : by_bit_) start(set);
    for (auto& set : by_agreement_) start(set);
  }

  bool run(const FloatRun& run) {
    const int bits = 8 * run.bytes;
    uint32_t before = 0, before2 = 0;
    for (int64_t i = 0; i < run.count; ++i) {
      const uint32_t above = run.cols > 1 && i >= run.cols ? load(run, i - run.cols) : before2;
      const uint32_t value = code(load(run, i), before, above, bits);
      for (int at = 0; at < run.bytes; ++at) run.values[i * run.bytes + at] = static_cast<uint8_t>(value >> 8 * at);
      before2 = before;
      before = value;
      if (coder_.overdrawn()) return false;
    }
    return true;
  }

 private:
  static constexpr int kinds = 6, index_bits = 16;

  static uint32_t load(const FloatRun& run, int64_t i) {
    uint32_t value = 0;
    for (int at = run.bytes; at-- > 0;) value = value << 8 | run.values[i * run.bytes + at];
    return value;
  }

  static void start(Weights& set) {
    for (int i = 0; i < kinds; ++i) set.w[i] = (1 << 28) / 3;
  }

  // A place in the counters of a kind. Contexts may share one.
  Counter& counter(int kind, int bits, uint32_t context) {
    const uint32_t hash = (context * 0x9e3779b1u + static_cast<uint32_t>(bits)) * 0x85ebca6bu;
    return counters_[(static_cast<size_t>(kind) << index_bits) + (hash >> (32 - index_bits))];
  }

  uint32_t code(uint32_t value, uint32_t before, uint32_t above, int bits) {
    const int exponent = bits == 16 ? 10 : 23;  // bits below the exponent
    uint32_t known = 1;                         // a 1 and the bits so far
    for (int bit = bits; bit-- > 0;) {
      const uint32_t same = before >> bit >> 1, there = above >> bit >> 1, mark = 1u << (bits - 1 - bit);
      const bool agrees = (same | mark) == known, agrees_above = (there | mark) == known;
      const uint32_t place = static_cast<uint32_t>(bit + bits);
      const uint32_t next_left = agrees ? 2 + (before >> bit & 1) : 0;
      const uint32_t next_above = agrees_above ? 2 + (above >> bit & 1) : 0;
      const uint32_t head = bit < exponent ? known >> (exponent - 1 - bit) : known;  // sign and exponent
      Counter* used[kinds] = {
          &counter(0, bits, place),
          &counter(1, bits, bit >= exponent - 6 ? known * 64 : place + 1),
          &counter(2, bits, next_left + place * 4),
          &counter(3, bits, next_left * 4 + next_above + place * 16),
          &counter(4, bits, bit >= exponent ? (known * 64 + (before >> exponent & 63)) : head * 64 + place),
          &counter(5, bits, bit >= exponent - 3 ? (known * 64 + (above >> exponent & 63)) : place + 7),
      };
      alignas(64) int16_t inputs[mixer_inputs] = {};
      for (int i = 0; i < kinds; ++i) {
        if (used[i]->state == 0) used[i]->start(32768, 0);
        inputs[i] = used[i]->stretch(tables_);
      }
      inputs[kinds] = 256;
      Weights &a = by_bit_[place], &b = by_agreement_[agrees * 2 + agrees_above];
      const int32_t one = squash(tables_, mix(inputs, a, b));
      const uint32_t found = coder_.code(value >> bit & 1, static_cast<uint32_t>(one));
      learn(inputs, a, b, found, one);
      for (Counter* each : used) each->update(tables_, found);
      known = known * 2 + found;
    }
    return bits == 32 ? known : known & 0xffff;
  }

  Coder& coder_;
  const LogisticTables& tables_;
  std::vector<Counter> counters_;
  Weights by_bit_[64], by_agreement_[4];
};

}  // namespace

std::vector<uint8_t> encode_float_runs(const std::vector<FloatRun>& runs) {
  std::vector<uint8_t> payload;
  RangeEncoder coder(payload, free_float_bits);
  const auto model = std::make_unique<FloatModel<RangeEncoder>>(coder);
  for (const FloatRun& run : runs) model->run(run);
  coder.finish();
  return payload;
}

bool decode_float_runs(const uint8_t* payload, size_t size, const std::vector<FloatRun>& runs) {
  RangeDecoder coder(payload, size, free_float_bits);
  const auto model = std::make_unique<FloatModel<RangeDecoder>>(coder);
  for (const FloatRun& run : runs)
    if (!model->run(run)) return false;
  return coder.at_end();
}

}  // namespace pgolf
