// Plain values in a row of bytes and back, with a checksum at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace pgolf {

inline uint64_t checksum(const uint8_t* data, size_t size) {
  uint64_t sum = 0xcbf29ce484222325ULL;  // FNV-1a, eight bytes at a time
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    sum = (sum ^ word) * 0x100000001b3ULL;
    sum ^= sum >> 32;
  }
  for (; size; ++data, --size) sum = (sum ^ *data) * 0x100000001b3ULL;
  return sum;
}

class ByteWriter {
 public:
  template <class Value>
  void put(const Value* values, size_t count) {
    static_assert(std::is_trivially_copyable<Value>::value);
    const auto* bytes = reinterpret_cast<const uint8_t*>(values);
    bytes_.insert(bytes_.end(), bytes, bytes + count * sizeof(Value));
  }
  template <class Value>
  void put(const Value& value) {
    put(&value, 1);
  }
  std::vector<uint8_t> finish() {
    put(checksum(bytes_.data(), bytes_.size()));
    return std::move(bytes_);
  }

 private:
  std::vector<uint8_t> bytes_;
};

// Reads past the end give zeros and make good() false.
class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t size) : data_(data), left_(size) {
    uint64_t sum = 0;
    good_ = size >= sizeof sum;
    if (!good_) return;
    left_ -= sizeof sum;
    std::memcpy(&sum, data + left_, sizeof sum);
    good_ = sum == checksum(data, left_);
  }
  template <class Value>
  void get(Value* values, size_t count) {
    const size_t bytes = count * sizeof(Value);
    good_ = good_ && bytes <= left_;
    if (!good_) {
      std::memset(static_cast<void*>(values), 0, bytes);
      return;
    }
    std::memcpy(static_cast<void*>(values), data_, bytes);
    data_ += bytes;
    left_ -= bytes;
  }
  template <class Value>
  void get(Value& value) {
    get(&value, 1);
  }
  bool good() const { return good_; }
  bool done() const { return good_ && left_ == 0; }

 private:
  const uint8_t* data_;
  size_t left_;
  bool good_;
};

}  // namespace pgolf
