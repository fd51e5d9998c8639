// Attention of one token over a part of its context. Included by attention.cpp once for each instruction set, after
// prompt_floats.h, inside its target pragma and a namespace of its own.
//
// 64 positions at a time: scores of up to four query heads, whose lanes are positions, then weights, then sums of the
// values, whose lanes are dimensions. A word of keys or of values has the N numbers of 32 bits that cache.h describes.

// Vectors of positions or dimensions: with G heads as many sums as registers hold beside a number and a factor of each head.
template <int G>
constexpr int vectors_at_once() { return kRegisters >= 32 || G < 4 ? 4 : 2; }

// Asks for words of the block that is read next: it lies elsewhere. In the second level: the first holds the block that is read.
INLINE void prefetch(const uint32_t* words, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(words + i, 0, 2);
}

// The scores of all positions of a block.
template <int G, int N>
INLINE void scores_of_block(const float* queries, const uint32_t* keys, const uint32_t* next, int64_t width, float (*scores)[kBlockTokens]) {
  constexpr int V = vectors_at_once<G>();
  for (int64_t t = 0; t < kBlockTokens; t += V * kLanes) {
    Vector sums[G][V];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[g][v] = all(0.0f);
    for (int64_t i = 0; i < width / N; ++i) {
      const uint32_t* words = keys + i * kBlockTokens + t;
      prefetch(next + i * kBlockTokens + t, V * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        Vector factors[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) factors[g] = all(queries[g * width + i * N + j]);
        asm("" : "+r"(words));  // the words are loaded for each number, since no registers are left for them
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vector numbers = number_of<N>(load_words(words + v * kLanes), j);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) add_product(sums[g][v], factors[g], numbers);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(scores[g] + t + v * kLanes, sums[g][v]);
  }
}

// Adds the weighted values of positions [begin, end) of a block to V vectors of columns; the weights of other positions are 0.
template <int G, int N, int V>
INLINE void add_columns_of(const float (*weights)[kBlockTokens], const uint32_t* values, const uint32_t* next, int64_t begin, int64_t end, int64_t width,
                           int64_t stride, float* to) {
  Vector sums[G][V];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[g][v] = load(to + g * stride + v * kLanes);
  for (int64_t t = begin / N; t * N < end; ++t) {
    const uint32_t* words = values + t * width;
    prefetch(next + t * width, V * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vector factors[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) factors[g] = all(weights[g][t * N + j]);
      asm("" : "+r"(words));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vector numbers = number_of<N>(load_words(words + v * kLanes), j);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) add_product(sums[g][v], factors[g], numbers);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + g * stride + v * kLanes, sums[g][v]);
}

template <int G, int N>
INLINE void add_values(const float (*weights)[kBlockTokens], const uint32_t* values, const uint32_t* next, int64_t begin, int64_t end, int64_t width,
                       int64_t stride, float* to) {
  constexpr int V = vectors_at_once<G>();
  int64_t i = 0;
  for (; i + V * kLanes <= width; i += V * kLanes)
    add_columns_of<G, N, V>(weights, values + i, next + i, begin, end, width, stride, to + i);
  for (; i < width; i += kLanes) add_columns_of<G, N, 1>(weights, values + i, next + i, begin, end, width, stride, to + i);
}

INLINE float largest_of(Vector v) {
  float lanes[kLanes], largest = -INFINITY;
  store(lanes, v);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}
INLINE float sum_of(Vector v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Scores of positions [begin, end) of a block to weights, in place; those of other positions become 0. A score larger than all
// before scales down what was added before it came. `scales`: of int8 keys, and 64 floats further of values.
template <int N>
INLINE void weights_of_block(float* scores, int64_t begin, int64_t end, const float* scales, float& largest, float& total, float* to,
                             int64_t width) {
  Vector most = all(-INFINITY);
  for (int64_t t = 0; t < kBlockTokens; t += kLanes) {
    Vector score = load(scores + t);
    if (N == 4) score *= load(scales + t);
    store(scores + t, score);
  }
  for (int64_t t = 0; t < begin; ++t) scores[t] = -INFINITY;
  for (int64_t t = end; t < kBlockTokens; ++t) scores[t] = -INFINITY;
  for (int64_t t = 0; t < kBlockTokens; t += kLanes) most = larger(load(scores + t), most);
  const float here = largest_of(most);
  if (here > largest) {
    const float factor = std::exp2(largest - here);
    largest = here, total *= factor;
    for (int64_t i = 0; i < width; ++i) to[i] *= factor;
  }
  Vector sum = all(0.0f);
  for (int64_t t = 0; t < kBlockTokens; t += kLanes) {
    Vector weight = power_of_two(load(scores + t) - all(largest));
    sum += weight;
    if (N == 4) weight *= load(scales + kBlockTokens + t);
    store(scores + t, weight);
  }
  total += sum_of(sum);
}

template <int G, int N>
void attend_part(const Part& part, int64_t head) {
  const HeadBlocks& of = part.of;
  const int64_t stride = of.width + kPartRest;
  float* const to = part.to + head * stride;
  float largest[G], total[G] = {};
  std::fill_n(largest, G, -3e38f);
  std::fill_n(to, G * stride, 0.0f);
  for (int64_t t = part.first / kBlockTokens * kBlockTokens; t < part.last; t += kBlockTokens) {
    const auto *const keys = reinterpret_cast<const uint32_t*>(of.at(t)), *const values = keys + of.half_bytes / 4;
    const auto* const next = reinterpret_cast<const uint32_t*>(t + kBlockTokens < part.last ? of.at(t + kBlockTokens) : part.next);
    const auto* const scales = reinterpret_cast<const float*>(values + of.half_bytes / 4);
    const int64_t begin = std::max<int64_t>(0, part.first - t), end = std::min(kBlockTokens, part.last - t);
    alignas(64) float weights[G][kBlockTokens];
    scores_of_block<G, N>(part.queries + head * of.width, keys, next, of.width, weights);
    for (int g = 0; g < G; ++g)
      weights_of_block<N>(weights[g], begin, end, scales, largest[g], total[g], to + g * stride, of.width);
    add_values<G, N>(weights, values, next + of.half_bytes / 4, begin, end, of.width, stride, to);
  }
  for (int g = 0; g < G; ++g) to[g * stride + of.width] = largest[g], to[g * stride + of.width + 1] = total[g];
}

template <int N>
void attend_part_of(const Part& part) {
  for (int64_t head = 0; head < part.group; head += 4) switch (part.group - head) {
    case 1: attend_part<1, N>(part, head); break;
    case 2: attend_part<2, N>(part, head); break;
    case 3: attend_part<3, N>(part, head); break;
    default: attend_part<4, N>(part, head);
  }
}
