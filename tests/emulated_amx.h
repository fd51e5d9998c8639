// The tile instructions of AMX in plain C++, for processors with AVX-512 and BF16 alone: test_kernel_levels.py compiles the
// kernels with this header before each file.

#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
};
inline Tile* tiles() {
  static thread_local Tile all[8];
  return all;
}
inline void load(int tile, const void* from, int64_t stride) {
  for (int k = 0; k < 16; k++) std::memcpy(tiles()[tile].bytes[k], static_cast<const uint8_t*>(from) + k * stride, 64);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int k = 0; k < 16; k++) std::memcpy(static_cast<uint8_t*>(to) + k * stride, tiles()[tile].bytes[k], 64);
}
inline void zero(int tile) { std::memset(tiles()[tile].bytes, 0, 1024); }

// Adds the products of rows of `a` with words of `b`: T (4 int8, or 2 bf16 as uint16) to Sum.
template <class T, class Sum, class Product>
void add_products(int to, int a, int b, Product product) {
  constexpr int kTogether = 4 / sizeof(T);
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      Sum sum;
      std::memcpy(&sum, tiles()[to].bytes[m] + 4 * n, 4);
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < kTogether; i++) {
          T x, w;
          std::memcpy(&x, tiles()[a].bytes[m] + 4 * k + sizeof(T) * i, sizeof(T));
          std::memcpy(&w, tiles()[b].bytes[k] + 4 * n + sizeof(T) * i, sizeof(T));
          sum += product(x, w);
        }
      std::memcpy(tiles()[to].bytes[m] + 4 * n, &sum, 4);
    }
}
inline float widened(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline void add_bytes(int to, int a, int b) {
  add_products<int8_t, int32_t>(to, a, b, [](int8_t x, int8_t w) { return int32_t(x) * w; });
}
inline void add_bfloat16(int to, int a, int b) {
  add_products<uint16_t, float>(to, a, b, [](uint16_t x, uint16_t w) { return widened(x) * widened(w); });
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbssd(to, a, b) emulated::add_bytes(to, a, b)
#define _tile_dpbf16ps(to, a, b) emulated::add_bfloat16(to, a, b)
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(d) = ~0u, 1)  // the processor has it
#define syscall(...) 0                                                           // and Linux lets us use it
#endif
