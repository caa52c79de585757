// Vectors of rows and the sums of products that GPTQ is made of, for one instruction set: each_level.h includes this
// once for each. A strip is 32 rows, stored as [column][row].

constexpr int vec_floats = sizeof(Vec) / sizeof(float);
constexpr int panel = 8;  // columns that are worked on together

PGOLF_TARGET inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PGOLF_TARGET inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

PGOLF_TARGET inline Vec all(float value) { return value - Vec{}; }

// sum[j][lane] += x[lane] * p[j * stride] for a tile of the registers.
template <int stride>
PGOLF_TARGET inline void add_product(Vec (&sum)[tile_columns][tile_vecs], const float* x, const float* p) {
  Vec rows[tile_vecs];
  for (int v = 0; v < tile_vecs; ++v) rows[v] = load(x + v * vec_floats);
  for (int j = 0; j < tile_columns; ++j) {
    const Vec factor = all(p[j * stride]);
    for (int v = 0; v < tile_vecs; ++v) sum[j][v] = fused(rows[v], factor, sum[j][v]);
  }
}

// Sums of products for the 32 rows of a strip and the 8 columns of a panel: out[j][lane]. `add(tile, lane, column)`
// adds the products of one register tile.
template <class Add>
PGOLF_TARGET inline void tiles(float* out, Add add) {
  for (int lane = 0; lane < strip_rows; lane += tile_vecs * vec_floats)
    for (int column = 0; column < panel; column += tile_columns) {
      Vec sum[tile_columns][tile_vecs] = {};
      add(sum, lane, column);
      for (int j = 0; j < tile_columns; ++j)
        for (int v = 0; v < tile_vecs; ++v) store(out + (column + j) * strip_rows + lane + v * vec_floats, sum[j][v]);
    }
}
