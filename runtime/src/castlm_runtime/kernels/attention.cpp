// Attention by products of fp32 with AVX-512, with AVX2, and with the vectors of 16 bytes that x86-64 and 64-bit ARM always have;
// and the choice of a level's kernels.

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "avx2.h"
#include "plain.h"

namespace castlm {
namespace narrow {
namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
#if defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32, kTileRows = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kRegisters = 16, kTileRows = 6, kVectors = 2;
#endif

INLINE Vector all(float value) { return Vector{value, value, value, value}; }
INLINE void add_product(Vector& sum, Vector a, Vector b) { sum += a * b; }

#include "vectors.h"
#include "prompt_floats.h"
#include "token_attention.h"
#include "prompt_attention.h"

Attention attention(CacheKind kind) {
  return {kind == kCacheBFloat16 ? attend_part_of<2> : kind == kCacheInt8 ? attend_part_of<4> : attend_part_of<1>, attend_to_prompt};
}

}  // namespace
}  // namespace narrow
}  // namespace castlm

#if defined(CASTLM_AVX2)
BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace wide {
namespace {

using Vector = __m256;
typedef int32_t Integers __attribute__((vector_size(32)));
constexpr int kLanes = 8, kRegisters = 16, kTileRows = 6, kVectors = 2;

INLINE Vector all(float value) { return _mm256_set1_ps(value); }
// In assembly: of an FMA in C++, GCC 12 moves sums between registers and spills some of them.
INLINE void add_product(Vector& sum, Vector a, Vector b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }

#include "vectors.h"
#include "prompt_floats.h"
#include "token_attention.h"
#include "prompt_attention.h"

Attention attention() { return {attend_part_of<1>, attend_to_prompt}; }  // others: attention_words.cpp

}  // namespace
}  // namespace wide
}  // namespace castlm
END_TARGET

BEGIN_TARGET("avx512f,avx2,fma")

namespace castlm {
namespace widest {
namespace {

using Vector = __m512;
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int kLanes = 16, kRegisters = 32, kTileRows = 8, kVectors = 2;

INLINE Vector all(float value) { return _mm512_set1_ps(value); }
INLINE void add_product(Vector& sum, Vector a, Vector b) { sum += a * b; }

#include "vectors.h"
#include "prompt_floats.h"
#include "token_attention.h"
#include "prompt_attention.h"

Attention attention(CacheKind kind) {
  return {kind == kCacheBFloat16 ? attend_part_of<2> : kind == kCacheInt8 ? attend_part_of<4> : attend_part_of<1>, attend_to_prompt};
}

}  // namespace
}  // namespace widest
}  // namespace castlm
END_TARGET
#endif

namespace castlm {

Attention attention_of(CacheKind kind) {
#if defined(CASTLM_AVX2)
  if (level() >= kAvx512) {
    Attention found = widest::attention(kind);
    if (kind == kCacheInt8) found.part = attend_part_of_int8;
    if (has_bf16_attention()) found.prompt = kind == kCacheFloat32 ? found.prompt : bf16_attention().prompt;
    if (has_bf16_attention() && kind == kCacheBFloat16) found.part = bf16_attention().part;
    return found;
  }
  if (level() >= kAvx2) return kind == kCacheFloat32 ? wide::attention() : attention_by_words(kind);
#endif
  return narrow::attention(kind);
}

}  // namespace castlm
