// The two coders of a strip of small integers: "mix", small, and "static", fast.
//
// The decoders never read outside the payload and never write outside the planes; they return whether the payload was
// used up exactly. Zeros may follow it as padding. `trellis_states` is 0, 4 or 8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "coder/int_layout.h"

namespace pgolf {

std::vector<uint8_t> encode_mix(const std::vector<Plane>& strip, int trellis_states);
bool decode_mix(const uint8_t* payload, size_t size, const std::vector<Plane>& strip, int trellis_states);

std::vector<uint8_t> encode_static(const std::vector<Plane>& strip, int trellis_states);
bool decode_static(const uint8_t* payload, size_t size, const std::vector<Plane>& strip, int trellis_states);

}  // namespace pgolf
