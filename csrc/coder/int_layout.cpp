#include "coder/int_layout.h"

#include <algorithm>

namespace pgolf {

std::vector<std::vector<Plane>> strips_of(const std::vector<IntTensor>& tensors, int8_t* values) {
  std::vector<std::vector<Plane>> strips;
  int64_t room = 0;
  auto add = [&](Plane plane) {
    if (room <= 0) {
      strips.emplace_back();
      room = strip_values;
      plane.previous = nullptr;
    }
    strips.back().push_back(plane);
    room -= plane.count;
  };
  const auto at_place = [=](int64_t place) { return values ? values + place : nullptr; };
  int index = 0;
  int64_t begin = 0;
  for (const IntTensor& tensor : tensors) {
    const int64_t all = tensor.values();
    if (all > 0 && tensor.low < tensor.high) {
      const bool whole = tensor.rows * tensor.cols < fewest_matrix_values;
      const int64_t matrix = whole ? all : tensor.rows * tensor.cols;
      const int64_t cols = std::min(tensor.cols, most_plane_columns);
      const int64_t most = std::max<int64_t>(strip_values / cols, 1) * cols;  // of a plane: whole rows
      for (int64_t at = 0; at < all; at += matrix)
        for (int64_t from = 0; from < matrix; from += most) {
          const int64_t first = begin + at + from;
          const int8_t* previous = at > 0 && matrix <= most ? at_place(first - matrix) : nullptr;
          add({at_place(first), previous, std::min(most, matrix - from), cols, tensor.low, tensor.high, index});
        }
    }
    begin += all;
    ++index;
  }
  return strips;
}

int64_t values_of(const std::vector<Plane>& strip) {
  int64_t total = 0;
  for (const Plane& plane : strip) total += plane.count;
  return total;
}

}  // namespace pgolf
