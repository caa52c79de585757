// For each row of a matrix the earlier row that predicts it best: rows of rare tokens are near copies of each other.
#pragma once

#include <cstdint>
#include <vector>

namespace pgolf {

struct Match {
  int32_t row = 0;
  int32_t eighths = 0;  // of that row's values; 0: the row has no match
};

constexpr int match_bits = 4;  // eighths are below 1 << match_bits
constexpr int most_eighths = 9;

// Bits that name one of the rows before row `row`.
inline int row_bits(int64_t row) {
  int bits = 0;
  while (row >> bits) ++bits;
  return bits;
}

// One match for each row, or nothing where a look at some rows says that it does not pay. Any answer makes a right
// stream; this one is the same on every machine.
std::vector<Match> match_rows(const int8_t* values, int64_t rows, int64_t cols);

}  // namespace pgolf
