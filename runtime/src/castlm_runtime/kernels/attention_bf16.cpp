// Attention with products of bf16, for processors that have `vdpbf16ps` beside AVX-512, where it does twice the work of an FMA. A factor
// is a word of two bf16, as the blocks of a cache of bf16 have them (cache.h): kernels read these as they are. The prompt's walk is
// that of prompt_attention.h, one token's that of token_attention.h:
//
//   queries:  (width / 2, lanes)   dimensions 2 i and 2 i + 1 of a query
//   keys:     (width / 2, 64)      the same of a key
//   weights:  (32, lanes)          of positions 2 j and 2 j + 1
//   values:   (32, width)          of positions 2 j and 2 j + 1
//
// A weight counts in its total as it was rounded, so that the weights of a query still add up to 1.

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "avx512.h"
#include "plain.h"

#if defined(CASTLM_AVX512) && (defined(__clang__) || __GNUC__ >= 10)

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace castlm {
namespace by_bf16 {
namespace {

using Vector = __m512;
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int kLanes = 16, kTileRows = 8, kVectors = 2;

INLINE Vector all(float value) { return _mm512_set1_ps(value); }

#include "vectors.h"

using Factor = uint32_t;
using Factors = __m512i;
typedef float Four __attribute__((vector_size(16)));  // four factors, too
constexpr int kNumbers = 2;                           // in a factor

INLINE Factors all_of(Factor factor) { return _mm512_set1_epi32(int(factor)); }
INLINE Factors load_factors(const Factor* at) { return castlm::load(at); }
// In assembly: GCC 12 copies the sums of the intrinsic, and spills some of them in a loop.
INLINE void add_products(Vector& sums, Factors a, Factors b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(b), "v"(a)); }

INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Numbers times `scale` as factors.
INLINE Four four_factors(const float* from, float scale) {
  return (Four)_mm256_cvtneps_pbh(_mm256_mul_ps(_mm256_loadu_ps(from), _mm256_set1_ps(scale)));
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
INLINE Factors weights_of(const float* scores, Units, Vector largest, Vector& totals) {
  const Vector first = _mm512_load_ps(scores), second = _mm512_load_ps(scores + kVectors * kLanes);
  const Factors weights = factors_of(short_power_of_two(first - largest), short_power_of_two(second - largest));
  add_products(totals, _mm512_set1_epi32(0x3f803f80), weights);  // times 1
  return weights;
}

INLINE __m512 number(__m512i words, int j) {  // byte j of each word
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(words, _mm512_set1_epi32(24 - 8 * j)), 24));
}

// The keys (width / 2, 64) and values (32, width) of a block as factors: where they are, or of int8 in `room`.
struct Brought {
  const Factor *keys, *values;
  Units units;
};
Brought bring(const HeadBlocks& of, int64_t t, Factor* room) {
  const uint8_t* const at = of.at(t);
  if (of.kind == kCacheBFloat16) return {reinterpret_cast<const Factor*>(at), reinterpret_cast<const Factor*>(at + of.half_bytes), {}};
  const uint8_t* const values = at + of.half_bytes;
  const auto* const scales = reinterpret_cast<const float*>(values + of.half_bytes);
  Factor* const to_values = room + kBlockTokens / 2 * of.width;
  for (int64_t i = 0; i < of.width / 4; i++)
    for (int64_t k = 0; k < kBlockTokens; k += 16) {
      const __m512i words = castlm::load(at + (i * kBlockTokens + k) * 4);
      const __m512 scale = _mm512_loadu_ps(scales + k);
      for (int j = 0; j < 4; j += 2)
        _mm512_storeu_si512(room + (2 * i + j / 2) * kBlockTokens + k, factors_of(number(words, j) * scale, number(words, j + 1) * scale));
    }
  for (int64_t k = 0; k < kBlockTokens; k += 4)
    for (int64_t i = 0; i < of.width; i += 16) {
      const __m512i words = castlm::load(values + (k / 4 * of.width + i) * 4);
      for (int j = 0; j < 4; j += 2) {
        const float* const scale = scales + kBlockTokens + k + j;
        _mm512_storeu_si512(to_values + (k + j) / 2 * of.width + i, factors_of(number(words, j) * scale[0], number(words, j + 1) * scale[1]));
      }
    }
  return {room, to_values, {}};
}

#include "prompt_attention.h"

// ---- one token

// Asks for the cache line `at` in the second level: the first holds the block that is read.
INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

// The scores of the 64 positions of a block for G heads: 4 G sums, whose products do not wait for each other. Asks for the keys
// of the next block meanwhile, which lie elsewhere.
template <int G>
INLINE void scores_of_block(const Factor* queries, const Factor* keys, const Factor* next, int64_t factors, float (*scores)[kBlockTokens]) {
  __m512 sums[G][4];
#pragma GCC unroll 4
  for (auto& of_head : sums)
#pragma GCC unroll 4
    for (__m512& sum : of_head) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < factors; i++, keys += kBlockTokens, next += kBlockTokens) {
    __m512i words[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) words[v] = castlm::load(keys + 16 * v), prefetch(next + 16 * v);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const __m512i query = _mm512_set1_epi32(int(queries[g * factors + i]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) add_products(sums[g][v], query, words[v]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_store_ps(scores[g] + 16 * v, sums[g][v]);
}

// Adds the values of pairs [begin, end) of positions, by their weights, to V vectors of columns.
template <int G, int V>
INLINE void add_columns_of(const Factor (*weights)[kBlockTokens / 2], const Factor* values, const Factor* next, int64_t begin, int64_t end,
                           int64_t width, int64_t stride, float* to) {
  __m512 sums[G][V];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[g][v] = _mm512_loadu_ps(to + g * stride + 16 * v);
  for (int64_t t = begin; t < end; t++) {
    __m512i words[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) words[v] = castlm::load(values + t * width + 16 * v), prefetch(next + t * width + 16 * v);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const __m512i weight = _mm512_set1_epi32(int(weights[g][t]));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) add_products(sums[g][v], weight, words[v]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_storeu_ps(to + g * stride + 16 * v, sums[g][v]);
}

// Scores of positions [begin, end) to weights as factors; see `weights_of_block` of token_attention.h.
INLINE void weights_of_block(const float* scores, int64_t begin, int64_t end, float& largest, float& total, float* to, int64_t width,
                             Factor* weights) {
  const uint64_t here = (end == 64 ? ~uint64_t(0) : (uint64_t(1) << end) - 1) >> begin << begin;
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 score[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) score[v] = _mm512_mask_loadu_ps(none, __mmask16(here >> 16 * v), scores + 16 * v);
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
  if (most > largest) {
    const __m512 factor = power_of_two(_mm512_set1_ps(largest - most));
    largest = most, total *= _mm512_cvtss_f32(factor);
    for (int64_t i = 0; i < width; i += 16) _mm512_storeu_ps(to + i, _mm512_loadu_ps(to + i) * factor);
  }
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int v = 0; v < 4; v += 2) {
    const __m512i both = rounded(short_power_of_two(score[v] - shift), short_power_of_two(score[v + 1] - shift));
    add_products(sum, _mm512_set1_epi32(0x3f803f80), both);  // times 1: a weight counts as it was rounded
    _mm512_storeu_si512(weights + 8 * v, both);
  }
  total += _mm512_reduce_add_ps(sum);
}

template <int G>
void attend_part(const Part& part, int64_t head) {
  const HeadBlocks& of = part.of;
  const int64_t width = of.width, stride = width + kPartRest;
  float* const to = part.to + head * stride;
  alignas(64) Factor queries[G * kWidestHead / 2];
  for (int64_t i = 0; i < G * width; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(queries + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(part.queries + head * width + i)));
  float largest[G], total[G] = {};
  std::fill_n(largest, G, -3e38f);
  std::fill_n(to, G * stride, 0.0f);
  for (int64_t t = part.first / kBlockTokens * kBlockTokens; t < part.last; t += kBlockTokens) {
    const uint8_t* const at = of.at(t);
    const uint8_t* const next = t + kBlockTokens < part.last ? of.at(t + kBlockTokens) : part.next;
    const int64_t begin = std::max<int64_t>(0, part.first - t), end = std::min(kBlockTokens, part.last - t);
    alignas(64) float scores[G][kBlockTokens];
    alignas(64) Factor weights[G][kBlockTokens / 2];
    scores_of_block<G>(queries, reinterpret_cast<const Factor*>(at), reinterpret_cast<const Factor*>(next), width / 2, scores);
    for (int g = 0; g < G; g++) weights_of_block(scores[g], begin, end, largest[g], total[g], to + g * stride, width, weights[g]);
    const auto* const values = reinterpret_cast<const Factor*>(at + of.half_bytes);
    const auto* const next_values = reinterpret_cast<const Factor*>(next + of.half_bytes);
    int64_t i = 0;
    for (; i + 64 <= width; i += 64)
      add_columns_of<G, 4>(weights, values + i, next_values + i, begin / 2, (end + 1) / 2, width, stride, to + i);
    for (; i < width; i += 16)
      add_columns_of<G, 1>(weights, values + i, next_values + i, begin / 2, (end + 1) / 2, width, stride, to + i);
  }
  for (int g = 0; g < G; g++) to[g * stride + width] = largest[g], to[g * stride + width + 1] = total[g];
}

void attend_part_of(const Part& part) {
  for (int64_t head = 0; head < part.group; head += 4) switch (part.group - head) {
    case 1: attend_part<1>(part, head); break;
    case 2: attend_part<2>(part, head); break;
    case 3: attend_part<3>(part, head); break;
    default: attend_part<4>(part, head);
  }
}

}  // namespace
}  // namespace by_bf16

bool has_bf16_attention() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

Attention bf16_attention() { return {by_bf16::attend_part_of, by_bf16::attend_to_prompt}; }

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_bf16_attention() { return false; }
Attention bf16_attention() { return {}; }
}  // namespace castlm

#endif
