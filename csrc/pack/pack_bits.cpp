#include "pack/pack_bits.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "base/cpu_features.h"
#include "base/dispatch_bits.h"
#include "pack/pack_group.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PGOLF_X86 1
#endif

namespace pgolf {
namespace {

// A thread costs about as much to start as this many values cost to convert.
constexpr int64_t values_a_thread = 1 << 18;

uint64_t load(const uint8_t* from, int64_t size) {
  uint64_t word = 0;
  std::memcpy(&word, from, size);
  return word;
}

void store(uint8_t* to, uint64_t word, int64_t size) { std::memcpy(to, &word, size); }

// What packing sees of its values besides their low bits. Of an unsigned value that fits, the bits from `bits` up are
// zero; of a signed one each of them equals the bit below. A whole word of bytes is looked at: what a shift carries
// from byte to byte is bit 0, which is not among them.
template <int bits, bool is_signed>
struct Strays {
  static constexpr uint8_t mask = static_cast<uint8_t>(0xff00u >> (8 - bits));
  uint64_t seen = 0;

  void see(uint64_t loose) { seen |= is_signed ? loose ^ (loose << 1) : loose; }
  bool any() const { return bits < 8 && (seen & every_byte(mask)) != 0; }
};

// Whole groups are moved as 8 bytes, so that each copy is one instruction, for as long as 8 bytes are left on both
// sides; the rest, at most 8 groups, byte by byte. A tight store's surplus bytes are overwritten by the next group.
// Packing tells whether every value fits.
template <int bits, bool is_signed>
bool pack_portable(const uint8_t* src, uint8_t* dst, int64_t count) {
  const int64_t size = packed_size(count, bits);
  Strays<bits, is_signed> strays;
  int64_t group = 0;
  for (; (group + 1) * 8 <= count && group * bits + 8 <= size; ++group) {
    const uint64_t loose = load(src + group * 8, 8);
    strays.see(loose);
    store(dst + group * bits, tighten<bits>(loose), 8);
  }
  for (; group * 8 < count; ++group) {
    const int64_t values = std::min<int64_t>(8, count - group * 8);
    const uint64_t loose = load(src + group * 8, values);
    strays.see(loose);
    store(dst + group * bits, tighten<bits>(loose), packed_size(values, bits));
  }
  return !strays.any();
}

template <int bits, bool is_signed>
void unpack_portable(const uint8_t* src, uint8_t* dst, int64_t count) {
  const int64_t size = packed_size(count, bits);
  int64_t group = 0;
  for (; (group + 1) * 8 <= count && group * bits + 8 <= size; ++group)
    store(dst + group * 8, loosen<bits, is_signed>(load(src + group * bits, 8)), 8);
  for (; group * 8 < count; ++group) {
    const int64_t values = std::min<int64_t>(8, count - group * 8);
    store(dst + group * 8, loosen<bits, is_signed>(load(src + group * bits, packed_size(values, bits))), values);
  }
}

#if PGOLF_X86
// The same with one instruction for each group; what is left at the end is portable's.
template <int bits, bool is_signed>
__attribute__((target("bmi2"))) bool pack_bmi2(const uint8_t* src, uint8_t* dst, int64_t count) {
  const int64_t size = packed_size(count, bits);
  constexpr uint64_t mask = every_byte((1u << bits) - 1);
  Strays<bits, is_signed> strays;
  int64_t group = 0;
  for (; (group + 1) * 8 <= count && group * bits + 8 <= size; ++group) {
    const uint64_t loose = load(src + group * 8, 8);
    strays.see(loose);
    store(dst + group * bits, _pext_u64(loose, mask), 8);
  }
  return pack_portable<bits, is_signed>(src + group * 8, dst + group * bits, count - group * 8) && !strays.any();
}

template <int bits, bool is_signed>
__attribute__((target("bmi2"))) void unpack_bmi2(const uint8_t* src, uint8_t* dst, int64_t count) {
  const int64_t size = packed_size(count, bits);
  constexpr uint64_t mask = every_byte((1u << bits) - 1);
  int64_t group = 0;
  for (; (group + 1) * 8 <= count && group * bits + 8 <= size; ++group) {
    const uint64_t loose = _pdep_u64(load(src + group * bits, 8), mask);
    store(dst + group * 8, is_signed ? extend_sign<bits>(loose) : loose, 8);
  }
  unpack_portable<bits, is_signed>(src + group * bits, dst + group * 8, count - group * 8);
}

// Where each byte of eight tight words lies: byte `at % 8` of group `at / 8` in the stream, and the reverse.
template <int bits, bool to_stream>
struct ByteOrder {
  alignas(64) uint8_t from[64] = {};
  constexpr ByteOrder() {
    for (int at = 0; at < 64; ++at) {
      if (to_stream)
        from[at] = at < 8 * bits ? at / bits * 8 + at % bits : 0;
      else
        from[at] = at % 8 < bits ? at / 8 * bits + at % 8 : 0;
    }
  }
};

constexpr uint64_t first_bytes(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

#define PGOLF_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

// Eight groups a step: the three joins of tighten() in all eight words at once, then the bytes of the words are closed up.
template <int bits, bool is_signed>
PGOLF_VBMI bool pack_vbmi(const uint8_t* src, uint8_t* dst, int64_t count) {
  static constexpr ByteOrder<bits, true> order;
  const __m512i from = _mm512_load_si512(order.from);
  const __m512i keep = _mm512_set1_epi8(static_cast<char>((1u << bits) - 1));
  const __m512i single = _mm512_set1_epi16(0x00ff), pair = _mm512_set1_epi32(0x0000ffff);
  const __m512i quad = _mm512_set1_epi64(0x00000000ffffffff);
  const __m512i strays = _mm512_set1_epi8(static_cast<char>(Strays<bits, is_signed>::mask));
  __m512i seen = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + 64 <= count; at += 64) {
    const __m512i loose = _mm512_loadu_si512(src + at);
    seen = _mm512_or_si512(seen, is_signed ? _mm512_xor_si512(loose, _mm512_slli_epi64(loose, 1)) : loose);
    __m512i x = _mm512_and_si512(loose, keep);
    x = _mm512_or_si512(_mm512_and_si512(x, single), _mm512_srli_epi64(_mm512_andnot_si512(single, x), 8 - bits));
    x = _mm512_or_si512(_mm512_and_si512(x, pair), _mm512_srli_epi64(_mm512_andnot_si512(pair, x), 16 - 2 * bits));
    x = _mm512_or_si512(_mm512_and_si512(x, quad), _mm512_srli_epi64(_mm512_andnot_si512(quad, x), 32 - 4 * bits));
    _mm512_mask_storeu_epi8(dst + at / 8 * bits, first_bytes(8 * bits), _mm512_permutexvar_epi8(from, x));
  }
  const bool fits = bits == 8 || _mm512_test_epi8_mask(seen, strays) == 0;
  return pack_portable<bits, is_signed>(src + at, dst + at / 8 * bits, count - at) && fits;
}

// Eight groups a step: each group's bytes go to a word of their own, from which one instruction takes 8 bits at each of
// the offsets 0, bits, 2 * bits, ...
template <int bits, bool is_signed>
PGOLF_VBMI void unpack_vbmi(const uint8_t* src, uint8_t* dst, int64_t count) {
  static constexpr ByteOrder<bits, false> order;
  constexpr uint64_t offsets = 0x0706050403020100u * bits;
  const __m512i from = _mm512_load_si512(order.from), shifts = _mm512_set1_epi64(offsets);
  const __m512i keep = _mm512_set1_epi8(static_cast<char>((1u << bits) - 1));
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(1u << (bits - 1)));
  int64_t at = 0;
  for (; at + 64 <= count; at += 64) {
    const __m512i stream = _mm512_maskz_loadu_epi8(first_bytes(8 * bits), src + at / 8 * bits);
    __m512i x = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(from, stream));
    x = _mm512_and_si512(x, keep);
    if (is_signed) x = _mm512_sub_epi8(_mm512_xor_si512(x, sign), sign);
    _mm512_storeu_si512(dst + at, x);
  }
  unpack_portable<bits, is_signed>(src + at / 8 * bits, dst + at, count - at);
}
#endif

template <int bits, bool is_signed>
bool pack_range(const uint8_t* src, uint8_t* dst, int64_t count) {
#if PGOLF_X86
  if (level() == Level::avx512vbmi) return pack_vbmi<bits, is_signed>(src, dst, count);
  if (level() == Level::bmi2) return pack_bmi2<bits, is_signed>(src, dst, count);
#endif
  return pack_portable<bits, is_signed>(src, dst, count);
}

template <int bits, bool is_signed>
void unpack_range(const uint8_t* src, uint8_t* dst, int64_t count) {
#if PGOLF_X86
  if (level() == Level::avx512vbmi) return unpack_vbmi<bits, is_signed>(src, dst, count);
  if (level() == Level::bmi2) return unpack_bmi2<bits, is_signed>(src, dst, count);
#endif
  unpack_portable<bits, is_signed>(src, dst, count);
}

// Calls work(first, count) for consecutive ranges of values that together are [0, count). Each starts at a multiple of
// 64 values, so that no byte and, in an aligned buffer, almost no cache line is shared.
template <class Work>
void in_threads(int64_t count, int threads, Work work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / values_a_thread));
  const int64_t share = (count / parts + 63) / 64 * 64;
  std::vector<std::thread> pool;
  pool.reserve(parts);
  for (int64_t first = share; first < count; first += share) {
    const int64_t length = std::min(share, count - first);
    try {
      pool.emplace_back(work, first, length);
    } catch (const std::exception&) {  // no more threads, or no memory for one
      work(first, length);
    }
  }
  work(0, std::min(share, count));
  for (std::thread& each : pool) each.join();
}

}  // namespace

bool pack_bits(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, int threads) {
  std::atomic<bool> fits{true};
  dispatch_bits(bits, [=, &fits](auto width) {
    constexpr int b = decltype(width)::value;
    in_threads(count, threads, [=, &fits](int64_t first, int64_t length) {
      const uint8_t* from = src + first;
      uint8_t* to = dst + first / 8 * b;
      if (!(is_signed ? pack_range<b, true>(from, to, length) : pack_range<b, false>(from, to, length))) fits = false;
    });
  });
  return fits;
}

void unpack_bits(const uint8_t* src, uint8_t* dst, int64_t count, int bits, bool is_signed, int threads) {
  dispatch_bits(bits, [=](auto width) {
    constexpr int b = decltype(width)::value;
    in_threads(count, threads, [=](int64_t first, int64_t length) {
      if (is_signed)
        unpack_range<b, true>(src + first / 8 * b, dst + first, length);
      else
        unpack_range<b, false>(src + first / 8 * b, dst + first, length);
    });
  });
}

}  // namespace pgolf
