// Binary arithmetic coding: one bit and the 16-bit probability that it is 1, in and out of bytes.
//
// The range has 32 bits and stays at 2^24 or more, so that a probability is cut off by 1 in 256 of itself at worst. The
// encoder keeps bytes back for as long as a carry can still change them. Reading past the end yields zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf {

constexpr int most_left_out = 4;  // zeros that the encoder leaves out at the end

class RangeEncoder {
 public:
  explicit RangeEncoder(std::vector<uint8_t>& out) : out_(out) {}

  // Codes `bit`, which is 1 with probability one / 65536, 0 < one < 65536; returns it.
  uint32_t code(uint32_t bit, uint32_t one) {
    const uint32_t bound = (range_ >> 16) * one;
    if (bit) {
      range_ = bound;
    } else {
      low_ += bound;
      range_ -= bound;
    }
    while (range_ < (1u << 24)) {
      range_ <<= 8;
      shift();
    }
    return bit;
  }

  static constexpr bool overdrawn() { return false; }

  // Writes what is left, without the zeros at its end.
  void finish() {
    // Of the numbers in [low, low + range) the one with the most zeros at its end.
    for (int bits = 32; bits >= 0; --bits) {
      const uint64_t step = uint64_t{1} << bits, value = (low_ + step - 1) & ~(step - 1);
      if (value - low_ < range_) {
        low_ = value;
        break;
      }
    }
    for (int i = 0; i < 5; ++i) shift();
    for (int i = 0; i < most_left_out && out_.size() > start_ && out_.back() == 0; ++i) out_.pop_back();
  }

 private:
  void shift() {
    if (low_ < 0xff000000u || low_ > 0xffffffffu) {
      const auto carry = static_cast<uint8_t>(low_ >> 32);
      if (held_) out_.push_back(static_cast<uint8_t>(cache_ + carry));
      for (; pending_ > 0; --pending_) out_.push_back(static_cast<uint8_t>(0xff + carry));
      cache_ = static_cast<uint8_t>(low_ >> 24);
      held_ = true;
    } else {
      ++pending_;
    }
    low_ = (low_ & 0x00ffffffu) << 8;
  }

  std::vector<uint8_t>& out_;
  const size_t start_ = out_.size();
  uint64_t low_ = 0;
  int64_t pending_ = 0;
  uint32_t range_ = 0xffffffffu;
  uint8_t cache_ = 0;
  bool held_ = false;
};

class RangeDecoder {
 public:
  RangeDecoder(const uint8_t* data, size_t size) : next_(data), end_(data + size) {
    for (int i = 0; i < 4; ++i) code_ = code_ << 8 | byte();
  }

  // The next bit, which is 1 with probability one / 65536; the first argument stands for the encoder's bit.
  uint32_t code(uint32_t, uint32_t one) {
    const uint32_t bound = (range_ >> 16) * one;
    const uint32_t bit = code_ < bound;
    if (bit) {
      range_ = bound;
    } else {
      code_ -= bound;
      range_ -= bound;
    }
    while (range_ < (1u << 24)) {
      range_ <<= 8;
      code_ = code_ << 8 | byte();
    }
    return bit;
  }

  // Whether what was not read is padding, and no more was read than the encoder could have left out.
  bool at_end() const {
    for (const uint8_t* rest = next_; rest != end_; ++rest)
      if (*rest != 0) return false;
    return !overdrawn();
  }
  bool overdrawn() const { return beyond_ > most_left_out; }

 private:
  uint32_t byte() {
    if (next_ != end_) return *next_++;
    ++beyond_;
    return 0;
  }

  const uint8_t* next_;
  const uint8_t* end_;
  int64_t beyond_ = 0;
  uint32_t range_ = 0xffffffffu;
  uint32_t code_ = 0;
};

}  // namespace pgolf
