// GPTQ of a bank of float32 matrices: the factor of the Hessians, then the columns rounded from the last to the first.
// The mathematics is told in pgolf/ops/gptq.py.
//
// A factor is lower triangular with ones on its diagonal, and stored in strips: strip r holds rows [32 r, 32 r + 32) as
// [column][row of the strip], for the columns 0 to 32 r + 31. Rows and columns past n are those of the identity. What
// lies above the diagonal is unspecified, the ones on it are rounded; neither is read. A strip is what both loops here
// read 32 rows at a time, one behind the other.
//
// Results depend on the level of the CPU by rounding only (fused multiply-add at avx2 and above, the same bits there),
// and on nothing else: not on the number of threads, nor on the other matrices of the bank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pgolf {

constexpr int64_t strip_rows = 32;

inline int64_t strip_count(int64_t n) { return (n + strip_rows - 1) / strip_rows; }

// Where strip r begins, in floats.
inline int64_t strip_offset(int64_t r) { return strip_rows * strip_rows * (r * (r + 1) / 2); }

// Floats of one factor.
inline int64_t factor_size(int64_t n) { return strip_offset(strip_count(n)); }

// A bank of symmetric matrices, [count][n][n].
struct Hessians {
  const float* data;
  int64_t count, n;
};

// What is wrong with the numbers of a matrix.
enum Flaw : uint8_t { not_finite = 1, negative_diagonal = 2, lopsided = 4 };

// flaws: [count], a sum of Flaw for each matrix; lopsided where |h - hᵀ| is above `tolerance` times the largest |h|.
void check_hessians(const Hessians& hessians, float tolerance, uint8_t* flaws, int threads);

// Factors the matrices that `which` lists, with column order[i] of a matrix in place i and its diagonal replaced.
// order, diagonal: [count][n], diagonal in the matrix's own order; factors: [count][factor_size(n)].
// failed: [length], 1 where a matrix is not positive definite, whose factor then is unspecified.
void factor_hessians(const Hessians& hessians, const int64_t* order, const float* diagonal, const int64_t* which,
                     int64_t length, float* factors, uint8_t* failed, int threads);

struct Rounding {
  const float* weight;    // [count][rows][n]
  const int64_t* order;   // [count][n]
  const float* factors;   // [count][factor_size(n)]
  const float* scale;     // [count][rows]
  int8_t* values;         // [count][rows][n]
  int64_t count, rows, n;
  int limit;              // values are in -limit..limit
};

void round_columns(const Rounding& bank, int threads);

// On the GPU, the columns start..start+width-1 of every matrix, width at most 128, from the last to the first; the
// caller does the rest by products. All in factored order, device addresses; work, values, difference hold a column's
// rows side by side: work [count][n][rows], in: weight plus what columns behind the block push, values
// [count][n][rows].
struct BlockRounding {
  const float* weight;  // [count][n][rows]
  const float* work;    // [count][n][rows]
  const float* factor;  // [count][n][n], lower triangular, ones on the diagonal
  const float* scale;   // [count][rows]
  int8_t* values;       // [count][n][rows]
  float* difference;    // [count][width][rows], weight - scale * values
  int64_t count, rows, n, start;
  int width, limit;
};

// Launches and returns at once: "" or what CUDA said was wrong.
std::string round_block_cuda(const BlockRounding& block, void* stream);

}  // namespace pgolf
