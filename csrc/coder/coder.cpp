#include "coder/coder.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>

#include "coder/float_coder.h"
#include "coder/int_coder.h"
#include "coder/int_layout.h"
#include "coder/range_coder.h"
#include "trellis/parity_machine.h"

namespace pgolf {
namespace {

constexpr uint8_t version = 1, list_flag = 0x80;
constexpr size_t most_int_dims = 3, most_float_dims = 8;

// What can be said of a payload's length beforehand, so that nobody can ask for hours of decoding with a few bytes. The
// coders of bits (range_coder.h) fill up with zeros themselves, static's words are filled up here.
size_t shortest_payload(Kind kind, int64_t bytes) {
  constexpr int64_t free_values = 65536, most_values_a_byte = 64;
  if (kind == Kind::mix) return fewest_bytes(bytes, free_bits);
  if (kind == Kind::floats) return fewest_bytes(8 * bytes, free_float_bits);
  return static_cast<size_t>(std::max<int64_t>(bytes - free_values, 0) / most_values_a_byte);
}

std::vector<IntTensor> int_tensors(const Blob& blob) {
  std::vector<IntTensor> tensors;
  for (const CodedTensor& each : blob.tensors) {
    int64_t size[most_int_dims] = {1, 1, 1};
    std::copy_backward(each.shape.begin(), each.shape.end(), size + most_int_dims);
    tensors.push_back({size[0], size[1], size[2], each.low, each.high});
  }
  return tensors;
}

std::vector<FloatRun> float_runs(const Blob& blob, uint8_t* values) {
  std::vector<FloatRun> runs;
  for (const CodedTensor& each : blob.tensors) {
    const int64_t cols = each.shape.empty() ? 1 : each.shape.back();
    runs.push_back({values, each.values(), each.bytes, cols});
    values += each.values() * each.bytes;
  }
  return runs;
}

// Calls work(i) for each i below `count`; whether all of them returned true.
template <class Work>
bool in_threads(size_t count, int threads, Work work) {
  std::atomic<size_t> next{0};
  std::atomic<bool> right{true}, no_memory{false};
  auto loop = [&] {
    for (size_t i; (i = next++) < count;) {
      try {
        if (!work(i)) right = false;
      } catch (const std::bad_alloc&) {
        no_memory = true;
      }
    }
  };
  std::vector<std::thread> pool;
  const size_t most = std::min(count, static_cast<size_t>(std::max(threads, 1)));
  pool.reserve(most);
  try {
    while (pool.size() + 1 < most) pool.emplace_back(loop);
  } catch (const std::exception&) {  // no more threads, or no memory for one
  }
  loop();
  for (std::thread& each : pool) each.join();
  if (no_memory) throw std::bad_alloc();
  return right;
}

void write_number(std::vector<uint8_t>& out, uint64_t number) {
  for (; number >= 128; number >>= 7) out.push_back(static_cast<uint8_t>(number | 128));
  out.push_back(static_cast<uint8_t>(number));
}

std::vector<uint8_t> assemble(const Blob& blob, std::vector<std::vector<uint8_t>> payloads) {
  const auto kind = static_cast<uint8_t>(static_cast<int>(blob.kind) | (blob.is_list ? list_flag : 0));
  std::vector<uint8_t> out = {version, kind, static_cast<uint8_t>(blob.trellis_states)};
  write_number(out, blob.tensors.size());
  for (const CodedTensor& each : blob.tensors) {
    out.push_back(static_cast<uint8_t>(each.shape.size()));
    for (int64_t size : each.shape) write_number(out, static_cast<uint64_t>(size));
    if (blob.kind == Kind::floats) {
      out.push_back(static_cast<uint8_t>(each.bytes));
    } else {
      out.push_back(static_cast<uint8_t>(each.low));
      out.push_back(static_cast<uint8_t>(each.high));
    }
  }
  for (const auto& payload : payloads) write_number(out, payload.size());
  for (const auto& payload : payloads) out.insert(out.end(), payload.begin(), payload.end());
  return out;
}

class HeaderReader {
 public:
  HeaderReader(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}
  uint8_t byte() {
    if (next_ != end_) return *next_++;
    failed_ = true;
    return 0;
  }
  // At most 35 bits.
  int64_t number() {
    uint64_t value = 0;
    for (int shift = 0; shift < 35; shift += 7) {
      const uint8_t part = byte();
      value |= static_cast<uint64_t>(part & 127) << shift;
      if (part < 128) return static_cast<int64_t>(value);
    }
    failed_ = true;
    return 0;
  }
  bool failed() const { return failed_; }
  size_t left() const { return static_cast<size_t>(end_ - next_); }
  const uint8_t* take(size_t size) {
    next_ += size;
    return next_ - size;
  }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  bool failed_ = false;
};

const char* read_tensor(HeaderReader& reader, const Blob& blob, CodedTensor& tensor) {
  const bool floats = blob.kind == Kind::floats;
  const size_t dims = reader.byte();
  if (dims > (floats ? most_float_dims : most_int_dims)) return "has a tensor with too many dimensions";
  int64_t product = 1;
  bool is_empty = false;
  for (size_t i = 0; i < dims; ++i) {
    const int64_t size = reader.number();
    tensor.shape.push_back(size);
    is_empty = is_empty || size == 0;
    if (size > most_bytes || (size > 0 && product > most_bytes / size)) return "has a tensor with too many values";
    product *= std::max<int64_t>(size, 1);
  }
  if (floats) {
    tensor.bytes = reader.byte();
    if (tensor.bytes != 2 && tensor.bytes != 4) return "has floats of an unknown size";
  } else {
    tensor.low = static_cast<int8_t>(reader.byte());
    tensor.high = static_cast<int8_t>(reader.byte());
    if (tensor.low > tensor.high || (is_empty && (tensor.low || tensor.high))) return "has a tensor with wrong bounds";
    if (blob.trellis_states && dims > 0 && tensor.shape.back() > most_plane_columns)
      return "has rows too long for a trellis";
  }
  return reader.failed() ? "ends within its header" : nullptr;
}

}  // namespace

int64_t CodedTensor::values() const {
  int64_t product = 1;
  for (int64_t size : shape) product *= size;
  return product;
}

int64_t Blob::bytes() const {
  int64_t total = 0;
  for (const CodedTensor& each : tensors) total += each.values() * each.bytes;
  return total;
}

std::vector<uint8_t> encode_ints(const Blob& what, const int8_t* values, int threads) {
  const auto strips = strips_of(int_tensors(what), const_cast<int8_t*>(values));  // encoders write what was there
  std::vector<std::vector<uint8_t>> payloads(strips.size());
  in_threads(strips.size(), threads, [&](size_t i) {
    if (what.kind == Kind::mix) {
      payloads[i] = encode_mix(strips[i], what.trellis_states);
    } else {
      payloads[i] = encode_static(strips[i], what.trellis_states);
      payloads[i].resize(std::max(payloads[i].size(), shortest_payload(what.kind, values_of(strips[i]))));
    }
    return true;
  });
  return assemble(what, payloads);
}

std::vector<uint8_t> encode_floats(const Blob& what, const uint8_t* values) {
  if (what.bytes() == 0) return assemble(what, {});
  return assemble(what, {encode_float_runs(float_runs(what, const_cast<uint8_t*>(values)))});
}

const char* read_blob(const uint8_t* data, size_t size, Blob& blob) {
  HeaderReader reader(data, size);
  if (reader.byte() != version) return "is not of version 1";
  const uint8_t kind = reader.byte();
  blob.is_list = kind & list_flag;
  blob.kind = static_cast<Kind>(kind & ~list_flag);
  blob.trellis_states = reader.byte();
  const int64_t count = reader.number();
  if (reader.failed()) return "ends within its header";
  if ((kind & ~list_flag) > static_cast<int>(Kind::floats)) return "is of an unknown kind";
  const int states = blob.trellis_states;
  if (states != 0 && (blob.kind == Kind::floats || !is_trellis(states))) return "has an unknown trellis";
  if (count > most_tensors || (!blob.is_list && count != 1)) return "has too many or too few tensors";
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    blob.tensors.emplace_back();
    if (const char* problem = read_tensor(reader, blob, blob.tensors.back())) return problem;
    total += blob.tensors.back().values() * blob.tensors.back().bytes;
    if (total > most_bytes) return "has too many values";
  }
  std::vector<int64_t> bytes;
  if (blob.kind == Kind::floats)
    bytes.assign(total > 0, total);
  else
    for (const auto& strip : strips_of(int_tensors(blob), nullptr)) bytes.push_back(values_of(strip));
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < bytes.size(); ++i) {
    sizes.push_back(reader.number());
    if (reader.failed()) return "ends within its header";
    if (static_cast<size_t>(sizes[i]) < shortest_payload(blob.kind, bytes[i])) return "is too short for its values";
  }
  for (int64_t each : sizes) {
    if (static_cast<size_t>(each) > reader.left()) return "is shorter than it says";
    blob.payloads.emplace_back(reader.take(static_cast<size_t>(each)), static_cast<size_t>(each));
  }
  return reader.left() ? "is longer than it says" : nullptr;
}

const char* decode_blob(const Blob& blob, uint8_t* values, int threads) {
  bool right = true;
  if (blob.kind == Kind::floats) {
    if (!blob.payloads.empty())
      right = decode_float_runs(blob.payloads[0].first, blob.payloads[0].second, float_runs(blob, values));
  } else {
    auto* integers = reinterpret_cast<int8_t*>(values);
    const auto strips = strips_of(int_tensors(blob), integers);
    for (const CodedTensor& each : blob.tensors) {
      if (each.low == each.high) std::fill_n(integers, each.values(), static_cast<int8_t>(each.low));
      integers += each.values();
    }
    right = in_threads(strips.size(), threads, [&](size_t i) {
      const auto [payload, size] = blob.payloads[i];
      return blob.kind == Kind::mix ? decode_mix(payload, size, strips[i], blob.trellis_states)
                                    : decode_static(payload, size, strips[i], blob.trellis_states);
    });
  }
  return right ? nullptr : "has a damaged payload";
}

}  // namespace pgolf
