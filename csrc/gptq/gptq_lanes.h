// The loops of gptq.cpp for one instruction set; see each_level.h.

// Columns [first, first + 32) of the rows of a strip, of which `strip` holds the Hessian in these columns, the factor
// in those before. `own` is the strip of the rows first..first+31, `scaled` the same with each column times its pivot,
// all pivots lie in `pivots`. For own itself (is_diagonal) scaled and the pivots from `first` on are written; then
// false when one is not positive.
template <bool is_diagonal>
PGOLF_TARGET bool factor_strip(float* strip, const float* own, float* scaled, float* pivots, int64_t first) {
  alignas(64) float sum[panel * strip_rows];
  if (is_diagonal)
    for (int64_t k = 0; k < first; ++k)
      for (int lane = 0; lane < strip_rows; lane += vec_floats)
        store(scaled + k * strip_rows + lane, load(own + k * strip_rows + lane) * all(pivots[k]));
  for (int inside = 0; inside < strip_rows; inside += panel) {
    const int64_t start = first + inside;
    tiles(sum, [&](auto& tile, int lane, int column) PGOLF_TARGET {
      for (int64_t k = 0; k < start; ++k)
        add_product<1>(tile, strip + k * strip_rows + lane, scaled + k * strip_rows + inside + column);
    });
    for (int j = 0; j < panel; ++j) {
      float* column = strip + (start + j) * strip_rows;
      float* rest = sum + j * strip_rows;
      for (int lane = 0; lane < strip_rows; lane += vec_floats) {
        Vec s = load(column + lane) - load(rest + lane);
        for (int i = 0; i < j; ++i)
          s = fused(load(sum + i * strip_rows + lane), all(-own[(start + i) * strip_rows + inside + j]), s);
        store(rest + lane, s);
      }
      if (is_diagonal) {
        const float pivot = rest[inside + j];
        using Limits = std::numeric_limits<float>;
        if (!(pivot >= Limits::min() && pivot <= Limits::max())) return false;  // its inverse is finite too
        pivots[start + j] = pivot;
        std::memcpy(scaled + (start + j) * strip_rows, rest, strip_rows * sizeof(float));
      }
      const Vec over = all(1 / pivots[start + j]);
      for (int lane = 0; lane < strip_rows; lane += vec_floats) store(column + lane, load(rest + lane) * over);
    }
  }
  return true;
}

// Rounds the columns of 32 rows from the last to the first. x: [n up to a full strip][32], in: the weights, out: the
// weights minus their rounded values; values likewise.
PGOLF_TARGET inline void round_strip(const float* factor, float* x, int8_t* values, const float* scale, int64_t strips,
                                     int limit) {
  alignas(64) float sum[panel * strip_rows];
  const Vec most = all(static_cast<float>(limit)), least = all(static_cast<float>(-limit));
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits behind the point, rounded half to even
  for (int64_t own = strips - 1; own >= 0; --own)
    for (int inside = strip_rows - panel; inside >= 0; inside -= panel) {
      const int64_t start = own * strip_rows + inside;
      const float* mine = factor + strip_offset(own) + start * strip_rows;  // columns of this panel, rows of this strip
      tiles(sum, [&](auto& tile, int lane, int column) PGOLF_TARGET {
        for (int64_t r = strips - 1; r > own; --r) {
          const float* p = factor + strip_offset(r) + (start + column) * strip_rows;
          for (int k = strip_rows - 1; k >= 0; --k)
            add_product<strip_rows>(tile, x + (r * strip_rows + k) * strip_rows + lane, p + k);
        }
        for (int k = strip_rows - 1; k >= inside + panel; --k)
          add_product<strip_rows>(tile, x + (own * strip_rows + k) * strip_rows + lane, mine + column * strip_rows + k);
      });
      for (int j = panel - 1; j >= 0; --j)
        for (int lane = 0; lane < strip_rows; lane += vec_floats) {
          float* at = x + (start + j) * strip_rows + lane;
          const Vec weight = load(at), s = load(scale + lane);
          Vec q = (weight + load(sum + j * strip_rows + lane)) / s;
          q = q < most ? q : most;
          q = q > least ? q : least;
          q = (q + magic) - magic;
          const Vec difference = weight - q * s;
          store(at, difference);
          for (int v = 0; v < vec_floats; ++v) values[(start + j) * strip_rows + lane + v] = static_cast<int8_t>(q[v]);
          for (int i = 0; i < j; ++i) {
            float* other = sum + i * strip_rows + lane;
            store(other, fused(difference, all(mine[i * strip_rows + inside + j]), load(other)));
          }
        }
    }
}

// The largest bits of |a| and of |a - aᵀ| over 32 columns from `column` on of the rows [row, last). As integers the
// bits are in the order of the numbers, infinity and NaN above all.
PGOLF_TARGET inline void survey(const float* h, int64_t n, int64_t row, int64_t last, int64_t column, int64_t width,
                                uint32_t& largest, uint32_t& lopsided) {
  float turned[strip_rows];
  for (; row < last; ++row) {
    for (int64_t k = 0; k < width; ++k) turned[k] = h[(column + k) * n + row];
    for (int64_t k = 0; k < width; ++k) {
      const float value = h[row * n + column + k], difference = value - turned[k];
      uint32_t bits, other, gap;
      std::memcpy(&bits, &value, 4), std::memcpy(&other, &turned[k], 4), std::memcpy(&gap, &difference, 4);
      largest = std::max(largest, std::max(bits & 0x7fffffff, other & 0x7fffffff));
      lopsided = std::max(lopsided, gap & 0x7fffffff);
    }
  }
}
