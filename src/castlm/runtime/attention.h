// Attention of one token for query heads that share their keys and values, which are read once for all of them, and of
// tokens of a prompt. Included by attention.cpp once for each instruction set, inside its target pragma and a namespace of
// its own that has a `Vector` of `kLanes` floats with the arithmetic operators, `all` (a number in every lane), and
// `four_sums` (of the lanes of four vectors).

constexpr int64_t kTokens = 64;  // whose keys and values are read at a time
constexpr int64_t kAhead = 16;   // tokens whose keys are asked for early

INLINE Vector load(const float* at) {
  Vector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
INLINE void store(float* at, Vector v) { std::memcpy(at, &v, sizeof v); }

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

Attend attend_of(int64_t group) {
  switch (group) {
    case 1: return attend_together<1>;
    case 2: return attend_together<2>;
    case 3: return attend_together<3>;
    default: return attend_together<4>;
  }
}

// ---- prompts

// Adds the products of a (R, depth) and b (depth, width) to c (R, width), with rows `lda`, `ldb` and `ldc` apart.
template <int R>
INLINE void add_products(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, int64_t width, float* c,
                         int64_t ldc) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    Vector sums[R][2];
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) sums[r][half] = load(c + r * ldc + i + half * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
      const Vector first = load(b + k * ldb + i), last = load(b + k * ldb + i + kLanes);
      for (int r = 0; r < R; ++r) {
        const Vector factor = all(a[r * lda + k]);
        sums[r][0] += factor * first;
        sums[r][1] += factor * last;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) store(c + r * ldc + i + half * kLanes, sums[r][half]);
  }
  for (; i < width; ++i)
    for (int r = 0; r < R; ++r)
      for (int64_t k = 0; k < depth; ++k) c[r * ldc + i] += a[r * lda + k] * b[k * ldb + i];
}

inline void add_products(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                         int64_t width, float* c, int64_t ldc) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) add_products<6>(a + r * lda, lda, b, ldb, depth, width, c + r * ldc, ldc);
  for (; r < rows; ++r) add_products<1>(a + r * lda, lda, b, ldb, depth, width, c + r * ldc, ldc);
}

// Turns the scores of a row with up to `kTokens` keys, of which the token reads [first, last), to weights, and adds them to
// the row's total. Returns the factor of what was added to `to` before.
INLINE float weigh(float* weights, int64_t first, int64_t last, float scale, float& largest, float& total) {
  if (first >= last) {
    std::fill(weights, weights + kTokens, 0.0f);
    return 1;
  }
  for (int64_t t = 0; t < kTokens; ++t) weights[t] *= scale;
  std::fill(weights, weights + first, -INFINITY);
  std::fill(weights + last, weights + kTokens, -INFINITY);
  const float before = largest;
  largest = largest_of(weights, before);
  const float factor = largest > before ? fast_exp(before - largest) : 1;
  total = total * factor + exponentials(weights, largest);
  return factor;
}

// Blocks of keys pass by the queries of up to `kTokens` tokens, so that a block is read once for all of them. Scores are
// products with the keys transposed, whose lanes are keys.
void attend_to_prompt(const Prompt& of, int64_t first, int64_t count) {
  const int64_t width = of.width, end = of.start + first + count;  // tokens up to the last of these
  const int64_t begin = of.window ? std::max<int64_t>(0, of.start + first + 1 - of.window) : 0;
  const float *queries = of.queries + first * of.stride, *const keys = of.keys, *const values = of.values;
  float* to = of.to + first * of.stride;
  std::vector<float> transposed(width * kTokens), scores(kTokens * kTokens);
  std::vector<float> largest(of.group * count, -INFINITY), totals(of.group * count);
  for (int64_t row = 0; row < count; ++row) std::fill_n(to + row * of.stride, of.group * width, 0.0f);
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t num_keys = std::min(kTokens, end - t);
    for (int64_t k = 0; k < num_keys; ++k)
      for (int64_t i = 0; i < width; ++i) transposed[i * kTokens + k] = keys[(t + k) * width + i];
    for (int64_t g = 0; g < of.group; ++g) {
      std::fill(scores.begin(), scores.end(), 0.0f);
      add_products(count, queries + g * width, of.stride, transposed.data(), kTokens, width, kTokens, scores.data(), kTokens);
      for (int64_t row = 0; row < count; ++row) {
        const int64_t position = of.start + first + row, oldest = of.window ? position + 1 - of.window : 0;
        const int64_t at = g * count + row;
        const float factor = weigh(&scores[row * kTokens], std::max<int64_t>(0, oldest - t),
                                   std::min(num_keys, position + 1 - t), of.scale, largest[at], totals[at]);
        float* mixed = to + row * of.stride + g * width;
        for (int64_t i = 0; i < width && factor != 1; ++i) mixed[i] *= factor;
      }
      add_products(count, scores.data(), kTokens, values + t * width, width, num_keys, width, to + g * width, of.stride);
    }
  }
  for (int64_t g = 0; g < of.group; ++g)
    for (int64_t row = 0; row < count; ++row) {
      float* mixed = to + row * of.stride + g * width;
      for (int64_t i = 0; i < width; ++i) mixed[i] /= totals[g * count + row];
    }
}
