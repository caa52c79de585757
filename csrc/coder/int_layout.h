// How the integers of one or more tensors are cut: into planes, one matrix each as a rule, and these into strips that
// are coded independently of each other, so that threads can share the work. Depends on the shapes alone.
#pragma once

#include <cstdint>
#include <vector>

namespace pgolf {

constexpr int64_t strip_values = int64_t{1} << 22;    // a strip ends with the plane that makes it this long
constexpr int64_t most_plane_columns = 1 << 16;       // a wider matrix is read as one long row, cut into such rows
constexpr int64_t fewest_matrix_values = 1 << 10;     // smaller matrices of a bank are read as one

struct IntTensor {
  int64_t count, rows, cols;  // a bank of `count` matrices
  int low, high;              // bounds of the values
  int64_t values() const { return count * rows * cols; }
};

struct Plane {
  int8_t* values;
  const int8_t* previous;  // the matrix before this one, where it is in the same tensor and strip, or null
  int64_t count, cols;     // `count` > 0 values in rows of `cols`; the last row may be shorter
  int low, high;           // bounds of the values, low < high
  int tensor;
};

// The strips of `tensors`, whose values lie one after another from `values`, which is null where only the counts are
// wanted. Tensors that hold no values, or one over and over, have no planes.
std::vector<std::vector<Plane>> strips_of(const std::vector<IntTensor>& tensors, int8_t* values);

int64_t values_of(const std::vector<Plane>& strip);

}  // namespace pgolf
