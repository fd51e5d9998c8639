// One token through a decoder with packed weights: RMS norms, rotary embedding, attention over a cache, gated MLP, output
// head. Between the layers of a small model, Python takes longer than the multiplications do; here nothing comes between.

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

namespace castlm {
namespace {

constexpr int64_t kCachePerThread = 1 << 16;  // elements of keys; fewer are read sooner than a thread wakes

INLINE float dot(const float* a, const float* b, int64_t count) {
  float sums[8] = {}, rest = 0;
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int i = 0; i < 8; ++i) sums[i] += a[k + i] * b[k + i];
  for (; k < count; ++k) rest += a[k] * b[k];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])) + rest;
}

EACH_CPU void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* to) {
  const float factor = 1.0f / std::sqrt(dot(x, x, count) / float(count) + epsilon);
  for (int64_t k = 0; k < count; ++k) to[k] = weight[k] * (x[k] * factor);
}

EACH_CPU void add_to(float* sum, const float* x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) sum[k] += x[k];
}

EACH_CPU void silu_times(float* gate, const float* up, int64_t count) {
  for (int64_t k = 0; k < count; ++k) gate[k] = gate[k] / (1.0f + fast_exp(-gate[k])) * up[k];
}

void rotate(float* head, const float* cosines, const float* sines, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[half + i];
    head[i] = low * cosines[i] - high * sines[i];
    head[half + i] = high * cosines[half + i] + low * sines[half + i];
  }
}

class Step {
 public:
  Step(const Decoder& of, int64_t position, int threads) : of_(of), position_(position), threads_(threads) {}

  // False where a size does not fit.
  bool run(const float* embedding, float* logits) {
    const int64_t heads = of_.heads * of_.head_dim;
    x_.assign(embedding, embedding + of_.hidden);
    normed_.resize(of_.hidden), added_.resize(of_.hidden), query_.resize(heads), mixed_.resize(heads);
    key_.resize(of_.kv_heads * of_.head_dim), value_.resize(of_.kv_heads * of_.head_dim);
    gate_.resize(of_.intermediate), up_.resize(of_.intermediate);
    for (int64_t i = 0; i < of_.num_layers; ++i)
      if (!attention(of_.layers[i]) || !mlp(of_.layers[i])) return false;
    rms_norm(x_.data(), of_.norm, of_.hidden, of_.epsilon, normed_.data());
    return multiply(of_.head, normed_, logits);
  }

 private:
  bool multiply(const Weight& by, const std::vector<float>& x, float* y) {
    const auto* from = reinterpret_cast<const uint8_t*>(x.data());
    if (int64_t(x.size()) != by.columns) return false;
    if (castlm::multiply(by.packed, by.bytes, from, 0, 1, by.columns, reinterpret_cast<uint8_t*>(y), by.rows, threads_))
      return false;
    if (by.bias) add_to(y, by.bias, by.rows);
    return true;
  }
  bool multiply(const Weight& by, const std::vector<float>& x, std::vector<float>& y) {
    return by.rows == int64_t(y.size()) && multiply(by, x, y.data());
  }

  void place_heads(const DecoderLayer& layer, const float* norm, std::vector<float>& all) {
    const int64_t at = position_ * of_.head_dim;
    for (float* head = all.data(); head < all.data() + all.size(); head += of_.head_dim) {
      if (norm) rms_norm(head, norm, of_.head_dim, of_.epsilon, head);
      if (layer.cosines) rotate(head, layer.cosines + at, layer.sines + at, of_.head_dim);
    }
  }

  bool attention(const DecoderLayer& layer) {
    rms_norm(x_.data(), layer.attention_norm, of_.hidden, of_.epsilon, normed_.data());
    if (!multiply(layer.q, normed_, query_) || !multiply(layer.k, normed_, key_) || !multiply(layer.v, normed_, value_))
      return false;
    place_heads(layer, layer.q_norm, query_);
    place_heads(layer, layer.k_norm, key_);
    const int64_t width = of_.head_dim, stride = of_.capacity * width;
    const int64_t length = layer.window ? std::min(layer.window, position_ + 1) : position_ + 1;
    for (int64_t head = 0; head < of_.kv_heads; ++head) {
      std::copy_n(&key_[head * width], width, layer.keys + head * stride + position_ * width);
      std::copy_n(&value_[head * width], width, layer.values + head * stride + position_ * width);
    }
    const int64_t most = std::max<int64_t>(1, length * width * of_.kv_heads / kCachePerThread);
    const int64_t group = of_.heads / of_.kv_heads, parts = (group + kMostTogether - 1) / kMostTogether;
    in_parallel(of_.kv_heads * parts, 1, std::min<int64_t>(threads_, most), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t shared = i / parts, begin = i % parts * group / parts, end = (i % parts + 1) * group / parts;
        const int64_t at = (shared * group + begin) * width, from = shared * stride + (position_ + 1 - length) * width;
        attend_of(end - begin)(&query_[at], layer.keys + from, layer.values + from, length, width, of_.scale, &mixed_[at]);
      }
    });
    if (!multiply(layer.o, mixed_, added_)) return false;
    add_to(x_.data(), added_.data(), of_.hidden);
    return true;
  }

  bool mlp(const DecoderLayer& layer) {
    rms_norm(x_.data(), layer.mlp_norm, of_.hidden, of_.epsilon, normed_.data());
    if (!multiply(layer.gate, normed_, gate_) || !multiply(layer.up, normed_, up_)) return false;
    silu_times(gate_.data(), up_.data(), of_.intermediate);
    if (!multiply(layer.down, gate_, added_)) return false;
    add_to(x_.data(), added_.data(), of_.hidden);
    return true;
  }

  const Decoder& of_;
  const int64_t position_;
  const int threads_;
  std::vector<float> x_, normed_, added_, query_, key_, value_, mixed_, gate_, up_;
};

}  // namespace
}  // namespace castlm

extern "C" {

// The logits (head.rows,) of the token whose embedding is `embedding` (hidden,), at `position` after as many in the
// cache, which takes its keys and values.
int castlm_decode(const castlm::Decoder* of, const float* embedding, int64_t position, float* logits, int threads) {
  using namespace castlm;
  if (position < 0 || position >= of->capacity || of->kv_heads < 1 || of->heads % of->kv_heads || of->head_dim % 2)
    return kBadSize;
  return guarded([&] { return Step(*of, position, threads).run(embedding, logits) ? kOk : kBadSize; });
}
}
