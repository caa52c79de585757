#include <algorithm>
#include <memory>

#include "coder/int_coder.h"
#include "coder/mix_model.h"
#include "coder/range_coder.h"

namespace pgolf {
namespace {

// The model can say 0 of a plane that has none, where a payload is damaged.
bool is_within_bounds(const Plane& plane) {
  int8_t least = plane.values[0], most = least;
  for (int64_t i = 0; i < plane.count; ++i) {
    least = std::min(least, plane.values[i]);
    most = std::max(most, plane.values[i]);
  }
  return least >= plane.low && most <= plane.high;
}

}  // namespace

std::vector<uint8_t> encode_mix(const std::vector<Plane>& strip, int trellis_states) {
  std::vector<uint8_t> payload;
  RangeEncoder coder(payload);
  const auto model = std::make_unique<MixModel<RangeEncoder>>(coder, trellis_states);
  for (const Plane& plane : strip) {
    const bool whole_rows = plane.count % plane.cols == 0;
    model->matrix(plane, whole_rows ? match_rows(plane.values, plane.count / plane.cols, plane.cols)
                                    : std::vector<Match>{});
  }
  coder.finish();
  return payload;
}

bool decode_mix(const uint8_t* payload, size_t size, const std::vector<Plane>& strip, int trellis_states) {
  RangeDecoder coder(payload, size);
  const auto model = std::make_unique<MixModel<RangeDecoder>>(coder, trellis_states);
  for (const Plane& plane : strip)
    if (!model->matrix(plane, {}) || !is_within_bounds(plane)) return false;
  return coder.at_end();
}

}  // namespace pgolf
