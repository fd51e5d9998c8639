// The plain path, which takes any pattern and any processor, and the scratch memory that it shares with the entry points.

#pragma once

#include <vector>

#include "table.h"

namespace castlm {

constexpr int kScratchSlots = 4;
constexpr size_t kLargeScratch = 2 << 20;  // bytes; many rows of x need more, one row does not

inline std::vector<uint8_t>& scratch_of_thread(int slot) {
  static thread_local std::vector<uint8_t> buffers[kScratchSlots];
  return buffers[slot];
}

// A buffer of this thread that is kept from call to call, aligned to a cache line. Its content is lost when it grows.
template <int slot>
void* scratch(int64_t bytes) {
  static_assert(slot < kScratchSlots, "there is no such slot");
  std::vector<uint8_t>& buffer = scratch_of_thread(slot);
  if (int64_t(buffer.size()) < bytes + 64) {
    std::vector<uint8_t>().swap(buffer);
    buffer.resize(bytes + 64);
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}

// Frees the memory of a prompt, which the tokens after it do not need.
inline void release_large_scratch() {
  for (int slot = 0; slot < kScratchSlots; ++slot)
    if (scratch_of_thread(slot).size() > kLargeScratch) std::vector<uint8_t>().swap(scratch_of_thread(slot));
}

// Value `index` of a row of a file as fp32, without its scale.
float load_value(const uint8_t* row, int32_t values, int64_t index);
// Row `row` of a matrix as fp32 in `to`, `padded()` long, in any layout but kLanes.
void expand_row(const Header& of, const uint8_t* data, int64_t row, float* to);
// Row `row` of a matrix as fp32 in `to`, `padded()` long, in any layout.
void gather_row(const Header& of, const uint8_t* data, int64_t row, float* to);
// The 16 rows of a tile of kLanes as fp32, `ld` apart and `padded()` long each.
void expand_lanes(const Header& of, const uint8_t* data, int64_t tile, float* to, int64_t ld);
// x as it is, for kernels of floats.
inline Activations as_floats(const Header&, const float* x, int64_t rows, int64_t, int64_t, uint8_t*) { return {x, nullptr, nullptr, nullptr, rows}; }
// As `avx2_integers`.
Activations plain_integers(const Header&, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room);

// x as int8 with a scale for each block, row by row. `quantize(x, columns, narrow, scales)` rounds a row.
template <class Quantize>
Activations as_integers(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room, Quantize quantize) {
  const int64_t width = of.padded(), blocks = of.blocks();
  auto* narrow = reinterpret_cast<int8_t*>(room);
  auto* scales = reinterpret_cast<float*>(narrow + rows * width);
  for (int64_t b = first; b < last; ++b) quantize(x + b * width, width, narrow + b * width, scales + b * blocks);
  return {x, narrow, scales, nullptr, rows};
}

}  // namespace castlm
