// Attention with AVX2 by products of 16 bits: `vpmaddwd` adds two products to an int32, twice the work of an FMA for one addition more.
// It takes caches of bf16 and of int8; fp32 stays with fp32 (attention.cpp). The walks are those of prompt_attention.h and
// token_attention.h.
//
// Prompts: queries, keys, weights and values are rounded to integers of some 13 bits, so that no sum of 64 products, or of as many as a
// head is wide, leaves 32 bits. bf16 has 8.
//
//   queries, keys:  a number is an integer times the unit of its row
//   values:         the unit of a position is a power of two, 2^e. e is added to the scores of the position, and its weight carries it
//   weights:        2^(score + e) relative to the largest one of the block. The total takes 2^-e off again
//
// So a unit depends on one position alone, and what a token reads not on tokens that come after it.
//
// One token, int8: a word of the cache has four bytes, which become two words of 16 bits; queries and weights have 16 bits.

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "avx2.h"
#include "plain.h"

#if defined(CASTLM_AVX2)

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace by_words {
namespace {

using Vector = __m256;
typedef int32_t Integers __attribute__((vector_size(32)));
constexpr int kLanes = 8, kRegisters = 16, kTileRows = 6, kVectors = 2;

INLINE Vector all(float value) { return _mm256_set1_ps(value); }
// In assembly: of an FMA in C++, GCC 12 moves sums between registers and spills some of them.
INLINE void add_product(Vector& sum, Vector a, Vector b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }

namespace floats {
#include "vectors.h"
#include "prompt_floats.h"
#include "token_attention.h"
}  // namespace floats
using floats::load, floats::store, floats::larger, floats::power_of_two, floats::number_of, floats::load_words;

constexpr float kMostWeight = 5792;  // 64 products of two such numbers are less than 2^31
constexpr float kWeightUnit = 1 / kMostWeight;
constexpr bool kRounds = true;

using Factor = uint32_t;
using Factors = __m256i;
using Sums = __m256i;
typedef float Four __attribute__((vector_size(16)));  // four factors, too
constexpr int kNumbers = 2;                           // in a factor

INLINE Factors all_of(Factor factor) { return _mm256_set1_epi32(int(factor)); }
INLINE Factors load_factors(const Factor* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
// In one piece: GCC would begin with all products of a step, and find no registers for the sums.
INLINE void add_products(Sums& sums, Factors a, Factors b) {
  __m256i products;
  asm("vpmaddwd %[b], %[a], %[products]\n\t"
      "vpaddd %[products], %[sums], %[sums]"
      : [sums] "+x"(sums), [products] "=&x"(products)
      : [a] "x"(a), [b] "x"(b));
}

// The largest integer of which `count` products stay below 2^31.
INLINE float most_of(int64_t count) { return std::floor(std::sqrt(2147483647.0f / float(count)) * 0.9999f); }

// Two vectors of numbers times `scale`, rounded, as factors: one number of each.
INLINE Factors factors_of(Vector even, Vector odd, Vector scale) {
  const Vector shift = all(12582912.0f);  // 1.5 * 2^23: the low bits are the nearest integer
  const Vector first = _mm256_fmadd_ps(even, scale, shift), second = _mm256_fmadd_ps(odd, scale, shift);
  return _mm256_blend_epi16(_mm256_castps_si256(first), _mm256_slli_epi32(_mm256_castps_si256(second), 16), 0xaa);
}

// Numbers times `scale` as factors.
INLINE Four four_factors(const float* from, float scale) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), all(scale)));
  return (Four)_mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}

// Of the units of a block, (64,) each, from a position on.
struct Units {
  const float *keys, *exponents, *inverses;  // 2^-exponent
  Units from(int64_t k) const { return {keys + k, exponents + k, inverses + k}; }
};
constexpr int64_t kUnitWords = 3 * kBlockTokens;

// NaN where a number is NaN or infinite.
INLINE float scale_of_query(const float* query, int64_t width, float scale, float* unit) {
  Vector most = all(0), finite = all(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vector x = load(query + i);
    most = larger(x, larger(-x, most)), finite += x * all(0);
  }
  float largest = 0, lanes[kLanes];
  store(lanes, most);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  const float most_number = most_of(width);
  *unit = largest * scale / most_number + sum_of(finite);
  return largest > 1e-30f ? most_number / largest : 0.0f;
}

INLINE Vector score_of(Sums sums, Units units, int r, const float* of_queries) {
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), all(units.keys[r])), load(of_queries), all(units.exponents[r]));
}
INLINE void begin_sums(Sums& sums, const float*, Vector) { sums = _mm256_setzero_si256(); }
INLINE void end_sums(Sums sums, float* to, Vector factor, Vector unit) {
  store(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), unit, load(to) * factor));
}

// 2^x to within 8e-5 of its value for x <= 0, at least 2^-126; NaN stays. The error is less than a weight keeps.
INLINE Vector short_power_of_two(Vector x) {
  x = _mm256_max_ps(all(-126), x);
  const Vector shifted = x + all(12582912.0f), r = x - (shifted - all(12582912.0f));
  Vector p = _mm256_fmadd_ps(all(5.517166853e-2f), r, all(2.426111549e-1f));
  p = _mm256_fmadd_ps(p, r, all(6.932609677e-1f));
  p = _mm256_fmadd_ps(p, r, all(9.999280572e-1f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

// The weights of scores of two keys as a factor of each lane. What they count for is added to the totals.
INLINE Factors weights_of(const float* scores, Units units, Vector largest, Vector& totals) {
  const Vector first = short_power_of_two(load(scores) - largest), second = short_power_of_two(load(scores + kVectors * kLanes) - largest);
  totals += first * all(units.inverses[0]);
  totals += second * all(units.inverses[1]);
  return factors_of(first, second, all(kMostWeight));
}

struct Brought {
  const Factor *keys, *values;
  Units units;
};

// The largest magnitudes among bf16, in pairs, and more than any number where one is NaN or infinite.
INLINE __m256i largest_pairs(const uint32_t* words, int64_t step, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; ++i) most = _mm256_max_epu16(most, _mm256_and_si256((__m256i)load_words(words + i * step), _mm256_set1_epi32(0x7fff7fff)));
  return most;
}

// A block (cache.h) whose words have N numbers: keys (width / 2, 64), values (32, width). int8 has numbers up to 127, times its scales.
template <int N>
INLINE Brought bring_words(const uint8_t* at, int64_t half_bytes, int64_t width, Factor* room) {
  const auto* const keys = reinterpret_cast<const uint32_t*>(at);
  const auto* const values = reinterpret_cast<const uint32_t*>(at + half_bytes);
  const auto* const scales = reinterpret_cast<const float*>(at + 2 * half_bytes);  // of int8
  Factor* const to_values = room + kBlockTokens / 2 * width;
  auto* const of_keys = reinterpret_cast<float*>(to_values + kBlockTokens / 2 * width);
  float *const exponents = of_keys + kBlockTokens, *const inverses = exponents + kBlockTokens;
  const float most_number = most_of(width);
  for (int64_t t = 0; t < kBlockTokens; t += kLanes) {
    Vector most = all(127), unit;
    if (N == 2) {
      const __m256i pairs = largest_pairs(keys + t, kBlockTokens, width / 2);
      most = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(pairs, 16), _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))));
    }
    unit = most * all(1 / most_number) * (N == 4 ? load(scales + t) : all(1));
    store(of_keys + t, unit + unit * all(0));
    const Vector factor = all(most_number) / larger(most, all(1e-30f));
    for (int64_t i = 0; i < width / N; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < N; j += 2) {
        const Integers words = load_words(keys + i * kBlockTokens + t);
        store(room + (i * N + j) / 2 * kBlockTokens + t, factors_of(number_of<N>(words, j), number_of<N>(words, j + 1), factor));
      }
  }
  for (int64_t t = 0; t < kBlockTokens / N; ++t) {
    float most[N], factors[N];
    if (N == 2) {
      const __m256i pairs = largest_pairs(values + t * width, kLanes, width / kLanes);
      __m128i four = _mm_max_epu16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      four = _mm_max_epu16(four, _mm_shuffle_epi32(four, 0x4e));
      const auto both = uint32_t(_mm_cvtsi128_si32(_mm_max_epu16(four, _mm_shuffle_epi32(four, 0xb1))));
      most[0] = from_bits(both << 16), most[1] = from_bits(both & 0xffff0000);
    } else {
      for (int j = 0; j < N; ++j) most[j] = 127 * scales[kBlockTokens + t * N + j];
    }
    for (int j = 0; j < N; ++j) {
      // The least power of two that is large enough, and at least 2^-40.
      const int32_t exponent = std::max(int32_t((to_bits(most[j] * kWeightUnit) + 0x7fffff) >> 23) - 127, -40);
      const float inverse = from_bits(uint32_t(127 - exponent) << 23);
      exponents[t * N + j] = float(exponent), inverses[t * N + j] = inverse + most[j] * 0;
      factors[j] = inverse * (N == 4 ? scales[kBlockTokens + t * N + j] : 1);
    }
    for (int64_t i = 0; i < width; i += kLanes)
#pragma GCC unroll 2
      for (int j = 0; j < N; j += 2) {
        const Integers words = load_words(values + t * width + i);
        const Vector first = number_of<N>(words, j) * all(factors[j]), second = number_of<N>(words, j + 1) * all(factors[j + 1]);
        store(to_values + (t * N + j) / 2 * width + i, factors_of(first, second, all(1)));
      }
  }
  return {room, to_values, {of_keys, exponents, inverses}};
}
INLINE Brought bring(const HeadBlocks& of, int64_t t, Factor* room) {
  return of.kind == kCacheInt8 ? bring_words<4>(of.at(t), of.half_bytes, of.width, room) : bring_words<2>(of.at(t), of.half_bytes, of.width, room);
}

#include "prompt_attention.h"

// ---- one token, int8

constexpr float kMostOfToken = 127 * 256;  // 512 products of it and a byte stay below 2^31

// `count` numbers, at most 1 in magnitude, as integers: two factors for four of them, of the even and of the odd ones.
INLINE void round_to_words(const float* from, int64_t count, float factor, Factor* to) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i first = _mm256_cvtps_epi32(load(from + i) * all(factor)), second = _mm256_cvtps_epi32(load(from + i + 8) * all(factor));
    const __m256i fours = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    store(to + i / 2, _mm256_shuffle_epi8(fours, order));
  }
}

// The largest magnitude, and NaN where a number is NaN or infinite.
INLINE float largest_magnitude(const float* from, int64_t count) {
  Vector most = all(0), finite = all(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector x = load(from + i);
    most = larger(x, larger(-x, most)), finite += x * all(0);
  }
  return floats::largest_of(most) + sum_of(finite);
}

// Rows of `stride` words times the factors of G heads, which are `step` apart: sums of V vectors of columns. Asks for `next` meanwhile.
template <int G, int V>
INLINE void multiply_bytes(const uint32_t* words, const uint32_t* next, int64_t stride, int64_t rows, const Factor* factors, int64_t step, Sums (&sums)[G][V]) {
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[g][v] = _mm256_setzero_si256();
  for (int64_t i = 0; i < rows; ++i, words += stride, next += stride, factors += 2) {
    floats::prefetch(next, V * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const auto both = (__m256i)load_words(words + v * kLanes);
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), odd = _mm256_srai_epi16(both, 8);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        add_products(sums[g][v], even, all_of(factors[g * step]));
        add_products(sums[g][v], odd, all_of(factors[g * step + 1]));
      }
    }
  }
}

template <int G>
void attend_part(const Part& part, int64_t head) {
  constexpr int V = 2;
  const HeadBlocks& of = part.of;
  const int64_t width = of.width, stride = width + kPartRest;
  float* const to = part.to + head * stride;
  alignas(64) Factor queries[G][kWidestHead / 2];
  float units[G], largest[G], total[G] = {};
  for (int g = 0; g < G; ++g) {
    const float* const query = part.queries + (head + g) * width;
    const float most = largest_magnitude(query, width);
    round_to_words(query, width, most > 1e-30f ? kMostOfToken / most : 0, queries[g]);
    units[g] = most / kMostOfToken;
  }
  std::fill_n(largest, G, -3e38f);
  std::fill_n(to, G * stride, 0.0f);
  for (int64_t t = part.first / kBlockTokens * kBlockTokens; t < part.last; t += kBlockTokens) {
    const auto *const keys = reinterpret_cast<const uint32_t*>(of.at(t)), *const values = keys + of.half_bytes / 4;
    const auto* const next = reinterpret_cast<const uint32_t*>(t + kBlockTokens < part.last ? of.at(t + kBlockTokens) : part.next);
    const auto *const next_values = next + of.half_bytes / 4, *const next_scales = next + of.half_bytes / 2;
    const auto* const scales = reinterpret_cast<const float*>(values + of.half_bytes / 4);
    const int64_t begin = std::max<int64_t>(0, part.first - t), end = std::min(kBlockTokens, part.last - t);
    alignas(64) float weights[G][kBlockTokens];
    alignas(64) Factor factors[G][kBlockTokens / 2];
    Sums sums[G][V];
    for (int64_t k = 0; k < kBlockTokens; k += V * kLanes) {
      multiply_bytes<G, V>(keys + k, next + k, kBlockTokens, width / 4, queries[0], kWidestHead / 2, sums);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(weights[g] + k + v * kLanes, _mm256_cvtepi32_ps(sums[g][v]) * all(units[g]));
    }
    floats::prefetch(next_scales, 2 * kBlockTokens);
    float weight_units[G];
    for (int g = 0; g < G; ++g) {
      floats::weights_of_block<4>(weights[g], begin, end, scales, largest[g], total[g], to + g * stride, width);
      const float most = largest_magnitude(weights[g], kBlockTokens);
      round_to_words(weights[g], kBlockTokens, most > 1e-30f ? kMostOfToken / most : 0, factors[g]);
      weight_units[g] = most / kMostOfToken;
    }
    for (int64_t i = 0; i < width; i += V * kLanes) {
      const int64_t row = begin / 4, at = row * width + i;
      multiply_bytes<G, V>(values + at, next_values + at, width, (end + 3) / 4 - row, factors[0] + 2 * row, kBlockTokens / 2, sums);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          float* const sum = to + g * stride + i + v * kLanes;
          store(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[g][v]), all(weight_units[g]), load(sum)));
        }
    }
  }
  for (int g = 0; g < G; ++g) to[g * stride + width] = largest[g], to[g * stride + width + 1] = total[g];
}

void attend_part_of_int8(const Part& part) {
  for (int64_t head = 0; head < part.group; head += 4) switch (part.group - head) {
    case 1: attend_part<1>(part, head); break;
    case 2: attend_part<2>(part, head); break;
    case 3: attend_part<3>(part, head); break;
    default: attend_part<4>(part, head);
  }
}

}  // namespace
}  // namespace by_words

Attention attention_by_words(CacheKind kind) {
  return {kind == kCacheInt8 ? by_words::attend_part_of_int8 : by_words::floats::attend_part_of<2>, by_words::attend_to_prompt};
}

}  // namespace castlm
END_TARGET

#endif
