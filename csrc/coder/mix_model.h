// The mixing model of small integers: every value becomes a few binary decisions, and every decision's probability is a
// mix of what several contexts have seen and of what rounded Gaussians of several adaptive scales say.
//
// Decisions: 0 or not, the sign, then "more than k?" for k = 1, 2, ... unary_nodes - 1; what is left beyond that is a
// tree of 7 bits. Magnitudes are counted in half steps, so that the indices of both trellis quantisers compare: 2 |v|,
// less 1 for the second quantiser's unless it is 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "coder/int_layout.h"
#include "coder/logistic.h"
#include "coder/match_rows.h"
#include "coder/mixer.h"
#include "trellis/parity_machine.h"

namespace pgolf {

template <class Coder>
class MixModel {
 public:
  MixModel(Coder& coder, int trellis_states)
      : coder_(coder), tables_(logistic_tables()), machine_(trellis_states), counters_(contexts * 2 * nodes) {
    for (auto* sets : {&by_node_[0][0], &by_scale_[0][0]})
      for (int i = 0; i < nodes * (sets == &by_node_[0][0] ? 4 : 8); ++i)
        for (int at = 0; at < mixer_inputs; ++at)
          sets[i].w[at] = (at < 3 ? 955 : at == bias || at >= first_counter ? 108 : 0) * 65536;
  }

  // Codes a matrix: what a decoder reads is written to plane.values. Returns whether there was enough to read.
  bool matrix(const Plane& plane, const std::vector<Match>& matches) {
    const int64_t rows = (plane.count + plane.cols - 1) / plane.cols;
    plane_ = plane;
    columns_.assign(plane.cols, {0, 0});
    zeros_.assign(plane.cols, 0);
    while (static_cast<int64_t>(log_count_.size()) < plane.cols)
      log_count_.push_back(log2_of(tables_, static_cast<uint32_t>(log_count_.size() + near_prior)));
    column_count_ = 0;
    if (seen_ > 64 << 13) total_ = mean() << 7, seen_ = 64 << 13;
    matching_ = code_plain(coder_, tables_, any_match_, !matches.empty());
    for (int64_t r = 0; r < rows; ++r) {
      match_ = nullptr;
      if (matching_ && r > 0) read_match(r, matches.empty() ? Match{} : matches[r]);
      row(plane.values + r * plane.cols, std::min(plane.cols, plane.count - r * plane.cols), r);
      if (coder_.overdrawn()) return false;
    }
    return true;
  }

 private:
  static constexpr int nodes = 24, sign_node = unary_nodes;
  // Inputs of the mixer: Gaussians, a constant, counters by context, and the two that know the matching row.
  static constexpr int gaussians = 4, bias = 4, first_counter = 5, counters = 8, match_gauss = 13, match_counter = 14;
  static constexpr int contexts = 32 + 128 + 128 + 128 + 64 + 512 + 128 + 8;
  // How many values at the mean scale a scale starts with: a row's, a column's, and a row's that may differ.
  static constexpr int row_prior = 7544, column_prior = 14, near_prior = 32, match_prior = 16;

  struct Column {
    int32_t magnitude;  // sum of magnitudes in half steps
    int32_t mean;       // running, of the values, 1/256
  };

  int64_t mean() const { return (total_ + 2048) * 4096 / (seen_ + 1024); }  // of magnitudes, in 1/4096

  int32_t log(int64_t x) const { return log2_of(tables_, static_cast<uint32_t>(x + 1)); }

  static int scale_class(int32_t log) {
    return std::clamp((log - lowest_scale * 1024) / (1024 / scale_steps), 0, scale_classes - 1);
  }

  void read_match(int64_t r, Match match) {
    eighths_ = static_cast<int>(code_tree(coder_, tables_, match_tree_, match.eighths, match_bits));
    if (eighths_ == 0) return;
    int64_t from = 0;
    for (int bit = row_bits(r); bit-- > 0;) from = from * 2 + coder_.code(match.row >> bit & 1, 32768);
    match_ = plane_.values + std::min(from, r - 1) * plane_.cols;
  }

  void row(int8_t* values, int64_t count, int64_t r) {
    const int64_t cols = plane_.cols;
    const int8_t* above = r > 0 ? values - cols : zeros_.data();
    const int8_t* previous = plane_.previous ? plane_.previous + r * cols : nullptr;
    int64_t row_magnitude = 0;
    row_distance_ = 0;
    int32_t row_mean = 0, log_mean = 0, log_row = 0, log_near = 0;
    int64_t prior = 0;
    const int32_t log_rows = log2_of(tables_, static_cast<uint32_t>(column_count_ + column_prior));
    int left = 0, left2 = 0, corner = 0;
    machine_.restart();
    for (int64_t c = 0; c < count; ++c) {
      if (c % 8 == 0) {
        if (coder_.overdrawn()) return;
        // logarithms to the base of 2, in 1/1024, of scales in half steps
        const int64_t average = mean();
        prior = average * column_prior / 64;
        log_mean = log(average) - 12 * 1024;
        log_row = log((row_magnitude << 6) + average * row_prior / 64) - log2_of(tables_, c + row_prior) - 6 * 1024;
        log_near = log((row_magnitude << 6) + average * near_prior / 64) - log_count_[c] - 6 * 1024;
      }
      Column& column = columns_[c];
      const int32_t log_column = log((int64_t{column.magnitude} << 6) + prior) - log_rows - 6 * 1024;
      const int32_t by_column = log_column - log_mean, by_both = by_column + log_near - log_mean;
      const int up = above[c], next = c + 1 < count ? above[c + 1] : 0;
      const int around = 2 * std::abs(left) + 2 * std::abs(up) + std::abs(corner) + std::abs(next) + std::abs(left2);
      const int32_t log_around = log2_of(tables_, static_cast<uint32_t>(8 * around + 8)) - 5 * 1024;
      const int32_t log_here = by_column + log_row;
      quantiser_ = machine_.quantiser();
      const auto& gauss = tables_.gauss[quantiser_];
      gauss_[0] = gauss[scale_class(log_mean)];
      gauss_[1] = gauss[scale_class(log_here)];
      gauss_[2] = gauss[scale_class(log_mean + by_both)];
      gauss_[3] = gauss[scale_class((log_here * 3 + log_around) >> 2)];

      int start = 0;
      auto context = [&](int which, int index, int size) {
        slots_[which] = counters_.data() + ((start + index) * 2 + quantiser_) * nodes;
        start += size;
      };
      context(0, std::clamp((by_column >> 6) + 16, 0, 31), 32);
      context(1, std::clamp((by_both >> 6) + 16, 0, 31), 128);
      context(2, (std::clamp(column.mean >> 6, -3, 3) + 3) * 16 + std::clamp(up, -7, 7) + 7, 128);
      context(3, (std::clamp(row_mean >> 6, -3, 3) + 3) * 16 + std::clamp(left, -7, 7) + 7, 128);
      context(4, previous ? std::clamp<int>(previous[c], -31, 31) + 32 : 0, 64);
      context(5, match_ ? find_match(c) : 0, 512);
      context(6, (std::clamp(up, -2, 2) * 5 + std::clamp(left, -2, 2)) * 5 + std::clamp(corner, -2, 2) + 62, 128);
      context(7, 0, 8);
      node_set_ = quantiser_ + (match_ ? 2 : 0);
      scale_set_ = std::clamp((by_column >> 7) + 4, 0, 7);

      const int value = code_value(values[c]);
      values[c] = static_cast<int8_t>(value);
      const int half_steps = 2 * std::abs(value) - (quantiser_ && value ? 1 : 0);
      row_magnitude += half_steps;
      row_mean += (value * 256 - row_mean) >> 6;
      column.magnitude += half_steps;
      column.mean += (value * 256 - column.mean) >> 6;
      total_ += 64 * half_steps;
      if (match_) {
        const int distance = std::abs(2 * value - prediction_);
        row_distance_ += distance;
        distances_[eighths_] += distance;
        ++distance_counts_[eighths_];
      }
      machine_.advance(value);
      left2 = left, left = value, corner = up;
    }
    seen_ += 64 * count;
    if (++column_count_ == 1 << 13) {
      column_count_ /= 2;
      for (Column& column : columns_) column.magnitude /= 2;
    }
  }

  // What the matching row says about column c; returns a context below 512.
  int find_match(int64_t c) {
    prediction_ = (match_[c] * eighths_ + 2) >> 2;
    const int64_t usual = (distances_[eighths_] + 64) * 1024 / (distance_counts_[eighths_] + 8);
    const int32_t distance = log((row_distance_ * 1024 + usual * match_prior) / (c + match_prior));
    distance_class_ = std::clamp((distance - (10 + lowest_shift) * 1024) / (1024 / shift_octave), 0, shift_classes - 1);
    return distance_class_ / 8 * 64 + std::clamp<int>(match_[c], -31, 31) + 31;
  }

  int code_value(int value) {
    const int magnitude = std::abs(value);
    negative_ = false;
    if (!decide(0, magnitude > 0)) return 0;
    negative_ = plane_.high <= 0 || (plane_.low < 0 && decide(sign_node, value < 0));
    const int limit = negative_ ? -plane_.low : plane_.high;
    int k = 1;
    while (k < std::min(limit, unary_nodes) && decide(k, magnitude > k)) ++k;
    if (k == unary_nodes && k < limit)
      k = std::min(k + static_cast<int>(code_tree(coder_, tables_, escape_, (magnitude - k) & 127, 7)), limit);
    return negative_ ? -k : k;
  }

  uint32_t decide(int node, uint32_t bit) {
    alignas(64) int16_t inputs[mixer_inputs];
    const bool sign = node == sign_node;
    for (int i = 0; i < gaussians; ++i) inputs[i] = sign ? 0 : gauss_[i][node];
    inputs[bias] = 1024;
    for (int i = 0; i < counters; ++i) {
      Counter& counter = slots_[i][node];
      if (counter.state == 0) counter.start(squash(tables_, inputs[1]), 4);
      inputs[first_counter + i] = counter.stretch(tables_);
    }
    Counter* relative = nullptr;
    inputs[match_gauss] = inputs[match_counter] = inputs[15] = 0;
    if (match_) {
      const int at = node == 0 || sign ? prediction_ : 2 * node - (negative_ ? -prediction_ : prediction_);
      const int step = std::clamp(at + shift_middle, 0, shift_steps - 1);
      const auto& table = node == 0 ? tables_.nonzero : sign ? tables_.negative : tables_.more;
      inputs[match_gauss] = table[distance_class_][step];
      relative = &relative_[node == 0 ? 0 : sign ? 1 : 2][distance_class_ / 2][std::clamp(at, -31, 31) + 32];
      if (relative->state == 0) relative->start(squash(tables_, inputs[match_gauss]), 4);
      inputs[match_counter] = relative->stretch(tables_);
    }
    Weights &a = by_node_[node][node_set_], &b = by_scale_[node][scale_set_];
    const int32_t one = squash(tables_, mix(inputs, a, b));
    bit = coder_.code(bit, static_cast<uint32_t>(one));
    learn(inputs, a, b, bit, one);
    for (int i = 0; i < counters; ++i) slots_[i][node].update(tables_, bit);
    if (relative) relative->update(tables_, bit);
    return bit;
  }

  Coder& coder_;
  const LogisticTables& tables_;
  ParityMachine machine_;
  Plane plane_ = {};
  std::vector<Counter> counters_;
  Weights by_node_[nodes][4], by_scale_[nodes][8];
  Counter escape_[128], any_match_, match_tree_[1 << match_bits], relative_[3][shift_classes / 2][64];
  std::vector<Column> columns_;
  std::vector<int8_t> zeros_;
  std::vector<int32_t> log_count_;
  int64_t column_count_ = 0, total_ = 0, seen_ = 0;  // total_ and seen_: 64 for each half step and value

  // Of the row
  const int8_t* match_ = nullptr;
  bool matching_ = false;
  int eighths_ = 0;
  int64_t row_distance_ = 0, distances_[1 << match_bits] = {}, distance_counts_[1 << match_bits] = {};
  // Of the value
  const int16_t* gauss_[gaussians] = {};
  Counter* slots_[counters] = {};
  int quantiser_ = 0, node_set_ = 0, scale_set_ = 0, prediction_ = 0, distance_class_ = 0;
  bool negative_ = false;
};

}  // namespace pgolf
