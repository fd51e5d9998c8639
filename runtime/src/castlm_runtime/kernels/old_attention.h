// Attention of one token for query heads that share their keys and values, which are read once for all of them. Included by
// attention.cpp once for each instruction set, after prompt_attention.h, inside its target pragma and a namespace of its own
// that has a `Vector` of `kLanes` floats with the arithmetic operators, `all` (a number in every lane), `load`, `store`, and
// `four_sums` (of the lanes of four vectors).

constexpr int64_t kTokens = 64;  // whose keys and values are read at a time
constexpr int64_t kAhead = 16;   // tokens whose keys are asked for early

// The products of G queries and U keys in `to` (4,), key by key. G * U is at most 4.
template <int G, int U>
INLINE void dots(const float* queries, const float* keys, int64_t width, float* to) {
  Vector sums[4];
  for (auto& sum : sums) sum = all(0);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int u = 0; u < U; ++u) {
      const Vector key = load(keys + u * width + i);
      for (int g = 0; g < G; ++g) sums[u * G + g] += key * load(queries + g * width + i);
    }
  four_sums(sums, to);
  for (; i < width; ++i)
    for (int u = 0; u < U; ++u)
      for (int g = 0; g < G; ++g) to[u * G + g] += keys[u * width + i] * queries[g * width + i];
}

// Products of the queries with `count` keys, times `scale`; minus infinity for the rest of the weights. Asks for the values,
// too: the processor would notice each of the two streams late, as they are read in turns.
template <int G>
INLINE void scores(const float* queries, const float* keys, const float* values, int64_t count, int64_t width, float scale,
                   float (*weights)[kTokens]) {
  constexpr int U = 4 / G;
  float found[4];
  int64_t t = 0;
  for (; t + U <= count; t += U) {
    for (int64_t i = 0; i < U * width; i += 16) {
      __builtin_prefetch(keys + (t + kAhead) * width + i);
      __builtin_prefetch(values + t * width + i, 0, 2);
    }
    dots<G, U>(queries, keys + t * width, width, found);
    for (int u = 0; u < U; ++u)
      for (int g = 0; g < G; ++g) weights[g][t + u] = scale * found[u * G + g];
  }
  for (; t < count; ++t) {
    dots<G, 1>(queries, keys + t * width, width, found);
    for (int g = 0; g < G; ++g) weights[g][t] = scale * found[g];
  }
  for (int g = 0; g < G; ++g) std::fill(weights[g] + count, weights[g] + kTokens, -INFINITY);
}

INLINE float largest_of(const float* weights, float largest) {
  float lanes[8];
  std::fill(lanes, lanes + 8, largest);
  for (int64_t t = 0; t < kTokens; t += 8)
    for (int i = 0; i < 8; ++i) lanes[i] = weights[t + i] > lanes[i] ? weights[t + i] : lanes[i];
  return *std::max_element(lanes, lanes + 8);
}

// Replaces scores by their exponentials after subtracting `largest`; returns the sum.
INLINE float exponentials(float* weights, float largest) {
  float lanes[8] = {};
  for (int64_t t = 0; t < kTokens; ++t) weights[t] = fast_exp(weights[t] - largest);
  for (int64_t t = 0; t < kTokens; t += 8)
    for (int i = 0; i < 8; ++i) lanes[i] += weights[t + i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Adds the weighted sums of C vectors of columns of the values.
template <int G, int C>
INLINE void add_columns(const float (*weights)[kTokens], const float* values, int64_t count, int64_t width, float* to) {
  Vector sums[G][C];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) sums[g][c] = load(to + g * width + c * kLanes);
  for (int64_t t = 0; t < count; ++t)
    for (int c = 0; c < C; ++c) {
      const Vector value = load(values + t * width + c * kLanes);
      for (int g = 0; g < G; ++g) sums[g][c] += all(weights[g][t]) * value;
    }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) store(to + g * width + c * kLanes, sums[g][c]);
}

template <int G>
INLINE void add_values(const float (*weights)[kTokens], const float* values, int64_t count, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) add_columns<G, 2>(weights, values + i, count, width, to + i);
  for (; i + kLanes <= width; i += kLanes) add_columns<G, 1>(weights, values + i, count, width, to + i);
  for (; i < width; ++i)
    for (int g = 0; g < G; ++g)
      for (int64_t t = 0; t < count; ++t) to[g * width + i] += weights[g][t] * values[t * width + i];
}

// What was added before a larger score came is scaled down when it comes.
template <int G>
void attend_together(const float* queries, const float* keys, const float* values, int64_t length, int64_t width, float scale,
                     float* to) {
  float largest[G], totals[G] = {};
  std::fill(largest, largest + G, -INFINITY);
  std::fill(to, to + G * width, 0.0f);
  for (int64_t t = 0; t < length; t += kTokens) {
    const int64_t count = std::min(kTokens, length - t);
    alignas(64) float weights[G][kTokens];
    scores<G>(queries, keys + t * width, values + t * width, count, width, scale, weights);
    for (int g = 0; g < G; ++g) {
      const float before = largest[g];
      largest[g] = largest_of(weights[g], before);
      if (largest[g] > before) {
        const float factor = fast_exp(before - largest[g]);
        totals[g] *= factor;
        for (int64_t i = 0; i < width; ++i) to[g * width + i] *= factor;
      }
      totals[g] += exponentials(weights[g], largest[g]);
    }
    add_values<G>(weights, values + t * width, count, width, to);
  }
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < width; ++i) to[g * width + i] /= totals[g];
}

Attend old_attend_of(int64_t group) {
  switch (group) {
    case 1: return attend_together<1>;
    case 2: return attend_together<2>;
    case 3: return attend_together<3>;
    default: return attend_together<4>;
  }
}
