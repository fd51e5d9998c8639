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

}  // namespace castlm
END_TARGET
#endif
