// The kernels for 64-bit ARM, over the same panels and dense blocks as the AVX2 ones: a table look-up of 16 bytes permutes x
// as `vpermilps` and `vpshufb` do. They were compared with the plain path under emulation, and never timed.

#include "plain.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

namespace castlm {
namespace {

// Four weights that follow each other.
template <int values>
INLINE float32x4_t load_four(const uint8_t* at) {
  if (values == kFloat32) return vld1q_f32(reinterpret_cast<const float*>(at));
  const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(at));
  if (values == kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

// Lanes [4 q, 4 q + 4) of a step and half of a panel: see `place_in_panel`.
template <int values>
INLINE float32x4_t load_step(const uint8_t* panel, int step, int half, int q) {
  if (values == kBFloat16) {
    const uint32x4_t both = vld1q_u32(reinterpret_cast<const uint32_t*>(panel + 32 + 32 * step + 16 * q));
    return vreinterpretq_f32_u32(half ? vandq_u32(both, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(both, 16));
  }
  constexpr int kBytes = values == kFloat32 ? 4 : 2;
  return load_four<values>(panel + 32 + kBytes * (16 * (step / 2 * 2 + half) + 8 * (step % 2) + 4 * q));
}

// ---- 2:4 and 1:4: `sums[half * BT + b]` has the rows of a half in its lanes

template <int values, int BT>
INLINE void panels_of_floats(const uint8_t* panel, int64_t blocks, const float* x, int64_t ldx, float32x4_t* sums) {
  constexpr int kBytes = 32 + (values == kFloat32 ? 512 : 256);
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock)
    for (int q = 0; q < 2; q++) {
      const uint32x4_t meta = vld1q_u32(reinterpret_cast<const uint32_t*>(panel + 16 * q));
      for (int step = 0; step < 8; step++)
        for (int half = 0; half < 2; half++) {
          const uint32x4_t column = vandq_u32(vshlq_u32(meta, vdupq_n_s32(-2 * step - 16 * half)), vdupq_n_u32(3));
          const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), column, vdupq_n_u32(0x04040404));
          const float32x4_t w = load_step<values>(panel, step, half, q);
          for (int b = 0; b < BT; b++) {
            const float32x4_t v = vld1q_f32(x + b * ldx + 8 * step + 4 * q);
            const uint8x16_t taken = vqtbl1q_u8(vreinterpretq_u8_f32(v), vreinterpretq_u8_u32(bytes));
            sums[half * BT + b] = vfmaq_f32(sums[half * BT + b], w, vreinterpretq_f32_u8(taken));
          }
        }
    }
}

// Products of 16 bytes, summed in fours.
INLINE int32x4_t dot_bytes(int8x16_t w, int8x16_t x) {
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  return vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(w, x)));
}

// Of 16 bytes of int4, the low or the high halves.
INLINE int8x16_t load_int4(const uint8_t* at, bool high) {
  const uint8x16_t both = vld1q_u8(at);
  const uint8x16_t halves = high ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
  return vsubq_s8(vreinterpretq_s8_u8(halves), vdupq_n_s8(8));
}

INLINE float short_scale(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bfloat16_to_float(bits);
}

template <int n, bool is_int4, int BT>
INLINE void panels_of_integers(const uint8_t* panel, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                               int64_t ld_scales, float32x4_t* sums) {
  constexpr int kBytes = is_int4 ? 32 + 64 + 16 / n : 160;
  const uint8x16_t group = vreinterpretq_u8_u64(vdupq_n_u64(n == 2 ? 0x0c0c080804040000 : 0x0c0804000c080400));
  for (int64_t i = 0; i < blocks; i++, panel += kBytes, x += kBlock, scales++)
    for (int half = 0; half < 2; half++) {
      int32x4_t products[BT];
      for (int b = 0; b < BT; b++) products[b] = vdupq_n_s32(0);
      for (int c = 0; c < 2; c++)
        for (int q = 0; q < 2; q++) {
          const uint8x16_t meta = vshlq_u8(vld1q_u8(panel + 16 * q), vdupq_n_s8(-2 * (2 * half + c)));
          const uint8x16_t control = vorrq_u8(vandq_u8(meta, vdupq_n_u8(3)), group);
          const uint8_t* at = panel + 32 + 16 * q;
          const int8x16_t w = is_int4 ? load_int4(at + 32 * half, c)
                                      : vld1q_s8(reinterpret_cast<const int8_t*>(at + 32 * (2 * half + c)));
          for (int b = 0; b < BT; b++) {
            const int8x16_t taken = vqtbl1q_s8(vld1q_s8(x + b * ldx + 32 * c + 16 * q), control);
            products[b] = vaddq_s32(products[b], dot_bytes(w, taken));
          }
        }
      float32x4_t w_scales = vdupq_n_f32(1.0f);
      if (is_int4) {
        const float32x4_t rows = load_four<kBFloat16>(panel + 96 + (n == 1 ? 8 * half : 0));
        w_scales = n == 1 ? rows : half ? vzip2q_f32(rows, rows) : vzip1q_f32(rows, rows);
      }
      for (int b = 0; b < BT; b++) {
        const float32x4_t scale = vmulq_n_f32(w_scales, scales[b * ld_scales]);
        sums[half * BT + b] = vfmaq_f32(sums[half * BT + b], vcvtq_f32_s32(products[b]), scale);
      }
    }
}

// ---- four dense rows in blocks of 64 columns: `sums[row * BT + b]`

template <int values, int BT>
INLINE void dense_floats(const uint8_t* row, int64_t blocks, const float* x, int64_t ldx, float32x4_t* sums) {
  constexpr int kBytes = values == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < blocks; i++, row += 4 * kBlock * kBytes, x += kBlock)
    for (int r = 0; r < 4; r++)
      for (int k = 0; k < kBlock; k += 4) {
        const float32x4_t w = load_four<values>(row + (r * kBlock + k) * kBytes);
        for (int b = 0; b < BT; b++) sums[r * BT + b] = vfmaq_f32(sums[r * BT + b], w, vld1q_f32(x + b * ldx + k));
      }
}

template <bool is_int4, int BT>
INLINE void dense_integers(const uint8_t* row, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                           int64_t ld_scales, float32x4_t* sums) {
  constexpr int kBytes = is_int4 ? 34 : 64;
  for (int64_t i = 0; i < blocks; i++, row += 4 * kBytes, x += kBlock, scales++)
    for (int r = 0; r < 4; r++) {
      const uint8_t* at = row + r * kBytes;
      const float w_scale = is_int4 ? short_scale(at + 32) : 1.0f;
      int32x4_t products[BT];
      for (int b = 0; b < BT; b++) products[b] = vdupq_n_s32(0);
      for (int k = 0; k < kBlock; k += 16) {
        const int8x16_t w = is_int4 ? load_int4(at + k % 32, k >= 32) : vld1q_s8(reinterpret_cast<const int8_t*>(at + k));
        for (int b = 0; b < BT; b++) products[b] = vaddq_s32(products[b], dot_bytes(w, vld1q_s8(x + b * ldx + k)));
      }
      for (int b = 0; b < BT; b++)
        sums[r * BT + b] = vfmaq_n_f32(sums[r * BT + b], vcvtq_f32_s32(products[b]), w_scale * scales[b * ld_scales]);
    }
}

#include "tiles.h"

struct Neon {
  using Vector = float32x4_t;
  static constexpr int kMostRows = 4;
  static constexpr int kParts = 1;
  static constexpr bool kHasHalves = false, kHasDense = true;
  static INLINE Vector zero() { return vdupq_n_f32(0.0f); }

  template <int n, int values>
  static constexpr int num_sums() { return n ? 2 : 4; }

  template <int n, int values, int BT, int T, bool in_parts>
  static INLINE void add(const Header& of, const uint8_t* panel, int64_t, int64_t count, const Activations& x, int64_t at,
                         int64_t k, Vector* sums) {
    const int64_t width = of.padded(), blocks = of.blocks();
    const float* wide = x.wide + at * width + k * kBlock;
    if constexpr (values < kInt8) {
      if constexpr (n == 0) dense_floats<values, BT>(panel, count, wide, width, sums);
      else panels_of_floats<values, BT>(panel, count, wide, width, sums);
    } else {
      const int8_t* narrow = x.narrow + at * width + k * kBlock;
      const float* scales = x.scales + at * blocks + k;
      constexpr bool is_int4 = values == kInt4;
      if constexpr (n == 0) dense_integers<is_int4, BT>(panel, count, narrow, width, scales, blocks, sums);
      else panels_of_integers<n, is_int4, BT>(panel, count, narrow, width, scales, blocks, sums);
    }
  }

  template <int n, int values>
  static INLINE void rows(const Vector* sums, int BT, int b, float* to) {
    if (n == 0) {
      for (int r = 0; r < 4; r++) to[r] = vaddvq_f32(sums[r * BT + b]);
      return;
    }
    vst1q_f32(to, n == 2 ? vpaddq_f32(sums[b], sums[BT + b]) : sums[b]);
    if (n == 1) vst1q_f32(to + 4, sums[BT + b]);
  }
};

}  // namespace

bool has_neon() { return true; }
Kernel neon_panels(const Header& of, int64_t rows, bool) { return kernel_of<Neon>(of, rows, plain_integers); }

}  // namespace castlm

#else

namespace castlm {
bool has_neon() { return false; }
Kernel neon_panels(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
