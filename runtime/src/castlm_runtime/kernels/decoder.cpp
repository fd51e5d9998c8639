// One token of one or more sequences, or tokens of a prompt, through a decoder with packed weights: RMS norms, rotary
// embedding, attention over a cache, gated MLP, output head. Between the layers of a small model, Python takes longer than
// the multiplications do; here nothing comes between.

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "team.h"

namespace castlm {
namespace {

constexpr int64_t kCachePerThread = 1 << 16;  // elements of keys; fewer are read sooner than a thread wakes
constexpr int64_t kTokensPerThread = 16;      // tokens whose norms and products by elements a thread takes at a time

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

// One token of each of `count` sequences of one model, each with its own cache, or `count` tokens of a prompt, which name one
// sequence: a weight is read once for all of them.
//
//   x, normed, added   (count, hidden)          query, mixed   (count, heads * head_dim)
//   gate, up           (count, intermediate)    key, value     (count, kv_heads * head_dim)
class Step {
 public:
  Step(const Decoder* const* sequences, const int64_t* positions, int64_t count, bool is_prompt, int threads)
      : of_(*sequences[0]),
        sequences_(sequences),
        positions_(positions),
        count_(count),
        is_prompt_(is_prompt),
        threads_(threads) {}

  // Writes logits for each sequence, or for the last token of a prompt. False where a size does not fit.
  bool run(const float* embeddings, float* logits) {
    const int64_t heads = count_ * of_.heads * of_.head_dim, kv_heads = count_ * of_.kv_heads * of_.head_dim;
    x_.assign(embeddings, embeddings + count_ * of_.hidden);
    normed_.resize(x_.size()), added_.resize(x_.size()), query_.resize(heads), mixed_.resize(heads);
    key_.resize(kv_heads), value_.resize(kv_heads);
    gate_.resize(count_ * of_.intermediate), up_.resize(count_ * of_.intermediate);
    for (int64_t i = 0; i < of_.num_layers; ++i)
      if (!attention(i) || !mlp(of_.layers[i])) return false;
    norm_all(of_.norm);
    const int64_t asked = is_prompt_ ? 1 : count_;
    const float* last = normed_.data() + (count_ - asked) * of_.hidden;
    return multiply({{of_.head, logits, asked * of_.head.rows}}, last, asked * of_.hidden, asked);
  }

 private:
  struct Output {
    const Weight& by;
    float* y;
    int64_t size;  // of y
  };
  static Output in(std::vector<float>& y, const Weight& by) { return {by, y.data(), int64_t(y.size())}; }

  // The outputs y (count, by.rows) of x, which has `size` floats. x is prepared once for weights that are stored alike.
  bool multiply(std::initializer_list<Output> outputs, const float* x, int64_t size, int64_t count) {
    products_.clear();
    const int64_t columns = outputs.begin()->by.columns;
    for (const Output& of : outputs) {
      if (of.by.columns != columns || size != count * columns || of.size != count * of.by.rows) return false;
      products_.push_back({of.by.packed, of.by.bytes, reinterpret_cast<uint8_t*>(of.y), of.by.rows});
    }
    const auto* from = reinterpret_cast<const uint8_t*>(x);
    if (castlm::multiply(products_.data(), int64_t(products_.size()), from, 0, count, columns, threads_)) return false;
    for (const Output& of : outputs)
      for (int64_t s = 0; of.by.bias && s < count; ++s) add_to(of.y + s * of.by.rows, of.by.bias, of.by.rows);
    return true;
  }
  bool multiply(std::initializer_list<Output> outputs, const std::vector<float>& x) {
    return multiply(outputs, x.data(), int64_t(x.size()), count_);
  }

  // Calls work(first, last) for parts of the tokens.
  template <class Work>
  void for_tokens(Work work) {
    in_parallel(count_, kTokensPerThread, threads_, work);
  }

  void norm_all(const float* weight) {
    for_tokens([&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t at = s * of_.hidden;
        rms_norm(&x_[at], weight, of_.hidden, of_.epsilon, &normed_[at]);
      }
    });
  }

  // Norm and rotary embedding of the `heads` heads (count, heads, head_dim) that each sequence has.
  void place_heads(int64_t index, int64_t heads, bool is_key, std::vector<float>& all) {
    for_tokens([&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const DecoderLayer& layer = sequences_[s]->layers[index];
        const int64_t at = positions_[s] * of_.head_dim;
        const float* norm = is_key ? layer.k_norm : layer.q_norm;
        for (int64_t h = 0; h < heads; ++h) {
          float* head = &all[(s * heads + h) * of_.head_dim];
          if (norm) rms_norm(head, norm, of_.head_dim, of_.epsilon, head);
          if (layer.cosines) rotate(head, layer.cosines + at, layer.sines + at, of_.head_dim);
        }
      }
    });
  }

  bool attention(int64_t index) {
    const DecoderLayer& shared = of_.layers[index];
    norm_all(shared.attention_norm);
    if (!multiply({in(query_, shared.q), in(key_, shared.k), in(value_, shared.v)}, normed_)) return false;
    place_heads(index, of_.heads, false, query_);
    place_heads(index, of_.kv_heads, true, key_);
    for (int64_t s = 0; s < count_; ++s) remember(index, s);
    if (is_prompt_) attend_all(shared);
    else for (int64_t s = 0; s < count_; ++s) attend(index, s);
    if (!multiply({in(added_, shared.o)}, mixed_)) return false;
    add_to(x_.data(), added_.data(), int64_t(x_.size()));
    return true;
  }

  // Puts a token's key and value into the cache of its sequence.
  void remember(int64_t index, int64_t s) {
    const DecoderLayer& layer = sequences_[s]->layers[index];
    const int64_t width = of_.head_dim, stride = sequences_[s]->capacity * width;
    const float *key = &key_[s * of_.kv_heads * width], *value = &value_[s * of_.kv_heads * width];
    for (int64_t head = 0; head < of_.kv_heads; ++head) {
      std::copy_n(key + head * width, width, layer.keys + head * stride + positions_[s] * width);
      std::copy_n(value + head * width, width, layer.values + head * stride + positions_[s] * width);
    }
  }

  void attend_all(const DecoderLayer& layer) {
    const int64_t width = of_.head_dim, group = of_.heads / of_.kv_heads;
    const int64_t parts = (count_ + kPromptTokens - 1) / kPromptTokens;
    const bool by_bf16 = has_integers(layer.q.packed);
    in_parallel(of_.kv_heads * parts, 1, threads_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = i / parts, token = i % parts * kPromptTokens, from = head * of_.capacity * width;
        const int64_t at = head * group * width;
        old_attend_to_prompt({&query_[at], layer.keys + from, layer.values + from, &mixed_[at], of_.heads * width, group, width,
                          positions_[0], layer.window, of_.scale, by_bf16},
                         token, std::min(kPromptTokens, count_ - token));
      }
    });
  }

  void attend(int64_t index, int64_t s) {
    const DecoderLayer& layer = sequences_[s]->layers[index];
    const int64_t width = of_.head_dim, stride = sequences_[s]->capacity * width, position = positions_[s];
    const int64_t length = layer.window ? std::min(layer.window, position + 1) : position + 1;
    const float* query = &query_[s * of_.heads * width];
    float* mixed = &mixed_[s * of_.heads * width];
    const int64_t most = std::max<int64_t>(1, length * width * of_.kv_heads / kCachePerThread);
    const int64_t group = of_.heads / of_.kv_heads, parts = (group + kMostTogether - 1) / kMostTogether;
    in_parallel(of_.kv_heads * parts, 1, std::min<int64_t>(threads_, most), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t kv_head = i / parts, begin = i % parts * group / parts, end = (i % parts + 1) * group / parts;
        const int64_t at = (kv_head * group + begin) * width, from = kv_head * stride + (position + 1 - length) * width;
        old_attend_of(end - begin)(query + at, layer.keys + from, layer.values + from, length, width, of_.scale, mixed + at);
      }
    });
  }

  bool mlp(const DecoderLayer& layer) {
    norm_all(layer.mlp_norm);
    if (!multiply({in(gate_, layer.gate), in(up_, layer.up)}, normed_)) return false;
    for_tokens([&](int64_t first, int64_t last) {
      silu_times(&gate_[first * of_.intermediate], &up_[first * of_.intermediate], (last - first) * of_.intermediate);
    });
    if (!multiply({in(added_, layer.down)}, gate_)) return false;
    add_to(x_.data(), added_.data(), int64_t(x_.size()));
    return true;
  }

  const Decoder& of_;  // what the sequences share: weights and sizes
  const Decoder* const* sequences_;
  const int64_t* positions_;
  const int64_t count_;
  const bool is_prompt_;
  const int threads_;
  std::vector<Product> products_;
  std::vector<float> x_, normed_, added_, query_, key_, value_, mixed_, gate_, up_;
};

}  // namespace
}  // namespace castlm

namespace {

bool fits(const castlm::Decoder& of, int64_t position, int64_t count) {
  return position >= 0 && position < of.capacity && count >= 1 && count <= of.capacity - position && of.kv_heads >= 1 &&
         of.heads % of.kv_heads == 0 && of.head_dim % 2 == 0;
}

}  // namespace

extern "C" {

// The logits (count, head.rows) of one token of each sequence, whose embeddings are (count, hidden), at `positions` after
// as many in the sequence's cache, which takes their keys and values. The sequences are of one model.
int castlm_decode(const castlm::Decoder* const* sequences, const int64_t* positions, int64_t count,
                  const float* embeddings, float* logits, int threads) {
  using namespace castlm;
  if (count < 1) return kBadSize;
  for (int64_t s = 0; s < count; ++s)
    if (!fits(*sequences[s], positions[s], 1)) return kBadSize;
  return guarded([&] {
    return Step(sequences, positions, count, false, threads).run(embeddings, logits) ? kOk : kBadSize;
  });
}

// The logits (head.rows,) of the last of `count` tokens of a prompt, whose embeddings are (count, hidden), after `position`
// tokens in the cache, which takes their keys and values.
int castlm_read_prompt(const castlm::Decoder* of, int64_t position, int64_t count, const float* embeddings, float* logits,
                       int threads) {
  using namespace castlm;
  if (!fits(*of, position, count)) return kBadSize;
  return guarded([&] {
    const std::vector<const Decoder*> sequences(count, of);
    std::vector<int64_t> positions(count);
    for (int64_t i = 0; i < count; ++i) positions[i] = position + i;
    return Step(sequences.data(), positions.data(), count, true, threads).run(embeddings, logits) ? kOk : kBadSize;
  });
}
}
