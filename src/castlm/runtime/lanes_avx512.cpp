// The kernels of kLanes for processors with AVX-512, VNNI and VBMI2. The lanes of a register are 16 outputs, so that no sum runs
// across lanes. Of integers it has four columns in each lane, and the products of a whole block of 64 columns are summed as integers.
//
// `vpexpandb` puts the kept weights of a step to the places that 64 bits of the mask name, and the next step begins as many
// bytes further as there are bits. `vpdpbusd` multiplies unsigned by signed bytes: 128 is added to weights of int8, 8 to those
// of int4, and masked places hold that much, too. The sums start at -128 (or -8) times the sum of x, which makes them exact.
//
// Few rows of x: weights are expanded in registers (`multiply_rows`). Many: two tiles are expanded to the cache, and all rows of x
// pass them, six at a time (`multiply_many`).

#include "avx512.h"

#if defined(CASTLM_AVX512)

#include <algorithm>
#include <array>

#include "plain.h"

BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2")

namespace castlm {
namespace {

#include "lanes_avx512.h"

template <int columns>
INLINE __m512i spread(const int8_t* x) {  // 4 or 8 columns of x to all lanes
  if (columns == 8) {
    int64_t bits;
    std::memcpy(&bits, x, 8);
    return _mm512_set1_epi64(bits);
  }
  int32_t bits;
  std::memcpy(&bits, x, 4);
  return _mm512_set1_epi32(bits);
}

template <int values>
INLINE __m512 whole_sums(const __m512i* of) {  // of both halves
  if (values == kInt8) return _mm512_cvtepi32_ps(of[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(half_step<0>(of[0], of[1]), half_step<1>(of[0], of[1])));
}

// Weights that will be read soon. On Zen 4 it costs up to a third of the speed.
INLINE void prefetch(const uint8_t* panel, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(panel + kAhead + line), _MM_HINT_T0);
}

// R rows of x times a tile of the matrix. Tiles are read one after the other: of several streams, Zen 4 fetches none ahead.
template <int values, bool is_masked, int R>
void multiply_rows(const Header& of, const uint8_t* data, const Activations& x, int64_t b, float* y, int64_t ldy, int64_t first,
                   int64_t last) {
  using Of = Shape<values>;
  constexpr int kHalves = Of::kHalves, E = R * kHalves >= 4 ? 1 : 4 / (R * kHalves);  // sums of an output: `vpdpbusd` takes 4 cycles
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), width = of.padded();
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * blocks * bytes);  // of int8
  const uint8_t* panel = data + first * blocks * bytes;
  for (int64_t tile = first; tile < last; tile++) {
    const int8_t* narrow = x.narrow + b * width;
    const float* scales = x.scales + b * blocks;
    const int32_t* offsets = x.offsets + b * blocks;
    __m512 sums[R];
#pragma GCC unroll 8
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < blocks; i++, panel += bytes, narrow += kBlock, scales++, offsets++) {
      Reader<values, is_masked> reader;
      reader.start(panel);
      if (is_intel) prefetch(panel, bytes);
      __m512i c[E][R][kHalves];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint32_t offset = uint32_t(offsets[r * blocks]);
#pragma GCC unroll 4
        for (int e = 0; e < E; e++)
#pragma GCC unroll 2
          for (__m512i& half : c[e][r]) {
            half = _mm512_setzero_si512();
            if (e == 0) half = values == kInt4 ? _mm512_set1_epi64(offset) : _mm512_set1_epi32(int(offset));
          }
      }
#pragma GCC unroll 2
      for (int step = 0; step < Of::kSteps; step += E)
#pragma GCC unroll 4
        for (int e = 0; e < E; e++) {
          __m512i w[kHalves];
#pragma GCC unroll 2
          for (int half = 0; half < kHalves; half++) w[half] = reader.next(half);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const __m512i v = spread<Of::kColumns>(narrow + r * width + Of::kColumns * (step + e));
#pragma GCC unroll 2
            for (int half = 0; half < kHalves; half++) add_products(c[e][r][half], w[half], v);
          }
        }
      const __m512 of_rows = values == kInt4 ? short_scales(panel + bytes - 32) : _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int e = 1; e < E; e++)
#pragma GCC unroll 2
          for (int half = 0; half < kHalves; half++) c[0][r][half] = _mm512_add_epi32(c[0][r][half], c[e][r][half]);
        const __m512 whole = whole_sums<values>(c[0][r]), scale = _mm512_set1_ps(scales[r * blocks]);
        sums[r] = _mm512_fmadd_ps(values == kInt4 ? _mm512_mul_ps(whole, of_rows) : whole, scale, sums[r]);
      }
    }
    const int64_t row = 16 * tile;
    const __mmask16 here = rows_here(of, row);
    const __m512 factor = values == kInt8 ? _mm512_loadu_ps(row_scales + row) : _mm512_set1_ps(1);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(y + (b + r) * ldy + row, here, _mm512_mul_ps(sums[r], factor));
  }
}

template <int values, bool is_masked, int R>
void multiply_floats(const Header& of, const uint8_t* data, const Activations& x, int64_t b, float* y, int64_t ldy, int64_t first,
                     int64_t last) {
  constexpr int E = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums of an output: an FMA takes 4 cycles
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), width = of.padded();
  const uint8_t* panel = data + first * blocks * bytes;
  for (int64_t tile = first; tile < last; tile++) {
    const float* wide = x.wide + b * width;
    __m512 sums[R][E];
#pragma GCC unroll 8
    for (auto& of_row : sums)
#pragma GCC unroll 4
      for (__m512& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < blocks; i++, panel += bytes, wide += kBlock) {
      FloatReader<values, is_masked> reader;
      reader.start(panel);
      if (is_intel) prefetch(panel, bytes);
#pragma GCC unroll 2
      for (int k = 0; k < kBlock; k += 4)
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
          __m512 w[2];
          reader.next(w);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
              __m512& sum = sums[r][(2 * pair + j) % E];
              sum = _mm512_fmadd_ps(w[j], _mm512_set1_ps(wide[r * width + k + 2 * pair + j]), sum);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __m512 sum = E == 4 ? _mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][2 % E]), _mm512_add_ps(sums[r][1 % E], sums[r][3 % E]))
                   : E == 2 ? _mm512_add_ps(sums[r][0], sums[r][1 % E]) : sums[r][0];
      _mm512_mask_storeu_ps(y + (b + r) * ldy + 16 * tile, rows_here(of, 16 * tile), sum);
    }
  }
}

// ---- many rows of x

constexpr int64_t kManyRows = 13;  // from here on tiles are expanded
constexpr int kRowsAtOnce = 6, kTilesAtOnce = 2;  // 12 sums of integers and 12 of fp32, all in registers
constexpr int64_t kPassBytes = 1 << 19;           // of x, which stay in the second-level cache while the tiles pass

// A tile as steps of 16 outputs by 4 columns, one byte each: (blocks, 16, 64).
template <int values, bool is_masked>
void expand(const uint8_t* panel, int64_t bytes, int64_t blocks, uint8_t* to) {
  Reader<values, is_masked> reader;
  for (int64_t i = 0; i < blocks; i++, panel += bytes) {
    reader.start(panel);
    for (int step = 0; step < 16; step += 2, to += 128) {
      __m512i first, second;
      next_steps(reader, first, second);
      _mm512_store_si512(to, first);
      _mm512_store_si512(to + 64, second);
    }
  }
}

// R rows of x times some tiles, expanded to `w`, `w_stride` bytes apart. x is (blocks, kRowsAtOnce, 64), its scales and offsets (blocks, kRowsAtOnce).
template <int values, int R>
void multiply_tile(const Header& of, const uint8_t* w, int64_t w_stride, const uint8_t* panel, int64_t stride, const int8_t* x, const float* scales,
                   const int32_t* offsets, __m512 (*to)[kTilesAtOnce]) {
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes();
  __m512 sums[R][kTilesAtOnce];
#pragma GCC unroll 6
  for (auto& of_row : sums)
    for (__m512& sum : of_row) sum = _mm512_setzero_ps();
  panel += bytes - 32;
  for (int64_t i = 0; i < blocks; i++, x += kRowsAtOnce * kBlock, scales += kRowsAtOnce, offsets += kRowsAtOnce, panel += bytes) {
    __m512i c[R][kTilesAtOnce];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int t = 0; t < kTilesAtOnce; t++) c[r][t] = _mm512_set1_epi32(offsets[r]);
#pragma GCC unroll 2
    for (int step = 0; step < 16; step++, w += 64) {
      __m512i of_step[kTilesAtOnce];
#pragma GCC unroll 4
      for (int t = 0; t < kTilesAtOnce; t++) of_step[t] = load(w + t * w_stride);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m512i v = spread<4>(x + r * kBlock + 4 * step);
#pragma GCC unroll 4
        for (int t = 0; t < kTilesAtOnce; t++) add_products(c[r][t], of_step[t], v);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTilesAtOnce; t++) {
      const __m512 of_rows = values == kInt4 ? short_scales(panel + t * stride) : _mm512_setzero_ps();
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m512 whole = _mm512_cvtepi32_ps(c[r][t]);
        sums[r][t] = _mm512_fmadd_ps(values == kInt4 ? _mm512_mul_ps(whole, of_rows) : whole, _mm512_set1_ps(scales[r]), sums[r][t]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < kTilesAtOnce; t++) to[r][t] = sums[r][t];
}

template <int values>
constexpr auto kTile = std::array{multiply_tile<values, 1>, multiply_tile<values, 2>, multiply_tile<values, 3>,
                                  multiply_tile<values, 4>, multiply_tile<values, 5>, multiply_tile<values, 6>};

// A tile of floats as fp32, (columns, 16).
template <int values, bool is_masked>
void expand_floats(const uint8_t* panel, int64_t bytes, int64_t blocks, float* to) {
  FloatReader<values, is_masked> reader;
  for (int64_t i = 0; i < blocks; i++, panel += bytes) {
    reader.start(panel);
    for (int k = 0; k < kBlock; k += 2, to += 32) {
      __m512 w[2];
      reader.next(w);
      _mm512_store_ps(to, w[0]);
      _mm512_store_ps(to + 16, w[1]);
    }
  }
}

// R rows of x times some tiles of floats, expanded to `w`, `w_stride` floats apart.
template <int R>
void multiply_float_tile(const float* w, int64_t w_stride, int64_t columns, const float* x, int64_t ldx, __m512 (*to)[kTilesAtOnce]) {
  __m512 sums[R][kTilesAtOnce];
#pragma GCC unroll 6
  for (auto& of_row : sums)
#pragma GCC unroll 2
    for (__m512& sum : of_row) sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t k = 0; k < columns; k++, w += 16) {
    __m512 of_column[kTilesAtOnce];
#pragma GCC unroll 2
    for (int t = 0; t < kTilesAtOnce; t++) of_column[t] = _mm512_load_ps(w + t * w_stride);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int t = 0; t < kTilesAtOnce; t++) sums[r][t] = _mm512_fmadd_ps(of_column[t], _mm512_set1_ps(x[r * ldx + k]), sums[r][t]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int t = 0; t < kTilesAtOnce; t++) to[r][t] = sums[r][t];
}
constexpr auto kFloatTile = std::array{multiply_float_tile<1>, multiply_float_tile<2>, multiply_float_tile<3>,
                                       multiply_float_tile<4>, multiply_float_tile<5>, multiply_float_tile<6>};

template <int values, bool is_masked>
void multiply_many(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                   int64_t last) {
  constexpr bool kIsFloat = values < kInt8, kExpands = kIsFloat || values == kInt4 || is_masked;
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), stride = blocks * bytes, width = of.padded();
  const int64_t pass = std::max<int64_t>(96, kPassBytes / (width * (kIsFloat ? 4 : 1)) / kRowsAtOnce * kRowsAtOnce);
  const int64_t step_bytes = blocks * 1024 * (kIsFloat ? 4 : 1);  // of a tile, expanded
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * stride);
  auto* room = static_cast<uint8_t*>(scratch<0>(kExpands ? kTilesAtOnce * step_bytes : 0));
  for (int64_t b0 = 0; b0 < x.batch; b0 += pass)
    for (int64_t tile = first; tile < last; tile += kTilesAtOnce) {
      const int64_t tiles = std::min<int64_t>(kTilesAtOnce, last - tile);
      const uint8_t *panel = data + tile * stride, *w = kExpands ? room : panel;
      for (int t = 0; kExpands && t < tiles; t++) {
        if constexpr (kIsFloat)
          expand_floats<values, is_masked>(panel + t * stride, bytes, blocks, reinterpret_cast<float*>(room + t * step_bytes));
        else expand<values, is_masked>(panel + t * stride, bytes, blocks, room + t * step_bytes);
      }
      const int64_t next = tiles > 1 ? step_bytes : 0, next_panel = tiles > 1 ? stride : 0;  // one tile alone stands for both
      for (int64_t b = b0; b < std::min(b0 + pass, x.batch); b += kRowsAtOnce) {
        const int64_t at = b * blocks, rows = std::min<int64_t>(kRowsAtOnce, x.batch - b);
        __m512 sums[kRowsAtOnce][kTilesAtOnce];
        for (int64_t r = 0; r < rows; r++)  // lines far apart, before they are written
          for (int t = 0; t < tiles; t++) __builtin_prefetch(y + (b + r) * ldy + 16 * (tile + t), 1);
        if constexpr (kIsFloat)
          kFloatTile[rows - 1](reinterpret_cast<const float*>(w), next / 4, width, x.wide + b * width, width, sums);
        else kTile<values>[rows - 1](of, w, next, panel, next_panel, x.narrow + at * kBlock, x.scales + at, x.offsets + at, sums);
        for (int t = 0; t < tiles; t++) {
          const int64_t row = 16 * (tile + t);
          const __m512 factor = values == kInt8 ? _mm512_loadu_ps(row_scales + row) : _mm512_set1_ps(1);
          for (int64_t r = 0; r < rows; r++)
            _mm512_mask_storeu_ps(y + (b + r) * ldy + row, rows_here(of, row), _mm512_mul_ps(sums[r][t], factor));
        }
      }
    }
}

template <int values, bool is_masked, int R>
constexpr auto rows_kernel() {
  if constexpr (values < kInt8) return multiply_floats<values, is_masked, R>;
  else return multiply_rows<values, is_masked, R>;
}
template <int values, bool is_masked>
constexpr auto kRowsKernels = std::array{
    rows_kernel<values, is_masked, 1>(), rows_kernel<values, is_masked, 2>(), rows_kernel<values, is_masked, 3>(),
    rows_kernel<values, is_masked, 4>(), rows_kernel<values, is_masked, 5>(), rows_kernel<values, is_masked, 6>(),
    rows_kernel<values, is_masked, 7>(), rows_kernel<values, is_masked, 8>()};

template <int values, bool is_masked>
void multiply(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  if (x.batch >= kManyRows) return multiply_many<values, is_masked>(of, data, x, y, ldy, first, last);
  constexpr int64_t kMost = kRowsKernels<values, is_masked>.size();
  for (int64_t b = 0; b < x.batch;) {
    const int64_t rest = x.batch - b, passes = (rest + kMost - 1) / kMost, rows = (rest + passes - 1) / passes;
    kRowsKernels<values, is_masked>[rows - 1](of, data, x, b, y, ldy, first, last);
    b += rows;
  }
}

template <int values>
Kernel of_values(const Header& of, int64_t batch) {
  const Multiply kernel = of.m ? multiply<values, true> : multiply<values, false>;
  if (values < kInt8) return {as_floats, kernel, 1, kTilesAtOnce};
  return {batch >= kManyRows ? in_groups<kRowsAtOnce, false> : in_groups<1, false>, kernel, 1, kTilesAtOnce};
}

}  // namespace

Kernel avx512_kernel(const Header& of, int64_t batch, bool) {
  if (avx512_gathers(of, batch)) return avx512_gathered(of);
  switch (of.values) {
    case kBFloat16: return of_values<kBFloat16>(of, batch);
    case kFloat16: return of_values<kFloat16>(of, batch);
    case kFloat32: return of_values<kFloat32>(of, batch);
    case kInt8: return of_values<kInt8>(of, batch);
    default: return of_values<kInt4>(of, batch);
  }
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_avx512() { return false; }
Kernel avx512_kernel(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
