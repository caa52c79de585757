// What must come out alike on every machine, as lines "name hash", for test_other_machines.py: coded blobs, packed bits,
// exp and log, n-gram caches, and trellis search and decoding. All inputs come from integers and are exact in floating point.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/byte_stream.h"
#include "coder/coder.h"
#include "base/cpu_features.h"
#include "base/exp_log.h"
#include "ngram/ngram_cache.h"
#include "pack/pack_bits.h"
#include "trellis/trellis.h"

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  int below(int limit) { return static_cast<int>(next() % limit); }
  // Bell-shaped, the mean of four, within +-limit.
  int around_zero(int limit) {
    int sum = 0;
    for (int i = 0; i < 4; ++i) sum += below(2 * limit + 1) - limit;
    return sum / 4;
  }

 private:
  uint64_t state_;
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

template <class Value>
uint64_t hash_of(const std::vector<Value>& values) {
  return pgolf::checksum(reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(Value));
}

void tell(const std::string& name, uint64_t hash) {
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

// The hash that work() returns, which must be the same at every level of this CPU.
template <class Work>
void tell_at_every_level(const std::string& name, Work work) {
  const std::string before = pgolf::level_name();
  pgolf::set_level("portable");
  const uint64_t expected = work();
  for (const std::string& level : pgolf::levels()) {
    pgolf::set_level(level);
    if (work() != expected) fail(name + " differs at level " + level);
  }
  pgolf::set_level(before);
  tell(name, expected);
}

void coded(const std::string& name, pgolf::Blob blob, const std::vector<uint8_t>& values) {
  const bool floats = blob.kind == pgolf::Kind::floats;
  const auto* integers = reinterpret_cast<const int8_t*>(values.data());
  const std::vector<uint8_t> bytes =
      floats ? pgolf::encode_floats(blob, values.data()) : pgolf::encode_ints(blob, integers, 2);
  pgolf::Blob read;
  std::vector<uint8_t> decoded(values.size());
  const char* problem = pgolf::read_blob(bytes.data(), bytes.size(), read);
  if (!problem) problem = pgolf::decode_blob(read, decoded.data(), 2);
  if (problem) fail(name + ": " + problem);
  if (decoded != values) fail(name + ": not what was encoded");
  tell(name, hash_of(bytes));
}

void code_integers() {
  Random random(1);
  std::vector<uint8_t> values;
  std::vector<pgolf::CodedTensor> tensors;
  const int shapes[][3] = {{2, 61, 100}, {1, 40, 50}, {3, 10, 7}, {1, 1, 2000}};
  const int limits[] = {5, 31, 127, 2};
  for (int t = 0; t < 4; ++t) {
    const auto [count, rows, cols] = shapes[t];
    const int limit = limits[t];
    for (int i = 0; i < count * rows * cols; ++i) {
      const int scale = 1 + limit * (1 + i % cols % 7) / 8;  // columns of unlike size
      const bool repeats = i >= 2 * cols && i / cols % 5 == 0;
      values.push_back(repeats ? values[values.size() - 2 * cols] : static_cast<uint8_t>(random.around_zero(scale)));
    }
    tensors.push_back({{count, rows, cols}, -limit, limit, 1});
  }
  for (const auto kind : {pgolf::Kind::mix, pgolf::Kind::fixed})
    for (const int states : {0, 4, 8})
      coded("integers " + std::to_string(static_cast<int>(kind)) + " " + std::to_string(states),
            {kind, true, states, tensors, {}}, values);
}

void code_floats() {
  Random random(2);
  std::vector<uint8_t> values;
  for (int i = 0; i < 4000; ++i) {  // of 4 and then of 2 bytes: a sign, a few exponents, and all bits of the fraction
    const bool wide = i < 1000;
    const uint32_t exponent = (wide ? 118u : 6u) + random.below(i % 4 ? 3 : 9);
    const uint32_t bits = random.below(2) << (wide ? 31 : 15) | exponent << (wide ? 23 : 10) |
                          random.below(wide ? 1 << 23 : 1 << 10);
    for (int byte = 0; byte < (wide ? 4 : 2); ++byte) values.push_back(bits >> 8 * byte & 255);
  }
  pgolf::Blob blob{pgolf::Kind::floats, true, 0, {{{20, 50}, 0, 0, 4}, {{3000}, 0, 0, 2}}, {}};
  coded("floats", blob, values);
}

void pack() {
  Random random(3);
  std::vector<uint8_t> values(1003);
  for (uint8_t& value : values) value = static_cast<uint8_t>(random.next());
  for (int bits = 1; bits <= 8; ++bits) {
    tell_at_every_level("bits " + std::to_string(bits), [&] {
      std::vector<uint8_t> all;
      for (const int64_t count : {1, 7, 8, 63, 500, 1003}) {
        std::vector<uint8_t> packed(pgolf::packed_size(count, bits)), back(count);
        all.push_back(pgolf::pack_bits(values.data(), packed.data(), count, bits, false, 2));
        all.insert(all.end(), packed.begin(), packed.end());
        for (const bool is_signed : {false, true}) {
          pgolf::unpack_bits(packed.data(), back.data(), count, bits, is_signed, 2);
          all.insert(all.end(), back.begin(), back.end());
        }
      }
      return hash_of(all);
    });
  }
}

// Within 2 units in the last place of the library's, which itself may be wrong by 1.
void require_close(const char* name, double x, double found, double expected) {
  const double unit = std::nextafter(std::fabs(expected), INFINITY) - std::fabs(expected);
  if (std::fabs(found - expected) > 2 * unit) fail(std::string(name) + " is wrong at " + std::to_string(x));
}

void exp_and_log() {
  Random random(6);
  std::vector<double> all;
  for (int i = 0; i < 20000; ++i) {
    const double x = -static_cast<double>(random.below(700 << 20)) / (1 << (i % 2 ? 20 : 26));  // to -700 and -11
    const double p = static_cast<double>(random.below(1 << 30) + 1) / (1 << 30);
    const double small = p * pgolf::power_of_two(-random.below(1022)), one = 1 - p / (1 << 10);
    all.push_back(pgolf::exp_of(x));
    require_close("exp", x, all.back(), std::exp(x));
    for (const double y : {p, small, one}) {
      all.push_back(pgolf::log_of(y));
      require_close("log", y, all.back(), std::log(y));
    }
  }
  if (pgolf::exp_of(0) != 1 || pgolf::log_of(1) != 0 || pgolf::log_of(0) != -INFINITY) fail("exp or log is not exact");
  tell("exp and log", hash_of(all));
}

void count_ngrams() {
  constexpr int vocabulary = 300, count = 20000;
  Random random(4);
  std::vector<uint16_t> tokens(count);
  std::vector<double> base(count), whole(vocabulary), out(count);
  for (int i = 0; i < count; ++i) {
    const bool repeats = i > 500 && i / 40 % 3;
    tokens[i] = repeats ? tokens[i - 200 - i / 40 % 7] : static_cast<uint16_t>(random.below(random.below(vocabulary) + 1));
    base[i] = -static_cast<double>(random.below(1 << 20)) / (1 << 16);  // 0 to -16
  }
  for (int i = 0; i < vocabulary; ++i) whole[i] = (i + 1) / 65536.0;
  for (const bool reset : {false, true}) {
    for (const int mixing : {0, 1, 2}) {
      const std::string name = "n-grams " + std::to_string(mixing) + (reset ? " reset" : "");
      pgolf::NgramCache cache({vocabulary, 6, reset ? 0 : -1, reset, 1 << 22},
                              {static_cast<pgolf::Mixing>(mixing), 0x7e, 1.5, 0.5});
      cache.score(tokens.data(), base.data(), out.data(), count);
      tell(name + " scores", hash_of(out));
      tell(name + " state", hash_of(cache.save()));
      cache.distribution(whole.data(), out.data());
      tell(name + " distribution", hash_of(std::vector<double>(out.begin(), out.begin() + vocabulary)));
    }
    pgolf::HintCache cache({vocabulary, 4, reset ? 0 : -1, reset, 1 << 20}, 0.75);
    std::vector<uint16_t> hints(count);
    std::vector<uint8_t> gates(count);
    cache.hints(tokens.data(), hints.data(), gates.data(), count);
    tell(std::string("hints") + (reset ? " reset" : ""), hash_of(hints) ^ hash_of(gates) ^ hash_of(cache.save()));
  }
}

void search_trellises() {
  constexpr int rows = 37, columns = 75, limit = 15;
  Random random(5);
  std::vector<float> target(rows * columns), factor(columns * columns), rate(2 * (2 * limit + 1)), weight(rows);
  for (float& value : target) value = static_cast<float>(random.around_zero(1 << 12)) / 128;
  for (int i = 0; i < columns; ++i)
    for (int j = i; j < columns; ++j)
      factor[i * columns + j] = i == j ? 1 + random.below(100) / 64.0f : random.around_zero(512) / 1024.0f;
  for (size_t k = 0; k < rate.size(); ++k) rate[k] = 1 + std::abs(static_cast<int>(k) % (2 * limit + 1) - limit) / 4.0f;
  for (float& value : weight) value = random.below(1000) / 8192.0f;
  std::vector<int8_t> classes(columns);
  for (int8_t& value : classes) value = static_cast<int8_t>(random.below(4));
  for (const int states : {4, 8}) {
    tell_at_every_level("trellis " + std::to_string(states), [&] {
      std::vector<int8_t> indices(rows * columns);
      std::vector<float> out(rows * columns);
      pgolf::trellis_search({target.data(), factor.data(), rate.data(), weight.data(), indices.data(), rows, columns, limit},
                            states, 2);
      pgolf::trellis_dequantize({1, rows, columns, classes.data()}, indices.data(), weight.data(), out.data(), states, 2);
      return hash_of(indices) ^ hash_of(out);
    });
  }
}

}  // namespace

int main() {
  code_integers();
  code_floats();
  pack();
  exp_and_log();
  count_ngrams();
  search_trellises();
}
