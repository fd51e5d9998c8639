// The kernels for many rows of x on processors with AMX, whose tiles multiply 16 rows by 16 rows at once. The weights of 32 rows
// by up to 1,024 columns are expanded from kLanes into tiles, which stay in the cache while all of x
// passes. bf16 weights are exact; an fp32 activation becomes the sum of two bf16 numbers, which keep 17 of its 24 bits, and one
// in bf16 stays as it is. Integers are multiplied as int8 and summed in fp32 block by block, as the other kernels do.

#include "avx512.h"

#if defined(CASTLM_AVX512) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "plain.h"

BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi2,amx-tile,amx-bf16,amx-int8")

namespace castlm {
namespace {

constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes
constexpr int64_t kMostBlocks = 16;   // blocks of 64 columns whose products are summed in one pass over x
constexpr int64_t kPassBytes = 9 << 17;  // of x in a pass, which stay in a second-level cache of 2 MiB

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kShapes;

// The tile instructions of some compilers do not say which memory they read.
INLINE void all_stored() { __asm__ volatile("" ::: "memory"); }

#include "lanes_avx512.h"

#include "tiles_amx.h"

// ---- products of tiles

// A times 16 rows of x, whose tiles are `x_stride` bytes apart, and 32 rows of the matrix, added to y.
template <int A, int parts>
INLINE void add_floats(const uint8_t* x, int64_t x_stride, const uint8_t* w, int64_t steps, float* y, int64_t ldy,
                       bool is_first) {
  const int64_t y_stride = ldy * int64_t(sizeof(float)), w_stride = steps * kTileBytes;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (A == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, y, y_stride);
    _tile_loadd(1, y + 16, y_stride);
    if constexpr (A == 2) {
      _tile_loadd(2, y + 16 * ldy, y_stride);
      _tile_loadd(3, y + 16 * ldy + 16, y_stride);
    }
  }
  for (int64_t k = 0; k < steps; k++, w += kTileBytes) {
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + w_stride, 64);
    for (int part = 0; part < parts; part++, x += kTileBytes) {
      _tile_loadd(4, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (A == 2) {
        _tile_loadd(5, x + x_stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, y, y_stride);
  _tile_stored(1, y + 16, y_stride);
  if constexpr (A == 2) {
    _tile_stored(2, y + 16 * ldy, y_stride);
    _tile_stored(3, y + 16 * ldy + 16, y_stride);
  }
}

// 16 rows of x and 16 rows of the matrix, added to y. `scales` of x are (16, ld_scales), `w_scales` of int4 and int6 (steps, 32).
template <bool has_scales>
INLINE void add_integers(const uint8_t* x, const float* scales, int64_t ld_scales, const uint8_t* w, const float* w_scales,
                         int64_t steps, float* y, int64_t ldy, bool is_first) {
  alignas(64) int32_t products[2][16][16];
  __m512 sums[16];
#pragma GCC unroll 16
  for (int b = 0; b < 16; b++) sums[b] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + b * ldy);
  const auto add = [&](const int32_t (*of)[16], int64_t k) {
    const __m512 row_scales = has_scales ? _mm512_loadu_ps(w_scales + 32 * k) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int b = 0; b < 16; b++) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(of[b])), scale = _mm512_set1_ps(scales[b * ld_scales + k]);
      sums[b] = _mm512_fmadd_ps(has_scales ? _mm512_mul_ps(whole, row_scales) : whole, scale, sums[b]);
    }
  };
  for (int64_t k = 0; k < steps; k += 2) {
    _tile_zero(0);
    _tile_loadd(4, x + k * kTileBytes, 64);
    _tile_loadd(6, w + k * kTileBytes, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, products[0], 64);
    if (k + 1 < steps) {
      _tile_zero(1);
      _tile_loadd(5, x + (k + 1) * kTileBytes, 64);
      _tile_loadd(7, w + (k + 1) * kTileBytes, 64);
      _tile_dpbssd(1, 5, 7);
      _tile_stored(1, products[1], 64);
    }
    all_stored();
    add(products[0], k);
    if (k + 1 < steps) add(products[1], k + 1);
  }
#pragma GCC unroll 16
  for (int b = 0; b < 16; b++) _mm512_storeu_ps(y + b * ldy, sums[b]);
}

template <int values, int parts>
INLINE void multiply_rows(const Header& of, const Activations& x, const uint8_t* w, const float* w_scales, int64_t block,
                          int64_t blocks, float* y, int64_t ldy) {
  constexpr int kTiles = values == kBFloat16 ? 2 : 1;  // in a block
  const int64_t x_stride = of.blocks() * kTiles * parts * kTileBytes;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(x.narrow) + block * kTiles * parts * kTileBytes;
  if constexpr (values == kBFloat16) {
    int64_t b = 0;
    for (; b + 32 <= x.batch; b += 32)
      add_floats<2, parts>(at + b / 16 * x_stride, x_stride, w, 2 * blocks, y + b * ldy, ldy, block == 0);
    if (b < x.batch) add_floats<1, parts>(at + b / 16 * x_stride, x_stride, w, 2 * blocks, y + b * ldy, ldy, block == 0);
  } else {
    for (int64_t b = 0; b < x.batch; b += 16)
      for (int half = 0; half < 2; half++)
        add_integers<in_nibbles(values)>(at + b / 16 * x_stride, x.scales + b * of.blocks() + block, of.blocks(),
                                      w + half * blocks * kTileBytes, w_scales + 16 * half, blocks, y + b * ldy + 16 * half,
                                      ldy, block == 0);
  }
}

template <Kept kept, int values, int parts>
void multiply_tiles(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  alignas(64) uint8_t w[2 * kMostBlocks * (values == kBFloat16 ? 2 : 1) * kTileBytes];
  alignas(64) float w_scales[kMostBlocks * 32];
  _tile_loadconfig(&kShapes);
  const int64_t block_bytes = x.batch * kBlock * (values == kBFloat16 ? 2 * parts : 1);
  const int64_t fit = std::min(kMostBlocks, std::max<int64_t>(1, kPassBytes / block_bytes));
  const int64_t passes = (of.blocks() + fit - 1) / fit, most = (of.blocks() + passes - 1) / passes;
  for (int64_t block = 0; block < of.blocks(); block += most) {
    const int64_t blocks = std::min(most, of.blocks() - block);
    for (int64_t row = 16 * first; row < 16 * last; row += 32) {
      expand<values, kept>(of, data, row, block, blocks, w, w_scales);
      all_stored();
      multiply_rows<values, parts>(of, x, w, w_scales, block, blocks, y + row, ldy);
    }
  }
  _tile_release();
  if (values != kInt8) return;
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * of.blocks() * of.panel_bytes());
  for (int64_t b = 0; b < x.batch; b++)
    for (int64_t row = 16 * first; row < std::min(16 * last, of.rows); row++) y[b * ldy + row] *= row_scales[row];
}

template <int values, int parts>
void multiply_pattern(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  if constexpr (values == kBFloat16)
    if (of.in_pairs()) return multiply_tiles<kPairs, values, parts>(of, data, x, y, ldy, first, last);
  if (of.m) return multiply_tiles<kMasked, values, parts>(of, data, x, y, ldy, first, last);
  return multiply_tiles<kWhole, values, parts>(of, data, x, y, ldy, first, last);
}

// What 16 floats have beyond themselves as bf16; nothing where they became infinite.
INLINE __m512 rest(__m512 of, __m256i rounded) {
  const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  constexpr int kInfinite = 0x18;
  return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(wide, kInfinite)), of, wide);
}

// Linux asks each process to request the tiles before it uses them.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx() {
  static const bool has = has_avx512() && [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt = 1u << 25, kAvx512Bf16 = 1u << 5;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (~edx & (kBf16 | kTile | kInt))) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kAvx512Bf16)) return false;
    return may_use_tiles();
  }();
  return has;
}

namespace {

// Many rows of x as tiles of 16 rows by 64 bytes, a row of tiles after the other: 32 bf16 or 64 int8. fp32 takes `parts` = 2
// tiles: its bf16, and the rest that bf16 leaves of it.
template <int parts>
Activations floats_in_tiles(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  for (int64_t b = first; b < last; b++) {
    uint8_t* to = room + b / 16 * (of.padded() / 32) * parts * kTileBytes + 64 * (b % 16);
    for (int64_t column = 0; column < of.padded(); column += 32, to += parts * kTileBytes) {
      const float* from = x + b * of.padded() + column;
      const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
      const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(to, bits);
      if (parts == 1) continue;
      const __m512 low_rest = rest(low, _mm512_castsi512_si256(bits));
      const __m512 high_rest = rest(high, _mm512_extracti64x4_epi64(bits, 1));
      _mm512_storeu_si512(to + kTileBytes, (__m512i)_mm512_cvtne2ps_pbh(high_rest, low_rest));
    }
  }
  return {x, reinterpret_cast<int8_t*>(room), nullptr, nullptr, rows};
}

Activations integers_in_tiles(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  const int64_t blocks = of.blocks();
  auto* const tiles = reinterpret_cast<int8_t*>(room);
  auto* const scales = reinterpret_cast<float*>(tiles + rows * blocks * kBlock);
  for (int64_t b = first; b < last; b++)
    for (int64_t i = 0; i < blocks; i++) {
      int8_t* const to = tiles + ((b / 16 * blocks + i) * 16 + b % 16) * kBlock;
      _mm512_store_si512(to, rounded(x + b * of.padded() + i * kBlock, scales + b * blocks + i));
    }
  return {x, tiles, scales, nullptr, rows};
}

}  // namespace

Kernel amx_tiles(const Header& of, int64_t, bool is_bfloat16) {
  Kernel kernel{integers_in_tiles, multiply_pattern<kInt8, 1>, 16, 2, 32};
  if (of.values == kInt4) kernel.multiply = multiply_pattern<kInt4, 1>;
  if (of.values == kInt6) kernel.multiply = multiply_tiles<kWhole, kInt6, 1>;
  if (of.values == kBFloat16) {
    kernel.form = is_bfloat16 ? floats_in_tiles<1> : floats_in_tiles<2>;
    kernel.multiply = is_bfloat16 ? multiply_pattern<kBFloat16, 1> : multiply_pattern<kBFloat16, 2>;
  }
  return kernel;
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_amx() { return false; }
Kernel amx_tiles(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
