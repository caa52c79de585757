// The loops of gptq_refine.cpp for one instruction set; see each_level.h.

// Rows of x (a strip, [n][32]) times a symmetric matrix, 8 columns of it in `packed` as [n][8]: out[lane * width +
// column].
PGOLF_TARGET inline void multiply_panel(const float* x, const float* packed, int64_t n, float* out, int64_t width) {
  alignas(64) float sum[panel * strip_rows];
  tiles(sum, [&](auto& tile, int lane, int column) PGOLF_TARGET {
    for (int64_t k = 0; k < n; ++k) add_product<1>(tile, x + k * strip_rows + lane, packed + k * panel + column);
  });
  for (int64_t lane = 0; lane < strip_rows; ++lane)
    for (int j = 0; j < panel; ++j) out[lane * width + j] = sum[j * strip_rows + lane];
}

PGOLF_TARGET inline float total(Vec v) {
  float sum = 0;
  for (int i = 0; i < vec_floats; ++i) sum += v[i];
  return sum;
}

// One pass over the columns of a row; false when nothing was left to improve. q and pushed ((w - s q) H) have `width`
// floats, a multiple of 32, as has inverse (one over the diagonal, 0 in dead columns and past n).
PGOLF_TARGET inline bool sweep(const float* h, const float* inverse, int64_t n, int64_t width, float scale, int limit,
                               float step, float* q, float* pushed) {
  bool changed = false;
  const float bound = step * scale;
  for (int64_t chunk = 0; chunk < width; chunk += strip_rows)
    for (int64_t j = chunk; j < chunk + strip_rows; ++j) {
      int beyond = 0;
      if (j == chunk) {  // most chunks have nothing to change
        for (int64_t k = chunk; k < chunk + strip_rows; ++k) {
          const float moved = pushed[k] * inverse[k];
          beyond |= (moved > bound) | (moved < -bound);
        }
        if (!beyond) break;
      }
      const float moved = pushed[j] * inverse[j];
      if (!(moved > bound) && !(moved < -bound)) continue;
      const float most = limit - q[j], least = -limit - q[j];
      float change = std::min(std::max(moved / scale, least), most);  // whole bounds: rounding comes after
      change = (change + 12582912.0f) - 12582912.0f;
      if (change == 0) continue;
      q[j] += change;
      changed = true;
      const Vec less = all(-change * scale);
      const float* row = h + j * n;
      int64_t k = 0;
      for (; k + vec_floats <= n; k += vec_floats) store(pushed + k, fused(less, load(row + k), load(pushed + k)));
      for (; k < n; ++k) {
        float last[vec_floats] = {};
        last[0] = row[k];
        Vec old = all(pushed[k]);
        store(last, fused(less, load(last), old));
        pushed[k] = last[0];
      }
    }
  return changed;
}

// The sums of q * whole and q * pushed over a row.
PGOLF_TARGET inline void moments(const float* q, const float* whole, const float* pushed, int64_t width,
                                 float& of_whole, float& of_pushed) {
  Vec a = {}, b = {};
  for (int64_t k = 0; k < width; k += vec_floats) {
    a = fused(load(q + k), load(whole + k), a);
    b = fused(load(q + k), load(pushed + k), b);
  }
  of_whole = total(a), of_pushed = total(b);
}

// pushed = whole - ratio * (whole - pushed)
PGOLF_TARGET inline void rescale(const float* whole, float* pushed, int64_t width, float ratio) {
  for (int64_t k = 0; k < width; k += vec_floats)
    store(pushed + k, load(whole + k) - all(ratio) * (load(whole + k) - load(pushed + k)));
}
