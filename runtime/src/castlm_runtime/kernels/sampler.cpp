// The choice of tokens of sampler.h: the loops for each level, the steps of a row, and the entry point.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "api.h"
#include "avx2.h"
#include "table.h"
#include "team.h"

namespace castlm {
namespace plain_sampler {
namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
constexpr int kLanes = 4;
INLINE Vector all(float value) { return Vector{value, value, value, value}; }
#include "sampler_loops.h"

}  // namespace
}  // namespace plain_sampler
}  // namespace castlm

#if defined(CASTLM_AVX2)
BEGIN_TARGET("avx2,fma")
namespace castlm {
namespace avx2_sampler {
namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
constexpr int kLanes = 8;
INLINE Vector all(float value) { return _mm256_set1_ps(value); }
#include "sampler_loops.h"

}  // namespace
}  // namespace avx2_sampler
}  // namespace castlm
END_TARGET

BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace castlm {
namespace avx512_sampler {
namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
constexpr int kLanes = 16;
INLINE Vector all(float value) { return _mm512_set1_ps(value); }
#include "sampler_loops.h"

}  // namespace
}  // namespace avx512_sampler
}  // namespace castlm
END_TARGET
#endif

namespace castlm {
namespace {

constexpr int64_t kChunk = plain_sampler::kChunk;
constexpr int64_t kFew = 512;  // tokens that are sorted
constexpr float kLeastTemperature = 1e-6f;  // below, the largest logit is taken
constexpr int32_t kNotFinite = -1, kNoneAllowed = -2;  // in place of a token

const SamplerLoops& loops() {
#if defined(CASTLM_AVX2)
  if (level() >= kAvx512) return avx512_sampler::kLoops;
  if (level() >= kAvx2) return avx2_sampler::kLoops;
#endif
  return plain_sampler::kLoops;
}

// The buffers of a thread, kept from call to call.
struct Room {
  std::vector<float> changed, kept, weights, sums, maxima, sorted;
  std::vector<int32_t> indices, kept_indices, counts;
};

template <class T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (int64_t(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// Logits with what the loops know of them.
struct Row {
  const float* x;
  int64_t count;
  const float* maxima;  // of chunks
  float max;

  int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
  int32_t best() const {  // the first one of equals
    const int64_t chunk = std::find(maxima, maxima + chunks(), max) - maxima;
    return int32_t(std::find(x + chunk * kChunk, x + count, max) - x);
  }
};

// Finds the maxima of a row; false where a logit is NaN or +inf.
bool look(const float* x, int64_t count, std::vector<float>& maxima, Row& row) {
  row = Row{x, count, nullptr, 0};
  float* largest = at_least(maxima, row.chunks());
  row.maxima = largest;
  const bool is_finite = loops().maxima(x, count, largest);
  row.max = *std::max_element(largest, largest + row.chunks());
  return is_finite;
}

// Uniform in [0, 1): 53 bits of Philox4x64-10.
double uniform(uint64_t seed, uint64_t position) {
  uint64_t key[2] = {seed, 0}, counter[4] = {position, 0, 0, 0};
  for (int round = 0; round < 10; ++round) {
    const auto a = (unsigned __int128)0xD2E7470EE14C6C93u * counter[0], b = (unsigned __int128)0xCA5A826395121157u * counter[2];
    const uint64_t next[4] = {uint64_t(b >> 64) ^ counter[1] ^ key[0], uint64_t(b), uint64_t(a >> 64) ^ counter[3] ^ key[1], uint64_t(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B97F4A7C15u, key[1] += 0xBB67AE8584CAA73Bu;
  }
  return double(counter[0] >> 11) * 0x1p-53;
}

bool changes_logits(const SampleSpec& spec) {
  return spec.allowed || spec.num_biases || spec.repetition != 1 || spec.presence != 0 || spec.frequency != 0;
}

// Steps 1 to 4 of sampler.h.
const float* change(const float* x, int64_t count, const SampleSpec& spec, Room& room) {
  float* to = at_least(room.changed, count);
  if (spec.allowed) loops().allow(x, count, spec.allowed, to);
  else std::copy(x, x + count, to);
  for (int64_t i = 0; i < spec.num_biases; ++i) to[spec.bias_tokens[i]] += spec.biases[i];
  if (spec.repetition == 1 && spec.presence == 0 && spec.frequency == 0) return to;
  // For each token how often the answer has it, and one more where prompt or answer has it; all 0 between two calls.
  int32_t* counts = at_least(room.counts, count);
  for (int64_t i = 0; i < spec.num_history; ++i) {
    int32_t& seen = counts[spec.history[i]];
    seen = std::max(seen, 1) + (i >= spec.num_prompt);
  }
  for (int64_t i = 0; i < spec.num_history; ++i) {
    const int32_t token = spec.history[i], in_answer = counts[token] - 1;
    if (counts[token] == 0) continue;  // it has been here
    counts[token] = 0;
    float& logit = to[token];
    logit = logit < 0 ? logit * spec.repetition : logit / spec.repetition;
    if (in_answer > 0) logit -= spec.presence + spec.frequency * float(in_answer);
  }
  return to;
}

// The order of indices: larger logits first, of equals the first token.
auto largest_first(const Row& row) {
  return [x = row.x](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
}

// The k-th largest logit, 1 <= k < count.
float kth_largest(const Row& row, int64_t k, Room& room) {
  float* sorted;
  int64_t count = row.count;
  if (k <= row.chunks()) {
    sorted = at_least(room.sorted, row.chunks());
    std::copy(row.maxima, row.maxima + row.chunks(), sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + row.chunks(), std::greater<float>());
    int32_t* indices = at_least(room.indices, row.count + 1);
    count = loops().collect(row.x, row.count, row.maxima, sorted[k - 1], HUGE_VALF, indices);
    sorted = at_least(room.sorted, count);
    for (int64_t i = 0; i < count; ++i) sorted[i] = row.x[indices[i]];
  } else {
    sorted = at_least(room.sorted, count);
    std::copy(row.x, row.x + count, sorted);
  }
  std::nth_element(sorted, sorted + k - 1, sorted + count, std::greater<float>());
  return sorted[k - 1];
}

// Step 7: the least logit of the fewest tokens, largest first, whose weights have the sum `share` of `total`. Tokens with the same
// logit that are not among them get the weight 0.
float nucleus(const Row& row, float* weights, double total, float share, float temperature, Room& room) {
  const double wanted = std::max(double(share) * total, DBL_MIN);  // not 0, which no token has
  // The sum is reached between `least` and `below`: what is less than `least` weighs less than 1 - share together.
  float least = row.max - temperature * std::log(float(row.count) / std::max(1 - share, 1e-7f));
  float below = std::nextafter(row.max, HUGE_VALF);
  double above = 0;  // the sum from `below` on
  while (loops().count_between(row.x, row.count, row.maxima, least, below) > kFew) {
    float thresholds[kThresholds];
    double masses[kThresholds];
    for (int t = 0; t < kThresholds; ++t) thresholds[t] = least + (below - least) * (t + 1) / (kThresholds + 1);
    loops().masses(row.x, weights, row.count, row.maxima, thresholds, masses);
    const float last_least = least, last_below = below;
    for (int t = 0; t < kThresholds; ++t) {
      if (masses[t] >= wanted) least = thresholds[t];
      else if (thresholds[t] < below) below = thresholds[t], above = masses[t];
    }
    if (least == last_least && below == last_below) break;  // equal logits
  }
  int32_t* indices = at_least(room.indices, row.count + 1);
  const int64_t count = loops().collect(row.x, row.count, row.maxima, least, below, indices);
  std::sort(indices, indices + count, largest_first(row));
  for (int64_t i = 0; i < count; ++i) {
    above += weights[indices[i]];
    if (above < wanted) continue;
    least = row.x[indices[i]];
    for (int64_t j = i + 1; j < count && row.x[indices[j]] == least; ++j) weights[indices[j]] = 0;
    break;
  }
  return least;
}

// Step 9: the token at the share `at` of the sum of the weights whose logits are `least` or more, in the order of the tokens.
int32_t choose(const Row& row, const float* weights, const float* sums, double total, float least, double at) {
  const double wanted = at * total;
  double before = 0;
  int64_t chunk = 0;
  for (int64_t c = 0; c < row.chunks(); ++c) {
    if (sums[c] == 0) continue;
    chunk = c;
    if (before + sums[c] > wanted) break;
    before += sums[c];
  }
  int32_t found = kNoneAllowed;
  for (int64_t i = chunk * kChunk; i < std::min(row.count, (chunk + 1) * kChunk); ++i) {
    if (weights[i] == 0 || row.x[i] < least) continue;
    found = int32_t(i);  // the last one where the sum of the chunk was rounded up
    before += weights[i];
    if (before > wanted) break;
  }
  return found;
}

// Steps 5 to 9.
int32_t draw(const Row& all, const SampleSpec& spec, Room& room) {
  if (spec.temperature < kLeastTemperature) return all.best();
  Row row = all;
  const int32_t* original = nullptr;  // indices of the row that is left, if top_k has left a part
  if (spec.top_k > 0 && spec.top_k < all.count) {
    int32_t* indices = at_least(room.kept_indices, all.count + 1);
    const float least = kth_largest(all, spec.top_k, room);
    const int64_t count = loops().collect(all.x, all.count, all.maxima, least, HUGE_VALF, indices);
    float* kept = at_least(room.kept, count);
    for (int64_t i = 0; i < count; ++i) kept[i] = all.x[indices[i]];
    original = indices;
    look(kept, count, room.maxima, row);  // `all` is not read any more
  }
  float *weights = at_least(room.weights, row.chunks() * kChunk), *sums = at_least(room.sums, row.chunks());
  double total = loops().weigh(row.x, row.count, row.max, 1 / spec.temperature, weights, sums);
  float least = -HUGE_VALF;
  if (spec.top_p < 1) least = nucleus(row, weights, total, spec.top_p, spec.temperature, room);
  if (spec.min_p > 0) least = std::max(least, row.max + spec.temperature * std::log(spec.min_p));
  if (least > -HUGE_VALF) total = loops().sums_from(row.x, weights, row.count, row.maxima, least, sums);
  const int32_t found = choose(row, weights, sums, total, least, uniform(spec.seed, spec.position));
  return original ? original[found] : found;
}

// Log probabilities of a row as the model has given it, before any of the steps.
struct LogProbabilities {
  float* chosen;      // one
  int32_t* best;      // (num_best,) tokens, the most probable one first, the first one of equals
  float* best_values; // (num_best,)
};

double log_of_sum(const Row& row, Room& room) {
  float *weights = at_least(room.weights, row.chunks() * kChunk), *sums = at_least(room.sums, row.chunks());
  return row.max + std::log(loops().weigh(row.x, row.count, row.max, 1, weights, sums));
}

void find_best(const Row& row, int64_t num_best, double log_of_sum, const LogProbabilities& to, Room& room) {
  if (num_best <= 0) return;
  const float least = num_best < row.count ? kth_largest(row, num_best, room) : -HUGE_VALF;
  int32_t* indices = at_least(room.indices, row.count + 1);
  const int64_t count = loops().collect(row.x, row.count, row.maxima, least, HUGE_VALF, indices);
  std::partial_sort(indices, indices + num_best, indices + count, largest_first(row));
  for (int64_t i = 0; i < num_best; ++i) {
    to.best[i] = indices[i];
    to.best_values[i] = float(row.x[indices[i]] - log_of_sum);
  }
}

// The token of a row, or why it has none.
int32_t sample(const float* logits, int64_t count, const SampleSpec& spec, const LogProbabilities& to, Room& room) {
  Row row;
  if (!look(logits, count, room.maxima, row) || row.max == -HUGE_VALF) return kNotFinite;
  double sum = 0;
  if (spec.num_best >= 0) {
    sum = log_of_sum(row, room);
    find_best(row, spec.num_best, sum, to, room);
  }
  int32_t token = spec.given;
  if (token < 0) {
    if (changes_logits(spec) && !look(change(logits, count, spec, room), count, room.maxima, row)) return kNotFinite;
    if (row.max == -HUGE_VALF) return kNoneAllowed;
    token = draw(row, spec, room);
  }
  if (spec.num_best >= 0) *to.chosen = float(logits[token] - sum);
  return token;
}

bool in_vocabulary(const int32_t* tokens, int64_t count, int64_t vocabulary) {
  return count == 0 || (tokens && std::all_of(tokens, tokens + count, [&](int32_t t) { return t >= 0 && t < vocabulary; }));
}

bool is_sound(const SampleSpec& spec, int64_t vocabulary, int64_t most_best) {
  const bool numbers = spec.temperature >= 0 && spec.temperature < HUGE_VALF && spec.top_p >= 0 && spec.min_p >= 0 && spec.min_p <= 1 &&
                       spec.repetition > 0 && std::isfinite(spec.repetition) && std::isfinite(spec.presence) &&
                       std::isfinite(spec.frequency);
  return numbers && spec.num_best <= std::min(most_best, vocabulary) && spec.given < vocabulary &&
         in_vocabulary(spec.history, spec.num_history, vocabulary) && in_vocabulary(spec.bias_tokens, spec.num_biases, vocabulary);
}

}  // namespace
}  // namespace castlm

using namespace castlm;

extern "C" {

int castlm_sample(const float* logits, int64_t count, int64_t vocabulary, const SampleSpec* specs, int64_t spec_bytes, int64_t most_best,
                  int32_t* tokens, float* logprobs, int32_t* best, int threads) {
  if (spec_bytes != sizeof(SampleSpec) || count < 0 || vocabulary < 1 || vocabulary > INT32_MAX - kChunk || most_best < 0) return kBadSize;
  for (int64_t row = 0; row < count; ++row)
    if (!is_sound(specs[row], vocabulary, most_best)) return kBadSize;
  return guarded([&] {
    in_parallel(count, 1, threads, [&](int64_t first, int64_t last) {
      static thread_local Room room;
      for (int64_t row = first; row < last; ++row) {
        LogProbabilities to{};
        if (specs[row].num_best >= 0) {
          float* values = logprobs + row * (1 + most_best);
          to = {values, best + row * most_best, values + 1};
        }
        tokens[row] = sample(logits + row * vocabulary, vocabulary, specs[row], to, room);
      }
    });
    return kOk;
  });
}
}
