// Eight values of `bits` bits, as one 64-bit word: the logic that every packing path shares, on the CPU and on the GPU.
//
// "Loose" is eight values of one byte each, value 0 in the lowest byte. "Tight" is the same eight values one after
// another in the lowest 8 * bits bits of the word. Tight words stored little-endian, `bits` bytes each, are the packed
// stream: value i has bits [i * bits, (i + 1) * bits), least significant bit first.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PGOLF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PGOLF_HOST_DEVICE inline
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed stream is read and written as little-endian words"
#endif

namespace pgolf {

// The byte `value` in each of the eight bytes of a word.
PGOLF_HOST_DEVICE constexpr uint64_t every_byte(uint64_t value) { return value * 0x0101010101010101u; }

// Keeps the low `bits` bits of each byte and closes the gaps: neighbours join to 2, then 4, then 8 values.
template <int bits>
PGOLF_HOST_DEVICE uint64_t tighten(uint64_t loose) {
  uint64_t x = loose & every_byte((1u << bits) - 1);
  x = (x & 0x00ff00ff00ff00ffu) | ((x & 0xff00ff00ff00ff00u) >> (8 - bits));
  x = (x & 0x0000ffff0000ffffu) | ((x & 0xffff0000ffff0000u) >> (16 - 2 * bits));
  x = (x & 0x00000000ffffffffu) | ((x & 0xffffffff00000000u) >> (32 - 4 * bits));
  return x;
}

// Fills each byte above its value with copies of the value's top bit. No carry leaves a byte.
template <int bits>
PGOLF_HOST_DEVICE uint64_t extend_sign(uint64_t loose) {
  constexpr uint64_t sign = 1u << (bits - 1);
  return ((loose ^ every_byte(sign)) + every_byte(0x80 - sign)) ^ every_byte(0x80);
}

// The inverse of tighten. Bits of `tight` above 8 * bits are ignored.
template <int bits, bool is_signed>
PGOLF_HOST_DEVICE uint64_t loosen(uint64_t tight) {
  constexpr uint64_t quad = bits == 8 ? 0xffffffffu : (uint64_t{1} << (4 * bits)) - 1;
  constexpr uint64_t pair = 0x0000000100000001u * ((1u << (2 * bits)) - 1);
  constexpr uint64_t single = 0x0001000100010001u * ((1u << bits) - 1);
  uint64_t x = (tight & quad) | ((tight & (quad << (4 * bits))) << (32 - 4 * bits));
  x = (x & pair) | ((x & (pair << (2 * bits))) << (16 - 2 * bits));
  x = (x & single) | ((x & (single << bits)) << (8 - bits));
  return is_signed ? extend_sign<bits>(x) : x;
}

}  // namespace pgolf
