// The AVX2 kernels for few rows of x: they stream the weights once and are bound by their bytes.
//
// n:m kernels permute x, not the weights (`matrix.h` draws a panel). Two rows of 2:4 share a lane of four floats or of 16
// bytes. `vpermilps` reads the two low bits of each control, so that one shift of the 32 bytes of columns gives the controls
// of the next step. A panel of 4 rows by 64 columns, or of 8 rows of 1:4, is one linear stream: 288 bytes of bf16, 160 of
// int8, 104 of int4 (2:4). 8:16 and its like are the same with places of 4 bits: `vpshufb` picks int8 of 16 columns as before, and
// two `vpermps` pick floats of 8 columns each.
//
// In the names below, b counts rows of x, r rows of weights, i blocks of 64 columns, t and c steps within a block, h and p
// halves of a panel's rows, j tiles that are read side by side, e independent sums of one output.

#include "avx2.h"
#include "plain.h"

#if defined(CASTLM_AVX2)

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace {

constexpr int kPrefetchAhead = 1536;  // bytes; the hardware's own prefetcher is late at 14 bytes a nanosecond

// Asks for the panel that comes some time after the one at `panel`.
template <int bytes>
INLINE void prefetch(const uint8_t* panel) {
  for (int line = 0; line < bytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(panel + kPrefetchAhead + line), _MM_HINT_T0);
}

// ---- 2:4 and 1:4 of floats

// T tiles, `stride` bytes apart.
template <int values, int BT, int T, bool in_parts>
INLINE void panels_of_floats(const uint8_t* panel, int64_t stride, int64_t blocks, const float* x, int64_t ldx,
                             __m256* sums) {
  constexpr int kStep = values == kFloat32 ? 64 : 32, kBytes = 32 + 8 * kStep;  // of 16 weights; of a panel
  constexpr int E = BT <= 2 && !in_parts ? 2 : 1;  // two sums an output where there are few: it hides the latency of an FMA
  __m256 a[E][T][2][BT];
  for (int e = 0; e < E; e++)
    for (int j = 0; j < T; j++)
      for (int h = 0; h < 2; h++)
        for (int b = 0; b < BT; b++) a[e][j][h][b] = e ? _mm256_setzero_ps() : sums[(2 * j + h) * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock) {
    __m256i meta[T];
#pragma GCC unroll 4
    for (int j = 0; j < T; j++) {
      prefetch<kBytes>(panel + j * stride);
      meta[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + j * stride));
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
#pragma GCC unroll 2
      for (int e = 0; e < 2; e++) {
#pragma GCC unroll 4
        for (int j = 0; j < T; j++) {
          const __m256 w0 = load_step<values>(panel + j * stride, 2 * t + e, 0);
          const __m256 w1 = load_step<values>(panel + j * stride, 2 * t + e, 1);
          const __m256i c0 = _mm256_srli_epi32(meta[j], 4 * t + 2 * e);
          const __m256i c1 = _mm256_srli_epi32(meta[j], 4 * t + 2 * e + 16);
#pragma GCC unroll 4
          for (int b = 0; b < BT; b++) {
            const __m256 v = _mm256_loadu_ps(x + b * ldx + 16 * t + 8 * e);
            a[e % E][j][0][b] = _mm256_fmadd_ps(w0, _mm256_permutevar_ps(v, c0), a[e % E][j][0][b]);
            a[e % E][j][1][b] = _mm256_fmadd_ps(w1, _mm256_permutevar_ps(v, c1), a[e % E][j][1][b]);
          }
        }
      }
    }
  }
  for (int j = 0; j < T; j++)
    for (int h = 0; h < 2; h++)
      for (int b = 0; b < BT; b++)
        sums[(2 * j + h) * BT + b] = E == 2 ? _mm256_add_ps(a[0][j][h][b], a[E - 1][j][h][b]) : a[0][j][h][b];
}

// ---- 8 of 16 columns of floats

// R rows from `row` on, of each of T tiles `stride` bytes apart. Sixteen columns of x are two registers.
template <int values, int R, int BT, int T>
INLINE void halves_of_floats(const uint8_t* panel, int row, int64_t stride, int64_t blocks, const float* x, int64_t ldx, __m256* sums) {
  constexpr int kBytes = 64 + (values == kFloat32 ? 512 : 256);
  __m256 a[T * R][BT];
  for (int r = 0; r < T * R; r++)
    for (int b = 0; b < BT; b++) a[r][b] = sums[r * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock) {
    for (int j = 0; j < T; j++) prefetch<kBytes>(panel + j * stride);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 8
      for (int r = 0; r < T * R; r++) {
        const uint8_t* const of_tile = panel + r / R * stride;
        const int in_tile = row + r % R, shift = 4 * (k % 2 * 4 + in_tile);
        const __m256i codes = load_bytes(of_tile + k / 2 * 32);
        const __m256i column = _mm256_srli_epi32(codes, shift);  // `vpermps` reads its three low bits
        const __m256 is_second = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - shift));
        const __m256 w = load_step<values, 64>(of_tile, 2 * k + in_tile / 2, in_tile % 2);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++) {
          const float* const at = x + b * ldx + 16 * k;
          const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), column);
          const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at + 8), column);
          a[r][b] = _mm256_fmadd_ps(w, _mm256_blendv_ps(first, second, is_second), a[r][b]);
        }
      }
  }
  for (int r = 0; r < T * R; r++)
    for (int b = 0; b < BT; b++) sums[r * BT + b] = a[r][b];
}

// ---- n:m of int8 and int4

// Pairs of int8 products added to `sum`, of int4 as int16 (at most 4 * 15 * 127), of int8 as int32.
template <bool is_int4>
INLINE __m256i add_pairs(const __m256i* sum, __m256i pairs, __m256i ones) {
  if (is_int4) return sum ? _mm256_add_epi16(*sum, pairs) : pairs;
  const __m256i wide = _mm256_madd_epi16(pairs, ones);
  return sum ? _mm256_add_epi32(*sum, wide) : wide;
}

template <int n, bool is_int4, int BT>
INLINE void panels_of_integers(const uint8_t* panel, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                    int64_t ld_scales, __m256* sums) {
  constexpr int kBytes = integer_panel_bytes<n, is_int4>();
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 a[2][BT];
  for (int p = 0; p < 2; p++)
    for (int b = 0; b < BT; b++) a[p][b] = sums[p * BT + b];
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock, scales++) {
    prefetch<kBytes>(panel);
    const __m256i meta = load_bytes(panel);
    __m256 w_scales[2];
    if (is_int4) row_scales<n>(panel + 96, w_scales);
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
      __m256i s[BT];
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        const __m256i control = control_of_step<n>(panel, meta, 2 * p + c), w = kept_of_step<n, is_int4>(panel, 2 * p + c);
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
        for (int b = 0; b < BT; b++) {
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + b * ldx + 32 * c));
          const __m256i pairs = dot_bytes(magnitude, w, _mm256_shuffle_epi8(v, control));
          s[b] = add_pairs<is_int4>(c ? &s[b] : nullptr, pairs, ones);
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

// ---- tiles

// `count` blocks from block `k` of a tile times rows [at, at + BT) of x, added to `sums`.
template <int n, int values, int BT, int T, bool in_parts>
INLINE void add_blocks(const Header& of, const uint8_t* panel, int64_t stride, int64_t count, const Activations& x,
                       int64_t at, int64_t k, __m256* sums) {
  const int64_t width = of.padded(), blocks = of.blocks();
  const float* wide = x.wide + at * width + k * kBlock;
  const int8_t* narrow = x.narrow + at * width + k * kBlock;
  const float* scales = x.scales + at * blocks + k;
  constexpr bool is_int4 = values == kInt4;
  if constexpr (n == 8 && values < kInt8) {
    constexpr int R = BT == 4 ? 2 : 4;  // as many sums as the registers hold
    for (int r = 0; r < 4; r += R) halves_of_floats<values, R, BT, T>(panel, r, stride, count, wide, width, sums + r * BT);
  } else if constexpr (values < kInt8) {
    panels_of_floats<values, BT, T, in_parts>(panel, stride, count, wide, width, sums);
  } else {
    panels_of_integers<n, is_int4, BT>(panel, count, narrow, width, scales, blocks, sums);
  }
}

#include "tiles.h"

struct Avx2 {
  using Vector = __m256;
  static constexpr int kMostRows = 4;
  static constexpr int kParts = 2;
  static constexpr bool kHasHalves = true, kHasDense = false;
  static INLINE Vector zero() { return _mm256_setzero_ps(); }
  template <int n, int values>
  static constexpr int num_sums() { return n == 8 && values < kInt8 ? 4 : 2; }
  template <int n, int values, int BT, int T, bool in_parts>
  static INLINE void add(const Header& of, const uint8_t* panel, int64_t stride, int64_t count, const Activations& x,
                         int64_t at, int64_t k, Vector* sums) {
    add_blocks<n, values, BT, T, in_parts>(of, panel, stride, count, x, at, k, sums);
  }
  template <int n, int values>
  static INLINE void rows(const Vector* sums, int BT, int b, float* to) {
    constexpr int kSums = num_sums<n, values>();
    Vector parts[kSums];
    __m128 outputs[n == 1 ? 2 : 1];
    for (int part = 0; part < kSums; part++) parts[part] = sums[part * BT + b];
    tile_outputs<kSums == 4 ? 0 : n>(parts, outputs);
    for (const __m128& four : outputs) _mm_storeu_ps(to, four), to += 4;
  }
};

}  // namespace

// Not every compiler has "f16c" in __builtin_cpu_supports: bit 29 of ecx, leaf 1.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c();
}

Kernel avx2_panels(const Header& of, int64_t rows, bool) { return kernel_of<Avx2>(of, rows, avx2_integers); }

// Blocks of x as int8 with the largest magnitude at 127. NaN and infinity make the scale NaN, and so the outputs.
static void quantize(const float* x, int64_t width, int8_t* narrow, float* scales) {
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

Activations avx2_integers(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  return as_integers(of, x, rows, first, last, room, quantize);
}

int32_t avx2_offset(const int8_t* narrow) {
  const __m256i* x = reinterpret_cast<const __m256i*>(narrow);
  const __m256i eights = _mm256_set1_epi8(8);
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(eights, _mm256_loadu_si256(x)),
                                         _mm256_maddubs_epi16(eights, _mm256_loadu_si256(x + 1)));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return -_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_avx2() { return false; }
Kernel avx2_panels(const Header&, int64_t, bool) { return {}; }
int32_t avx2_offset(const int8_t*) { return 0; }
}  // namespace castlm

#endif
