// What the files for AVX-512 share: whether they can be compiled, and how registers are read and transposed, and 2^x.

#pragma once

#include "matrix.h"
#include "target.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 9)
#define CASTLM_AVX512
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace castlm {

INLINE __m512i load(const void* at) { return _mm512_loadu_si512(at); }

// 16 registers of 16 words as a matrix: word i of register j becomes word j of register i.
INLINE void transpose(__m512i (&of)[16]) {
  __m512i pairs[16], fours[16], eights[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(of[i], of[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(of[i], of[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      eights[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0x88);
      eights[i + j + 4] = _mm512_shuffle_i32x4(fours[i + j], fours[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    of[i] = _mm512_shuffle_i32x4(eights[i], eights[i + 8], 0x88);
    of[i + 8] = _mm512_shuffle_i32x4(eights[i], eights[i + 8], 0xdd);
  }
}

// 2^x to within 8e-5 of its value for x <= 0, and 0 below -126; NaN stays. The error is less than bf16 keeps.
INLINE __m512 short_power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(5.517166853e-2f), r, _mm512_set1_ps(2.426111549e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.932609677e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999280572e-1f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_US), p, whole);
}

}  // namespace castlm
END_TARGET
#endif
