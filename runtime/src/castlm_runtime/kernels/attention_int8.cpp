// Attention of one token over a cache of int8, by products of bytes: `vpdpbusd` adds four products of an unsigned and a signed byte to
// an int32, so that a word of the cache (cache.h) is a factor as it is. The walk is that of token_attention.h.
//
// The other factor has 16 bits, in two bytes with a product each, so that nothing is lost beside the rounding of the cache:
//
//   queries:  a number is scale * (256 * high + low), both bytes signed. A key is read as key + 128, unsigned, so a sum of products
//             begins at -128 times the sum of the query's bytes.
//   weights:  of a value, its scale included; a number is scale * (256 * high + low), both bytes unsigned. The scale is that of the
//             block's largest value, which no weight of at most 1 exceeds.

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "avx512.h"

#if defined(CASTLM_AVX512)

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace castlm {
namespace by_int8 {
namespace {

using Word = uint32_t;  // four bytes

INLINE __m512i all(Word word) { return _mm512_set1_epi32(int(word)); }
// In assembly: GCC 12 copies the sums of the intrinsic, and spills some of them in a loop.
INLINE void add_products(__m512i& sums, __m512i of_unsigned, __m512i of_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(of_unsigned), "v"(of_signed));
}
// Asks for the cache line `at` in the second level: the first holds the block that is read.
INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

INLINE __m512 numbers(__m512i high, __m512i low) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
}

// A query (width,) as bytes.
struct Query {
  Word high[kWidestHead / 4], low[kWidestHead / 4];
  int32_t high_start, low_start;  // of the sums
  float scale;                    // NaN where a number is NaN or infinite
};

void round_query(const float* from, int64_t width, Query& to) {
  __m512 most = _mm512_setzero_ps(), finite = most;
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 x = _mm512_loadu_ps(from + i);
    most = _mm512_max_ps(_mm512_abs_ps(x), most);
    finite = _mm512_fmadd_ps(x, _mm512_setzero_ps(), finite);
  }
  const float largest = _mm512_reduce_max_ps(most), factor = largest > 1e-30f ? 127 * 256 / largest : 0.0f;
  __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
  for (int64_t i = 0; i < width; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(factor)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.high + i / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.low + i / 4), _mm512_cvtepi32_epi8(low));
    high_sum = _mm512_add_epi32(high_sum, high), low_sum = _mm512_add_epi32(low_sum, low);
  }
  to.high_start = -128 * _mm512_reduce_add_epi32(high_sum), to.low_start = -128 * _mm512_reduce_add_epi32(low_sum);
  to.scale = largest / (127 * 256) + _mm512_reduce_add_ps(finite);
}

// The scores of 16 V positions of a block for G heads, but for the scales of the keys. Asks for the keys of the next block, too.
template <int G, int V>
INLINE void scores_of(const Query* queries, const Word* keys, const Word* next, int64_t words, float (*scores)[kBlockTokens]) {
  __m512i high[G][V], low[G][V];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) high[g][v] = _mm512_set1_epi32(queries[g].high_start), low[g][v] = _mm512_set1_epi32(queries[g].low_start);
  for (int64_t i = 0; i < words; i++, keys += kBlockTokens, next += kBlockTokens) {
    __m512i of_keys[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) of_keys[v] = _mm512_xor_si512(load(keys + 16 * v), all(0x80808080)), prefetch(next + 16 * v);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const __m512i of_high = all(queries[g].high[i]), of_low = all(queries[g].low[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) add_products(high[g][v], of_keys[v], of_high), add_products(low[g][v], of_keys[v], of_low);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) _mm512_store_ps(scores[g] + 16 * v, numbers(high[g][v], low[g][v]) * _mm512_set1_ps(queries[g].scale));
}

// The weights of the 64 positions of a block, four in a word.
struct Weights {
  Word high[kBlockTokens / 4], low[kBlockTokens / 4];
};

// Adds the values of words [begin, end) of a block, by their weights, to V vectors of columns.
template <int G, int V>
INLINE void add_columns_of(const Weights* weights, float scale, const Word* values, const Word* next, int64_t begin, int64_t end, int64_t width,
                           int64_t stride, float* to) {
  __m512i high[G][V], low[G][V];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) high[g][v] = low[g][v] = _mm512_setzero_si512();
  for (int64_t t = begin; t < end; t++) {
    __m512i of_values[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) of_values[v] = load(values + t * width + 16 * v), prefetch(next + t * width + 16 * v);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const __m512i of_high = all(weights[g].high[t]), of_low = all(weights[g].low[t]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) add_products(high[g][v], of_high, of_values[v]), add_products(low[g][v], of_low, of_values[v]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* const at = to + g * stride + 16 * v;
      _mm512_storeu_ps(at, _mm512_fmadd_ps(numbers(high[g][v], low[g][v]), _mm512_set1_ps(scale), _mm512_loadu_ps(at)));
    }
}

// The positions that a part reads of a block, and its scales of 64 keys and as many values.
struct Scales {
  Scales(const float* from, int64_t begin, int64_t end) : of_keys(from), of_values(from + kBlockTokens) {
    here = (end == 64 ? ~uint64_t(0) : (uint64_t(1) << end) - 1) >> begin << begin;
    __m512 most = _mm512_setzero_ps();
    __mmask16 unordered = 0;
    for (int v = 0; v < 4; v++) {
      const __m512 scale = _mm512_maskz_loadu_ps(__mmask16(here >> 16 * v), of_values + 16 * v);
      most = _mm512_max_ps(scale, most);
      unordered |= _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q);
    }
    largest = unordered ? NAN : _mm512_reduce_max_ps(most);
  }
  const float *of_keys, *of_values;
  uint64_t here;
  float largest;  // of the values
};

// Scores to weights; see `weights_of_block` of token_attention.h.
INLINE void weights_of_block(const float* scores, const Scales& scales, float& largest, __m512& total, float* to, int64_t width, Weights& weights) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 score[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512 all_scores = _mm512_load_ps(scores + 16 * v) * _mm512_loadu_ps(scales.of_keys + 16 * v);
    score[v] = _mm512_mask_mov_ps(none, __mmask16(scales.here >> 16 * v), all_scores);
  }
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
  if (most > largest) {
    const __m512 factor = short_power_of_two(_mm512_set1_ps(largest - most));
    largest = most, total *= factor;
    for (int64_t i = 0; i < width; i += 16) _mm512_storeu_ps(to + i, _mm512_loadu_ps(to + i) * factor);
  }
  const __m512 shift = _mm512_set1_ps(largest), factor = _mm512_set1_ps(scales.largest > 0 ? 255 * 256 / scales.largest : 0.0f);
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512 weight = short_power_of_two(score[v] - shift);
    total += weight;
    const __m512i whole = _mm512_cvtps_epi32(weight * (_mm512_loadu_ps(scales.of_values + 16 * v) * factor));
    _mm_store_si128(reinterpret_cast<__m128i*>(weights.high + 4 * v), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(weights.low + 4 * v), _mm512_cvtepi32_epi8(whole));
  }
}

template <int G>
void attend_part(const Part& part, int64_t head) {
  constexpr int kAtOnce = G < 4 ? 4 : 2;  // vectors, whose sums fit in registers
  const HeadBlocks& of = part.of;
  const int64_t width = of.width, stride = width + kPartRest;
  float* const to = part.to + head * stride;
  Query queries[G];
  for (int g = 0; g < G; g++) round_query(part.queries + (head + g) * width, width, queries[g]);
  float largest[G];
  __m512 total[G];
  std::fill_n(largest, G, -3e38f);
  std::fill_n(total, G, _mm512_setzero_ps());
  std::fill_n(to, G * stride, 0.0f);
  for (int64_t t = part.first / kBlockTokens * kBlockTokens; t < part.last; t += kBlockTokens) {
    const uint8_t* const at = of.at(t);
    const uint8_t* const next = t + kBlockTokens < part.last ? of.at(t + kBlockTokens) : part.next;
    const int64_t begin = std::max<int64_t>(0, part.first - t), end = std::min(kBlockTokens, part.last - t);
    alignas(64) float scores[G][kBlockTokens];
    alignas(64) Weights weights[G];
    const auto *const keys = reinterpret_cast<const Word*>(at), *const next_keys = reinterpret_cast<const Word*>(next);
    for (int64_t v = 0; v < kBlockTokens; v += 16 * kAtOnce)
      scores_of<G, kAtOnce>(queries, keys + v, next_keys + v, width / 4, reinterpret_cast<float(*)[kBlockTokens]>(scores[0] + v));
    const Scales scales(reinterpret_cast<const float*>(at + 2 * of.half_bytes), begin, end);
    for (int i = 0; i < 2 * kBlockTokens; i += 16) prefetch(next + 2 * of.half_bytes + 4 * i);
    for (int g = 0; g < G; g++) weights_of_block(scores[g], scales, largest[g], total[g], to + g * stride, width, weights[g]);
    const auto *const values = keys + of.half_bytes / 4, *const next_values = next_keys + of.half_bytes / 4;
    const float scale = scales.largest / (255 * 256);
    int64_t i = 0;
    for (; i + 16 * kAtOnce <= width; i += 16 * kAtOnce)
      add_columns_of<G, kAtOnce>(weights, scale, values + i, next_values + i, begin / 4, (end + 3) / 4, width, stride, to + i);
    for (; i < width; i += 16)
      add_columns_of<G, 1>(weights, scale, values + i, next_values + i, begin / 4, (end + 3) / 4, width, stride, to + i);
  }
  for (int g = 0; g < G; g++) to[g * stride + width] = largest[g], to[g * stride + width + 1] = _mm512_reduce_add_ps(total[g]);
}

}  // namespace
}  // namespace by_int8

void attend_part_of_int8(const Part& part) {
  for (int64_t head = 0; head < part.group; head += 4) switch (part.group - head) {
    case 1: by_int8::attend_part<1>(part, head); break;
    case 2: by_int8::attend_part<2>(part, head); break;
    case 3: by_int8::attend_part<3>(part, head); break;
    default: by_int8::attend_part<4>(part, head);
  }
}

}  // namespace castlm
END_TARGET

#endif
