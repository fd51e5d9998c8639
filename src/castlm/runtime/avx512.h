// What the files for AVX-512 share: whether they can be compiled, and how bytes are read.

#pragma once

#include "matrix.h"
#include "target.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 9)
#define CASTLM_AVX512
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace castlm {

INLINE __m512i load(const void* at) { return _mm512_loadu_si512(at); }
INLINE __m512i load_twice(const void* at) {  // 32 bytes into both halves
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
INLINE __m512i in_halves(int low, int high) {
  return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
}

// 32 bytes of int4 as 64 bytes, all low halves, then all high ones: 16 times each, as (halves & 0xf0) ^ 0x80.
INLINE __m512i load_int4(const uint8_t* at) {
  const __m512i halves = _mm512_sllv_epi16(load_twice(at), in_halves(0x00040004, 0));
  return _mm512_ternarylogic_epi32(halves, _mm512_set1_epi8(char(0xf0)), _mm512_set1_epi8(char(0x80)), 0x6a);
}

}  // namespace castlm
END_TARGET
#endif
