// The attention of attention.h and prompt_attention.h with AVX2 and with the vectors of 16 bytes that x86-64 and 64-bit ARM
// always have, that of prompts with AVX-512, too.

#include <algorithm>
#include <cmath>

#include "avx2.h"
#include "decoder.h"
#include "plain.h"

namespace castlm {
namespace old_narrow {
namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
#if defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 4, kVectors = 4;  // of 32 registers
#else
constexpr int kLanes = 4, kTileRows = 6, kVectors = 2;  // of 16
#endif

INLINE Vector all(float value) { return Vector{value, value, value, value}; }
INLINE void four_sums(const Vector* sums, float* to) {
  for (int k = 0; k < 4; ++k) to[k] = (sums[k][0] + sums[k][2]) + (sums[k][1] + sums[k][3]);
}

#include "old_prompt_floats.h"
#include "old_prompt_attention.h"
#include "old_attention.h"

}  // namespace
}  // namespace old_narrow
}  // namespace castlm

#if defined(CASTLM_AVX2)
BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace old_wide {
namespace {

using Vector = __m256;
typedef int32_t Integers __attribute__((vector_size(32)));
constexpr int kLanes = 8, kTileRows = 6, kVectors = 2;

INLINE Vector all(float value) { return _mm256_set1_ps(value); }
INLINE void four_sums(const Vector* sums, float* to) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

#include "old_prompt_floats.h"
#include "old_prompt_attention.h"
#include "old_attention.h"

}  // namespace
}  // namespace wide
}  // namespace castlm
END_TARGET

BEGIN_TARGET("avx512f,avx2,fma")

namespace castlm {
namespace old_widest {
namespace {

using Vector = __m512;
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int kLanes = 16, kTileRows = 8, kVectors = 2;

INLINE Vector all(float value) { return _mm512_set1_ps(value); }

#include "old_prompt_floats.h"
#include "old_prompt_attention.h"

}  // namespace
}  // namespace old_widest
}  // namespace castlm
END_TARGET
#endif

namespace castlm {

Attend old_attend_of(int64_t group) {
#if defined(CASTLM_AVX2)
  if (level() >= kAvx2) return old_wide::old_attend_of(group);
#endif
  return old_narrow::old_attend_of(group);
}

void old_attend_to_prompt(const OldPrompt& of, int64_t first, int64_t count) {
#if defined(CASTLM_AVX2)
  if (level() >= kAvx512 && of.by_bf16 && old_has_bf16_attention()) return old_attend_to_prompt_by_bf16(of, first, count);
  if (level() >= kAvx512) return old_widest::old_attend_to_prompt(of, first, count);
  if (level() >= kAvx2) return old_wide::old_attend_to_prompt(of, first, count);
#endif
  old_narrow::old_attend_to_prompt(of, first, count);
}

}  // namespace castlm
