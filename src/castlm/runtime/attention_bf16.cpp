// Attention of tokens of a prompt with products of bf16, for processors that have `vdpbf16ps` beside AVX-512, where it does twice the
// work of an FMA. The walk is that of prompt_attention.h, whose lanes are queries; numbers lie in pairs, two bf16 in a word:
//
//   queries:  (width / 2, lanes)   columns 2 i and 2 i + 1 of a query
//   keys:     (64, width / 2)      columns 2 i and 2 i + 1 of a key
//   weights:  (32, lanes)          of keys 2 j and 2 j + 1
//   values:   (32, width)          of keys 2 j and 2 j + 1
//
// Scores, their exponentials, sums and totals are fp32. A weight counts in its total as it was rounded, so that the weights of a
// query still add up to 1.

#include <algorithm>
#include <cmath>

#include "avx512.h"
#include "decoder.h"
#include "plain.h"

#if defined(CASTLM_AVX512) && (defined(__clang__) || __GNUC__ >= 10)

BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace castlm {
namespace {

constexpr int kLanes = 16, kVectors = 2, kTileRows = 8;
constexpr int64_t kStrip = kVectors * kLanes, kKeys = 64;  // as in prompt_attention.h

// In assembly, as GCC 12 copies the sums of the intrinsic.
INLINE void add_products(__m512& sums, __m512i pairs, __m512i more_pairs) {
  sums = _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)more_pairs);
}
INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1 << count) - 1); }

// Two vectors of numbers as pairs, one of each.
INLINE __m512i pairs_of(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(load(kOrder), rounded(even, odd));
}

// 2^x to within 2e-7 of its value for x <= 0, and 0 below -126.
INLINE __m512 power_of_two(__m512 x) {
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

// R rows of pairs by `kVectors` vectors of sums: row r and step k of the first factor are at a[r * row_step + k * step].
template <int R>
INLINE void multiply(const uint32_t* a, int64_t row_step, int64_t step, const uint32_t* b, int64_t depth, __m512 (*sums)[kVectors]) {
  for (int64_t k = 0; k < depth; k++, a += step, b += kStrip) {
    __m512i of_step[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) of_step[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i pair = _mm512_set1_epi32(int(a[r * row_step]));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) add_products(sums[r][v], of_step[v], pair);
    }
  }
}

// Scores of R keys in `to` (R, kStrip); `largest` takes part in their maxima and becomes these.
template <int R>
INLINE void scores_of(const uint32_t* keys, int64_t depth, const uint32_t* queries, float* to, __m512* largest) {
  __m512 sums[R][kVectors];
#pragma GCC unroll 8
  for (auto& row : sums)
#pragma GCC unroll 2
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  multiply<R>(keys, depth, 1, queries, depth, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      _mm512_store_ps(to + r * kStrip + v * kLanes, sums[r][v]);
      largest[v] = _mm512_max_ps(sums[r][v], largest[v]);
    }
}

// Adds the weighted sums of R columns of the values to `factor` times what `to` (R, kStrip) has.
template <int R>
INLINE void add_columns(const uint32_t* values, int64_t width, const uint32_t* weights, int64_t pairs, const __m512* factor, float* to) {
  __m512 sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) sums[r][v] = _mm512_mul_ps(_mm512_load_ps(to + r * kStrip + v * kLanes), factor[v]);
  multiply<R>(values, 1, width, weights, pairs, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) _mm512_store_ps(to + r * kStrip + v * kLanes, sums[r][v]);
}

// A strip of lanes while keys pass.
struct Strip {
  const uint32_t* queries;   // (width / 2, kStrip), times `scale` and log2(e)
  float* sums;               // (width, kStrip)
  float* largest;            // (kStrip,) of the scores so far
  float* totals;             // (kStrip,) of the weights so far
  const int32_t* positions;  // (kStrip,) of the lanes' tokens
};

// `count` keys from position `t` on, and their values.
__attribute__((noinline)) void attend_to_keys(const Strip& strip, const uint32_t* keys, const uint32_t* values, int64_t t, int64_t count, int64_t width,
                    int64_t window) {
  alignas(64) float scores[(kKeys + 1) * kStrip];
  alignas(64) uint32_t weights[kKeys / 2 * kStrip];
  __m512 before[kVectors], largest[kVectors], factor[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; v++) largest[v] = before[v] = _mm512_load_ps(strip.largest + v * kLanes);
  const int64_t depth = width / 2, pairs = (count + 1) / 2;
  int64_t k = 0;
  for (; k + kTileRows <= count; k += kTileRows)
    scores_of<kTileRows>(keys + k * depth, depth, strip.queries, scores + k * kStrip, largest);
  for (; k < count; k++) scores_of<1>(keys + k * depth, depth, strip.queries, scores + k * kStrip, largest);
  const __m512 none = _mm512_set1_ps(-INFINITY);
  if (count % 2)
    for (int v = 0; v < kVectors; v++) _mm512_store_ps(scores + count * kStrip + v * kLanes, none);
  if (t + count - 1 > strip.positions[0] || (window && t <= strip.positions[kStrip - 1] - window)) {  // some lanes do not read all keys
    __m512i newest[kVectors], oldest[kVectors];
    for (int v = 0; v < kVectors; v++) {
      newest[v] = _mm512_sub_epi32(load(strip.positions + v * kLanes), _mm512_set1_epi32(int(t)));
      oldest[v] = _mm512_sub_epi32(newest[v], _mm512_set1_epi32(int(window ? std::min<int64_t>(window, 1 << 30) : 1 << 30)));
      largest[v] = before[v];
    }
    for (k = 0; k < count; k++)
      for (int v = 0; v < kVectors; v++) {
        const __m512i key = _mm512_set1_epi32(int(k));
        const __mmask16 read = _mm512_cmple_epi32_mask(key, newest[v]) & _mm512_cmpgt_epi32_mask(key, oldest[v]);
        float* at = scores + k * kStrip + v * kLanes;
        const __m512 score = _mm512_mask_load_ps(none, read, at);
        _mm512_store_ps(at, score);
        largest[v] = _mm512_max_ps(score, largest[v]);
      }
  }
  const __m512 lowest = _mm512_set1_ps(-3e38f);
  for (int v = 0; v < kVectors; v++) {
    _mm512_store_ps(strip.largest + v * kLanes, largest[v]);
    // A lane that has read no key yet has minus infinity twice; subtracting the lowest number keeps its weights 0.
    largest[v] = _mm512_max_ps(largest[v], lowest);
    factor[v] = power_of_two(_mm512_sub_ps(_mm512_max_ps(before[v], lowest), largest[v]));
    total[v] = _mm512_mul_ps(_mm512_load_ps(strip.totals + v * kLanes), factor[v]);
  }
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (k = 0; k < pairs; k++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      const float* at = scores + 2 * k * kStrip + v * kLanes;
      const __m512i pair = pairs_of(power_of_two(_mm512_sub_ps(_mm512_load_ps(at), largest[v])),
                                    power_of_two(_mm512_sub_ps(_mm512_load_ps(at + kStrip), largest[v])));
      _mm512_store_si512(weights + k * kStrip + v * kLanes, pair);
      add_products(total[v], pair, ones);
    }
  for (int v = 0; v < kVectors; v++) _mm512_store_ps(strip.totals + v * kLanes, total[v]);
  int64_t i = 0;
  for (; i + kTileRows <= width; i += kTileRows)
    add_columns<kTileRows>(values + i, width, weights, pairs, factor, strip.sums + i * kStrip);
  for (; i < width; i++) add_columns<1>(values + i, width, weights, pairs, factor, strip.sums + i * kStrip);
}

// Keys and values (count, width) as pairs; the partner of an odd last value is 0.
void pair_up(const float* keys, const float* values, int64_t count, int64_t width, uint32_t* of_keys, uint32_t* of_values) {
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
      _mm512_mask_storeu_epi32(of_values + i, here, pairs_of(_mm512_maskz_loadu_ps(here, values + i), odd));
    }
}

}  // namespace

bool has_bf16_attention() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

void attend_to_prompt_by_bf16(const Prompt& of, int64_t first, int64_t count) {
  const int64_t width = of.width, start = of.start + first, end = start + count, lanes = count * of.group;
  const int64_t strips = (lanes + kStrip - 1) / kStrip, size = width * kStrip;
  uint32_t* const queries = static_cast<uint32_t*>(scratch<0>((strips * (3 * size / 2 + 3 * kStrip) + kKeys * width) * 4));
  float* const sums = reinterpret_cast<float*>(queries + strips * size / 2);
  float *const totals = sums + strips * size, *const largest = totals + strips * kStrip;
  auto* const positions = reinterpret_cast<int32_t*>(largest + strips * kStrip);
  auto* const keys = reinterpret_cast<uint32_t*>(positions + strips * kStrip);
  uint32_t* const values = keys + kKeys * width / 2;
  std::fill(sums, largest, 0.0f);
  std::fill_n(largest, strips * kStrip, -INFINITY);

  // Of 16 lanes at a time, the rows of (width,); lanes past the last one repeat it.
  const auto offset_of = [&](int64_t lane) { return (first + lane / of.group) * of.stride + lane % of.group * width; };
  const __m512 scale = _mm512_set1_ps(of.scale * 1.44269504f);  // log2(e)
  for (int64_t lane = 0; lane < strips * kStrip; lane += 16) {
    uint32_t* const to = queries + lane / kStrip * (size / 2) + lane % kStrip;
    const float* from[16];
    for (int j = 0; j < 16; j++) {
      const int64_t taken = std::min(lane + j, lanes - 1);
      from[j] = of.queries + offset_of(taken), positions[lane + j] = int32_t(start + taken / of.group);
    }
    for (int64_t i = 0; i < width; i += 32) {
      __m512i rows[16];
      for (int j = 0; j < 16; j++) {
        const __m512 low = _mm512_maskz_loadu_ps(first_lanes(width - i), from[j] + i);
        const __m512 high = width - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(width - i - 16), from[j] + i + 16) : _mm512_setzero_ps();
        rows[j] = rounded(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
      }
      transpose(rows);
      for (int64_t j = 0; j < std::min<int64_t>(16, (width - i) / 2); j++) _mm512_storeu_si512(to + (i / 2 + j) * kStrip, rows[j]);
    }
  }

  const int64_t begin = of.window ? std::max<int64_t>(0, start + 1 - of.window) : 0;
  for (int64_t t = begin; t < end; t += kKeys) {
    pair_up(of.keys + t * width, of.values + t * width, std::min(kKeys, end - t), width, keys, values);
    for (int64_t s = 0; s < strips; s++) {
      const int32_t* const at = positions + s * kStrip;
      const Strip strip{queries + s * size / 2, sums + s * size, largest + s * kStrip, totals + s * kStrip, at};
      const int64_t oldest = of.window ? at[0] + 1 - of.window : 0, newest = at[kStrip - 1];
      if (t > newest || t + kKeys <= oldest) continue;
      attend_to_keys(strip, keys, values, t, std::min(kKeys, newest + 1 - t), width, of.window);
    }
  }

  for (int64_t lane = 0; lane < lanes; lane += 16) {
    const float* const from = sums + lane / kStrip * size + lane % kStrip;
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(totals + lane));
    for (int64_t i = 0; i < width; i += 16) {
      const int64_t columns = std::min<int64_t>(16, width - i);
      __m512i rows[16];
      for (int64_t j = 0; j < 16; j++)
        rows[j] = j < columns ? _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + (i + j) * kStrip), factor)) : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t j = 0; j < std::min<int64_t>(16, lanes - lane); j++)
        _mm512_mask_storeu_epi32(of.to + offset_of(lane + j) + i, first_lanes(columns), rows[j]);
    }
  }
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_bf16_attention() { return false; }
void attend_to_prompt_by_bf16(const Prompt&, int64_t, int64_t) {}
}  // namespace castlm

#endif
