// Coded blobs. The first byte tells what the input is: 0 a blob; 1 a payload, given the right head; 2 values to encode.
#include "coder/coder.h"

#include "coder/int_layout.h"
#include "target.h"

namespace {

using Bytes = std::vector<uint8_t>;

constexpr int64_t most_decoded = 1 << 17, most_encoded = 1 << 11;  // bytes, for the fuzzer's time
constexpr size_t model_bytes = 2 << 20;                            // what a coder takes for itself

// Whether the planes are the values in their order, none outside and none twice, and `previous` is the plane before.
void check_layout(const pgolf::Blob& blob) {
  std::vector<pgolf::IntTensor> tensors;
  for (const pgolf::CodedTensor& each : blob.tensors) {
    int64_t size[3] = {1, 1, 1};
    std::copy_backward(each.shape.begin(), each.shape.end(), size + 3);
    tensors.push_back({size[0], size[1], size[2], each.low, each.high});
  }
  int8_t* const begin = reinterpret_cast<int8_t*>(uintptr_t{1} << 40);  // never read
  std::vector<int8_t*> starts;
  int8_t* at = begin;
  for (const pgolf::IntTensor& each : tensors) {
    starts.push_back(at);
    at += each.values();
  }
  size_t tensor = 0;
  int64_t done = 0;  // values of the tensor
  const auto skip = [&] {
    while (tensor < tensors.size() &&
           (done == tensors[tensor].values() || tensors[tensor].low == tensors[tensor].high)) {
      ++tensor;
      done = 0;
    }
  };
  for (const auto& strip : pgolf::strips_of(tensors, begin)) {
    if (strip.empty()) fuzz::fail("a strip without planes");
    for (const pgolf::Plane* plane = strip.data(); plane != strip.data() + strip.size(); ++plane) {
      skip();
      if (tensor == tensors.size()) fuzz::fail("a plane beyond the last tensor");
      const bool right = plane->tensor == static_cast<int>(tensor) && plane->values == starts[tensor] + done &&
                         plane->count > 0 && done + plane->count <= tensors[tensor].values() && plane->cols > 0 &&
                         plane->cols <= pgolf::most_plane_columns && plane->low < plane->high;
      if (!right) fuzz::fail("a plane is not where the one before ends");
      if (plane->previous && (plane == strip.data() || plane[-1].tensor != plane->tensor ||
                              plane[-1].values != plane->previous || plane[-1].count != plane->count))
        fuzz::fail("a plane's previous one is another");
      done += plane->count;
    }
  }
  skip();
  if (tensor != tensors.size()) fuzz::fail("values without a plane");
  for (const auto& strip : pgolf::strips_of(tensors, nullptr))
    for (const pgolf::Plane& plane : strip)
      if (plane.values || plane.previous) fuzz::fail("a plane of no values has an address");
}

bool is_within_bounds(const pgolf::Blob& blob, const Bytes& values) {
  const auto* next = reinterpret_cast<const int8_t*>(values.data());
  for (const pgolf::CodedTensor& each : blob.tensors) {
    const auto* end = next + each.values();
    for (; next != end; ++next)
      if (*next < each.low || *next > each.high) return false;
  }
  return true;
}

Bytes decode(const Bytes& coded, const char* what) {
  pgolf::Blob blob;
  if (const char* problem = pgolf::read_blob(coded.data(), coded.size(), blob))
    fuzz::fail(std::string(what) + " " + problem);
  Bytes values(static_cast<size_t>(blob.bytes()));
  if (const char* problem = pgolf::decode_blob(blob, values.data(), 1)) fuzz::fail(std::string(what) + " " + problem);
  return values;
}

Bytes encode(const pgolf::Blob& blob, const Bytes& values, int threads) {
  if (blob.kind == pgolf::Kind::floats) return pgolf::encode_floats(blob, values.data());
  return pgolf::encode_ints(blob, reinterpret_cast<const int8_t*>(values.data()), threads);
}

bool read_blob(const uint8_t* data, size_t size) {
  pgolf::Blob blob;
  fuzz::largest_allocation();
  const char* problem = pgolf::read_blob(data, size, blob);
  const int64_t declared = problem ? pgolf::most_bytes / 16 : blob.bytes();
  fuzz::check_allocations(static_cast<size_t>(2 * declared) + model_bytes, "read_blob");
  if (problem) return false;
  if (blob.kind != pgolf::Kind::floats) check_layout(blob);
  if (declared > most_decoded) return true;
  Bytes values(static_cast<size_t>(declared));
  fuzz::largest_allocation();
  problem = pgolf::decode_blob(blob, values.data(), 1);
  fuzz::check_allocations(2 * values.size() + model_bytes, "decode_blob");
  if (!problem && blob.kind != pgolf::Kind::floats && !is_within_bounds(blob, values))
    fuzz::fail("a blob has values beyond its bounds");
  if (declared > most_encoded) return !problem;
  Bytes again(values.size(), 255);
  if (!problem != !pgolf::decode_blob(blob, again.data(), 2)) fuzz::fail("a blob is refused or not as it comes");
  if (problem) return false;
  if (values != again) fuzz::fail("a blob has two meanings");
  if (decode(encode(blob, values, 1), "encoded again, a blob") != values)
    fuzz::fail("encoded again, a blob has another meaning");
  return true;
}

void put_number(Bytes& out, size_t number) {
  for (; number >= 128; number >>= 7) out.push_back(static_cast<uint8_t>(number | 128));
  out.push_back(static_cast<uint8_t>(number));
}

bool read_payload(fuzz::Input input) {
  const int kind = input.number(0, 2), states = kind == 2 ? 0 : input.number(0, 2) * 4;
  Bytes blob = {1, static_cast<uint8_t>(kind), static_cast<uint8_t>(states), 1, 3};
  const int count = input.number(1, 4), rows = input.number(1, 80), cols = input.number(1, 200);
  for (const int size : {count, rows, cols}) put_number(blob, static_cast<size_t>(size));
  if (kind == 2) {
    blob.push_back(input.take() & 1 ? 2 : 4);
  } else {
    blob.push_back(input.take());
    blob.push_back(input.take());
  }
  const Bytes payload = input.rest();
  put_number(blob, payload.size());
  blob.insert(blob.end(), payload.begin(), payload.end());
  blob.shrink_to_fit();
  return read_blob(blob.data(), blob.size());
}

bool encode_values(fuzz::Input input) {
  pgolf::Blob blob;
  const int kind = input.number(0, 2), tensors = input.number(0, 4);
  blob.kind = static_cast<pgolf::Kind>(kind);
  blob.trellis_states = kind == 2 ? 0 : input.number(0, 2) * 4;
  blob.is_list = tensors != 1;
  for (int i = 0; i < tensors; ++i) {
    pgolf::CodedTensor tensor;
    for (int dims = input.number(0, 3); dims > 0; --dims) tensor.shape.push_back(input.number(0, dims > 2 ? 4 : 64));
    if (kind == 2) tensor.bytes = input.take() & 1 ? 2 : 4;
    blob.tensors.push_back(tensor);
  }
  if (blob.bytes() > most_encoded) return false;
  // What there is, over and over, so that rows resemble each other.
  const Bytes given = input.rest();
  Bytes values(static_cast<size_t>(blob.bytes()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = given.empty() ? 0 : given[i % given.size()];
  if (kind != 2) {
    auto* from = reinterpret_cast<const int8_t*>(values.data());
    for (pgolf::CodedTensor& each : blob.tensors) {
      const auto* end = from + each.values();
      if (from != end) each.low = *std::min_element(from, end), each.high = *std::max_element(from, end);
      from = end;
    }
  }
  const Bytes coded = encode(blob, values, 1);
  if (coded != encode(blob, values, 2)) fuzz::fail("the bytes depend on the threads");
  if (decode(coded, "what was encoded") != values) fuzz::fail("values are not decoded as they were encoded");
  return true;
}

}  // namespace

bool fuzz::read(const uint8_t* data, size_t size) {
  if (!size) return false;
  if (data[0] % 3 == 0) return read_blob(data + 1, size - 1);
  Input input(data + 1, size - 1);
  return data[0] % 3 == 1 ? read_payload(input) : encode_values(input);
}
