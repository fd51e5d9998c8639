// Attention of tokens of a prompt with products of bf16, for processors that have `vdpbf16ps` beside AVX-512, where it does twice the
// work of an FMA. It walks as prompt_attention.h does, and a factor is two bf16:
//
//   queries:  (width / 2, lanes)   columns 2 i and 2 i + 1 of a query
//   keys:     (64, width / 2)      columns 2 i and 2 i + 1 of a key
//   weights:  (32, lanes)          of keys 2 j and 2 j + 1
//   values:   (32, width)          of keys 2 j and 2 j + 1
//
// A weight counts in its total as it was rounded, so that the weights of a query still add up to 1.

#include <algorithm>
#include <cmath>

#include "avx512.h"
#include "decoder.h"
#include "plain.h"

#if defined(CASTLM_AVX512) && (defined(__clang__) || __GNUC__ >= 10)

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace castlm {
namespace old_by_bf16 {
namespace {

using Vector = __m512;
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int kLanes = 16, kTileRows = 8, kVectors = 2;

INLINE Vector all(float value) { return _mm512_set1_ps(value); }

using Factor = uint32_t;
using Factors = __m512i;
typedef float Four __attribute__((vector_size(16)));  // four factors, too
constexpr int kNumbers = 2;                           // in a factor

INLINE Factors all_of(Factor factor) { return _mm512_set1_epi32(int(factor)); }
INLINE Factors load_factors(const Factor* at) { return castlm::load(at); }
INLINE void add_products(Vector& sums, Factors a, Factors b) { sums = _mm512_dpbf16_ps(sums, (__m512bh)b, (__m512bh)a); }

INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1 << count) - 1); }

// Numbers times `scale` as factors.
INLINE Four four_factors(const float* from, float scale) {
  return (Four)_mm256_cvtneps_pbh(_mm256_mul_ps(_mm256_loadu_ps(from), _mm256_set1_ps(scale)));
}
INLINE Factor one_factor(const float* from, float scale) {
  const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return Factor(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_mul_ps(two, _mm_set1_ps(scale)))));
}

// Two vectors of numbers as factors, one number of each.
INLINE Factors factors_of(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(castlm::load(kOrder), rounded(even, odd));
}

// 2^x to within 2e-7 of its value for x <= 0, and 0 below -126.
INLINE Vector power_of_two(Vector x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.535336188e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_US);  // NaN stays
  return _mm512_maskz_scalef_ps(normal, p, whole);
}

// The weights of scores of two keys as a factor of each lane, which are added to the totals.
INLINE Factors weights_of(const float* scores, Vector largest, Vector& totals) {
  const Vector first = _mm512_load_ps(scores), second = _mm512_load_ps(scores + kVectors * kLanes);
  const Factors weights = factors_of(power_of_two(first - largest), power_of_two(second - largest));
  add_products(totals, _mm512_set1_epi32(0x3f803f80), weights);  // times 1
  return weights;
}

// Keys and values (count, width) as factors in `room`; the partner of an odd last value is 0.
struct Brought {
  const Factor *keys, *values;
};
Brought bring(const float* keys, const float* values, int64_t count, int64_t width, Factor* room) {
  Factor *of_keys = room, *of_values = room + (count + 1) / 2 * width;
  const Brought brought{of_keys, of_values};
  for (int64_t k = 0; k < count; k++, keys += width, of_keys += width / 2)
    for (int64_t i = 0; i < width; i += 32) {
      const __m512 low = _mm512_maskz_loadu_ps(first_lanes(width - i), keys + i);
      const __m512 high = width - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(width - i - 16), keys + i + 16) : _mm512_setzero_ps();
      _mm512_mask_storeu_epi32(of_keys + i / 2, first_lanes((width - i) / 2), rounded(low, high));
    }
  for (int64_t k = 0; k < count; k += 2, values += 2 * width, of_values += width)
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 here = first_lanes(width - i);
      const __m512 odd = k + 1 < count ? _mm512_maskz_loadu_ps(here, values + width + i) : _mm512_setzero_ps();
      _mm512_mask_storeu_epi32(of_values + i, here, factors_of(_mm512_maskz_loadu_ps(here, values + i), odd));
    }
  return brought;
}

#include "old_prompt_attention.h"

}  // namespace
}  // namespace old_by_bf16

bool old_has_bf16_attention() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

void old_attend_to_prompt_by_bf16(const OldPrompt& of, int64_t first, int64_t count) { old_by_bf16::old_attend_to_prompt(of, first, count); }

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool old_has_bf16_attention() { return false; }
void old_attend_to_prompt_by_bf16(const OldPrompt&, int64_t, int64_t) {}
}  // namespace castlm

#endif
