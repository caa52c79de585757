// The Python face of csrc/ngram/ngram_cache.h, apart from bindings.cpp for its length.
#include "ngram/ngram_bindings.h"

#include <pybind11/stl.h>

#include <mutex>
#include <optional>

#include "ngram/ngram_cache.h"

namespace py = pybind11;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

void require(bool right, const char* name, int64_t value, const char* accepted) {
  if (!right) throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", accepted is " + accepted);
}

template <class Value>
Value* pointer(uintptr_t address, const char* name, int64_t count) {
  require(count >= 0, "count", count, "0 or more");
  require(address != 0 || count == 0, name, 0, "an address, or 0 with a count of 0");
  return reinterpret_cast<Value*>(address);
}

pgolf::CountsConfig counts_config(int64_t vocab_size, int64_t longest, int64_t boundary, bool reset,
                                  int64_t memory_bytes, size_t least_bytes) {
  require(vocab_size >= 1 && vocab_size <= 1 << 16, "vocab_size", vocab_size, "1 to 65536");
  require(longest >= 1 && longest <= pgolf::most_context, "longest", longest, "1 to 15");
  require(boundary >= -1 && boundary < vocab_size, "boundary", boundary, "-1 or a token");
  require(!reset || boundary >= 0, "boundary", boundary, "a token where it resets");
  const bool enough = memory_bytes >= static_cast<int64_t>(least_bytes) && memory_bytes <= int64_t{1} << 36;
  require(enough, "memory_bytes", memory_bytes, (std::to_string(least_bytes) + " to 68719476736").c_str());
  return {static_cast<int>(vocab_size), static_cast<int>(longest), static_cast<int>(boundary), reset,
          static_cast<size_t>(memory_bytes)};
}

// Threads of Python take turns: the calls release the interpreter's lock.
template <class Cache>
class Guarded {
 public:
  template <class... Arguments>
  explicit Guarded(Arguments... arguments) : cache_(arguments...) {}

  template <class Work>
  auto with(Work work) {
    std::lock_guard<std::mutex> lock(mutex_);
    return work(cache_);
  }

 private:
  std::mutex mutex_;
  Cache cache_;
};

using NgramCache = Guarded<pgolf::NgramCache>;
using HintCache = Guarded<pgolf::HintCache>;

std::unique_ptr<NgramCache> new_ngram_cache(int64_t vocab_size, const std::vector<int>& orders, int mixing,
                                            double concentration, double discount, int64_t boundary, bool reset,
                                            int64_t memory_bytes) {
  uint32_t lengths = 0;
  int longest = 0;
  for (int order : orders) {
    require(order >= 2 && order <= pgolf::most_context + 1, "order", order, "2 to 16");
    lengths |= 1u << (order - 1);
    longest = std::max(longest, order - 1);
  }
  require(mixing >= 0 && mixing <= 2, "mixing", mixing, "0 to 2");
  const pgolf::CountsConfig counts = counts_config(vocab_size, longest, boundary, reset, memory_bytes,
                                                   pgolf::NgramCounts::least_bytes(static_cast<int>(vocab_size)));
  return std::make_unique<NgramCache>(
      counts, pgolf::MixConfig{static_cast<pgolf::Mixing>(mixing), lengths, concentration, discount});
}

std::unique_ptr<HintCache> new_hint_cache(int64_t vocab_size, int64_t order, double threshold, int64_t boundary, bool reset,
                                          int64_t memory_bytes) {
  require(order >= 2 && order <= pgolf::most_context + 1, "order", order, "2 to 16");
  return std::make_unique<HintCache>(counts_config(vocab_size, order - 1, boundary, reset, memory_bytes,
                                                   pgolf::HintCounts::least_bytes()),
                                     threshold);
}

// The counts are found by token.
void check_tokens(const uint16_t* tokens, int64_t count, int vocab_size) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, tokens[i]);
  require(most < vocab_size, "token", most, "0 to vocab_size - 1");
}

template <class Cache>
void update(Cache& cache, uintptr_t tokens, int64_t count) {
  const auto* from = pointer<const uint16_t>(tokens, "tokens", count);
  cache.with([&](auto& inner) {
    check_tokens(from, count, inner.vocab_size());
    inner.update(from, count);
  });
}

void score(NgramCache& cache, uintptr_t tokens, uintptr_t base, uintptr_t out, int64_t count) {
  const auto* from = pointer<const uint16_t>(tokens, "tokens", count);
  const auto* base_logprob = pointer<const double>(base, "base", count);
  auto* logprob = pointer<double>(out, "out", count);
  cache.with([&](auto& inner) {
    check_tokens(from, count, inner.vocab_size());
    inner.score(from, base_logprob, logprob, count);
  });
}

void distribution(NgramCache& cache, uintptr_t base, uintptr_t out) {
  cache.with([&](auto& inner) {
    inner.distribution(pointer<const double>(base, "base", 1), pointer<double>(out, "out", 1));
  });
}

void hints(HintCache& cache, uintptr_t tokens, uintptr_t hints, uintptr_t gates, int64_t count) {
  const auto* from = pointer<const uint16_t>(tokens, "tokens", count);
  auto* found = pointer<uint16_t>(hints, "hints", count);
  auto* open = pointer<uint8_t>(gates, "gates", count);
  cache.with([&](auto& inner) {
    check_tokens(from, count, inner.vocab_size());
    inner.hints(from, found, open, count);
  });
}

std::optional<int> next_hint(HintCache& cache) {
  uint16_t hint;
  const bool open = cache.with([&](auto& inner) { return inner.look(hint); });
  return open ? std::optional<int>(hint) : std::nullopt;
}

template <class Cache>
py::bytes save(Cache& cache) {
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release unlocked;
    data = cache.with([](auto& inner) { return inner.save(); });
  }
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

template <class Cache>
bool load(Cache& cache, uintptr_t data, int64_t size) {
  const auto* from = pointer<const uint8_t>(data, "data", size);
  return cache.with([&](auto& inner) { return inner.load(from, static_cast<size_t>(size)); });
}

template <class Cache>
std::map<std::string, uint64_t> stats(Cache& cache) {
  const pgolf::CountsStats found = cache.with([](auto& inner) { return inner.stats(); });
  return {{"tokens", found.tokens},
          {"contexts", found.contexts},
          {"successors", found.successors},
          {"refused_contexts", found.refused_contexts},
          {"refused_successors", found.refused_successors},
          {"used_bytes", found.used_bytes}};
}

template <class Cache>
py::class_<Cache> bind_common(py::module_& module, const char* name) {
  using namespace py::literals;
  return py::class_<Cache>(module, name)
      .def("update", &update<Cache>, "tokens"_a, "count"_a, Unlocked(), "Counts uint16 tokens.")
      .def("stats", &stats<Cache>, Unlocked(), "What is kept and what found no place.")
      .def("save", &save<Cache>, "The whole state as bytes.")
      .def("load", &load<Cache>, "data"_a, "size"_a, Unlocked(), "False where the bytes are of no such cache.");
}

}  // namespace

void pgolf_bind_ngram(py::module_& module) {
  using namespace py::literals;
  bind_common<NgramCache>(module, "NgramCache")
      .def(py::init(&new_ngram_cache), "vocab_size"_a, "orders"_a, "mixing"_a, "concentration"_a, "discount"_a,
           "boundary"_a, "reset"_a, "memory_bytes"_a)
      .def("score", &score, "tokens"_a, "base"_a, "out"_a, "count"_a, Unlocked(),
           "float64 log-probabilities of uint16 tokens, given the base's; see csrc/ngram/ngram_cache.h.")
      .def("distribution", &distribution, "base"_a, "out"_a, Unlocked(), "The next token's, float64 [vocab_size].");
  bind_common<HintCache>(module, "HintCache")
      .def(py::init(&new_hint_cache), "vocab_size"_a, "order"_a, "threshold"_a, "boundary"_a, "reset"_a,
           "memory_bytes"_a)
      .def("hints", &hints, "tokens"_a, "hints"_a, "gates"_a, "count"_a, Unlocked(),
           "uint16 hints and uint8 gates of uint16 tokens; see csrc/ngram/ngram_cache.h.")
      .def("next_hint", &next_hint, Unlocked(), "The next token's hint, or None.");
}
