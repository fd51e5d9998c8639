// Attention over the blocks of the cache: of one token, cut into parts of the context, and of the tokens of a prompt. Scores
// are in units of log2, so that a weight is a power of two: queries come multiplied by the scale and by log2(e).

#pragma once

#include "cache.h"

namespace castlm {

constexpr int64_t kPartTokens = 256;    // positions of a part: fixed, so that results do not depend on the number of threads
constexpr int64_t kPromptTokens = 64;   // tokens of a prompt that `AttendPrompt` takes at most
constexpr int64_t kPartRest = 16;       // floats after the sums of a part: the largest score, the total of the weights, and room

// One token's query heads that share keys and values, and the positions [first, last) that they read, of one part.
struct Part {
  HeadBlocks of;
  int64_t first, last, group;
  const float* queries;  // (group, width)
  float* to;             // (group, width + kPartRest): values summed by weights 2^(score - largest), the largest score, the total
  const uint8_t* next;   // a block that this thread reads after the part, which kernels may ask for meanwhile
};
using AttendPart = void (*)(const Part&);

// Causal attention of the tokens of a prompt, for query heads that share keys and values.
struct Prompt {
  HeadBlocks of;         // the keys and values of the prompt's own tokens among them
  const float* queries;  // of its first token (group, head_dim); a token is `stride` floats after the one before
  float* to;             // the same of its outputs
  int64_t stride, group, head_dim, start, window;  // `start` tokens came before; `window` as in LayerSpec
  float scale;           // of the queries, log2(e) included
};
// Attention of the tokens [first, first + count) of the prompt.
using AttendPrompt = void (*)(const Prompt&, int64_t first, int64_t count);

struct Attention {
  AttendPart part;
  AttendPrompt prompt;
};
Attention attention_of(CacheKind kind);  // of the level in use
// The same for processors with `vdpbf16ps` beside AVX-512, and whether this is one.
bool has_bf16_attention();
Attention bf16_attention();
void attend_part_of_int8(const Part& part);  // by products of bytes, with AVX-512
Attention attention_by_words(CacheKind kind);       // by products of 16 bits, with AVX2: of bf16 or int8

// Sums of parts of one head to its output (width,).
INLINE void combine_parts(const float* parts, int64_t count, int64_t stride, int64_t width, float* to) {
  float largest = parts[width], total = 0;
  for (int64_t p = 1; p < count; ++p) largest = parts[p * stride + width] > largest ? parts[p * stride + width] : largest;
  if (!(largest > -3e38f)) largest = -3e38f;
  std::fill_n(to, width, 0.0f);
  for (int64_t p = 0; p < count; ++p) {
    const float* const part = parts + p * stride;
    const float factor = part[width] == largest ? 1.0f : std::exp2(part[width] - largest);
    total += part[width + 1] * factor;
    for (int64_t i = 0; i < width; ++i) to[i] += part[i] * factor;
  }
  const float inverse = 1.0f / total;
  for (int64_t i = 0; i < width; ++i) to[i] *= inverse;
}

}  // namespace castlm
