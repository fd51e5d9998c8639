// The walk over the tiles of a matrix, which is the same for every instruction set. Included by each file of kernels inside
// its target pragma and its unnamed namespace. A set of kernels `Set` has a `Vector`, `zero()`, the number of sums that
// one row of x takes in a tile, `add` (blocks of a tile times rows of x, added to sums), `rows` (sums to outputs), whether it
// has kernels of 8 of 16 columns and of dense rows, and the number of parts of a wide matrix of floats that it reads side by side.

// `share` tiles of each of T parts of the matrix, the first of them from tile `first` on. The T parts are read side by side,
// so that each load of x serves T tiles while every part is one stream. `in_parts` is true for what is left over, too: it
// decides the order of sums, which may not depend on how a matrix is shared out.
template <class Set, int n, int values, int BT, int T, bool in_parts>
INLINE void multiply_parts(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                           int64_t share) {
  static_assert(T == 1 || (BT == 1 && in_parts), "several parts are for one wide row of x");
  constexpr int kTileRows = n == 1 ? 8 : 4, kSums = Set::template num_sums<n, values>();
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), stride = share * blocks * bytes;
  // A part of x that stays in the first-level cache while the rows of a tile pass.
  const int64_t x_bytes = x.batch * of.padded() * (values < kInt8 ? 4 : 1);
  const int64_t part = x.batch == 1 || x_bytes <= 20480 ? blocks : x.batch >= 16 ? 4 : 8;
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * blocks * bytes);
  for (int64_t tile = first; tile < first + share; tile++) {
    typename Set::Vector sums[BT == 1 ? T : kMaxBatch / BT][kSums * BT];
    for (int64_t t = 0; t < T * x.batch / BT; t++)
      for (auto& sum : sums[t]) sum = Set::zero();
    for (int64_t k = 0; k < blocks; k += part)
      for (int64_t t = 0; t < x.batch / BT; t++)
        Set::template add<n, values, BT, T, in_parts>(of, data + (tile * blocks + k) * bytes, stride,
                                                      smaller(part, blocks - k), x, t * BT, k, sums[t]);
    for (int j = 0; j < T; j++) {
      const int64_t row = (tile + j * share) * kTileRows, count = smaller(kTileRows, of.rows - row);
      for (int64_t b = 0; b < x.batch; b++) {
        float rows[kTileRows];
        Set::template rows<n, values>(sums[j + b / BT], BT, int(b % BT), rows);
        for (int64_t r = 0; r < count; r++)
          y[b * ldy + row + r] = values == kInt8 ? rows[r] * row_scales[row + r] : rows[r];
      }
    }
  }
}

constexpr int64_t kWideColumns = 2048;  // a longer row of x does not stay in the first-level cache beside the weights

template <class Set, int n, int values, int BT>
void multiply_tiles(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                    int64_t last) {
  if constexpr (BT == 1 && values < kInt8 && Set::kParts > 1) {
    if (of.padded() > kWideColumns) {
      const int64_t share = (last - first) / Set::kParts, rest = (last - first) % Set::kParts;
      multiply_parts<Set, n, values, 1, Set::kParts, true>(of, data, x, y, ldy, first, share);
      return multiply_parts<Set, n, values, 1, 1, true>(of, data, x, y, ldy, last - rest, rest);
    }
  }
  multiply_parts<Set, n, values, BT, 1, false>(of, data, x, y, ldy, first, last - first);
}

template <class Set, int n, int values>
Multiply for_batch(int64_t batch) {
  if (batch == 1) return multiply_tiles<Set, n, values, 1>;
  if (batch == 2) return multiply_tiles<Set, n, values, 2>;
  if constexpr (n > 0 && Set::kMostRows == 8)
    if (batch % 8 == 0) return multiply_tiles<Set, n, values, 8>;
  return multiply_tiles<Set, n, values, 4>;
}

template <class Set, int values>
Multiply for_pattern(const Header& of, int64_t batch) {
  if constexpr (values != kInt4 && Set::kHasHalves)
    if (panel_kind(of) > 2) return for_batch<Set, 8, values>(batch);
  if constexpr (Set::kHasDense)
    if (of.n == 0) return for_batch<Set, 0, values>(batch);
  return of.n == 1 ? for_batch<Set, 1, values>(batch) : for_batch<Set, 2, values>(batch);
}

template <class Set>
Multiply for_values(const Header& of, int64_t batch) {
  switch (of.values) {
    case kBFloat16: return for_pattern<Set, kBFloat16>(of, batch);
    case kFloat16: return for_pattern<Set, kFloat16>(of, batch);
    case kFloat32: return for_pattern<Set, kFloat32>(of, batch);
    case kInt8: return for_pattern<Set, kInt8>(of, batch);
    default: return for_pattern<Set, kInt4>(of, batch);
  }
}

constexpr int64_t kChunkBytes = 1 << 16;  // of weights that are multiplied by several batches of x in turn

template <class Set>
void multiply_in_batches(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                         int64_t last) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t width = of.padded(), blocks = of.blocks(), fit = kChunkBytes / (blocks * of.panel_bytes());
  const int64_t chunk = x.batch <= kMaxBatch ? last - first : fit < 1 ? 1 : fit;
  for (; first < last; first += chunk)
    for (int64_t b = 0; b < x.batch; b += kMaxBatch) {
      const int64_t at = b * blocks;
      const Activations some{x.wide + b * width, x.narrow ? x.narrow + b * width : nullptr, x.scales ? x.scales + at : nullptr, nullptr,
                             smaller(kMaxBatch, x.batch - b)};
      for_values<Set>(of, some.batch)(of, data, some, y + b * ldy, ldy, first, smaller(first + chunk, last));
    }
}

// The kernel of a matrix for `batch` rows of x.
template <class Set>
Kernel kernel_of(const Header& of, int64_t batch, Form integers) {
  return {of.values < kInt8 ? as_floats : integers, multiply_in_batches<Set>, batch <= 2 ? 1 : 4};
}
