// Binary arithmetic coding: one bit and the 16-bit probability that it is 1, in and out of bytes.
//
// The range has 32 bits and stays at 2^24 or more, so that a probability is cut off by 1 in 256 of itself at worst. The
// encoder keeps bytes back for as long as a carry can still change them. Reading past the end yields zeros.
//
// A bit of probability 0.9998 takes 0.0004 bits, so a few bytes could ask for hours of decoding. Hence n bits take at
// least (n - free) / 32 bytes: the encoder fills up with zeros, and the decoder gives up. Real weights take one byte for
// 8 to 12 bits, bytes that nothing is known about one for 27.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf {

constexpr int most_left_out = 4;  // zeros that the encoder leaves out at the end
constexpr int64_t most_bits_a_byte = 32;
constexpr int64_t free_bits = int64_t{1} << 14;

// The fewest bytes for `bits` of them.
inline size_t fewest_bytes(int64_t bits, int64_t free) {
  return static_cast<size_t>(std::max<int64_t>(bits - free + most_bits_a_byte - 1, 0) / most_bits_a_byte);
}

class RangeEncoder {
 public:
  explicit RangeEncoder(std::vector<uint8_t>& out, int64_t free = free_bits) : out_(out), free_(free) {}

  // Codes `bit`, which is 1 with probability one / 65536, 0 < one < 65536; returns it.
  uint32_t code(uint32_t bit, uint32_t one) {
    ++bits_;
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

  // Writes what is left, without the zeros at its end but with those that it needs to be long enough.
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
    out_.resize(std::max(out_.size(), start_ + fewest_bytes(bits_, free_)));
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
  const int64_t free_;
  int64_t bits_ = 0;
  uint64_t low_ = 0;
  int64_t pending_ = 0;
  uint32_t range_ = 0xffffffffu;
  uint8_t cache_ = 0;
  bool held_ = false;
};

class RangeDecoder {
 public:
  RangeDecoder(const uint8_t* data, size_t size, int64_t free = free_bits)
      : next_(data), end_(data + size), bits_left_(most_bits_a_byte * static_cast<int64_t>(size) + free) {
    for (int i = 0; i < 4; ++i) code_ = code_ << 8 | byte();
  }

  // The next bit, which is 1 with probability one / 65536; the first argument stands for the encoder's bit.
  uint32_t code(uint32_t, uint32_t one) {
    --bits_left_;
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
  // Whether there were not enough bytes for the bits read so far.
  bool overdrawn() const { return beyond_ > most_left_out || bits_left_ < 0; }

 private:
  uint32_t byte() {
    if (next_ != end_) return *next_++;
    ++beyond_;
    return 0;
  }

  const uint8_t* next_;
  const uint8_t* end_;
  int64_t bits_left_, beyond_ = 0;
  uint32_t range_ = 0xffffffffu;
  uint32_t code_ = 0;
};

}  // namespace pgolf
