// The AVX2 kernels. n:m: x is permuted, not the weights. Two rows of 2:4 share a lane of four floats (`vpermilps` reads
// the two low bits of each control, so that one shift of 32 bytes of metadata gives the next) or of 16 bytes (`vpshufb`);
// a panel of 4 rows by 64 columns, or 8 rows of 1:4, is one linear stream of 288, 160 or 104 bytes.

#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace castlm {
namespace {

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Eight weights of a lane step `e` out of the 16 at `at`.
template <int values>
INLINE __m256 load_step(const uint8_t* at, int e) {
  if (values == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * e)));
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
  return _mm256_castsi256_ps(e ? _mm256_and_si256(both, odd) : _mm256_slli_epi32(both, 16));
}

// ---- 2:4 and 1:4 of 16 bits

template <int values, int BT>
INLINE void panels16(const uint8_t* panel, int64_t blocks, const float* x, int64_t ldx, __m256* sums) {
  constexpr int E = BT <= 2 ? 2 : 1;  // two sums an output where the batch is small: it hides the latency of an FMA
  __m256 a[E][2][BT];
  for (int e = 0; e < E; e++)
    for (int h = 0; h < 2; h++)
      for (int b = 0; b < BT; b++) a[e][h][b] = e ? _mm256_setzero_ps() : sums[h * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += 288, x += kBlock) {
    const __m256i meta = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
#pragma GCC unroll 2
      for (int e = 0; e < 2; e++) {
        const __m256 w0 = load_step<values>(panel + 32 + 64 * t, e);
        const __m256 w1 = load_step<values>(panel + 64 + 64 * t, e);
        const __m256i c0 = _mm256_srli_epi32(meta, 4 * t + 2 * e);
        const __m256i c1 = _mm256_srli_epi32(meta, 4 * t + 2 * e + 16);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++) {
          const __m256 v = _mm256_loadu_ps(x + b * ldx + 16 * t + 8 * e);
          a[e % E][0][b] = _mm256_fmadd_ps(w0, _mm256_permutevar_ps(v, c0), a[e % E][0][b]);
          a[e % E][1][b] = _mm256_fmadd_ps(w1, _mm256_permutevar_ps(v, c1), a[e % E][1][b]);
        }
      }
    }
  }
  for (int h = 0; h < 2; h++)
    for (int b = 0; b < BT; b++) sums[h * BT + b] = E == 2 ? _mm256_add_ps(a[0][h][b], a[E - 1][h][b]) : a[0][h][b];
}

// ---- 2:4 and 1:4 of int8 and int4

INLINE __m256i dot_bytes(__m256i magnitude, __m256i w, __m256i x) {
  return _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
}

template <int n, bool is_int4>
INLINE void row_scales(const uint8_t* at, __m256* scales) {
  if (!is_int4) return;
  const auto widen = [](const uint8_t* four) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(four));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
  };
  const __m128 low = widen(at), high = n == 1 ? widen(at + 8) : low;
  const __m256 first = _mm256_set_m128(low, low), second = _mm256_set_m128(high, high);
  scales[0] = n == 1 ? first : _mm256_permute_ps(first, 0x50);
  scales[1] = n == 1 ? second : _mm256_permute_ps(first, 0xfa);
}

template <int n, bool is_int4, int BT>
INLINE void panels8(const uint8_t* panel, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                    int64_t ld_scales, __m256* sums) {
  constexpr int kBytes = is_int4 ? 32 + 64 + 16 / n : 160;
  const __m256i low_two = _mm256_set1_epi8(3), low_four = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const __m256i group = n == 2 ? _mm256_set1_epi64x(0x0c0c080804040000) : _mm256_set1_epi32(0x0c080400);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 a[2][BT];
  for (int p = 0; p < 2; p++)
    for (int b = 0; b < BT; b++) a[p][b] = sums[p * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock, scales++) {
    const __m256i meta = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    __m256 w_scales[2];
    row_scales<n, is_int4>(panel + 96, w_scales);
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
      __m256i s[BT];
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        const __m256i control =
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(meta, 2 * (2 * p + c)), low_two), group);
        __m256i w;
        if (is_int4) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 + 32 * p));
          w = _mm256_sub_epi8(_mm256_and_si256(c ? _mm256_srli_epi16(both, 4) : both, low_four), eight);
        } else {
          w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 + 32 * (2 * p + c)));
        }
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++) {
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + b * ldx + 32 * c));
          const __m256i pairs = dot_bytes(magnitude, w, _mm256_shuffle_epi8(v, control));
          if (is_int4) s[b] = c ? _mm256_add_epi16(s[b], pairs) : pairs;  // at most 4 * 8 * 127
          else s[b] = c ? _mm256_add_epi32(s[b], _mm256_madd_epi16(pairs, ones)) : _mm256_madd_epi16(pairs, ones);
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < BT; b++) {
        const __m256 whole = _mm256_cvtepi32_ps(is_int4 ? _mm256_madd_epi16(s[b], ones) : s[b]);
        const __m256 scale = _mm256_broadcast_ss(scales + b * ld_scales);
        a[p][b] = _mm256_fmadd_ps(whole, is_int4 ? _mm256_mul_ps(scale, w_scales[p]) : scale, a[p][b]);
      }
    }
  }
  for (int p = 0; p < 2; p++)
    for (int b = 0; b < BT; b++) sums[p * BT + b] = a[p][b];
}

// ---- tiles of panels

// The sums of a tile: 4 rows of 2:4, or 8 of 1:4.
template <int n>
INLINE void store_tile(const __m256* sums, int BT, int b, const float* scales, float* y, int64_t count) {
  __m128 half[2];
  for (int h = 0; h < 2; h++) {
    const __m256 v = sums[h * BT + b];
    half[h] = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  if (n == 2) half[0] = _mm_hadd_ps(half[0], half[1]);
  for (int h = 0; h < (n == 2 ? 1 : 2); h++) {
    if (scales) half[h] = _mm_mul_ps(half[h], _mm_loadu_ps(scales + 4 * h));
    if (count >= 4 * (h + 1)) {
      _mm_storeu_ps(y + 4 * h, half[h]);
    } else if (count > 4 * h) {
      float some[4];
      _mm_storeu_ps(some, half[h]);
      for (int64_t i = 4 * h; i < count; i++) y[i] = some[i - 4 * h];
    }
  }
}

template <int n, int values, int BT>
void multiply_panels(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                     int64_t last) {
  const int64_t blocks = of.blocks(), rows = of.panel_rows(), width = of.padded();
  const int64_t bytes = values == kInt8 ? 4 : values == kInt4 ? 4 : 16;  // of x, a column, in steps of quarter bytes
  // A part of x that stays in the first-level cache while the rows of a tile pass.
  const int64_t part = x.batch == 1 || x.batch * width * bytes / 4 <= 20480 ? blocks : x.batch >= 16 ? 4 : 8;
  const float* row_scales = nullptr;
  if (values == kInt8)
    row_scales = reinterpret_cast<const float*>(data + of.tiles(rows) * blocks * of.panel_bytes());
  for (int64_t tile = first; tile < last; tile++) {
    const uint8_t* panels = data + tile * blocks * of.panel_bytes();
    __m256 sums[kMaxBatch / BT][2 * BT];
    for (int64_t t = 0; t < x.batch / BT; t++)
      for (auto& sum : sums[t]) sum = _mm256_setzero_ps();
    for (int64_t k = 0; k < blocks; k += part)
      for (int64_t t = 0; t < x.batch / BT; t++) {
        const uint8_t* panel = panels + k * of.panel_bytes();
        const int64_t count = smaller(part, blocks - k), at = t * BT * width + k * kBlock;
        if constexpr (values >= kInt8)
          panels8<n, values == kInt4, BT>(panel, count, x.narrow + at, width, x.scales + t * BT * blocks + k, blocks,
                                          sums[t]);
        else
          panels16<values, BT>(panel, count, x.wide + at, width, sums[t]);
      }
    for (int64_t b = 0; b < x.batch; b++)
      store_tile<n>(sums[b / BT], BT, int(b % BT), row_scales ? row_scales + tile * rows : nullptr,
                    y + b * ldy + tile * rows, of.rows - tile * rows);
  }
}

// ---- dense rows

INLINE float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_hadd_ps(half, half);
  return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

// R rows by BT rows of x; x.wide is in pairs for bf16.
template <int values, int R, int BT>
INLINE void dense16(const uint8_t* row, int64_t row_bytes, int64_t width, const float* x, int64_t ldx, __m256 (*a)[BT]) {
  for (int64_t k = 0; k < width; k += 16, row += 32, x += 16)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int e = 0; e < 2; e++) {
        const __m256 w = load_step<values>(row + r * row_bytes, e);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++)
          a[BT == 1 ? 2 * r + e : r][b] =
              _mm256_fmadd_ps(w, _mm256_loadu_ps(x + b * ldx + 8 * e), a[BT == 1 ? 2 * r + e : r][b]);
      }
}

template <int R, int BT, bool is_int4>
INLINE void dense8(const uint8_t* row, int64_t row_bytes, int64_t blocks, const int8_t* x, int64_t ldx,
                   const float* scales, int64_t ld_scales, __m256 (*a)[BT]) {
  const __m256i ones = _mm256_set1_epi16(1), low_four = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  for (int64_t i = 0; i < blocks; i++, row += is_int4 ? 34 : 64, x += kBlock, scales++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      __m256i s[BT];
      const uint8_t* at = row + r * row_bytes;
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + (is_int4 ? 0 : 32 * c)));
        if (is_int4) w = _mm256_sub_epi8(_mm256_and_si256(c ? _mm256_srli_epi16(w, 4) : w, low_four), eight);
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++) {
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + b * ldx + 32 * c));
          const __m256i pairs = dot_bytes(magnitude, w, v);
          if (is_int4) s[b] = c ? _mm256_add_epi16(s[b], pairs) : pairs;
          else s[b] = c ? _mm256_add_epi32(s[b], _mm256_madd_epi16(pairs, ones)) : _mm256_madd_epi16(pairs, ones);
        }
      }
      __m256 scale = _mm256_setzero_ps();
      if (is_int4) {
        uint16_t bits;
        std::memcpy(&bits, at + 32, 2);
        scale = _mm256_set1_ps(bfloat16_to_float(bits));
      }
#pragma GCC unroll 4
      for (int b = 0; b < BT; b++) {
        const __m256 whole = _mm256_cvtepi32_ps(is_int4 ? _mm256_madd_epi16(s[b], ones) : s[b]);
        const __m256 x_scale = _mm256_broadcast_ss(scales + b * ld_scales);
        a[r][b] = _mm256_fmadd_ps(whole, is_int4 ? _mm256_mul_ps(scale, x_scale) : x_scale, a[r][b]);
      }
    }
}

template <int values, int R, int BT>
INLINE void dense_rows(const Header& of, const uint8_t* data, const Activations& x, int64_t batch_row, int64_t row,
                       float* y, int64_t ldy) {
  constexpr int E = values < kInt8 && BT == 1 ? 2 : 1;
  const int64_t width = of.padded(), blocks = of.blocks(), bytes = of.dense_row_bytes();
  __m256 a[R * E][BT];
  for (auto& sums : a)
    for (auto& sum : sums) sum = _mm256_setzero_ps();
  if constexpr (values < kInt8)
    dense16<values, R, BT>(data + row * bytes, bytes, width, x.wide + batch_row * width, width, a);
  else
    dense8<R, BT, values == kInt4>(data + row * bytes, bytes, blocks, x.narrow + batch_row * width, width,
                                   x.scales + batch_row * blocks, blocks, a);
  for (int r = 0; r < R; r++) {
    float scale = 1.0f;
    if (values == kInt8) std::memcpy(&scale, data + of.rows * bytes + 4 * (row + r), 4);
    for (int b = 0; b < BT; b++)
      y[b * ldy + row + r] = scale * sum_of(E == 2 ? _mm256_add_ps(a[r * E][b], a[r * E + E - 1][b]) : a[r * E][b]);
  }
}

template <int values, int BT>
void multiply_dense(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                    int64_t last) {
  constexpr int R = BT == 4 ? 2 : 4;
  const int64_t end = smaller(last * 4, of.rows);
  for (int64_t row = first * 4; row < end; row += R)
    for (int64_t b = 0; b < x.batch; b += BT) {
      if (row + R <= end) {
        dense_rows<values, R, BT>(of, data, x, b, row, y + b * ldy, ldy);
      } else {
        for (int64_t r = row; r < end; r++) dense_rows<values, 1, BT>(of, data, x, b, r, y + b * ldy, ldy);
      }
    }
}

template <int values>
Multiply chosen(const Header& of, int64_t batch) {
  if (of.layout == kDense)
    return batch == 1 ? multiply_dense<values, 1> : batch == 2 ? multiply_dense<values, 2> : multiply_dense<values, 4>;
  if (of.n == 1)
    return batch == 1   ? multiply_panels<1, values, 1>
           : batch == 2 ? multiply_panels<1, values, 2>
                        : multiply_panels<1, values, 4>;
  return batch == 1   ? multiply_panels<2, values, 1>
         : batch == 2 ? multiply_panels<2, values, 2>
                      : multiply_panels<2, values, 4>;
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// The kernel of a matrix for `batch` rows of x (1, 2, or a multiple of 4); null where the plain path is to be taken.
Multiply avx2_multiply(const Header& of, int64_t batch) {
  if (!has_avx2() || of.layout == kRows) return nullptr;
  switch (of.values) {
    case kBFloat16: return chosen<kBFloat16>(of, batch);
    case kFloat16: return chosen<kFloat16>(of, batch);
    case kInt8: return chosen<kInt8>(of, batch);
    case kInt4: return chosen<kInt4>(of, batch);
    default: return nullptr;
  }
}

// Blocks of x as int8 with the largest magnitude at 127. NaN and infinity make the scale NaN, and so the outputs.
void avx2_quantize(const float* x, int64_t width, int8_t* narrow, float* scales) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t k = 0; k < width; k += kBlock) {
    __m256 largest = _mm256_setzero_ps(), finite = _mm256_setzero_ps();
    for (int i = 0; i < 8; i++) {
      const __m256 v = _mm256_loadu_ps(x + k + 8 * i);
      largest = _mm256_max_ps(largest, _mm256_and_ps(v, magnitude));
      finite = _mm256_fmadd_ps(v, _mm256_setzero_ps(), finite);
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float most = _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    scales[k / kBlock] = most / 127.0f + sum_of(finite);
    const __m256 factor = _mm256_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);
    for (int i = 0; i < 2; i++) {
      __m256i q[4];
      for (int j = 0; j < 4; j++)
        q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 32 * i + 8 * j), factor));
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(narrow + k + 32 * i), _mm256_permutevar8x32_epi32(bytes, order));
    }
  }
}

}  // namespace castlm
#pragma GCC pop_options

#else

namespace castlm {
bool has_avx2() { return false; }
Multiply avx2_multiply(const Header&, int64_t) { return nullptr; }
void avx2_quantize(const float*, int64_t, int8_t*, float*) {}
}  // namespace castlm

#endif
