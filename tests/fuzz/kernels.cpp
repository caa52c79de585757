// The kernels that turn stored numbers into weights and back, at every level of this CPU: packed bits, trellis indices,
// and the quantisers, whose weights may be anybody's. The first byte tells which.
#include <cmath>
#include <numeric>

#include "base/cpu_features.h"
#include "gptq/gptq.h"
#include "gptq/gptq_refine.h"
#include "pack/pack_bits.h"
#include "target.h"
#include "trellis/trellis.h"

namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;
using Indices = std::vector<int8_t>;

// Calls work() at every level; each must give what the first that is `comparable` gave.
template <class Work>
auto at_every_level(const char* what, const std::string& first, Work work) {
  decltype(work()) expected{};
  bool compares = false;
  for (const std::string& level : pgolf::levels()) {
    pgolf::set_level(level);
    const auto found = work();
    if (compares && found != expected) fuzz::fail(std::string(what) + " differs at level " + level);
    compares = compares || level == first;
    if (!compares || level == first) expected = found;
  }
  return expected;
}

bool unpack(fuzz::Input input) {
  const int bits = input.number(1, 8), spare = input.number(0, 7);
  const bool is_signed = input.take() & 1;
  const Bytes given = input.rest();
  const int64_t count = std::max<int64_t>(static_cast<int64_t>(given.size()) * 8 / bits - spare, 0);
  const Bytes stream(given.begin(), given.begin() + pgolf::packed_size(count, bits));
  Bytes expected(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    unsigned value = 0;
    for (int bit = 0; bit < bits; ++bit)
      value |= (stream[(i * bits + bit) / 8] >> (i * bits + bit) % 8 & 1u) << bit;
    if (is_signed && value >> (bits - 1)) value |= 0xffu << bits;
    expected[i] = static_cast<uint8_t>(value);
  }
  Bytes cleared = stream;  // the bits that pad the last byte
  if (count * bits % 8) cleared.back() &= static_cast<uint8_t>((1u << count * bits % 8) - 1);
  at_every_level("unpacking", "portable", [&] {
    Bytes values(expected.size()), packed(stream.size());
    pgolf::unpack_bits(stream.data(), values.data(), count, bits, is_signed, 2);
    if (values != expected) fuzz::fail("values are not those of the stream");
    if (!pgolf::pack_bits(values.data(), packed.data(), count, bits, is_signed, 2))
      fuzz::fail("a value that was unpacked does not fit");
    if (packed != cleared) fuzz::fail("packed again, a stream is another");
    return true;
  });
  bool fits = true;
  for (const uint8_t each : given) {
    const int value = is_signed ? static_cast<int8_t>(each) : each, half = is_signed ? 1 << (bits - 1) : 0;
    fits = fits && value >= -half && value < (1 << bits) - half;
  }
  const bool found = at_every_level("whether values fit", "portable", [&] {
    Bytes packed(static_cast<size_t>(pgolf::packed_size(static_cast<int64_t>(given.size()), bits)));
    return pgolf::pack_bits(given.data(), packed.data(), static_cast<int64_t>(given.size()), bits, is_signed, 1);
  });
  if (found != fits) fuzz::fail("values that do not fit are packed, or the other way round");
  return true;
}

bool dequantize(fuzz::Input input) {
  const int matrices = input.number(0, 3), rows = input.number(0, 12), columns = input.number(0, 70);
  const int states = input.take() & 1 ? 8 : 4;
  const auto classes = input.array<int8_t>(static_cast<size_t>(matrices * columns));
  const auto scale = input.array<float>(static_cast<size_t>(matrices * rows));
  const auto indices = input.array<int8_t>(static_cast<size_t>(matrices * rows * columns));
  Floats weights(indices.size()), again(indices.size(), 1.0f), expected(indices.size());
  const pgolf::TrellisBank bank = {matrices, rows, columns, classes.data()};
  const pgolf::Machine& machine = pgolf::machine(states);
  for (int row = 0; row < matrices * rows; ++row) {
    std::vector<int> order(static_cast<size_t>(columns));
    std::iota(order.begin(), order.end(), 0);
    const int8_t* its = classes.data() + row / rows * columns;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return (its[a] & 3) < (its[b] & 3); });
    int state = 0;
    for (const int column : order) {
      const int index = indices[row * columns + column], level = pgolf::level_of(index, machine.quantiser[state]);
      expected[row * columns + column] = static_cast<float>(level) * scale[row];
      state = machine.next[state][index & 1];
    }
  }
  pgolf::trellis_dequantize(bank, indices.data(), scale.data(), weights.data(), states, 1);
  pgolf::trellis_dequantize(bank, indices.data(), scale.data(), again.data(), states, 3);
  for (const Floats* found : {&weights, &again})
    for (size_t i = 0; i < expected.size(); ++i)
      if ((*found)[i] != expected[i] && !(std::isnan((*found)[i]) && std::isnan(expected[i])))
        fuzz::fail("a weight is " + std::to_string((*found)[i]) + ", not " + std::to_string(expected[i]));
  return true;
}

void check_limit(const Indices& values, int limit, const char* what) {
  for (const int8_t each : values)
    if (each < -limit || each > limit) fuzz::fail(std::string(what) + " gave " + std::to_string(each));
}

bool quantize(fuzz::Input input) {
  const int columns = input.number(1, 70), rows = input.number(0, 40), limit = input.number(1, 127);
  const int states = input.take() & 1 ? 8 : 4, samples = input.number(0, 4);
  // Numbers as they come, NaN and infinity among them; or tame ones, which get further.
  const bool tame = input.take() & 1;
  const auto floats = [&](int count) {
    Floats found(static_cast<size_t>(count));
    for (float& each : found) each = tame ? input.take<int8_t>() / 64.0f : input.take<float>();
    return found;
  };
  const Floats weight = floats(rows * columns), x = floats(samples * columns);
  Floats hessian(static_cast<size_t>(columns * columns)), diagonal(static_cast<size_t>(columns));
  for (int i = 0; i < columns; ++i)
    for (int j = 0; j < columns; ++j) {
      float& sum = hessian[i * columns + j];
      for (int s = 0; s < samples; ++s) sum += x[s * columns + i] * x[s * columns + j];
      if (i == j) diagonal[i] = sum + (tame ? 0.25f : 0.0f);
    }
  Floats scale = floats(rows);
  if (tame)
    for (float& each : scale) each = std::max(std::fabs(each), 1 / 64.0f);
  std::vector<int64_t> order(static_cast<size_t>(columns));
  std::iota(order.begin(), order.end(), 0);
  std::rotate(order.begin(), order.begin() + input.number(0, columns - 1), order.end());

  const pgolf::Hessians bank = {hessian.data(), 1, columns};
  at_every_level("what is wrong with a Hessian", "portable", [&] {
    uint8_t flaws = 0;
    pgolf::check_hessians(bank, 1e-3f, &flaws, 1);
    return flaws;
  });
  at_every_level("GPTQ", "avx2", [&] {
    Floats factor(static_cast<size_t>(pgolf::factor_size(columns)));
    const int64_t which = 0;
    uint8_t failed = 0;
    pgolf::factor_hessians(bank, order.data(), diagonal.data(), &which, 1, factor.data(), &failed, 2);
    Indices values(weight.size());
    if (failed) return values;
    const float *from = weight.data(), *factors = factor.data(), *steps = scale.data();
    pgolf::round_columns({from, order.data(), factors, steps, values.data(), 1, rows, columns, limit}, 2);
    check_limit(values, limit, "GPTQ");
    Floats fitted = scale;
    pgolf::refine({weight.data(), hessian.data(), values.data(), fitted.data(), 1, rows, columns, limit, 3, 2}, 2);
    check_limit(values, limit, "refining");
    return values;
  });
  const Floats rate = floats(2 * (2 * limit + 1)), price = floats(rows);
  at_every_level("the search", "portable", [&] {
    Indices indices(weight.size());
    const float *target = weight.data(), *bits = rate.data(), *prices = price.data();
    pgolf::trellis_search({target, hessian.data(), bits, prices, indices.data(), rows, columns, limit}, states, 2);
    check_limit(indices, limit, "the search");
    return indices;
  });
  return true;
}

}  // namespace

bool fuzz::read(const uint8_t* data, size_t size) {
  if (!size) return false;
  const Input input(data + 1, size - 1);
  return data[0] % 3 == 0 ? unpack(input) : data[0] % 3 == 1 ? dequantize(input) : quantize(input);
}
