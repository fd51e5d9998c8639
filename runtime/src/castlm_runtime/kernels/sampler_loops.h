// The loops of sampler.h, for `Vector` of kLanes floats and `Integers` of as many; included into a namespace for each level.

constexpr int64_t kChunk = 64;
constexpr int kVectorsOfChunk = kChunk / kLanes;

INLINE Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store(const Vector& x, float* to) { std::memcpy(to, &x, sizeof x); }
INLINE Vector larger(const Vector& a, const Vector& b) { return a > b ? a : b; }
INLINE Vector value_of(const Integers& bits) { return (Vector)bits; }

// Chunk `c` of x: x itself, or `room`, where the last one is filled up with -inf.
INLINE const float* chunk_of(const float* x, int64_t count, int64_t c, float (&room)[kChunk]) {
  const int64_t left = count - c * kChunk;
  if (left >= kChunk) return x + c * kChunk;
  for (int64_t k = 0; k < kChunk; ++k) room[k] = k < left ? x[c * kChunk + k] : -HUGE_VALF;
  return room;
}

// e^x for x <= 0 with an error of 1e-7 of it; 0 below -87: 2^n times a polynomial of the rest, which is at most log(2) / 2.
INLINE Vector exponential(const Vector& x) {
  const Vector least = all(-87.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Integers is_small = x < least;
  const Vector y = is_small ? least : x;
  const Vector shifted = y * all(1.44269504f) + magic, n = shifted - magic;
  const Vector r = (y - n * all(0.693359375f)) + n * all(2.12194440e-4f);
  Vector p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * (r * r) + r + all(1.0f);
  const Vector power = value_of((((Integers)shifted - (Integers)magic) + 127) << 23);
  return is_small ? all(0.0f) : p * power;
}

bool maxima(const float* x, int64_t count, float* to) {
  const Vector most = all(FLT_MAX);
  Integers is_good = (Integers)all(0.0f) == 0;
  float room[kChunk], lanes[kLanes];
  for (int64_t c = 0; c * kChunk < count; ++c) {
    const float* from = chunk_of(x, count, c, room);
    Vector max = all(-HUGE_VALF);
    for (int v = 0; v < kVectorsOfChunk; ++v) {
      const Vector values = load(from + v * kLanes);
      is_good &= values <= most;
      max = larger(values, max);
    }
    store(max, lanes);
    to[c] = *std::max_element(lanes, lanes + kLanes);
  }
  bool good = true;
  for (int lane = 0; lane < kLanes; ++lane) good &= is_good[lane] != 0;
  return good;
}

INLINE float sum_of(const Vector& x) {
  float lanes[kLanes], sum = 0;
  store(x, lanes);
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

double weigh(const float* x, int64_t count, float max, float inverse_temperature, float* weights, float* sums) {
  double total = 0;
  float room[kChunk];
  for (int64_t c = 0; c * kChunk < count; ++c) {
    const float* from = chunk_of(x, count, c, room);
    Vector sum = all(0.0f);
    for (int v = 0; v < kVectorsOfChunk; ++v) {
      const Vector weight = exponential((load(from + v * kLanes) - all(max)) * all(inverse_temperature));
      store(weight, weights + c * kChunk + v * kLanes);
      sum += weight;
    }
    total += sums[c] = sum_of(sum);
  }
  return total;
}

double sums_from(const float* x, const float* weights, int64_t count, const float* maxima, float least, float* sums) {
  double total = 0;
  float room[kChunk];
  for (int64_t c = 0; c * kChunk < count; ++c) {
    sums[c] = 0;
    if (maxima[c] < least) continue;
    const float* from = chunk_of(x, count, c, room);
    Vector sum = all(0.0f);
    for (int v = 0; v < kVectorsOfChunk; ++v)
      sum += load(from + v * kLanes) >= all(least) ? load(weights + c * kChunk + v * kLanes) : all(0.0f);
    total += sums[c] = sum_of(sum);
  }
  return total;
}

void masses(const float* x, const float* weights, int64_t count, const float* maxima, const float (&thresholds)[kThresholds],
            double (&masses)[kThresholds]) {
  constexpr int64_t kTogether = 16;  // chunks whose sums stay in the lanes
  float room[kChunk];
  std::fill(masses, masses + kThresholds, 0.0);
  for (int64_t first = 0; first * kChunk < count; first += kTogether) {
    Vector sums[kThresholds];
    for (int t = 0; t < kThresholds; ++t) sums[t] = all(0.0f);
    for (int64_t c = first; c < first + kTogether && c * kChunk < count; ++c) {
      if (maxima[c] < thresholds[0]) continue;
      const float* from = chunk_of(x, count, c, room);
      for (int v = 0; v < kVectorsOfChunk; ++v) {
        const Vector values = load(from + v * kLanes), weight = load(weights + c * kChunk + v * kLanes);
        for (int t = 0; t < kThresholds; ++t) sums[t] += values >= all(thresholds[t]) ? weight : all(0.0f);
      }
    }
    for (int t = 0; t < kThresholds; ++t) masses[t] += sum_of(sums[t]);
  }
}

// How many of the 64 logits are in [least, below).
INLINE int64_t count_chunk(const float* from, float least, float below) {
  Integers counts = (Integers)all(0.0f);
  for (int v = 0; v < kVectorsOfChunk; ++v) {
    const Vector values = load(from + v * kLanes);
    counts -= (values >= all(least)) & (values < all(below));
  }
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += counts[lane];
  return sum;
}

int64_t count_between(const float* x, int64_t count, const float* maxima, float least, float below) {
  int64_t found = 0;
  float room[kChunk];
  for (int64_t c = 0; c * kChunk < count; ++c)
    if (maxima[c] >= least) found += count_chunk(chunk_of(x, count, c, room), least, below);
  return found;
}

int64_t collect(const float* x, int64_t count, const float* maxima, float least, float below, int32_t* indices) {
  int64_t found = 0;
  float room[kChunk];
  for (int64_t c = 0; c * kChunk < count; ++c) {
    if (maxima[c] < least || (maxima[c] >= below && count_chunk(chunk_of(x, count, c, room), least, below) == 0)) continue;
    const int64_t end = std::min(count, (c + 1) * kChunk);
    for (int64_t i = c * kChunk; i < end; ++i) {  // without a branch: `indices` has room for one more
      indices[found] = int32_t(i);
      found += x[i] >= least && x[i] < below;
    }
  }
  return found;
}

void allow(const float* x, int64_t count, const uint32_t* allowed, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = allowed[i / 32] >> (i % 32) & 1 ? x[i] : -HUGE_VALF;
}

constexpr SamplerLoops kLoops{maxima, weigh, sums_from, masses, count_between, collect, allow};
