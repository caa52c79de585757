// The state machine of trellis-coded quantisation: which of two quantisers a value belongs to, from the parities before
// it in its row. Every row starts in state 0.
#pragma once

#include <cstdint>

namespace pgolf {

// A state has a quantiser, and the parity of the index leads to the next state, in which the next column is quantised.
struct Machine {
  uint8_t quantiser[8];
  uint8_t next[8][2];  // by parity
};

inline constexpr Machine machines[] = {  // of 4 and of 8 states
    {{0, 0, 1, 1}, {{0, 2}, {2, 0}, {1, 3}, {3, 1}}},
    {{0, 1, 0, 1, 0, 1, 0, 1}, {{0, 2}, {5, 7}, {1, 3}, {6, 4}, {2, 0}, {4, 6}, {3, 1}, {7, 5}}},
};

inline bool is_trellis(int64_t states) { return states == 4 || states == 8; }

// `states` is that of a trellis.
inline const Machine& machine(int states) { return machines[states == 8]; }

// A machine at work. Of 0 states, without a trellis, all values are quantiser 0's.
class ParityMachine {
 public:
  explicit ParityMachine(int states) : machine_(states ? &machine(states) : nullptr) {}
  void restart() { state_ = 0; }
  int quantiser() const { return machine_ ? machine_->quantiser[state_] : 0; }
  void advance(int value) {
    if (machine_) state_ = machine_->next[state_][value & 1];
  }

 private:
  const Machine* machine_;
  int state_ = 0;
};

}  // namespace pgolf
