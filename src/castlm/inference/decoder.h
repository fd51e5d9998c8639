// What `decode.py` describes of a model, so that one call computes the logits of one token. Pointers belong to Python.

#pragma once

#include <cstdint>

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
  float *keys, *values;          // (kv_heads, capacity, head_dim)
};

struct Decoder {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, capacity;
  float epsilon, scale;
  const DecoderLayer* layers;
  const float* norm;
  Weight head;
  const float *cosines, *sines;  // (capacity, head_dim)
};

}  // namespace castlm
