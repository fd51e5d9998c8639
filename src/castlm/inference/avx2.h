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

// Eight weights of a panel of floats: those of one step and half (`place_in_panel`).
template <int values>
INLINE __m256 load_step(const uint8_t* panel, int step, int half) {
  if (values == kBFloat16) return every_second(panel + 32 + 32 * step, half);
  constexpr int kStep = values == kFloat32 ? 32 : 16;
  return load_contiguous<values>(panel + 32 + kStep * (4 * (step / 2) + 2 * half + step % 2));
}

}  // namespace castlm
END_TARGET
#endif
