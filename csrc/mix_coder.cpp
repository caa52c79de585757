#include <memory>

#include "int_coder.h"
#include "mix_model.h"
#include "range_coder.h"

namespace pgolf {

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
    if (!model->matrix(plane, {})) return false;
  return coder.at_end();
}

}  // namespace pgolf
