// What the AVX2 files share: whether they can be compiled, and how eight weights are read.

#pragma once

#include <type_traits>

#include "matrix.h"
#include "target.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CASTLM_AVX2
#include <cpuid.h>
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {

INLINE uint16_t load16(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bits;
}

INLINE uint32_t load32(const uint8_t* at) {
  uint32_t bits;
  std::memcpy(&bits, at, 4);
  return bits;
}

// Eight weights that follow each other.
template <int values>
INLINE __m256 load_contiguous(const uint8_t* at) {
  if (values == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  if (values == kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The even or the odd ones of 16 bf16.
INLINE __m256 every_second(const uint8_t* at, int odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  return _mm256_castsi256_ps(odd ? _mm256_and_si256(both, high) : _mm256_slli_epi32(both, 16));
}

// Eight weights of a panel of floats: those of one step and half (`place_in_panel`), behind so many bytes of columns.
template <int values, int codes = 32>
INLINE __m256 load_step(const uint8_t* panel, int step, int half) {
  if (values == kBFloat16) return every_second(panel + codes + 32 * step, half);
  constexpr int kStep = values == kFloat32 ? 32 : 16;
  return load_contiguous<values>(panel + codes + kStep * (4 * (step / 2) + 2 * half + step % 2));
}

INLINE __m256i load_bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

INLINE float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_hadd_ps(half, half);
  return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

// ---- integers
//
// `n` is what `panel_kind` makes of a pattern: 1 and 2 of 4, 4 of 8, or 8 of 16 columns. Both last kinds have the same panels.

template <int n>
constexpr int code_bytes() { return n > 2 ? 64 : 32; }  // of columns, in front of a panel
template <int n, bool is_int4>
constexpr int integer_panel_bytes() { return is_int4 ? 32 + 64 + 16 / n : code_bytes<n>() + 128; }

// The 32 kept weights of a panel at a step, as int8: 32 columns of one half of the rows. int4 stores two steps together.
template <int n, bool is_int4>
INLINE __m256i kept_of_step(const uint8_t* panel, int step) {
  if (!is_int4) return load_bytes(panel + code_bytes<n>() + 32 * step);
  const __m256i both = load_bytes(panel + 32 + 32 * (step / 2));
  const __m256i codes = _mm256_and_si256(step % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
  return _mm256_sub_epi8(codes, _mm256_set1_epi8(8));
}

// The byte of each group's first column, for each of its kept weights: 16 columns of a lane are four groups.
template <int n>
INLINE __m256i first_of_groups() {
  return n == 2 ? _mm256_set1_epi64x(0x0c0c080804040000) : _mm256_set1_epi32(0x0c080400);
}

// The bytes of x that these weights meet, for `vpshufb`. `meta` is the first 32 bytes of the panel, which has more for n > 2.
template <int n>
INLINE __m256i control_of_step(const uint8_t* panel, __m256i meta, int step) {
  if (n > 2) {
    const __m256i both = load_bytes(panel + step / 2 * 32);
    return _mm256_and_si256(step % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
  }
  return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(meta, 2 * step), _mm256_set1_epi8(3)), first_of_groups<n>());
}

// Sums of pairs of products, int16. `vpmaddubsw` takes one unsigned factor: |w| times x with the sign of w.
INLINE __m256i dot_bytes(__m256i magnitude, __m256i w, __m256i x) {
  return _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
}

// The bf16 scales of a panel's rows for each half of them, in the lanes that hold their sums.
template <int n>
INLINE void row_scales(const uint8_t* at, __m256* scales) {
  for (int p = 0; p < 2; p++) {
    int64_t four;  // bf16
    std::memcpy(&four, at + (n == 1 ? 8 * p : 0), 8);
    const int a = n == 1 ? 0 : 4 * p, step = n == 1 ? 2 : 0, c = n == 1 ? 4 : 4 * p + 2;  // bytes of the rows of a lane
    const auto lane = [](int byte) { return (byte + 1) << 24 | byte << 16 | 0x8080; };
    const __m128i order = _mm_setr_epi32(lane(a), lane(a + step), lane(c), lane(c + step));
    scales[p] = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(four), _mm256_broadcastsi128_si256(order)));
  }
}

// The outputs of a tile: the sum of the 8 lanes of each of `parts`, which are the two halves of a panel,
// whose lanes hold four rows of 1:4 or two of others, or with n = 0 four rows.
template <int n>
INLINE void tile_outputs(const __m256* parts, __m128* outputs) {
  constexpr int kParts = n ? 2 : 4;
  __m128 four[kParts];
  for (int part = 0; part < kParts; part++)
    four[part] = _mm_add_ps(_mm256_castps256_ps128(parts[part]), _mm256_extractf128_ps(parts[part], 1));
  if constexpr (n == 0) outputs[0] = _mm_hadd_ps(_mm_hadd_ps(four[0], four[1]), _mm_hadd_ps(four[2], four[3]));
  if constexpr (n == 1) outputs[0] = four[0], outputs[1] = four[1];
  if constexpr (n >= 2) outputs[0] = _mm_hadd_ps(four[0], four[1]);
}

}  // namespace castlm
END_TARGET
#endif
