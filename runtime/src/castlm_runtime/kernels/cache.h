// The cache of keys and values: blocks of 64 positions from one pool, in which a sequence is a list of blocks.
//
// A block has, for each layer and head, the keys of its positions, then their values, and of int8 a scale for each key and value.
// Lanes are positions while keys are read and dimensions while values are, so that no sum runs across lanes. What is summed
// lies side by side in a word of 32 bits: N = 1 number of fp32, 2 of bf16, or 4 of int8.
//
//   keys (width / N, 64 words)                          values (64 / N, width words)
//   word       0         1        ...   63              0         1        ...   width - 1
//   row 0      dims 0, 1 of position 0, 1, ..., 63      dims 0, 1, ... of positions 0 and 1
//   row 1      dims 2, 3 of position 0, 1, ..., 63      dims 0, 1, ... of positions 2 and 3            (bf16)
//
// `width` is the width of a head, filled up with zeros to a multiple of 16. A kernel of any instruction set reads the same blocks.
// Before the first position of a block is written its values are cleared (`clear_values`): what an older sequence left there would be
// multiplied by weights of zero, which do not cancel an infinite number.

#pragma once

#include <cmath>

#include "engine.h"
#include "matrix.h"

namespace castlm {

constexpr int64_t kWidestHead = 512;

struct CacheLayout {
  int64_t layers, heads, width;  // heads of keys and values; `width` is a multiple of 16
  CacheKind kind;

  int64_t bytes_of_number() const { return kind == kCacheBFloat16 ? 2 : kind == kCacheInt8 ? 1 : 4; }
  int64_t half_bytes() const { return kBlockTokens * width * bytes_of_number(); }  // of keys, or of values
  int64_t head_bytes() const { return 2 * half_bytes() + (kind == kCacheInt8 ? 2 * kBlockTokens * 4 : 0); }
  int64_t block_bytes() const { return layers * heads * head_bytes(); }
};

// The keys and values of one head and layer in the blocks of a sequence.
struct HeadBlocks {
  uint8_t* pool;  // of that head in block 0
  const int32_t* blocks;
  int64_t block_bytes, half_bytes, width;
  CacheKind kind;

  uint8_t* at(int64_t position) const { return pool + blocks[position / kBlockTokens] * block_bytes; }
};

// Rounds `count` numbers to int8 with the largest magnitude at 127, and returns the scale: NaN where a number is NaN or infinite.
INLINE float round_to_int8(const float* from, int64_t count, int8_t* to) {
  float most = 0, finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(from[i]);
    most = magnitude > most ? magnitude : most;
    finite += from[i] * 0.0f;
  }
  const float factor = most > 1e-30f ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = from[i] * factor;
    const float shifted = (std::fabs(scaled) < 127.5f ? scaled : 0.0f) + 12582912.0f;  // the low bits are the nearest integer
    to[i] = int8_t(int32_t(to_bits(shifted) & 0x7fffff) - 0x400000);
  }
  return most / 127.0f + finite;
}

// Clears the values of the block of a position, and what scales it has.
INLINE void clear_values(const HeadBlocks& of, int64_t position) {
  std::memset(of.at(position) + of.half_bytes, 0, of.half_bytes + (of.kind == kCacheInt8 ? 2 * kBlockTokens * 4 : 0));
}

// Writes the key and the value (width,) of a position.
template <class Number, int N, class Round>
INLINE void write_numbers(const HeadBlocks& of, int64_t position, const float* key, const float* value, Round round) {
  const int64_t at = position % kBlockTokens;
  auto* const keys = reinterpret_cast<Number*>(of.at(position));
  auto* const values = reinterpret_cast<Number*>(of.at(position) + of.half_bytes);
  Number* const to_keys = keys + at * N;
  Number* const to_values = values + at / N * of.width * N + at % N;
  for (int64_t i = 0; i < of.width; i += N)
    for (int j = 0; j < N; ++j) to_keys[i / N * kBlockTokens * N + j] = round(key[i + j]);
  for (int64_t i = 0; i < of.width; ++i) to_values[i * N] = round(value[i]);
}

INLINE void write_position(const HeadBlocks& of, int64_t position, const float* key, const float* value) {
  if (of.kind == kCacheFloat32)
    return write_numbers<float, 1>(of, position, key, value, [](float number) { return number; });
  if (of.kind == kCacheBFloat16) return write_numbers<uint16_t, 2>(of, position, key, value, float_to_bfloat16);
  int8_t narrow[2][kWidestHead];
  const float scales[2] = {round_to_int8(key, of.width, narrow[0]), round_to_int8(value, of.width, narrow[1])};
  const int64_t at = position % kBlockTokens;
  uint8_t *const keys = of.at(position), *const values = keys + of.half_bytes;
  auto* const to_scales = reinterpret_cast<float*>(values + of.half_bytes);
  to_scales[at] = scales[0], to_scales[kBlockTokens + at] = scales[1];
  for (int64_t i = 0; i < of.width; i += 4) std::memcpy(keys + (i / 4 * kBlockTokens + at) * 4, narrow[0] + i, 4);
  for (int64_t i = 0; i < of.width; ++i) values[(at / 4 * of.width + i) * 4 + at % 4] = uint8_t(narrow[1][i]);
}

}  // namespace castlm
