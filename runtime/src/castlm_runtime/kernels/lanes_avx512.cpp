// The kernels of kLanes for processors with AVX-512, VNNI and VBMI2. The lanes of a register are 16 outputs, so that no sum runs
// across lanes. Of integers it has four columns in each lane, and the products of a whole block of 64 columns are summed as integers.
//
// `vpexpandb` puts the kept weights of a step to the places that 64 bits of the mask name, and the next step begins as many
// bytes further as there are bits. `vpdpbusd` multiplies unsigned by signed bytes: 128 is added to weights of int8, 8 to those
// of int4, 32 to those of int6, and masked places hold that much, too. The sums start at so many times the negative sum of x, which
// makes them exact.
//
// Few rows of x: weights are expanded in registers, for up to 12 rows at a time (`multiply_groups`). Many: two tiles are expanded to
// the cache, and all rows of x pass them, six at a time (`multiply_many`).
//
// Floats in 2:4 and 1:2 lie in pairs (matrix.h) and are never expanded: `vpermilps` moves to each lane the column
// that its weight meets, so that there are half as many products, and mostly in other units than those that multiply.

#include "avx512.h"

#if defined(CASTLM_AVX512)

#include <algorithm>
#include <array>
#include <utility>

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

template <bool by_halves>
INLINE __m512 whole_sums(const __m512i* of) {
  if (!by_halves) return _mm512_cvtepi32_ps(of[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(half_step<0>(of[0], of[1]), half_step<1>(of[0], of[1])));
}

// How many bytes before they are read weights are asked for, for R rows of x; -1 for never. Zen 4 fetches a stream of weights by itself
// and loses up to a third of its speed where it is asked to, with two exceptions: where there are many products for each weight, and
// with masked int8, of which a panel is asked for at its start, as the processor would wait for its mask to learn where values begin.
template <int values, bool is_masked, int R>
INLINE int64_t fetched_ahead() {
  return is_intel ? 4096 : R > 8 ? 2560 : values == kInt8 && is_masked ? 0 : -1;
}
INLINE void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(from + line), _MM_HINT_T0);
}

constexpr int kMostTogether = 12;  // rows of x, whose sums of integers and of fp32 are all in registers

// R rows of x times a tile of the matrix, whose panels are asked for `ahead` bytes before, or never for -1. x is (blocks, R, 64), its
// scales and offsets (blocks, R).
template <int values, bool is_masked, int R>
INLINE void multiply_rows(const uint8_t* panel, int64_t bytes, int64_t blocks, int64_t ahead, const int8_t* x, const float* scales,
                          const int32_t* offsets, __m512* to) {
  constexpr bool by_halves = in_nibbles(values) && R <= 6;  // sums of eight columns, whose halves come together after a block
  constexpr int kParts = by_halves ? 2 : 1, kColumns = 4 * kParts, kSteps = kBlock / kColumns;
  constexpr int E = R * kParts >= 4 ? 1 : 4 / (R * kParts);  // sums of an output: `vpdpbusd` takes 4 cycles
  constexpr int kTogether = E < 2 ? 2 : E;                     // steps
  __m512 sums[R];
#pragma GCC unroll 12
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < blocks; i++, panel += bytes, x += R * kBlock, scales += R, offsets += R) {
    Reader<values, is_masked> reader;
    reader.start(panel);
    if (ahead >= 0) prefetch(panel + ahead, bytes);
    __m512i c[E][R][kParts];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int e = 0; e < E; e++)
#pragma GCC unroll 2
        for (__m512i& half : c[e][r]) {
          half = _mm512_setzero_si512();
          if (e == 0) half = by_halves ? _mm512_set1_epi64(uint32_t(offsets[r])) : _mm512_set1_epi32(offsets[r]);
        }
#pragma GCC unroll 2
    for (int step = 0; step < kSteps; step += kTogether) {
      __m512i w[kTogether][kParts];
#pragma GCC unroll 4
      for (int e = 0; e < kTogether; e += by_halves ? 1 : 2) {
        if constexpr (by_halves) w[e][0] = reader.next(0), w[e][1] = reader.next(1);
        else next_steps(reader, w[e][0], w[e + 1][0]);
      }
#pragma GCC unroll 4
      for (int e = 0; e < kTogether; e++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const int8_t* at = x + r * kBlock + kColumns * (step + e);
          if constexpr (by_halves || R == 1) {
            const __m512i v = spread<kColumns>(at);
#pragma GCC unroll 2
            for (int half = 0; half < kParts; half++) add_products(c[e % E][r][half], w[e][half], v);
          } else {
            add_products_of_all(c[e % E][r][0], w[e][0], at);
          }
        }
    }
    const __m512 of_rows = in_nibbles(values) ? short_scales(panel + bytes - 32) : _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int e = 1; e < E; e++)
#pragma GCC unroll 2
        for (int half = 0; half < kParts; half++) c[0][r][half] = _mm512_add_epi32(c[0][r][half], c[e][r][half]);
      const __m512 whole = whole_sums<by_halves>(c[0][r]), scale = _mm512_set1_ps(scales[r]);
      sums[r] = _mm512_fmadd_ps(in_nibbles(values) ? _mm512_mul_ps(whole, of_rows) : whole, scale, sums[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) to[r] = sums[r];
}

// Groups of R rows of x times some tiles of the matrix. Tiles are read one after the other: of several streams, Zen 4 fetches none ahead.
template <int values, bool is_masked, int R>
void multiply_groups(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), stride = blocks * bytes, ahead = fetched_ahead<values, is_masked, R>();
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * stride);  // of int8
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t row = 16 * tile;
    const __mmask16 here = rows_here(of, row);
    const __m512 factor = values == kInt8 ? _mm512_loadu_ps(row_scales + row) : _mm512_set1_ps(1);
    for (int64_t b = 0; b < x.batch; b += R) {
      const int64_t at = b * blocks, rows = std::min<int64_t>(R, x.batch - b);
      __m512 sums[R];
      multiply_rows<values, is_masked, R>(data + tile * stride, bytes, blocks, b ? -1 : ahead, x.narrow + at * kBlock, x.scales + at,
                                          x.offsets + at, sums);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        if (r < rows) _mm512_mask_storeu_ps(y + (b + r) * ldy + row, here, _mm512_mul_ps(sums[r], factor));
    }
  }
}

constexpr int64_t kPassBytes = 1 << 19;  // of x, which stay in the second-level cache while the tiles pass
constexpr int64_t kWideBlocks = 32;      // a row of x with more does not stay in the first-level cache beside the weights

// The same of floats, of T tiles `stride` bytes apart.
template <int values, Kept kept, int R, int T>
INLINE void multiply_float_rows(const uint8_t* panel, int64_t stride, int64_t bytes, int64_t blocks, const float* x, __m512 (*to)[R]) {
  constexpr int E = R >= 6 ? 1 : R >= 3 ? 2 : 4;  // sums of an output: an FMA takes 4 cycles
  __m512 sums[T][R][E];
#pragma GCC unroll 2
  for (auto& of_tile : sums)
#pragma GCC unroll 12
    for (auto& of_row : of_tile)
#pragma GCC unroll 4
      for (__m512& sum : of_row) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < blocks; i++, panel += bytes, x += R * kBlock) {
    FloatReader<values, kept> reader[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      reader[t].start(panel + t * stride);
      if (is_intel) prefetch(panel + t * stride + 4096, bytes);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kBlock; k += 2 * reader->kColumns)
#pragma GCC unroll 2
      for (int step = 0; step < 2; step++)
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
          __m512 w[2];
          reader[t].next(w);
#pragma GCC unroll 12
          for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
              __m512& sum = sums[t][r][(2 * step + j) % E];
              sum = _mm512_fmadd_ps(w[j], reader[t].meets(x + r * kBlock + k + step * reader->kColumns, j), sum);
            }
        }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; t++)
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      __m512* of = sums[t][r];
      to[t][r] = E == 4 ? _mm512_add_ps(_mm512_add_ps(of[0], of[2 % E]), _mm512_add_ps(of[1 % E], of[3 % E]))
                 : E == 2 ? _mm512_add_ps(of[0], of[1 % E]) : of[0];
    }
}

// Eight of the weights of a step of pairs at `at`: the first or second kept ones (`slot`) of eight outputs.
template <int values>
INLINE __m256 eight_of_pairs(const uint8_t* at, int slot, int half) {
  if (values == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at + 64 * slot + 32 * half));
  if (values == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 32 * slot + 16 * half)));
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * half));
  return _mm256_castsi256_ps(slot ? _mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(both, 16));
}

// The same of pairs by registers of 256 bits, of which Zen 4 permutes, multiplies and widens more than half of those of 512.
template <int values, int R>
INLINE void multiply_halves(const uint8_t* panel, int64_t bytes, int64_t blocks, const float* x, __m512* to) {
  constexpr int E = R == 1 ? 2 : 1;  // sums of an output and a slot
  __m256 sums[R][E][4];              // the last by slot and half of the outputs
#pragma GCC unroll 24
  for (int i = 0; i < 4 * R * E; i++) sums[i / 4 / E][i / 4 % E][i % 4] = _mm256_setzero_ps();
  for (int64_t i = 0; i < blocks; i++, panel += bytes, x += R * kBlock) {
    if (is_intel) prefetch(panel + 4096, bytes);
    __m256i columns[4];
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) columns[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * h));
    const uint8_t* at = panel + 128;
    for (int k = 0; k < kBlock; k += 8)
#pragma GCC unroll 2
      for (int group = 0; group < 2; group++, at += kStepBytes<values>)
#pragma GCC unroll 4
        for (int h = 0; h < 4; h++) {
          const __m256 w = eight_of_pairs<values>(at, h / 2, h % 2);
#pragma GCC unroll 6
          for (int r = 0; r < R; r++) {
            const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + r * kBlock + k + 4 * group));
            __m256& sum = sums[r][group % E][h];
            sum = _mm256_fmadd_ps(w, _mm256_permutevar_ps(four, columns[h]), sum);
          }
          columns[h] = _mm256_srli_epi32(columns[h], 2);
        }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    __m256 half[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      half[h] = _mm256_add_ps(sums[r][0][h], sums[r][0][2 + h]);
      if (E == 2) half[h] = _mm256_add_ps(half[h], _mm256_add_ps(sums[r][E - 1][h], sums[r][E - 1][2 + h]));
    }
    to[r] = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
  }
}

// Tiles are read one after the other, but for one wide row of x in turns with those half of all tiles further, which share each load of x.
template <int values, Kept kept, int R>
void multiply_float_groups(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  constexpr bool kByHalves = kept == kPairs && (R > 1 || values == kFloat16);
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), stride = blocks * bytes;
  if constexpr (R == 1 && !kByHalves) {
    const int64_t half = blocks > kWideBlocks ? (last - first) / 2 : 0;
    for (int64_t tile = first; tile < first + half; tile++) {
      __m512 sums[2][R];
      multiply_float_rows<values, kept, R, 2>(data + tile * stride, half * stride, bytes, blocks, x.wide, sums);
      for (int t = 0; t < 2; t++) {
        const int64_t row = 16 * (tile + t * half);
        _mm512_mask_storeu_ps(y + row, rows_here(of, row), sums[t][0]);
      }
    }
    first += 2 * half;
  }
  const int64_t pass = std::max<int64_t>(96, kPassBytes / (of.padded() * 4)) / R * R;
  for (int64_t b0 = 0; b0 < x.batch; b0 += pass)
    for (int64_t tile = first; tile < last; tile++)
      for (int64_t b = b0; b < std::min(b0 + pass, x.batch); b += R) {
        const int64_t row = 16 * tile, rows = std::min<int64_t>(R, x.batch - b);
        __m512 sums[1][R];
        if constexpr (kByHalves) multiply_halves<values, R>(data + tile * stride, bytes, blocks, x.wide + b * of.padded(), sums[0]);
        else multiply_float_rows<values, kept, R, 1>(data + tile * stride, 0, bytes, blocks, x.wide + b * of.padded(), sums);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
          if (r < rows) _mm512_mask_storeu_ps(y + (b + r) * ldy + row, rows_here(of, row), sums[0][r]);
      }
}

// The form of x for floats: groups of R rows, block by block.
template <int R>
Activations floats_in_groups(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  if (R == 1) return {x, nullptr, nullptr, nullptr, rows};
  const int64_t blocks = of.blocks();
  auto* wide = reinterpret_cast<float*>(room);
  x += first * of.padded();
  for (int64_t b = first; b < last; b++)
    for (int64_t i = 0; i < blocks; i++, x += kBlock) std::memcpy(wide + ((b / R * blocks + i) * R + b % R) * kBlock, x, kBlock * 4);
  return {wide, nullptr, nullptr, nullptr, rows};
}

// ---- many rows of x

constexpr int kRowsAtOnce = 6, kTilesAtOnce = 2;  // 12 sums of integers and 12 of fp32, all in registers

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
      const __m512 of_rows = in_nibbles(values) ? short_scales(panel + t * stride) : _mm512_setzero_ps();
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m512 whole = _mm512_cvtepi32_ps(c[r][t]);
        sums[r][t] = _mm512_fmadd_ps(in_nibbles(values) ? _mm512_mul_ps(whole, of_rows) : whole, _mm512_set1_ps(scales[r]), sums[r][t]);
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
template <int values, Kept kept>
void expand_floats(const uint8_t* panel, int64_t bytes, int64_t blocks, float* to) {
  FloatReader<values, kept> reader;
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

template <int values, Kept kept>
void multiply_many(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                   int64_t last) {
  constexpr bool kIsFloat = values < kInt8, kExpands = kIsFloat || in_nibbles(values) || kept == kMasked;
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
          expand_floats<values, kept>(panel + t * stride, bytes, blocks, reinterpret_cast<float*>(room + t * step_bytes));
        else expand<values, kept == kMasked>(panel + t * stride, bytes, blocks, room + t * step_bytes);
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

template <int values, Kept kept, int R>
constexpr Kernel group_kernel() {
  if constexpr (values < kInt8) return {floats_in_groups<R>, multiply_float_groups<values, kept, R>, 1, kTilesAtOnce};
  else return {in_groups<R, false>, multiply_groups<values, kept == kMasked, R>, 1, kTilesAtOnce};
}
// The kernels for groups of 1 to 12 rows of x.
template <int values, Kept kept, int... more>
constexpr auto group_kernels(std::integer_sequence<int, more...>) {
  return std::array{group_kernel<values, kept, 1 + more>()...};
}
template <Kept kept>
constexpr int kMostOf = kept == kPairs ? 6 : kMostTogether;  // 24 sums of 256 bits
template <int values, Kept kept>
constexpr auto kGroupKernels = group_kernels<values, kept>(std::make_integer_sequence<int, kMostOf<kept>>{});

// As few groups of rows as registers allow, of as equal a size as can be.
template <int values, Kept kept>
Kernel in_few_groups(int64_t rows) {
  const int64_t groups = (rows + kMostOf<kept> - 1) / kMostOf<kept>;
  return kGroupKernels<values, kept>[(rows + groups - 1) / groups - 1];
}
template <int values>
Kernel groups_of_values(const Header& of, int64_t rows) {
  if constexpr (values < kInt8)
    if (of.in_pairs()) return in_few_groups<values, kPairs>(rows);
  return of.m ? in_few_groups<values, kMasked>(rows) : in_few_groups<values, kWhole>(rows);
}
template <int values, Kept kept>
Kernel many_of() {
  return {values < kInt8 ? as_floats : in_groups<kRowsAtOnce, false>, multiply_many<values, kept>, 1, kTilesAtOnce};
}
template <int values>
Kernel many_of_values(const Header& of) { return of.m ? many_of<values, kMasked>() : many_of<values, kWhole>(); }

}  // namespace

Kernel avx512_groups(const Header& of, int64_t rows, bool) {
  switch (of.values) {
    case kBFloat16: return groups_of_values<kBFloat16>(of, rows);
    case kFloat16: return groups_of_values<kFloat16>(of, rows);
    case kFloat32: return groups_of_values<kFloat32>(of, rows);
    case kInt8: return groups_of_values<kInt8>(of, rows);
    case kInt4: return groups_of_values<kInt4>(of, rows);
    default: return in_few_groups<kInt6, kWhole>(rows);
  }
}

Kernel avx512_many(const Header& of, int64_t, bool) {
  switch (of.values) {
    case kBFloat16: return many_of_values<kBFloat16>(of);
    case kFloat16: return many_of_values<kFloat16>(of);
    case kFloat32: return many_of_values<kFloat32>(of);
    case kInt8: return many_of_values<kInt8>(of);
    case kInt4: return many_of_values<kInt4>(of);
    default: return many_of<kInt6, kWhole>();
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
Kernel avx512_groups(const Header&, int64_t, bool) { return {}; }
Kernel avx512_many(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
