// The engine: a model whose weights are packed, a cache of keys and values in blocks, and one call that runs the new tokens of
// many sequences through both. The structs are what Python fills by ctypes, as `castlm_describe` describes them.
//
// Python keeps every buffer that a `ModelSpec` points to while the model lives; the spec and its arrays of layers and experts are copied.

#pragma once

#include <cstdint>

namespace castlm {

constexpr int64_t kBlockTokens = 64;  // positions of a block of the cache

// A packed weight (rows, columns), as `castlm_repack` fills its buffer.
struct WeightRef {
  const void* packed;
  int64_t bytes, rows, columns;
  const float* bias;  // (rows,), or null
};

// One expert of a block. Without a gate, it is down(activation(up(n))).
struct ExpertSpec {
  WeightRef gate, up, down;
};

// One transformer block. A pointer may be null where a family lacks the part. Norms are RMS norms, or layer norms, which are twice as
// long: weights, then biases. Where a family adds 1 to their weights (Gemma), Python has added it.
//
//   h = x + residual_scale * post_attention_norm(o(attention(attention_norm(x))))
//   y = h + residual_scale * post_mlp_norm(mlp(mlp_norm(h))),   mlp(n) = down(activation(gate(n)) * up(n))
//
// A parallel block has no norms after its parts, and its MLP reads x: y = x + attention's part + mlp(mlp_norm(x)).
//
// In a block with experts, the router's softmax over all experts chooses `experts_per_token` of them for each token:
//
//   mlp(n) = sum of p_e * expert_e(n) over the chosen e,   p = softmax(router(n)), with `normalizes_experts` divided by the sum of the chosen
struct LayerSpec {
  WeightRef q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;            // (hidden,), or null: no norm before
  const float *q_norm, *k_norm;                      // (head_dim,) or, with `wide_head_norms`, (heads * head_dim,); or null
  const float *post_attention_norm, *post_mlp_norm;  // (hidden,), or null
  const float *cosines, *sines;                      // (max_positions, rotary_dim / 2), or null: no rotary embedding
  int64_t window;                                    // positions that attention reads, the token's own among them; 0 for all
  WeightRef router;                                  // (num_experts, hidden)
  const ExpertSpec* experts;                         // (num_experts,); null: every token takes gate, up and down
};

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

struct ModelSpec {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, max_positions;
  int64_t rotary_dim;        // of a head, from its first dimension on: i turns with i + rotary_dim / 2; the others stay
  int64_t num_experts, experts_per_token, expert_intermediate;  // 0 without experts
  int32_t activation;        // an `Activation`
  int32_t wide_head_norms;   // whether q_norm and k_norm run over all heads together (OLMo 2)
  int32_t layer_norms;       // whether the other norms are layer norms
  int32_t is_parallel;       // whether blocks are parallel
  int32_t normalizes_experts;
  float epsilon;             // of the norms
  float attention_scale;     // of the products of queries and keys
  float embedding_scale, residual_scale, logit_scale;  // 1 in most families
  float logit_cap;           // logits become cap * tanh(logits / cap); 0 for none
  const LayerSpec* layers;
  const float* norm;         // (hidden,)
  WeightRef head;            // (vocabulary, hidden)
  WeightRef embedding;       // (vocabulary, hidden); the same buffer as the head where they are tied
};

// What the cache keeps of a key and a value. int8 has a scale for each position and head.
enum CacheKind : int32_t { kCacheBFloat16 = 0, kCacheInt8 = 1, kCacheFloat32 = 2 };

// The new tokens of one sequence in a pass: part of a prompt, or one token.
struct Sequence {
  const int32_t* tokens;  // (count,)
  int64_t count;
  int64_t position;       // tokens before them, whose keys and values are in the blocks
  const int32_t* blocks;  // the numbers of the blocks of positions 0 to position + count - 1, ceil((position + count) / 64) of them
  float* logits;          // (vocabulary,) after the last token; with `all_logits` (count, vocabulary); null: not wanted, as in the
                          // middle of a prompt, which spares the output head
  int64_t all_logits;
};

}  // namespace castlm
