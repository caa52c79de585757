// The search of trellis.cpp for one width of vectors: included there once a level, inside a namespace of its own, with
// PGOLF_LANES (8 or 16) and PGOLF_TARGET (the level's function attribute) defined and these given for the two vector
// types: pick (lanes by number), look_up (floats of a table) and differing (a bit for each lane).
//
// A "bundle" is as many rows as fit one vector, a lane for each state of each row. A "group" is 16 rows whose bundles
// take turns, so that a panel of the factor is read once for all of them. Sums are made in the order of the columns,
// each product rounded, so every level gives the same bits.

// Floats of one bundle are [columns][lanes], of one group [rows][columns].
template <int S>
struct Bundle {
  static constexpr int rows = PGOLF_LANES / S;
  float *error, *path;  // of every survivor: its own error at a column; the error on the way to it
  int32_t* step;        // of every survivor: index << 4 | the lane that it came from
  Floats cost, weight;
  int64_t decided[rows];  // columns up to here are the same for all survivors of the row
  int64_t open;           // the smallest of them
};

struct Quantisers {  // by lane
  Floats offset;     // 0 or 1
  Ints table;        // where the rate of index 0 is
  Ints even, odd;    // the lane whose even, whose odd index leads here
  Ints first;        // the row's first lane
};

template <int S>
PGOLF_TARGET Quantisers quantisers(int limit) {
  const Machine& m = machine(S);
  Quantisers q;
  for (int lane = 0; lane < PGOLF_LANES; ++lane) {
    const int state = lane % S, start = lane - state;
    q.offset[lane] = m.quantiser[state];
    q.table[lane] = m.quantiser[state] * (2 * limit + 3) + limit + 1;
    q.even[start + m.next[state][0]] = lane;
    q.odd[start + m.next[state][1]] = lane;
    q.first[lane] = start;
  }
  return q;
}

// base[row][block] -= sum over columns p < count of history[row][p] * panel[p][block], for `R` rows.
template <int R>
PGOLF_TARGET void subtract_decided(float* base, const float* history, int64_t stride, const float* panel, int64_t count) {
  constexpr int vectors = block / PGOLF_LANES;
  Floats sum[R][vectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < vectors; ++v) sum[r][v] = load(base + r * block + v * PGOLF_LANES);
  for (int64_t p = 0; p < count; ++p) {
    for (int v = 0; v < vectors; ++v) {
      const Floats u = load(panel + p * block + v * PGOLF_LANES);
      for (int r = 0; r < R; ++r) sum[r][v] -= history[r * stride + p] * u;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < vectors; ++v) store(base + r * block + v * PGOLF_LANES, sum[r][v]);
}

// residual[block][lanes] from base, less what the survivors' own ways through the open columns have pushed on.
template <int S>
PGOLF_TARGET void spread(const Bundle<S>& bundle, const float* base, const float* panel, int64_t start, float* residual) {
  constexpr int tile = PGOLF_LANES;
  for (int at = 0; at < block; at += tile) {
    Floats sum[tile];
    for (int i = 0; i < tile; ++i)
      for (int lane = 0; lane < PGOLF_LANES; ++lane) sum[i][lane] = base[lane / S * block + at + i];
    for (int64_t p = bundle.open; p < start; ++p) {
      const Floats e = load(bundle.path + p * PGOLF_LANES);
      for (int i = 0; i < tile; ++i) sum[i] -= e * panel[p * block + at + i];
    }
    for (int i = 0; i < tile; ++i) store(residual + (at + i) * PGOLF_LANES, sum[i]);
  }
}

// One column for all survivors: the cheapest arrival at each state. Fills error and step, moves cost on.
template <int S>
PGOLF_TARGET inline Floats advance(Bundle<S>& bundle, const Quantisers& q, Floats x, float inverse, const float* rate,
                                   int limit, int64_t column, Ints& parent) {
  constexpr float to_whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest, half to even
  const Floats zero = {}, infinite = zero + INFINITY;
  const Ints negative = x < zero;
  const Floats y = negative ? -x : x;
  Floats m = (y + q.offset) * 0.5f;
  m = m < static_cast<float>(limit) ? m : zero + static_cast<float>(limit);  // NaN becomes the limit too
  m = (m + to_whole) - to_whole;
  const Ints middle = __builtin_convertvector(m, Ints);
  const Floats two = zero + 2.0f;
  const Floats at_middle = m > 0.0f ? two * m - q.offset : zero;
  const Floats at_inner = m > 1.0f ? two * m - two - q.offset : (m > 0.0f ? zero : q.offset - two);
  const Floats at_outer = two * m + two - q.offset;
  const Ints inner = middle - 1, outer = middle + 1;

  const Floats e_middle = (y - at_middle) * inverse, e_inner = (y - at_inner) * inverse;
  const Floats e_outer = (y - at_outer) * inverse;
  const Floats r_middle = look_up(rate, q.table + ((middle ^ negative) - negative));
  const Floats r_inner = look_up(rate, q.table + ((inner ^ negative) - negative));
  const Floats r_outer = look_up(rate, q.table + ((outer ^ negative) - negative));
  const Floats c_middle = bundle.cost + (e_middle * e_middle + bundle.weight * r_middle);
  const Floats c_inner = bundle.cost + (e_inner * e_inner + bundle.weight * r_inner);
  Floats c_outer = bundle.cost + (e_outer * e_outer + bundle.weight * r_outer);
  c_outer = outer > limit ? infinite : c_outer;

  const Ints out = c_outer < c_inner;
  const Floats c_other = out ? c_outer : c_inner, e_other = out ? e_outer : e_inner;
  const Ints other = out ? outer : inner;
  const Ints is_odd = (middle & 1) != 0;
  const Floats c_even = pick(is_odd ? c_other : c_middle, q.even), c_odd = pick(is_odd ? c_middle : c_other, q.odd);
  const Floats signed_middle = negative ? -e_middle : e_middle, signed_other = negative ? -e_other : e_other;
  const Floats e_even = pick(is_odd ? signed_other : signed_middle, q.even);
  const Floats e_odd = pick(is_odd ? signed_middle : signed_other, q.odd);
  const Ints k_middle = (middle ^ negative) - negative, k_other = (other ^ negative) - negative;
  const Ints k_even = pick(is_odd ? k_other : k_middle, q.even), k_odd = pick(is_odd ? k_middle : k_other, q.odd);

  const Ints by_odd = c_odd < c_even;
  bundle.cost = by_odd ? c_odd : c_even;
  const Floats error = by_odd ? e_odd : e_even;
  parent = by_odd ? q.odd : q.even;
  store(bundle.error + column * PGOLF_LANES, error);
  store(bundle.step + column * PGOLF_LANES, (by_odd ? k_odd : k_even) * 16 + parent);
  return error;
}

// Writes down what row `row` of the bundle decided at columns [from, to), going back from `lane`.
template <int S>
PGOLF_TARGET void decide(const Bundle<S>& bundle, int64_t from, int64_t to, int lane, float* history, int8_t* indices) {
  for (int64_t p = to - 1; p >= from; --p) {
    const int32_t step = bundle.step[p * PGOLF_LANES + lane];
    history[p] = bundle.error[p * PGOLF_LANES + lane];
    if (indices) indices[p] = static_cast<int8_t>(step >> 4);
    lane = step & (PGOLF_LANES - 1);
  }
}

// Goes back from column `end` until the survivors of each row meet; what lies before is decided.
template <int S>
PGOLF_TARGET void settle(Bundle<S>& bundle, const Quantisers& q, int64_t end, float* history, int64_t stride,
                         int8_t* const* indices) {
  constexpr unsigned one_row = (1u << S) - 1;
  Ints lane = q.even ^ q.even, apart = lane - 1;
  for (int i = 0; i < PGOLF_LANES; ++i) lane[i] = i;
  bool met[Bundle<S>::rows] = {};
  int left = Bundle<S>::rows;
  for (int64_t p = end - 1; p >= bundle.open; --p) {
    const unsigned differ = differing(lane, pick(lane, q.first));
    for (int row = 0; row < Bundle<S>::rows; ++row) {
      if (met[row] || (differ >> (row * S) & one_row)) continue;
      met[row] = true;
      --left;
      for (int i = 0; i < S; ++i) apart[row * S + i] = 0;
      decide(bundle, bundle.decided[row], p + 1, lane[row * S], history + row * stride, indices[row]);
      bundle.decided[row] = std::max(bundle.decided[row], p + 1);
    }
    if (!left) break;
    const Floats e = pick(load(bundle.error + p * PGOLF_LANES), lane);
    store(bundle.path + p * PGOLF_LANES, apart ? e : Floats{});
    lane = pick(load(bundle.step + p * PGOLF_LANES), lane) & (PGOLF_LANES - 1);
  }
  bundle.open = bundle.decided[0];
  for (int row = 1; row < Bundle<S>::rows; ++row) bundle.open = std::min(bundle.open, bundle.decided[row]);
}

// All columns of the group of rows from `first`. `space` is group_floats(columns) floats.
template <int S>
PGOLF_TARGET void search_group(const TrellisSearch& s, const float* panels, const float* inverse, const float* rate,
                               int64_t first, float* space) {
  constexpr int bundles = group_rows * S / PGOLF_LANES, rows = Bundle<S>::rows;
  const int64_t columns = s.columns;
  const Quantisers q = quantisers<S>(s.limit);
  float* history = space;
  float* base = history + group_rows * columns;
  float* residual = base + group_rows * block;
  float* rest = residual + block * PGOLF_LANES;
  Bundle<S> group[bundles];
  std::fill(history, base, 0.0f);
  for (int b = 0; b < bundles; ++b) {
    Bundle<S>& bundle = group[b];
    bundle.error = rest;
    bundle.path = rest + columns * PGOLF_LANES;
    bundle.step = reinterpret_cast<int32_t*>(rest + 2 * columns * PGOLF_LANES);
    rest += 3 * columns * PGOLF_LANES;
    bundle.open = 0;
    for (int row = 0; row < rows; ++row) bundle.decided[row] = 0;
    for (int lane = 0; lane < PGOLF_LANES; ++lane) {
      const int64_t row = first + b * rows + lane / S;
      bundle.cost[lane] = lane % S ? INFINITY : 0.0f;
      bundle.weight[lane] = row < s.rows ? s.weight[row] : 0.0f;
    }
  }
  const int live = static_cast<int>(std::min<int64_t>(bundles, (s.rows - first + rows - 1) / rows));

  const float* panel = panels;
  for (int64_t start = 0; start < columns; start += block) {
    const int width = static_cast<int>(std::min<int64_t>(block, columns - start));
    for (int row = 0; row < group_rows; ++row)
      for (int i = 0; i < block; ++i)
        base[row * block + i] = first + row < s.rows && i < width ? s.target[(first + row) * columns + start + i] : 0.0f;
    constexpr int together = PGOLF_LANES / 4;
    for (int row = 0; row < live * rows; row += together)
      subtract_decided<together>(base + row * block, history + row * columns, columns, panel, start);

    for (int b = 0; b < live; ++b) {
      Bundle<S>& bundle = group[b];
      spread<S>(bundle, base + b * rows * block, panel, start, residual);
      for (int i = 0; i < width; ++i) {
        Ints parent;
        const Floats x = load(residual + i * PGOLF_LANES);
        const Floats error = advance<S>(bundle, q, x, inverse[start + i], rate, s.limit, start + i, parent);
        const float* u = panel + (start + i) * block;
        for (int t = i + 1; t < width; ++t) {
          float* its = residual + t * PGOLF_LANES;
          store(its, pick(load(its), parent) - error * u[t]);
        }
      }
      Floats least = bundle.cost;
      for (int lane = 0; lane < PGOLF_LANES; ++lane)
        for (int i = 0; i < S; ++i) least[lane] = std::min(least[lane], bundle.cost[lane / S * S + i]);
      bundle.cost -= least;
      int8_t* indices[rows];
      for (int row = 0; row < rows; ++row) {
        const int64_t at = first + b * rows + row;
        indices[row] = at < s.rows ? s.indices + at * columns : nullptr;
      }
      float* its_history = history + b * rows * columns;
      settle<S>(bundle, q, start + width, its_history, columns, indices);
      if (start + width < columns) continue;
      for (int row = 0; row < rows; ++row) {
        int lane = row * S;
        for (int i = row * S; i < (row + 1) * S; ++i) lane = bundle.cost[i] < bundle.cost[lane] ? i : lane;
        decide(bundle, bundle.decided[row], columns, lane, its_history + row * columns, indices[row]);
      }
    }
    panel += (start + width) * block;
  }
}
