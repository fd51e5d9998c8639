// Attention of tokens of a prompt. Included once for each instruction set, inside its target pragma and a namespace of its own that has
//
//   Vector, Integers, kLanes   `kLanes` floats with the arithmetic operators, as many int32
//   all                        a number in every lane
//   kTileRows, kVectors        the size of a tile of sums in registers, in vectors
//
// and says what a `Factor` is (prompt_floats.h, attention_bf16.cpp, attention_words.cpp): the four bytes of `kNumbers` numbers that follow
// each other in the direction of a sum, whose products with those of another factor are added to `Sums` at once. With `kRounds` these are
// integers: `Units` says what keys, values and queries were divided by, and weights are relative to the largest score of their block.
//
// The lanes are queries: token by token, and of a token the heads that share keys and values. So scores, their maxima, their
// exponentials and the sums of values need no operation across lanes, and a key or a value is a number for all lanes. With f factors
// in a row of `width` numbers:
//
//   queries transposed:  (f, lanes)   once
//   scores:  (64 keys, lanes) = keys transposed (f, 64) times queries (f, lanes)
//   sums:    (width, lanes)  += values transposed (width, 64 / kNumbers) times weights (64 / kNumbers, lanes)
//
// 64 keys and their values pass by all lanes of a call, a strip of `kStrip` lanes at a time: the scores of a strip, its queries
// and its sums stay in the first-level cache. Scores, their exponentials, sums and totals are fp32.
//
// The two products are functions of their own: inlined, GCC 12 keeps their sums in memory.

constexpr int64_t kStrip = kVectors * kLanes;
constexpr int64_t kKeys = kBlockTokens;  // whose scores are computed before they become weights

// R rows by `kVectors` vectors of sums, which begin as `sums`: row r and step k of the first factor are at
// a[r * row_step + k * step], step k of the second at b[k * kStrip].
template <int R>
INLINE void multiply(const Factor* a, int64_t row_step, int64_t step, const Factor* b, int64_t depth, Sums (&sums)[R][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    Factors of_step[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) of_step[v] = load_factors(b + k * kStrip + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Factors factor = all_of(a[r * row_step + k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_products(sums[r][v], factor, of_step[v]);
    }
  }
}

// Scores of R keys in `to` (R, kStrip); `largest` takes part in their maxima and becomes these. `units`: of the first key.
template <int R>
__attribute__((noinline)) void scores_of(const Factor* keys, Units units, int64_t depth, const Factor* queries, const float* of_queries, float* to, Vector* largest) {
  Sums sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Sums{};
  multiply<R>(keys, 1, kKeys, queries, depth, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector score = score_of(sums[r][v], units, r, of_queries + v * kLanes);
      store(to + r * kStrip + v * kLanes, score);
      largest[v] = larger(score, largest[v]);
    }
}

// Adds the weighted sums of R columns of the values, in units of `unit`, to `factor` times what `to` (R, kStrip) has.
template <int R>
__attribute__((noinline)) void add_columns(const Factor* values, int64_t width, const Factor* weights, int64_t depth, const Vector* factor, const Vector* unit, float* to) {
  Sums sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) begin_sums(sums[r][v], to + r * kStrip + v * kLanes, factor[v]);
  multiply<R>(values, 1, width, weights, depth, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) end_sums(sums[r][v], to + r * kStrip + v * kLanes, factor[v], unit[v]);
}

// A strip of lanes while keys pass.
struct Strip {
  const Factor* queries;     // (width / kNumbers, kStrip), times `scale` and log2(e)
  const float* units;        // (kStrip,) of the queries
  float* sums;               // (width, kStrip)
  float* largest;            // (kStrip,) of the scores so far
  float* totals;             // (kStrip,) of the weights so far
  const int32_t* positions;  // (kStrip,) of the lanes' tokens
};

// `count` keys from position `t` on, and their values.
void attend_to_keys(const Strip& strip, const Brought& brought, int64_t t, int64_t count, int64_t width, int64_t window) {
  alignas(64) float scores[kKeys * kStrip];  // and in their place the weights
  auto* const weights = reinterpret_cast<Factor*>(scores);
  Vector before[kVectors], here[kVectors], largest[kVectors], factor[kVectors], unit[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) here[v] = all(-INFINITY);
  const int64_t f = width / kNumbers, depth = (count + kNumbers - 1) / kNumbers;
  int64_t k = 0;
  const bool whole = t + count - 1 <= strip.positions[0] && !(window && t <= strip.positions[kStrip - 1] - window);
  const auto add_scores = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; k + R <= count; k += R) scores_of<R>(brought.keys + k, brought.units.from(k), f, strip.queries, strip.units, scores + k * kStrip, here);
  };
  add_scores(std::integral_constant<int, kTileRows>()), add_scores(std::integral_constant<int, 4>()), add_scores(std::integral_constant<int, 1>());
  for (; k < depth * kNumbers; ++k)  // the last factor lacks a key
    for (int v = 0; v < kVectors; ++v) store(scores + k * kStrip + v * kLanes, all(-INFINITY));
  if (!whole) {  // some lanes do not read all of these keys
    Integers newest[kVectors], oldest[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(&newest[v], strip.positions + v * kLanes, sizeof newest[v]);
      newest[v] -= int32_t(t);
      oldest[v] = newest[v] - int32_t(window ? std::min<int64_t>(window, 1 << 30) : 1 << 30);
      here[v] = all(-INFINITY);
    }
    for (k = 0; k < count; ++k)
      for (int v = 0; v < kVectors; ++v) {
        const Integers key = oldest[v] * 0 + int32_t(k);
        float* at = scores + k * kStrip + v * kLanes;
        const Vector score = ((key <= newest[v]) & (key > oldest[v])) ? load(at) : all(-INFINITY);
        store(at, score);
        here[v] = larger(score, here[v]);
      }
  }
  for (int v = 0; v < kVectors; ++v) {
    before[v] = load(strip.largest + v * kLanes), largest[v] = larger(here[v], before[v]);
    store(strip.largest + v * kLanes, largest[v]);
    // A lane that has read no key yet has minus infinity twice; subtracting the lowest number keeps its weights 0.
    largest[v] = larger(largest[v], all(-3e38f));
    factor[v] = power_of_two(larger(before[v], all(-3e38f)) - largest[v]);
    total[v] = kRounds ? all(0.0f) : load(strip.totals + v * kLanes) * factor[v];
    here[v] = larger(here[v], all(-3e38f)), unit[v] = kRounds ? power_of_two(here[v] - largest[v]) : all(1.0f);
  }
  for (k = 0; k < depth; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Factors factors = weights_of(scores + k * kNumbers * kStrip + v * kLanes, brought.units.from(k * kNumbers), kRounds ? here[v] : largest[v], total[v]);
      store(weights + k * kStrip + v * kLanes, factors);
    }
  for (int v = 0; v < kVectors; ++v) {
    if (kRounds) total[v] = load(strip.totals + v * kLanes) * factor[v] + total[v] * unit[v], unit[v] *= all(kWeightUnit);
    store(strip.totals + v * kLanes, total[v]);
  }
  int64_t i = 0;
  const auto add = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; i + R <= width; i += R) add_columns<R>(brought.values + i, width, weights, depth, factor, unit, strip.sums + i * kStrip);
  };
  add(std::integral_constant<int, kTileRows>()), add(std::integral_constant<int, 4>()), add(std::integral_constant<int, 1>());
}

INLINE void transpose(Four* rows) {
  const Four a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  const Four ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]};
  const Four ab_high = {a[2], b[2], a[3], b[3]}, cd_high = {c[2], d[2], c[3], d[3]};
  rows[0] = Four{ab[0], ab[1], cd[0], cd[1]}, rows[1] = Four{ab[2], ab[3], cd[2], cd[3]};
  rows[2] = Four{ab_high[0], ab_high[1], cd_high[0], cd_high[1]};
  rows[3] = Four{ab_high[2], ab_high[3], cd_high[2], cd_high[3]};
}

void attend_to_prompt(const Prompt& of, int64_t first, int64_t count) {
  const int64_t width = of.of.width, f = width / kNumbers, start = of.start + first, end = start + count, lanes = count * of.group;
  const int64_t strips = (lanes + kStrip - 1) / kStrip, size = width * kStrip;
  const int64_t words = strips * (size / kNumbers + size + 4 * kStrip) + 2 * kKeys * width + kUnitWords;
  auto* const queries = static_cast<Factor*>(scratch<0>(words * 4));
  float* const sums = reinterpret_cast<float*>(queries + strips * size / kNumbers);
  float *const totals = sums + strips * size, *const largest = totals + strips * kStrip;
  float* const units = largest + strips * kStrip;
  auto* const positions = reinterpret_cast<int32_t*>(units + strips * kStrip);
  auto* const room = reinterpret_cast<Factor*>(positions + strips * kStrip);
  std::fill(sums, largest, 0.0f);
  std::fill_n(largest, strips * kStrip, -INFINITY);

  // Four lanes' rows of (head_dim,) at a time, filled up to `width`; lanes past the last one repeat it.
  alignas(64) float rows_of_lanes[4][kWidestHead] = {};
  const auto offset_of = [&](int64_t lane) {
    lane = std::min(lane, lanes - 1);
    return (first + lane / of.group) * of.stride + lane % of.group * of.head_dim;
  };
  for (int64_t lane = 0; lane < strips * kStrip; lane += 4) {
    Factor* const to = queries + lane / kStrip * (size / kNumbers) + lane % kStrip;
    float scales[4];
    for (int j = 0; j < 4; ++j) {
      std::copy_n(of.queries + offset_of(lane + j), of.head_dim, rows_of_lanes[j]);
      scales[j] = scale_of_query(rows_of_lanes[j], width, of.scale, units + lane + j);
      positions[lane + j] = int32_t(start + std::min(lane + j, lanes - 1) / of.group);
    }
    for (int64_t i = 0; i < f; i += 4) {
      Four rows[4];
      for (int j = 0; j < 4; ++j) rows[j] = four_factors(rows_of_lanes[j] + i * kNumbers, scales[j]);
      transpose(rows);
      for (int j = 0; j < 4; ++j) store(to + (i + j) * kStrip, rows[j]);
    }
  }

  const int64_t begin = of.window ? std::max<int64_t>(0, start + 1 - of.window) : 0;
  for (int64_t t = begin / kKeys * kKeys; t < end; t += kKeys) {
    const Brought brought = bring(of.of, t, room);
    const int64_t bytes = t + kKeys < end ? 2 * of.of.half_bytes : 0;
    const uint8_t* const following = bytes ? of.of.at(t + kKeys) : nullptr;
    for (int64_t s = 0; s < strips; ++s) {
      // The next block lies elsewhere, and its keys are not read line by line.
      for (int64_t at = bytes * s / strips / 64 * 64; at < bytes * (s + 1) / strips; at += 64) __builtin_prefetch(following + at, 0, 2);
      const int32_t* const at = positions + s * kStrip;
      const Strip strip{queries + s * (size / kNumbers), units + s * kStrip, sums + s * size, largest + s * kStrip, totals + s * kStrip, at};
      const int64_t oldest = of.window ? at[0] + 1 - of.window : 0, newest = at[kStrip - 1];
      if (t > newest || t + kKeys <= oldest) continue;
      attend_to_keys(strip, brought, t, std::min(kKeys, newest + 1 - t), width, of.window);
    }
  }

  for (int64_t lane = 0; lane < lanes; lane += 4) {
    const float* const from = sums + lane / kStrip * size + lane % kStrip;
    const Four factor = 1.0f / load<Four>(totals + lane);
    for (int64_t i = 0; i < width; i += 4) {
      Four rows[4];
      for (int j = 0; j < 4; ++j) rows[j] = load<Four>(from + (i + j) * kStrip) * factor;
      transpose(rows);
      for (int j = 0; j < 4; ++j) store(rows_of_lanes[j] + i, rows[j]);
    }
    for (int j = 0; j < 4; ++j) std::copy_n(rows_of_lanes[j], of.head_dim, of.to + offset_of(lane + j));
  }
}
