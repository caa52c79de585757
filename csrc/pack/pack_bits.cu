#include <cuda_runtime.h>

#include <algorithm>

#include "base/dispatch_bits.h"
#include "pack/pack_bits.h"
#include "pack/pack_group.h"

namespace pgolf {
namespace {

// A thread converts 32 values a step: two 128-bit words of values, `bits` 32-bit words of the stream. A warp's accesses
// lie side by side, so that every 32-byte sector is moved once.
constexpr int groups_a_step = 4, values_a_step = 32, threads_a_block = 256, blocks_an_sm = 8;

// `words` 32-bit words at an address that is a multiple of 4 * words' largest power of two, up to 16 bytes.
template <int words>
__device__ __forceinline__ void load_words(uint32_t (&to)[words], const uint8_t* from) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  } else if constexpr (words % 2 == 0) {
#pragma unroll
    for (int i = 0; i < words / 2; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(from)[i];
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < words; ++i) to[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}

template <int words>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&from)[words]) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words / 4; ++i)
      reinterpret_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  } else if constexpr (words % 2 == 0) {
#pragma unroll
    for (int i = 0; i < words / 2; ++i) reinterpret_cast<uint2*>(to)[i] = make_uint2(from[2 * i], from[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint32_t*>(to)[i] = from[i];
  }
}

// The `width` bits from bit `at` of little-endian words; `width` and `at` are known after unrolling.
template <int words>
__device__ __forceinline__ uint64_t get_bits(const uint32_t (&from)[words], int at, int width) {
  uint64_t value = from[at / 32] >> (at % 32);
  if (at % 32 + width > 32) value |= uint64_t{from[at / 32 + 1]} << (32 - at % 32);
  if (at % 32 + width > 64) value |= uint64_t{from[at / 32 + 2]} << (64 - at % 32);
  return value;
}

template <int words>
__device__ __forceinline__ void put_bits(uint32_t (&to)[words], int at, int width, uint64_t value) {
  to[at / 32] |= static_cast<uint32_t>(value << (at % 32));
  if (at % 32 + width > 32) to[at / 32 + 1] |= static_cast<uint32_t>(value >> (32 - at % 32));
  if (at % 32 + width > 64) to[at / 32 + 2] |= static_cast<uint32_t>(value >> (64 - at % 32));
}

__device__ __forceinline__ uint64_t load_bytes(const uint8_t* from, int size) {
  uint64_t word = 0;
  for (int i = 0; i < size; ++i) word |= uint64_t{from[i]} << (8 * i);
  return word;
}

__device__ __forceinline__ void store_bytes(uint8_t* to, uint64_t word, int size) {
  for (int i = 0; i < size; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

template <int bits>
struct Pack {
  static constexpr int value_words = values_a_step / 4;

  static __device__ __forceinline__ void step(const uint8_t* src, uint8_t* dst, int64_t at) {
    uint32_t values[value_words], stream[bits] = {};
    load_words(values, src + at);
#pragma unroll
    for (int g = 0; g < groups_a_step; ++g)
      put_bits(stream, g * 8 * bits, 8 * bits, tighten<bits>(uint64_t{values[2 * g + 1]} << 32 | values[2 * g]));
    store_words(dst + at / 8 * bits, stream);
  }

  static __device__ __forceinline__ void group(const uint8_t* src, uint8_t* dst, int64_t at, int values) {
    store_bytes(dst + at / 8 * bits, tighten<bits>(load_bytes(src + at, values)), (values * bits + 7) / 8);
  }
};

template <int bits, bool is_signed>
struct Unpack {
  static constexpr int value_words = values_a_step / 4;

  static __device__ __forceinline__ void step(const uint8_t* src, uint8_t* dst, int64_t at) {
    uint32_t values[value_words], stream[bits];
    load_words(stream, src + at / 8 * bits);
#pragma unroll
    for (int g = 0; g < groups_a_step; ++g) {
      const uint64_t loose = loosen<bits, is_signed>(get_bits(stream, g * 8 * bits, 8 * bits));
      values[2 * g] = static_cast<uint32_t>(loose), values[2 * g + 1] = static_cast<uint32_t>(loose >> 32);
    }
    store_words(dst + at, values);
  }

  static __device__ __forceinline__ void group(const uint8_t* src, uint8_t* dst, int64_t at, int values) {
    const uint64_t tight = load_bytes(src + at / 8 * bits, (values * bits + 7) / 8);
    store_bytes(dst + at, loosen<bits, is_signed>(tight), values);
  }
};

// Whole steps by words where both addresses allow it; what is left, or everything, group by group and byte by byte.
template <class Convert>
__global__ void __launch_bounds__(threads_a_block)
    convert(const uint8_t* __restrict__ src, uint8_t* __restrict__ dst, int64_t count, bool by_words) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t steps = by_words ? count / values_a_step : 0;
  for (int64_t i = thread; i < steps; i += threads) Convert::step(src, dst, i * values_a_step);
  for (int64_t at = steps * values_a_step + thread * 8; at < count; at += threads * 8)
    Convert::group(src, dst, at, static_cast<int>(min(int64_t{8}, count - at)));
}

template <class Convert>
cudaError_t launch(const uint8_t* src, uint8_t* dst, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int device, sms;
  if (const cudaError_t status = cudaGetDevice(&device)) return status;
  if (const cudaError_t status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return status;
  const bool by_words = (reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst)) % 16 == 0;
  const int64_t work = by_words ? count / values_a_step : (count + 7) / 8;
  const int64_t blocks = std::clamp<int64_t>((work + threads_a_block - 1) / threads_a_block, 1, int64_t{sms} * blocks_an_sm);
  convert<Convert><<<static_cast<unsigned>(blocks), threads_a_block, 0, stream>>>(src, dst, count, by_words);
  return cudaGetLastError();
}

std::string text_of(cudaError_t status) { return status == cudaSuccess ? "" : cudaGetErrorString(status); }

}  // namespace

std::string pack_bits_cuda(const uint8_t* src, uint8_t* dst, int64_t count, int bits, void* stream) {
  return text_of(dispatch_bits(bits, [=](auto width) {
    return launch<Pack<decltype(width)::value>>(src, dst, count, static_cast<cudaStream_t>(stream));
  }));
}

std::string unpack_bits_cuda(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, void* stream) {
  return text_of(dispatch_bits(bits, [=](auto width) {
    constexpr int b = decltype(width)::value;
    return is_signed ? launch<Unpack<b, true>>(src, dst, count, static_cast<cudaStream_t>(stream))
                     : launch<Unpack<b, false>>(src, dst, count, static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace pgolf
