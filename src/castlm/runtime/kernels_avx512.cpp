// The kernels for processors with AVX-512 and VNNI, over the panels and dense blocks of the AVX2 ones: two steps, or a whole
// block of 64 bytes, fill one register. `vpdpbusd` multiplies unsigned by signed bytes. So the panels take activations with
// 128 added and subtract 128 times the sum of the weights; dense weights become unsigned. Both are exact.

#include "avx512.h"

#if defined(CASTLM_AVX512)

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace castlm {
namespace {

INLINE __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
INLINE __m256 folded(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// Of weights that will be read soon, on Intel's processors: it takes 15 to 35 % off the time of a layer on an Emerald Rapids. On
// Zen 4 it costs up to a quarter of the bandwidth.
template <int bytes>
INLINE void prefetch(const uint8_t* weights) {
  constexpr int kAhead = 4096;
  if (!is_intel) return;
  for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead + line), _MM_HINT_T0);
}

// Sixteen weights that follow each other.
template <int values>
INLINE __m512 load_floats(const uint8_t* at) {
  if (values == kFloat32) return _mm512_loadu_ps(at);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  if (values == kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The even or the odd ones of 32 bf16.
INLINE __m512 every_second(__m512i both, int odd) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  return _mm512_castsi512_ps(odd ? _mm512_and_si512(both, high) : _mm512_slli_epi32(both, 16));
}

// ---- 2:4 and 1:4 of floats: `sums[b]` has the first rows of a tile in its low half, the others in its high half

// Two steps of one row half are one register, and so are their 16 columns of x. T tiles, `stride` bytes apart.
template <int values, int BT, int T, bool in_parts>
INLINE void panels_of_floats(const uint8_t* panel, int64_t stride, int64_t blocks, const float* x, int64_t ldx,
                             __m512* sums) {
  constexpr int kPair = values == kFloat32 ? 64 : 32, kBytes = 32 + 8 * kPair;  // of 16 weights; of a panel
  const __m512i step_shift = in_halves(0, 2);
  constexpr int E = BT == 1 && !in_parts ? 2 : 1;  // two sums an output where there are few: it hides the latency of an FMA
  __m512 a[E][T][2][BT];
  for (auto& of_e : a)
    for (auto& of_tile : of_e)
      for (auto& of_half : of_tile)
        for (auto& sum : of_half) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock) {
    for (int j = 0; j < T; j++) prefetch<kBytes>(panel + j * stride);
    __m512i meta[T];
#pragma GCC unroll 4
    for (int j = 0; j < T; j++) meta[j] = _mm512_srlv_epi32(load_twice(panel + j * stride), step_shift);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
#pragma GCC unroll 4
      for (int j = 0; j < T; j++) {
        const uint8_t* at = panel + j * stride + 32 + 2 * kPair * t;
        const bool is_bfloat16 = values == kBFloat16;  // the halves are interleaved
        const __m512 w0 = is_bfloat16 ? every_second(load(at), 0) : load_floats<values>(at);
        const __m512 w1 = is_bfloat16 ? every_second(load(at), 1) : load_floats<values>(at + kPair);
        const __m512i c0 = _mm512_srli_epi32(meta[j], 4 * t), c1 = _mm512_srli_epi32(meta[j], 4 * t + 16);
#pragma GCC unroll 8
        for (int b = 0; b < BT; b++) {
          const __m512 v = _mm512_loadu_ps(x + b * ldx + 16 * t);
          a[t % E][j][0][b] = _mm512_fmadd_ps(w0, _mm512_permutevar_ps(v, c0), a[t % E][j][0][b]);
          a[t % E][j][1][b] = _mm512_fmadd_ps(w1, _mm512_permutevar_ps(v, c1), a[t % E][j][1][b]);
        }
      }
    }
  }
  for (auto& of_e : a)
    for (int j = 0; j < T; j++)
      for (int b = 0; b < BT; b++)
        sums[j * BT + b] = _mm512_add_ps(sums[j * BT + b], join(folded(of_e[j][0][b]), folded(of_e[j][1][b])));
}

// ---- 2:4 and 1:4 of integers

// What x + 128 in place of x adds to the products, negative.
INLINE __m512i minus_offset(__m512i w) {
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), w));
}

// The scales of the rows of a tile, in the lanes in which `panels_of_integers` has the rows of each half.
template <int n>
INLINE void row_scales(const uint8_t* at, __m512* scales) {
  const auto* from = reinterpret_cast<const __m128i*>(at);
  const __m128i bits = n == 1 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
  const __m512 wide = _mm512_castps256_ps512(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  const __m512i lanes = n == 1 ? _mm512_set4_epi32(3, 2, 1, 0) : _mm512_set4_epi32(1, 1, 0, 0);
  scales[0] = _mm512_permutexvar_ps(lanes, wide);
  scales[1] = _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 / n)), wide);
}

template <int n, bool is_int4, int BT>
INLINE void panels_of_integers(const uint8_t* panel, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                               int64_t ld_scales, __m512* sums) {
  constexpr int kBytes = is_int4 ? 32 + 64 + 16 / n : 160;
  const __m512i low_two = _mm512_set1_epi8(3), column_shift = in_halves(0, 0x00020002);
  const __m512i group = n == 2 ? _mm512_set1_epi64(0x0c0c080804040000) : _mm512_set1_epi32(0x0c080400);
  __m512 a[2][BT];
  for (int h = 0; h < 2; h++)
    for (int b = 0; b < BT; b++) a[h][b] = sums[h * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock, scales++) {
    prefetch<kBytes>(panel);
    const __m512i meta = _mm512_srlv_epi16(load_twice(panel), column_shift);
    __m512 w_scales[2];
    if (is_int4) row_scales<n>(panel + 96, w_scales);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      // (meta >> 4 h & 3) | group
      const __m512i control = _mm512_ternarylogic_epi32(h ? _mm512_srli_epi16(meta, 4) : meta, low_two, group, 0xea);
      const __m512i w = is_int4 ? load_int4(panel + 32 + 32 * h) : load(panel + 32 + 64 * h);
      const __m512i offset = minus_offset(w);
#pragma GCC unroll 8
      for (int b = 0; b < BT; b++) {
        const __m512i v = _mm512_shuffle_epi8(load(x + b * ldx), control);
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset, v, w));
        const __m512 scale = _mm512_set1_ps(scales[b * ld_scales]);
        a[h][b] = _mm512_fmadd_ps(whole, is_int4 ? _mm512_mul_ps(scale, w_scales[h]) : scale, a[h][b]);
      }
    }
  }
  for (int h = 0; h < 2; h++)
    for (int b = 0; b < BT; b++) sums[h * BT + b] = a[h][b];
}

// ---- dense rows, R at a time in blocks of 64 columns

// x is in pairs of 32 for bf16. R rows of each of T tiles, `stride` bytes apart.
template <int values, int R, int BT, int T, bool in_parts>
INLINE void dense_floats(const uint8_t* row, int64_t stride, int64_t blocks, const float* x, int64_t ldx, __m512* sums) {
  constexpr int kBytes = values == kFloat32 ? 256 : 128;
  constexpr int E = BT >= 2 || in_parts ? 1 : 2;
  __m512 a[E][T * R][BT];
  for (int e = 0; e < E; e++)
    for (int r = 0; r < T * R; r++)
      for (int b = 0; b < BT; b++) a[e][r][b] = e ? _mm512_setzero_ps() : sums[r * BT + b];
  for (int64_t i = 0; i < blocks; i++, row += 4 * kBytes, x += kBlock) {
    for (int j = 0; j < T; j++) prefetch<4 * kBytes>(row + j * stride);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      __m512 v[BT];
#pragma GCC unroll 8
      for (int b = 0; b < BT; b++) v[b] = _mm512_loadu_ps(x + b * ldx + 16 * k);
#pragma GCC unroll 16
      for (int r = 0; r < T * R; r++) {
        const uint8_t* at = row + r / R * stride + r % R * kBytes;
        const __m512 w = values == kBFloat16 ? every_second(load(at + k / 2 * 64), k % 2)
                                             : load_floats<values>(at + k * kBytes / 4);
#pragma GCC unroll 8
        for (int b = 0; b < BT; b++) a[k % E][r][b] = _mm512_fmadd_ps(w, v[b], a[k % E][r][b]);
      }
    }
  }
  for (int r = 0; r < T * R; r++)
    for (int b = 0; b < BT; b++) sums[r * BT + b] = E == 2 ? _mm512_add_ps(a[0][r][b], a[E - 1][r][b]) : a[0][r][b];
}

template <bool is_int4, int R, int BT>
INLINE void dense_integers(const uint8_t* row, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                           const int32_t* offsets, int64_t ld_scales, __m512* sums) {
  constexpr int kBytes = is_int4 ? 34 : 64;
  const __m512i high_shift = in_halves(0, 0x00040004), low_four = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(char(0x80));
  __m512 a[R][BT];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < BT; b++) a[r][b] = sums[r * BT + b];
  for (int64_t i = 0; i < blocks; i++, row += 4 * kBytes, x += kBlock, scales++, offsets++) {
    prefetch<4 * kBytes>(row);
    __m512i v[BT], offset[BT];
#pragma GCC unroll 4
    for (int b = 0; b < BT; b++) v[b] = load(x + b * ldx), offset[b] = _mm512_maskz_loadu_epi32(1, offsets + b * ld_scales);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t* at = row + r * kBytes;
      const __m512i w = is_int4 ? _mm512_and_si512(_mm512_srlv_epi16(load_twice(at), high_shift), low_four)
                                : _mm512_xor_si512(load(at), sign);
      uint16_t bits = 0;
      if (is_int4) std::memcpy(&bits, at + 32, 2);
#pragma GCC unroll 4
      for (int b = 0; b < BT; b++) {
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(offset[b], w, v[b]));
        const float scale = scales[b * ld_scales];
        a[r][b] = _mm512_fmadd_ps(whole, _mm512_set1_ps(is_int4 ? bfloat16_to_float(bits) * scale : scale), a[r][b]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < BT; b++) sums[r * BT + b] = a[r][b];
}

// ---- tiles

#include "tiles.h"

struct Avx512 {
  using Vector = __m512;
  static constexpr int kMostRows = 8;
  static constexpr int kParts = 4;
  static INLINE Vector zero() { return _mm512_setzero_ps(); }

  template <int n, int values>
  static constexpr int num_sums() { return n == 0 ? 4 : values < kInt8 ? 1 : 2; }

  template <int n, int values, int BT, int T, bool in_parts>
  static INLINE void add(const Header& of, const uint8_t* panel, int64_t stride, int64_t count, const Activations& x,
                         int64_t at, int64_t k, Vector* sums) {
    const int64_t width = of.padded(), blocks = of.blocks();
    const float* wide = x.wide + at * width + k * kBlock;
    const int8_t* narrow = x.narrow + at * width + k * kBlock;
    const float* scales = x.scales + at * blocks + k;
    if constexpr (n > 0 && values < kInt8) {
      panels_of_floats<values, BT, T, in_parts>(panel, stride, count, wide, width, sums);
    } else if constexpr (n > 0) {
      panels_of_integers<n, values == kInt4, BT>(panel, count, narrow, width, scales, blocks, sums);
    } else {
      if constexpr (values < kInt8) dense_floats<values, 4, BT, T, in_parts>(panel, stride, count, wide, width, sums);
      else dense_integers<values == kInt4, 4, BT>(panel, count, narrow, width, scales, x.offsets + at * blocks + k, blocks, sums);
    }
  }

  // The rows of a tile for row `b` of the BT that `sums` are of: 4, or 8 of 1:4.
  template <int n, int values>
  static INLINE void rows(const Vector* sums, int BT, int b, float* to) {
    if (n == 0) {
      for (int r = 0; r < 4; r++) to[r] = _mm512_reduce_add_ps(sums[r * BT + b]);
      return;
    }
    __m256 halves[2];
    if (values < kInt8) halves[0] = _mm512_castps512_ps256(sums[b]), halves[1] = _mm512_extractf32x8_ps(sums[b], 1);
    else halves[0] = folded(sums[b]), halves[1] = folded(sums[BT + b]);
    __m128 half[2];
    for (int h = 0; h < 2; h++) half[h] = _mm_add_ps(_mm256_castps256_ps128(halves[h]), _mm256_extractf128_ps(halves[h], 1));
    _mm_storeu_ps(to, n == 2 ? _mm_hadd_ps(half[0], half[1]) : half[0]);
    if (n == 1) _mm_storeu_ps(to + 4, half[1]);
  }
};

}  // namespace

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
}

// On Zen 4, in units of the speed of AVX2: 0.88 to 0.96 with fp16 for up to 4 rows of x, 0.96 with int4 for one; 1.04 to 1.7
// in all other cases.
bool avx512_gains(const Header& of, int64_t batch) {
  return of.n == 0 || !((of.values == kFloat16 && batch <= 4) || (of.values == kInt4 && batch == 1));
}

Multiply avx512_multiply(const Header& of, int64_t batch) { return kernel_of<Avx512>(of, batch); }

int32_t avx512_adapt(const Header& of, int8_t* narrow, float* scale) {
  __m512i x = load(narrow);
  if (of.n == 0) {
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), x);
    return -(of.values == kInt4 ? 8 : 128) * _mm512_reduce_add_epi32(sums);
  }
  _mm512_storeu_si512(narrow, _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80))));
  if (of.values == kInt4) *scale /= 16;
  return 0;
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_avx512() { return false; }
Multiply avx512_multiply(const Header&, int64_t) { return nullptr; }
bool avx512_gains(const Header&, int64_t) { return false; }
int32_t avx512_adapt(const Header&, int8_t*, float*) { return 0; }
}  // namespace castlm

#endif
