// Multiplication by n:m and dense weights on a CPU: the entry points with their checks, the threads, the
// choice among instruction sets, and the conversion of activations. The `kernels_*.cpp` have the fast paths, `plain.cpp`
// the one that takes any pattern and any processor.
// Called through ctypes from castlm_runtime/library.py, whose signatures are these.

#include <algorithm>
#include <atomic>

#include "plain.h"
#include "team.h"

namespace castlm {
namespace {

bool runs(int32_t level) { return level >= 0 && level < kNumLevels && kLevels[level].is_here(); }

std::atomic<int32_t>& level_in_use() {
  static std::atomic<int32_t> used{[] {
    int32_t best = kNumLevels - 1;
    while (!runs(best)) --best;
    return best;
  }()};
  return used;
}

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

int32_t level() { return level_in_use().load(std::memory_order_relaxed); }

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

bool make_header(int layout, int values, int n, int m, int64_t rows, int64_t columns, Header& of) {
  const int64_t limit = int64_t(1) << 31, most_weights = int64_t(1) << 48;  // whose bytes do not overflow
  if (values < kBFloat16 || values > kInt6 || rows < 1 || columns < 1 || rows >= limit || columns >= limit) return false;
  if (rows > most_weights / columns) return false;
  if (m ? n < 1 || n >= m || columns % m : n != 0) return false;
  if (values == kInt6 && (m || (layout >= 0 && layout != kLanes))) return false;
  const bool is_half = values != kInt4 && keeps_half(n, m) && level() >= kAvx2;
  const bool fits_panels = (m == 4 && n <= 2) || is_half;
  if (layout < 0) {
    const bool by_avx2 = level() == kAvx2 && !fits_panels, by_neon = level() == kNeon && m && !fits_panels;
    const bool in_lanes = values == kInt6 || (fits_lanes(m) && (by_avx2 || by_neon || level() >= kAvx512));
    layout = in_lanes ? kLanes : m == 0 ? kDense : fits_panels && level() != kPlain ? kPanels : kRows;
  }
  // With AVX2 an expansion of int4 takes longer than the multiplication by zeros.
  if (layout == kLanes && values == kInt4 && level() == kAvx2) n = m = 0;
  if (layout > kLanes || (layout == kLanes ? !fits_lanes(m) : (layout == kDense) != (m == 0))) return false;
  if (layout == kPanels && !(fits_panels && level() != kPlain)) return false;
  const bool is_unsigned = values == kInt6 || (layout == kLanes && values >= kInt8 && level() >= kAvx512);
  of = Header{kMagic, layout, values, n, m, is_unsigned, rows, columns, 0};
  of.data_bytes = data_bytes(of);
  return true;
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

// The level whose kernels take a matrix.
int32_t level_for(const Header& of) {
  if (of.values == kInt6) return level();
  if (of.layout == kRows) return kPlain;
  if (of.layout == kDense) return level() == kNeon ? kNeon : kPlain;
  if (of.layout != kLanes) return std::min<int32_t>(level(), kAvx2);
  if (level() == kNeon && !of.is_unsigned && !of.in_pairs()) return kNeon;
  if (level() < (of.is_unsigned || of.in_pairs() ? kAvx512 : kAvx2)) return kPlain;
  if (of.values == kInt4 && of.m && !of.is_unsigned) return kPlain;  // of a level before AVX2
  if (of.values >= kInt8 && !of.is_unsigned) return kAvx2;
  return level();
}

}  // namespace

bool castlm::read_header(const uint8_t* packed, int64_t bytes, Header& of) {
  if (!packed || bytes < kHeaderBytes) return false;
  Header found;
  std::memcpy(&found, packed, sizeof found);
  if (found.magic != kMagic || !make_header(found.layout, found.values, found.n, found.m, found.rows, found.columns, of)) return false;
  of.is_unsigned = found.is_unsigned || of.values == kInt6;  // as at the level of its time
  return found.data_bytes == of.data_bytes && bytes >= kHeaderBytes + of.data_bytes;
}

bool castlm::same_form(const Header& a, const Header& b) {
  return a.layout == b.layout && a.values == b.values && a.n == b.n && a.m == b.m && a.is_unsigned == b.is_unsigned;
}

Kernel castlm::kernel_for(const Header& of, int64_t batch, bool is_bfloat16) { return kLevels[level_for(of)].kernel(of, batch, is_bfloat16); }

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
    in_parallel(of.tiles(), part, helped, [&](int64_t first, int64_t last) {
      kernel.multiply(of, packed + kHeaderBytes, all, sums, ldy, first, last);
    });
    for (int64_t b = 0; b < batch && !in_place; ++b) {
      if (is_bfloat16) narrow_bfloat16(sums + b * ldy, rows, reinterpret_cast<uint16_t*>(y) + b * rows);
      else std::memcpy(y + b * rows * 4, sums + b * ldy, rows * 4);
    }
  }
  return kOk;
}

extern "C" {

extern const int32_t castlm_inference_version;
const int32_t castlm_inference_version = 10;

// The level in use.
int castlm_level() { return level(); }

// The name of a level; null after the last one.
const char* castlm_level_name(int level) { return level >= 0 && level < kNumLevels ? kLevels[level].name : nullptr; }

// Whether this processor has a level.
int castlm_runs(int level) { return runs(level); }

// Takes another level; 1 where this processor lacks it. Buffers of the level before may not fit, as the plain path reads no
// panels.
int castlm_set_level(int level) {
  if (!runs(level)) return 1;
  level_in_use() = level;
  return 0;
}

// Bytes of the buffer that `castlm_repack` fills; -1 where there is no such matrix. `layout` -1 takes the best one.
int64_t castlm_packed_bytes(int layout, int values, int n, int m, int64_t rows, int64_t columns) {
  Header of;
  return make_header(layout, values, n, m, rows, columns, of) ? kHeaderBytes + of.data_bytes : -1;
}

// Builds the buffer `to` from the tensors of a file: values (rows, kept), mask (rows, columns / 8), fp32 scales.
int castlm_repack(int layout, int values, int n, int m, int64_t rows, int64_t columns, const uint8_t* from,
                  int64_t from_bytes, const uint8_t* mask, int64_t mask_bytes, const float* scales, int64_t num_scales,
                  uint8_t* to, int64_t to_bytes, int threads) {
  Header of;
  if (!make_header(layout, values, n, m, rows, columns, of) || to_bytes != kHeaderBytes + of.data_bytes) return kBadSize;
  Header stored = of;  // in the file, which may be n:m where the buffer is dense
  stored.n = n, stored.m = m;
  if (from_bytes != rows * stored.kept_row_bytes() || num_scales != rows * of.scales_per_row()) return kBadSize;
  if (mask_bytes != (m ? rows * of.mask_row_bytes() : 0)) return kBadSize;
  if (m && !mask_is_nm(stored, mask)) return kBadMask;
  std::memset(to, 0, to_bytes);
  std::memcpy(to, &of, sizeof of);
  return guarded([&] {
    if (of.m == m) repack(of, from, mask, scales, to + kHeaderBytes, threads);
    else repack(of, dense_int4(stored, from, mask).data(), nullptr, scales, to + kHeaderBytes, threads);
    return kOk;
  });
}

// y (batch, rows) = x (batch, columns) times the transposed matrix; both are fp32, or both bf16.
int castlm_multiply(const uint8_t* packed, int64_t bytes, const uint8_t* x, int is_bfloat16, int64_t batch,
                    int64_t columns, uint8_t* y, int64_t rows, int threads) {
  const Product product{packed, bytes, y, rows};
  return guarded([&] { return multiply(&product, 1, x, is_bfloat16, batch, columns, threads); });
}

// The rows `numbers` of the matrix as fp32, (count, columns).
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

// Rows [first, last) of the matrix as fp32, (last - first, columns).
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
