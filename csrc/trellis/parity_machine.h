// The state machine of trellis-coded quantisation: which of two quantisers a value belongs to, from the parities before
// it in its row. Every row starts in state 0. Without a trellis all values are quantiser 0's.
#pragma once

#include <cstdint>

namespace pgolf {

class ParityMachine {
 public:
  explicit ParityMachine(int states) : states_(states) {}
  void restart() { state_ = 0; }
  int quantiser() const { return states_ == 8 ? state_ & 1 : state_ >> 1; }
  void advance(int value) {
    static constexpr uint8_t four[4][2] = {{0, 2}, {2, 0}, {1, 3}, {3, 1}};
    static constexpr uint8_t eight[8][2] = {{0, 2}, {5, 7}, {1, 3}, {6, 4}, {2, 0}, {4, 6}, {3, 1}, {7, 5}};
    if (states_ != 0) state_ = states_ == 8 ? eight[state_][value & 1] : four[state_][value & 1];
  }

 private:
  int states_;
  int state_ = 0;
};

}  // namespace pgolf
