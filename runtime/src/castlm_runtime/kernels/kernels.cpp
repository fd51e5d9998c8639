// Weights: the entry points with their checks, the threads, and the conversion of activations. table.cpp chooses the kernel, the
// `kernels_*.cpp`, `lanes_*.cpp` and their like have the fast ones, `plain.cpp` those that take any pattern and any processor.

#include <algorithm>

#include "api.h"
#include "plain.h"
#include "team.h"

namespace castlm {
namespace {

constexpr int64_t kWeightsPerThread = 1 << 16;  // fewer are multiplied sooner than a thread wakes

EACH_CPU void widen_bfloat16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = bfloat16_to_float(from[k]);
}
EACH_CPU void narrow_bfloat16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = float_to_bfloat16(from[k]);
}
int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }  // the next multiple

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
const bool is_intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
const bool is_intel = false;
#endif

}  // namespace castlm

using namespace castlm;

namespace {

int64_t data_bytes(const Header& of) {
  if (of.layout != kRows)
    return of.tiles() * (of.blocks() * of.panel_bytes() + (of.values == kInt8 ? 4 * of.tile_rows() : 0)) +
           (of.layout == kLanes ? kLanesSlack : 0);
  const int64_t scale_bytes = of.values == kInt8 ? 4 : of.values == kInt4 ? 2 * of.blocks() : 0;
  return of.rows * (of.kept_row_bytes() + of.mask_row_bytes() + scale_bytes) + 32;  // and room for a read past the end
}

// The header of a weight that an entry of the table takes; n:m of a file becomes dense where the entry does not keep it.
bool make_header(int32_t entry, int values, int n, int m, int64_t rows, int64_t columns, Header& of) {
  const int64_t limit = int64_t(1) << 31, most_weights = int64_t(1) << 48;  // whose bytes do not overflow
  if (rows < 1 || columns < 1 || rows >= limit || columns >= limit || rows > most_weights / columns) return false;
  if (m ? n < 1 || n >= m || columns % (m == 4 && n == 2 ? 2 : m) : n != 0) return false;
  const Entry* const found = entry_at(entry, values, n, m);
  if (!found) return false;
  if (found->expands) n = m = 0;
  const bool is_unsigned = values == kInt6 || (found->layout == kLanes && values >= kInt8 && found->level >= kAvx512);
  of = Header{kMagic, entry, found->layout, values, n, m, is_unsigned, rows, columns, 0};
  of.data_bytes = data_bytes(of);
  return true;
}

// The same for a weight of a file, in the wanted layout or the best one (-1). 1:2 becomes 2:4: each keeps the same bytes, and two groups
// of two columns are a group of four.
bool choose_header(int layout, int values, int n, int m, int64_t rows, int64_t columns, Header& of) {
  if (values < kBFloat16 || values > kInt6 || m < 0 || (m && columns % m)) return false;
  if (n == 1 && m == 2) n = 2, m = 4;
  return make_header(entry_for(layout, values, n, m), values, n, m, rows, columns, of);
}

// x (batch, columns) as fp32 (rows, padded columns): x itself where it is so.
const float* widen(const Header& of, const uint8_t* x, bool is_bfloat16, int64_t batch, int64_t rows) {
  const int64_t width = of.padded();
  if (!is_bfloat16 && rows == batch && width == of.columns) return reinterpret_cast<const float*>(x);
  float* wide = static_cast<float*>(scratch<1>(rows * width * 4));
  for (int64_t b = 0; b < rows; ++b) {
    float* to = wide + b * width;
    const int64_t filled = b < batch ? of.columns : 0;
    if (filled && is_bfloat16) widen_bfloat16(reinterpret_cast<const uint16_t*>(x) + b * of.columns, filled, to);
    if (filled && !is_bfloat16) std::memcpy(to, reinterpret_cast<const float*>(x) + b * of.columns, filled * 4);
    std::fill(to + filled, to + width, 0.0f);
  }
  return wide;
}

}  // namespace

bool castlm::read_header(const uint8_t* packed, int64_t bytes, Header& of) {
  if (!packed || bytes < kHeaderBytes) return false;
  Header found;
  std::memcpy(&found, packed, sizeof found);
  if (found.magic != kMagic || found.values < kBFloat16 || found.values > kInt6 || found.m < 0) return false;
  if (!make_header(found.entry, found.values, found.n, found.m, found.rows, found.columns, of)) return false;
  return found.data_bytes == of.data_bytes && bytes >= kHeaderBytes + of.data_bytes;
}

int castlm::multiply(const Product* products, int64_t count, const uint8_t* x, int is_bfloat16, int64_t batch, int64_t columns,
                     int threads) {
  if (batch < 1) return kBadSize;
  if (batch == 1) release_large_scratch();
  Header of{}, before{};
  Activations all{};
  for (int64_t i = 0; i < count; ++i, before = of) {
    const auto [packed, bytes, y, rows] = products[i];
    if (!read_header(packed, bytes, of) || of.rows != rows || of.columns != columns) return kBadSize;
    const Kernel kernel = kernel_for(of, batch, is_bfloat16);
    const int64_t filled = whole(batch, kernel.multiple_of_rows), ldy = whole(rows, kernel.multiple_of_outputs);
    if (i == 0 || !same_form(of, before)) {
      auto* const room = static_cast<uint8_t*>(scratch<2>(form_bytes(of, filled)));
      all = kernel.form(of, widen(of, x, is_bfloat16, batch, filled), filled, 0, filled, room);
    }
    const bool in_place = !is_bfloat16 && filled == batch && ldy == rows;
    float* sums = in_place ? reinterpret_cast<float*>(y) : static_cast<float*>(scratch<3>(filled * ldy * 4));
    const int64_t helped = std::min<int64_t>(threads, std::max<int64_t>(1, rows * columns * batch / kWeightsPerThread));
    const int64_t part = helped == 1 ? of.tiles() : whole(std::max<int64_t>(1, of.tiles() / (helped * 4)), kernel.multiple_of_tiles);
    in_parallel(of.tiles(), part, helped, [&, weights = packed + kHeaderBytes](int64_t first, int64_t last) {
      kernel.multiply(of, weights, all, sums, ldy, first, last);
    });
    for (int64_t b = 0; b < batch && !in_place; ++b) {
      if (is_bfloat16) narrow_bfloat16(sums + b * ldy, rows, reinterpret_cast<uint16_t*>(y) + b * rows);
      else std::memcpy(y + b * rows * 4, sums + b * ldy, rows * 4);
    }
  }
  return kOk;
}

extern "C" {

int castlm_level() { return level(); }

int castlm_runs(int level) { return runs(level); }

int castlm_set_level(int level) {
  if (!runs(level)) return 1;
  use_level(level);
  return 0;
}

int64_t castlm_packed_bytes(int layout, int values, int n, int m, int64_t rows, int64_t columns) {
  Header of;
  return choose_header(layout, values, n, m, rows, columns, of) ? kHeaderBytes + of.data_bytes : -1;
}

int castlm_repack(int layout, int values, int n, int m, int64_t rows, int64_t columns, const uint8_t* from,
                  int64_t from_bytes, const uint8_t* mask, int64_t mask_bytes, const float* scales, int64_t num_scales,
                  uint8_t* to, int64_t to_bytes, int threads) {
  Header of;
  if (!choose_header(layout, values, n, m, rows, columns, of) || to_bytes != kHeaderBytes + of.data_bytes) return kBadSize;
  Header stored = of;  // in the file, which may be n:m where the buffer is dense, and 1:2 where it is 2:4
  stored.n = n, stored.m = m;
  if (from_bytes != rows * stored.kept_row_bytes() || num_scales != rows * of.scales_per_row()) return kBadSize;
  if (mask_bytes != (m ? rows * of.mask_row_bytes() : 0)) return kBadSize;
  if (m && !mask_is_nm(stored, mask)) return kBadMask;
  std::memset(to, 0, to_bytes);
  std::memcpy(to, &of, sizeof of);
  return guarded([&] {
    if (of.m || !m) repack(of, from, mask, scales, to + kHeaderBytes, threads);
    else repack(of, dense_int4(stored, from, mask).data(), nullptr, scales, to + kHeaderBytes, threads);
    return kOk;
  });
}

int castlm_rows_at_once(const uint8_t* packed, int64_t bytes) {
  Header of;
  return read_header(packed, bytes, of) ? entry_at(of.entry, of.values, of.n, of.m)->at_once : 0;
}

int castlm_multiply(const uint8_t* packed, int64_t bytes, const uint8_t* x, int is_bfloat16, int64_t batch,
                    int64_t columns, uint8_t* y, int64_t rows, int threads) {
  const Product product{packed, bytes, y, rows};
  return guarded([&] { return multiply(&product, 1, x, is_bfloat16, batch, columns, threads); });
}

int castlm_gather(const uint8_t* packed, int64_t bytes, const int64_t* numbers, int64_t count, float* to, int64_t columns, int threads) {
  Header of;
  if (!read_header(packed, bytes, of) || of.columns != columns) return kBadSize;
  for (int64_t i = 0; i < count; ++i)
    if (numbers[i] < 0 || numbers[i] >= of.rows) return kBadSize;
  return guarded([&] {
    in_parallel(count, 16, threads, [&](int64_t first, int64_t last) {
      float* const row = static_cast<float*>(scratch<1>(of.padded() * 4));
      for (int64_t i = first; i < last; ++i) {
        gather_row(of, packed + kHeaderBytes, numbers[i], row);
        std::copy_n(row, columns, to + i * columns);
      }
    });
    return kOk;
  });
}

int castlm_unpack(const uint8_t* packed, int64_t bytes, int64_t first, int64_t last, float* to, int64_t count,
                  int threads) {
  Header of;
  if (!read_header(packed, bytes, of) || first < 0 || first >= last || last > of.rows) return kBadSize;
  if (count != (last - first) * of.columns) return kBadSize;
  const uint8_t* data = packed + kHeaderBytes;
  const int64_t tile_rows = of.tile_rows(), first_tile = first / tile_rows;
  const bool by_tile = of.layout == kLanes || (of.layout == kPanels && (of.group() == 4 || of.values < kInt8) && level() >= kAvx2);
  return guarded([&] {
    in_parallel((last + tile_rows - 1) / tile_rows - first_tile, 8, threads, [&](int64_t begin, int64_t end) {
      float* rows = static_cast<float*>(scratch<0>(tile_rows * of.padded() * 4));
      for (int64_t tile = first_tile + begin; tile < first_tile + end; ++tile) {
        const int64_t start = tile * tile_rows, from = std::max(first, start), until = std::min(last, start + tile_rows);
        const auto expand_tile = of.layout == kLanes ? expand_lanes : avx2_expand_tile;
        if (by_tile && until - from == tile_rows && of.columns == of.padded()) {
          expand_tile(of, data, tile, to + (from - first) * of.columns, of.columns);
          continue;
        }
        if (by_tile) expand_tile(of, data, tile, rows, of.padded());
        else for (int64_t row = from; row < until; ++row) expand_row(of, data, row, rows + (row - start) * of.padded());
        for (int64_t row = from; row < until; ++row)
          std::memcpy(to + (row - first) * of.columns, rows + (row - start) * of.padded(), of.columns * 4);
      }
    });
    return kOk;
  });
}
}
