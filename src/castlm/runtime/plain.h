// The plain path, which takes any pattern and any processor, and the scratch memory that it shares with the entry points.

#pragma once

#include <vector>

#include "matrix.h"

namespace castlm {

constexpr int kScratchSlots = 5;
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
// The 16 rows of a tile of kLanes as fp32, `ld` apart and `padded()` long each.
void expand_lanes(const Header& of, const uint8_t* data, int64_t tile, float* to, int64_t ld);
// As `Multiply`: weights become fp32, a row or the rows of a tile at a time, in any layout.
void plain_multiply(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                    int64_t last);
// As `avx2_quantize`.
void plain_quantize(const float* x, int64_t width, int8_t* narrow, float* scales);

}  // namespace castlm
