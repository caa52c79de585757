// Values of 1 to 8 bits, packed without gaps into bytes and back. The bit layout is told in pack_group.h.
//
// Moves count + packed_size(count, bits) bytes, each once; 0 FLOPs. Addresses need no alignment, source and destination
// must not overlap, and nothing outside the exact buffers is read or written.
#pragma once

#include <cstdint>
#include <string>

namespace pgolf {

inline int64_t packed_size(int64_t count, int bits) { return count / 8 * bits + (count % 8 * bits + 7) / 8; }

// src: int8 (is_signed) or uint8 [count], of which the low `bits` bits are kept; dst: uint8 [packed_size(count, bits)].
// Returns whether every value fits in `bits` bits, which is looked at on the way; all are packed in either case.
// `threads` is an upper limit: short input is not worth one.
bool pack_bits(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, int threads);

// src: uint8 [packed_size(count, bits)]; dst: int8 (sign extended) or uint8 [count].
void unpack_bits(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, int threads);

// The same, without a look at what fits, on the GPU that is current in the calling thread; addresses are device
// addresses and `stream` is a cudaStream_t. Launches and returns at once: "" or what CUDA said was wrong.
std::string pack_bits_cuda(const uint8_t* src, uint8_t* dst, int64_t count, int bits, void* stream);
std::string unpack_bits_cuda(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, void* stream);

}  // namespace pgolf
