// What the fuzz targets share. A target defines read(), which harness.cpp calls; see tests/native_drivers.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace fuzz {

// What one input must do: be refused (false), or be taken and have the properties that the target checks (true).
bool read(const uint8_t* data, size_t size);

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::abort();
}

// The largest single allocation since the last call.
size_t largest_allocation();

inline void check_allocations(size_t most, const char* where) {
  const size_t largest = largest_allocation();
  if (largest > most)
    fail("too much memory: " + std::string(where) + " allocates " + std::to_string(largest) + " bytes, at most " +
         std::to_string(most) + " are in proportion");
}

// An input, taken from its front; zeros where it has ended.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <class Value = uint8_t>
  Value take() {
    Value value{};
    const size_t size = std::min(left_, sizeof value);
    if (size) std::memcpy(&value, data_, size);
    data_ += size;
    left_ -= size;
    return value;
  }
  // From `least` to `most`.
  int number(int least, int most) { return least + take<uint16_t>() % (most - least + 1); }
  // Of exactly this size on the heap, so that the sanitizer sees a byte too far.
  template <class Value>
  std::vector<Value> array(size_t count) {
    std::vector<Value> values(count);
    for (Value& each : values) each = take<Value>();
    return values;
  }
  std::vector<uint8_t> rest() { return array<uint8_t>(left_); }
  size_t left() const { return left_; }

 private:
  const uint8_t* data_;
  size_t left_;
};

}  // namespace fuzz
