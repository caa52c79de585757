// Adaptive probabilities of one bit, and their mix: what the coders of integers and of floats have in common.
//
// Everything is integer arithmetic; where numbers could grow without bound they wrap around as unsigned ones do, so the
// SSE2 and the portable path give the same bits for any input.
#pragma once

#include <cstdint>

#include "coder/logistic.h"

#if defined(__SSE2__) && !defined(PGOLF_PORTABLE)
#include <emmintrin.h>
#define PGOLF_SSE2 1
#endif

namespace pgolf {

// 22 bits of the probability of a 1, over 10 bits of how many bits were seen. 0 stands for "never used".
struct Counter {
  uint32_t state = 0;

  void start(uint32_t probability16, uint32_t confidence) { state = (probability16 << 16 & ~1023u) | confidence; }
  // Log-odds of 1, in 1/4096.
  int16_t stretch(const LogisticTables& tables) const { return tables.stretch[state >> 20]; }
  // Moves by 1 / (n + 3/2) of the distance, n at most 1000.
  void update(const LogisticTables& tables, uint32_t bit) {
    const uint32_t n = state & 1023;
    const int64_t p = state >> 10, target = bit ? (1 << 22) - 1 : 0;
    const auto moved = static_cast<uint32_t>(p + (((target - p) * tables.rate[n]) >> 16));
    state = moved << 10 | (n < 1000 ? n + 1 : n);
  }
};

// A bit with one counter of its own and no mixing.
template <class Coder>
uint32_t code_plain(Coder& coder, const LogisticTables& tables, Counter& counter, uint32_t bit) {
  if (counter.state == 0) counter.start(32768, 0);
  const uint32_t one = counter.state >> 16;
  bit = coder.code(bit, one < 16 ? 16 : one > 65520 ? 65520 : one);
  counter.update(tables, bit);
  return bit;
}

// `bits` bits of a value, highest first, in a tree of 1 << bits counters.
template <class Coder>
uint32_t code_tree(Coder& coder, const LogisticTables& tables, Counter* tree, uint32_t value, int bits) {
  uint32_t at = 1;
  for (int bit = bits; bit-- > 0;) at = at * 2 + code_plain(coder, tables, tree[at], value >> bit & 1);
  return at - (1u << bits);
}

constexpr int mixer_inputs = 16;

struct alignas(64) Weights {
  int32_t w[mixer_inputs] = {};  // 1 is 1 << 28
  int32_t rate = 220000;         // how fast they learn, falling to lowest_rate
};

// Log-odds in 1/4096: the inputs (1/4096) weighted with the mean of two sets.
inline int32_t mix(const int16_t* inputs, const Weights& a, const Weights& b) {
#if PGOLF_SSE2
  __m128i sum = _mm_setzero_si128();
  for (int i = 0; i < mixer_inputs; i += 8) {
    auto weight = [&](int at) {
      const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(a.w + at));
      const __m128i y = _mm_load_si128(reinterpret_cast<const __m128i*>(b.w + at));
      return _mm_srai_epi32(_mm_add_epi32(_mm_srai_epi32(x, 1), _mm_srai_epi32(y, 1)), 16);
    };
    const __m128i weights = _mm_packs_epi32(weight(i), weight(i + 4));
    sum = _mm_add_epi32(sum, _mm_madd_epi16(weights, _mm_load_si128(reinterpret_cast<const __m128i*>(inputs + i))));
  }
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return _mm_cvtsi128_si32(sum) >> 12;
#else
  uint32_t sum = 0;
  for (int i = 0; i < mixer_inputs; ++i)
    sum += static_cast<uint32_t>((((a.w[i] >> 1) + (b.w[i] >> 1)) >> 16) * inputs[i]);
  return static_cast<int32_t>(sum) >> 12;
#endif
}

// Moves both sets against the error of the probability `one` / 65536 that the mix gave `bit`.
inline void learn(const int16_t* inputs, Weights& a, Weights& b, uint32_t bit, int32_t one) {
  constexpr int32_t lowest_rate = 12000;
  const int32_t error = static_cast<int32_t>(bit << 16) - static_cast<int32_t>(bit) - one;
  const int32_t step = (error * (a.rate >> 8) + 1024) >> 11;  // 16 bits
  a.rate -= a.rate > lowest_rate;
#if PGOLF_SSE2
  const __m128i steps = _mm_set1_epi16(static_cast<int16_t>(step)), half = _mm_set1_epi32(128);
  for (int i = 0; i < mixer_inputs; i += 8) {
    const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(inputs + i));
    const __m128i low = _mm_mullo_epi16(x, steps), high = _mm_mulhi_epi16(x, steps);
    auto move = [&](int at, __m128i product) {
      const __m128i change = _mm_srai_epi32(_mm_add_epi32(product, half), 8);
      for (Weights* set : {&a, &b}) {
        auto* to = reinterpret_cast<__m128i*>(set->w + at);
        _mm_store_si128(to, _mm_add_epi32(_mm_load_si128(to), change));
      }
    };
    move(i, _mm_unpacklo_epi16(low, high));
    move(i + 4, _mm_unpackhi_epi16(low, high));
  }
#else
  for (int i = 0; i < mixer_inputs; ++i) {
    const auto change = static_cast<uint32_t>((inputs[i] * step + 128) >> 8);
    a.w[i] = static_cast<int32_t>(static_cast<uint32_t>(a.w[i]) + change);
    b.w[i] = static_cast<int32_t>(static_cast<uint32_t>(b.w[i]) + change);
  }
#endif
}

}  // namespace pgolf
