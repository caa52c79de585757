#include "coder/match_rows.h"

#include <algorithm>

#include "coder/logistic.h"

namespace pgolf {
namespace {

constexpr int64_t most_rows = 1 << 16, fewest_columns = 16, most_columns = 1 << 14;
constexpr int64_t sampled_rows = 48;
constexpr int64_t most_work = int64_t{1} << 36;  // products
constexpr int64_t chunk = 32, kept = 4;          // the first look takes one chunk of columns out of four

int64_t product(const int16_t* a, const int16_t* b, int64_t count) {
  int64_t total = 0;
  for (int64_t at = 0; at < count; at += chunk) {
    int32_t sum = 0;  // below 32 * 2^14
    for (int64_t i = 0; i < chunk; ++i) sum += a[at + i] * b[at + i];
    total += sum;
  }
  return total;
}

// The rows as 16-bit numbers, their columns filled up with zeros; a quarter of the chunks first.
class Rows {
 public:
  Rows(const int8_t* values, int64_t rows, int64_t cols) : width_((cols + chunk - 1) / chunk * chunk), cols_(cols) {
    std::vector<int64_t> order;
    const int64_t chunks = width_ / chunk;
    for (int64_t pass = 0; pass < 4; ++pass)
      for (int64_t i = pass; i < chunks; i += 4) order.push_back(i);
    head_ = (chunks + 3) / 4 * chunk;
    wide_.assign(rows * width_, 0);
    energy_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < chunks; ++i)
        for (int64_t j = order[i] * chunk; j < std::min(cols, (order[i] + 1) * chunk); ++j)
          wide_[r * width_ + i * chunk + j - order[i] * chunk] = values[r * cols + j];
      energy_[r] = product(row(r), row(r), width_);
      head_energy_.push_back(product(row(r), row(r), head_));
    }
  }

  // The best match of row r, and the bits that it saves.
  Match best(int64_t r, int32_t& saved) const {
    struct Candidate {
      int64_t score, row;
    };
    Candidate found[kept] = {};
    for (int64_t y = 0; y < r; ++y) {
      const int64_t xy = product(row(r), row(y), head_);
      if (xy <= 0) continue;
      const int64_t score = xy * xy / (head_energy_[y] + 1);
      if (score <= found[kept - 1].score) continue;
      int at = kept - 1;
      for (; at > 0 && found[at - 1].score < score; --at) found[at] = found[at - 1];
      found[at] = {score, y};
    }
    Match match;
    int64_t least = energy_[r];
    for (const Candidate& each : found) {
      if (each.score == 0) continue;
      const int64_t xy = product(row(r), row(each.row), width_), yy = energy_[each.row];
      const int64_t eighths = std::min<int64_t>((8 * xy + yy / 2) / (yy + 1), most_eighths);
      if (eighths <= 0) continue;
      const int64_t rest = energy_[r] - (16 * eighths * xy - eighths * eighths * yy) / 64;
      if (rest < least) {
        least = rest;
        match = {static_cast<int32_t>(each.row), static_cast<int32_t>(eighths)};
      }
    }
    // log2 of the standard deviations' ratio a value; a rounded value's has 1/12 of a step more
    const LogisticTables& tables = logistic_tables();
    auto log = [&](int64_t energy) {
      uint64_t x = static_cast<uint64_t>(std::max<int64_t>(energy, 0)) * 12 + static_cast<uint64_t>(cols_);
      int shift = 0;
      for (; x >> 31; x >>= 1) ++shift;
      return log2_of(tables, static_cast<uint32_t>(x)) + shift * 1024;
    };
    saved = static_cast<int32_t>((log(energy_[r]) - log(least)) * cols_ / 2048) - row_bits(r) - match_bits;
    return match;
  }

 private:
  const int16_t* row(int64_t r) const { return wide_.data() + r * width_; }

  int64_t width_, cols_, head_;
  std::vector<int16_t> wide_;
  std::vector<int64_t> energy_, head_energy_;
};

}  // namespace

std::vector<Match> match_rows(const int8_t* values, int64_t rows, int64_t cols) {
  if (rows < 4 || rows > most_rows || cols < fewest_columns || cols > most_columns) return {};
  if (rows * rows / 2 * cols / 4 > most_work) return {};
  const Rows all(values, rows, cols);
  int64_t sum = 0;
  int32_t saved = 0;
  const int64_t samples = std::min(rows, sampled_rows);
  for (int64_t i = 0; i < samples; ++i) {
    all.best((2 * i + 1) * rows / (2 * samples), saved);
    sum += std::max(saved, 0);
  }
  if (sum < 4 * samples) return {};
  std::vector<Match> matches(rows);
  for (int64_t r = 1; r < rows; ++r) {
    const Match match = all.best(r, saved);
    if (saved > 0) matches[r] = match;
  }
  return matches;
}

}  // namespace pgolf
