// What `decode.py` describes of a model and a sequence, so that one call computes the logits of one token of each sequence.
// Pointers belong to Python.

#pragma once

#include <cstdint>

#include "matrix.h"

namespace castlm {

struct Weight {
  const uint8_t* packed;  // as `castlm_multiply` takes it
  int64_t bytes, rows, columns;
  const float* bias;  // or null
};

struct DecoderLayer {
  Weight q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;
  const float *q_norm, *k_norm;  // (head_dim,), or null
  const float *cosines, *sines;  // (capacity, head_dim), or null without rotary embedding
  float *keys, *values;          // (kv_heads, capacity, head_dim)
  int64_t window;                // tokens that attention reads, the new one among them; 0 for all
};

struct Decoder {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, capacity;
  float epsilon, scale;
  const DecoderLayer* layers;
  const float* norm;
  Weight head;
};

// exp to within 2e-7 of its value, in operations that a compiler turns into vectors (cephes' expf).
INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;  // NaN stays
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
  const float whole = shifted - 12582912.0f;
  const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

// Attention of query heads (group, width) over the first `length` keys and values (length, width) that they share; writes
// (group, width). What it writes for a head does not depend on the other heads.
using Attend = void (*)(const float* queries, const float* keys, const float* values, int64_t length, int64_t width,
                        float scale, float* to);
constexpr int64_t kMostTogether = 4;  // heads whose sums fit in the registers
Attend old_attend_of(int64_t group);      // for 1 to kMostTogether heads

// Causal attention of the tokens of a prompt, for query heads that share keys and values. A token is `stride` floats after the
// one before in `queries` and `to`, where it has (group, width).
struct OldPrompt {
  const float* queries;
  const float *keys, *values;  // (start + tokens, width), those of the prompt's own tokens among them
  float* to;
  int64_t stride, group, width, start, window;  // `start` tokens came before; `window` as in DecoderLayer
  float scale;
  bool by_bf16;  // whether products may be of bf16: where the layers round their inputs to int8, which is coarser
};
constexpr int64_t kPromptTokens = 64;  // tokens that `old_attend_to_prompt` takes at most
// Attention of the tokens [first, first + count) of the prompt.
void old_attend_to_prompt(const OldPrompt&, int64_t first, int64_t count);
// The same by products of bf16, and whether this processor has them.
bool old_has_bf16_attention();
void old_attend_to_prompt_by_bf16(const OldPrompt&, int64_t first, int64_t count);

}  // namespace castlm
