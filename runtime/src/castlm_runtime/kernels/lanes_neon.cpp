// The NEON kernels of kLanes (matrix.h draws a panel): every n:m whose m divides 64, and dense weights. The lanes of four registers
// are the 16 outputs of a tile, so that x is broadcast and no sum crosses lanes.
//
// Kept values go to their columns by `tbl`: two bytes of the mask have the control of 16 bytes in tables (lane_tables.h), and
// their number of bits moves the pointer to the next kept values. Up to four rows of x are multiplied as the weights are expanded;
// for more, a tile is expanded once, integers to a byte and floats to fp32:
//
//   int8, a step of 4 columns:   | rows 0 .. 3, 4 columns each | rows 4 .. 7 | rows 8 .. 11 | rows 12 .. 15 |     16 bytes each
//   int4 and int6, of 8 columns: | rows 0, 1 | 4, 5 | 8, 9 | 12, 13 |, 8 columns each, then | rows 2, 3 | 6, 7 | 10, 11 | 14, 15 |
//   floats, a column:            | rows 0 .. 3 | 4 .. 7 | 8 .. 11 | 12 .. 15 |
//
// Written from the instruction set's manual and run under an emulator, never timed.

#include "matrix.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <type_traits>

#include "lane_tables.h"
#include "plain.h"

namespace castlm {
namespace {

constexpr int kFew = 4;  // rows of x that are multiplied at once
const LaneTables kTables;

enum Source { kMasked, kUnmasked, kExpanded };

}  // namespace

// Most processors since 2018.
bool has_sdot() {
#if defined(__APPLE__)
  return true;
#elif defined(__linux__) && defined(AT_HWCAP)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}

namespace {

// Adds the products of 16 bytes, four to a lane.
template <bool has_dot>
INLINE void add_products(int32x4_t& sums, int8x16_t w, int8x16_t x) {
  if (has_dot) {  // in assembly, as the rest of the file is for any processor with NEON
    asm(".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(w), "w"(x));
    return;
  }
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  sums = vaddq_s32(sums, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(w, x))));
}

// Reads the registers of a panel of integers in turn.
template <int values, Source source>
struct Reader {
  const uint8_t *mask, *at[2];  // the halves of int4 and int6; others use the first
  const uint8_t* first;         // of the panel

  INLINE void start(const uint8_t* panel) {
    mask = first = panel;
    at[0] = at[1] = panel + (source == kMasked ? 128 : 0);
  }
  INLINE int8x16_t next(int half) {
    if (source == kExpanded) half = 0;
    int8x16_t bytes = vld1q_s8(reinterpret_cast<const int8_t*>(at[half]));
    if (values == kInt4 && source != kExpanded) bytes = vshrq_n_s8(half ? bytes : vshlq_n_s8(bytes, 4), 4);
    if (values == kInt6 && source != kExpanded) bytes = six_bits(vreinterpretq_u8_s8(bytes), half);
    if (source != kMasked) {
      at[half] += 16;
      if (values == kInt6 && source != kExpanded && (at[half] - first) % kInt6Step == 64) at[half] += kInt6Step - 64;
      return bytes;
    }
    const uint8_t *low = kTables.low[mask[0]], *second = kTables.low[mask[1]];
    const uint8x16_t control = vaddq_u8(vld1q_u8(low), vld1q_u8(kTables.high[mask[1]]));
    mask += 2, at[half] += low[8] + second[8];
    return vqtbl1q_s8(bytes, control);
  }

 private:
  INLINE int8x16_t six_bits(uint8x16_t both, int half) const {
    const int64_t step = (at[half] - first) / kInt6Step * kInt6Step, byte = at[half] - first - step;  // 0 to 48
    const uint8x16_t nibbles = half ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
    const uint8x16_t four = vld1q_u8(first + step + 64 + byte % 32);
    const uint8x16_t high = vshlq_u8(four, vdupq_n_s8(int8_t(4 - 4 * half - byte / 32 * 2)));  // a negative count shifts right
    const uint8x16_t code = vorrq_u8(nibbles, vandq_u8(high, vdupq_n_u8(0x30)));
    return vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(32));
  }
};

// The same of floats: two columns at a time, each 16 outputs in fp32.
template <int values, Source source>
struct FloatReader {
  const uint8_t *mask, *at;

  INLINE void start(const uint8_t* panel) { mask = panel, at = panel + (source == kMasked ? 128 : 0); }
  INLINE void next(float32x4_t (*columns)[4]) {
    if (values == kFloat32 || source == kExpanded) {
      for (int i = 0; i < 8; i++) columns[i / 4][i % 4] = vreinterpretq_f32_u8(next_single(i % 2));
      return;
    }
    for (int i = 0; i < 4; i++) {
      const uint8x16_t eight = next_words();
      if (values == kFloat16) {
        const float16x8_t of_column = vreinterpretq_f16_u8(eight);
        columns[i / 2][i % 2 * 2] = vcvt_f32_f16(vget_low_f16(of_column));
        columns[i / 2][i % 2 * 2 + 1] = vcvt_high_f32_f16(of_column);
      } else {
        const uint32x4_t pairs = vreinterpretq_u32_u8(eight);
        columns[0][i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        columns[1][i] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
      }
    }
  }

 private:
  INLINE uint8x16_t next_single(int odd) {  // four values, whose bits are in half of a byte of the mask
    const uint8x16_t four = vld1q_u8(at);
    if (source != kMasked) {
      at += 16;
      return four;
    }
    const int bits = odd ? *mask >> 4 : *mask & 15;
    mask += odd, at += 4 * kTables.low[bits][8];
    return vqtbl1q_u8(four, vld1q_u8(kTables.singles[bits]));
  }
  INLINE uint8x16_t next_words() {
    const uint8x16_t eight = vld1q_u8(at);
    if (source != kMasked) {
      at += 16;
      return eight;
    }
    const int byte = *mask++;
    at += 2 * kTables.low[byte][8];
    return vqtbl1q_u8(eight, vld1q_u8(kTables.words[byte]));
  }
};

INLINE int8x16_t spread(const int8_t* x, int columns) {  // 4 or 8 columns of x to all lanes
  if (columns == 8) return vreinterpretq_s8_s64(vld1q_dup_s64(reinterpret_cast<const int64_t*>(x)));
  return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(x)));
}

INLINE float32x4_t four_scales(const uint8_t* at) {  // of bf16
  uint16x4_t bits;
  std::memcpy(&bits, at, 8);
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

// The panels of a tile times B rows of x, added to `sums`. `panels` are expanded ones or those of the matrix, whose scales of int4
// and int6 `w_scales` are, `stride` bytes apart.
template <int values, Source source, bool has_dot, int B>
void add_integers(const uint8_t* panels, int64_t bytes, const uint8_t* w_scales, int64_t stride, int64_t blocks, const Activations& x,
                  int64_t first_row, float32x4_t (*sums)[4]) {
  constexpr int kHalves = in_nibbles(values) ? 2 : 1, kColumns = 4 * kHalves;
  const int64_t width = blocks * kBlock;
  for (int64_t block = 0; block < blocks; block++, panels += bytes, w_scales += stride) {
    Reader<values, source> reader;
    reader.start(panels);
    int32x4_t products[B][kHalves][4];
    for (auto& of_row : products)
      for (auto& half : of_row)
        for (int32x4_t& four : half) four = vdupq_n_s32(0);
    for (int column = 0; column < kBlock; column += kColumns) {
      int8x16_t some[B];
      for (int b = 0; b < B; b++) some[b] = spread(x.narrow + (first_row + b) * width + block * kBlock + column, kColumns);
      for (int half = 0; half < kHalves; half++)
        for (int quarter = 0; quarter < 4; quarter++) {
          const int8x16_t w = reader.next(half);
          for (int b = 0; b < B; b++) add_products<has_dot>(products[b][half][quarter], w, some[b]);
        }
    }
    for (int quarter = 0; quarter < 4; quarter++) {
      const float32x4_t of_rows = in_nibbles(values) ? four_scales(w_scales + 8 * quarter) : vdupq_n_f32(1.0f);
      for (int b = 0; b < B; b++) {
        const int32x4_t whole = in_nibbles(values) ? vpaddq_s32(products[b][0][quarter], products[b][kHalves - 1][quarter])
                                                : products[b][0][quarter];
        const float32x4_t scale = vmulq_n_f32(of_rows, x.scales[(first_row + b) * blocks + block]);
        sums[b][quarter] = vfmaq_f32(sums[b][quarter], vcvtq_f32_s32(whole), scale);
      }
    }
  }
}

template <int values, Source source, int B>
void add_floats(const uint8_t* panels, int64_t bytes, int64_t blocks, const Activations& x, int64_t first_row, float32x4_t (*sums)[4]) {
  const int64_t width = blocks * kBlock;
  for (int64_t block = 0; block < blocks; block++, panels += bytes) {
    FloatReader<values, source> reader;
    reader.start(panels);
    const float* at = x.wide + first_row * width + block * kBlock;
    for (int column = 0; column < kBlock; column += 2) {
      float32x4_t w[2][4];
      reader.next(w);
      for (int i = 0; i < 2; i++)
        for (int b = 0; b < B; b++)
          for (int quarter = 0; quarter < 4; quarter++)
            sums[b][quarter] = vfmaq_n_f32(sums[b][quarter], w[i][quarter], at[b * width + column + i]);
    }
  }
}

constexpr int64_t expanded_bytes(int values) { return values < kInt8 ? 4096 : 1024; }  // of a panel

template <int values>
void expand_tile(const uint8_t* panels, int64_t bytes, int64_t blocks, uint8_t* to) {
  for (int64_t block = 0; block < blocks; block++, panels += bytes) {
    if constexpr (values < kInt8) {
      FloatReader<values, kMasked> reader;
      reader.start(panels);
      for (int column = 0; column < kBlock; column += 2) {
        float32x4_t w[2][4];
        reader.next(w);
        for (int i = 0; i < 8; i++, to += 16) vst1q_f32(reinterpret_cast<float*>(to), w[i / 4][i % 4]);
      }
    } else {
      Reader<values, kMasked> reader;
      reader.start(panels);
      for (int i = 0; i < 64; i++, to += 16) vst1q_s8(reinterpret_cast<int8_t*>(to), reader.next(values == kInt4 ? i / 4 % 2 : 0));
    }
  }
}

template <int values, bool is_masked, bool has_dot>
void multiply_lanes(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes();
  const bool expands = is_masked && x.batch > kFew;
  const auto* row_scales = reinterpret_cast<const float*>(data + of.tiles() * blocks * bytes);  // of int8
  auto* room = static_cast<uint8_t*>(scratch<0>(expands ? blocks * expanded_bytes(values) : 0));
  for (int64_t tile = first; tile < last; tile++) {
    const uint8_t* const panels = data + tile * blocks * bytes;
    const int64_t row = 16 * tile, count = std::min<int64_t>(16, of.rows - row);
    if (expands) expand_tile<values>(panels, bytes, blocks, room);
    const auto multiply = [&](auto of_x, int64_t b) {
      constexpr int B = decltype(of_x)::value;
      constexpr Source kFrom = is_masked ? kMasked : kUnmasked;
      float32x4_t sums[B][4];
      for (auto& of_row : sums)
        for (float32x4_t& four : of_row) four = vdupq_n_f32(0.0f);
      if constexpr (values < kInt8) {
        if (expands) add_floats<values, kExpanded, B>(room, expanded_bytes(values), blocks, x, b, sums);
        else add_floats<values, kFrom, B>(panels, bytes, blocks, x, b, sums);
      } else {
        const uint8_t* const scales = panels + bytes - 32;  // of int4 and int6
        if (expands) add_integers<values, kExpanded, has_dot, B>(room, expanded_bytes(values), scales, bytes, blocks, x, b, sums);
        else add_integers<values, kFrom, has_dot, B>(panels, bytes, scales, bytes, blocks, x, b, sums);
      }
      for (int r = 0; r < B; r++) {
        float outputs[16];
        for (int quarter = 0; quarter < 4; quarter++) vst1q_f32(outputs + 4 * quarter, sums[r][quarter]);
        for (int64_t i = 0; i < count; i++) y[(b + r) * ldy + row + i] = values == kInt8 ? outputs[i] * row_scales[row + i] : outputs[i];
      }
    };
    int64_t b = 0;
    for (; b + kFew <= x.batch; b += kFew) multiply(std::integral_constant<int, kFew>(), b);
    for (; b < x.batch; b++) multiply(std::integral_constant<int, 1>(), b);
  }
}

template <int values>
Multiply of_pattern(const Header& of) {
  if constexpr (values >= kInt8) {
    static const bool has_dot = has_sdot();
    if (has_dot) return of.m ? multiply_lanes<values, true, true> : multiply_lanes<values, false, true>;
  }
  return of.m ? multiply_lanes<values, true, false> : multiply_lanes<values, false, false>;
}

Multiply of_dense_int6() { return has_sdot() ? multiply_lanes<kInt6, false, true> : multiply_lanes<kInt6, false, false>; }

}  // namespace

Kernel neon_lanes(const Header& of, int64_t, bool) {
  switch (of.values) {
    case kBFloat16: return {as_floats, of_pattern<kBFloat16>(of)};
    case kFloat16: return {as_floats, of_pattern<kFloat16>(of)};
    case kFloat32: return {as_floats, of_pattern<kFloat32>(of)};
    case kInt8: return {plain_integers, of_pattern<kInt8>(of)};
    case kInt4: return {plain_integers, of_pattern<kInt4>(of)};
    default: return {plain_integers, of_dense_int6()};
  }
}

}  // namespace castlm

#else

namespace castlm {
bool has_sdot() { return false; }
Kernel neon_lanes(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
