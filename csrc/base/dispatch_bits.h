// From a width known at run time to code compiled for that width.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace pgolf {

// Calls work(std::integral_constant<int, bits>{}). Throws std::invalid_argument unless 1 <= bits <= 8.
template <class Work>
auto dispatch_bits(int bits, Work work) {
  switch (bits) {
    case 1: return work(std::integral_constant<int, 1>{});
    case 2: return work(std::integral_constant<int, 2>{});
    case 3: return work(std::integral_constant<int, 3>{});
    case 4: return work(std::integral_constant<int, 4>{});
    case 5: return work(std::integral_constant<int, 5>{});
    case 6: return work(std::integral_constant<int, 6>{});
    case 7: return work(std::integral_constant<int, 7>{});
    case 8: return work(std::integral_constant<int, 8>{});
  }
  throw std::invalid_argument("bits is " + std::to_string(bits) + ", accepted are 1 to 8");
}

}  // namespace pgolf
