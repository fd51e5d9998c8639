// Multiplication a row at a time, which becomes fp32 first: for patterns without panels, and for processors without kernels of
// their own. Also the reference that the other paths are compared with.

#include "plain.h"

#include <algorithm>
#include <cmath>

namespace castlm {

float load_value(const uint8_t* row, int32_t values, int64_t index) {
  uint16_t half;
  float single;
  switch (values) {
    case kBFloat16: std::memcpy(&half, row + 2 * index, 2); return bfloat16_to_float(half);
    case kFloat16: std::memcpy(&half, row + 2 * index, 2); return float16_to_float(half);
    case kFloat32: std::memcpy(&single, row + 4 * index, 4); return single;
    case kInt8: return float(int8_t(row[index]));
    default: return float(((row[index / 2] >> (index % 2 * 4) & 15) ^ 8) - 8);  // int4 in two's complement: 0b1000 is -8
  }
}

namespace {

void expand_kept(const Header& of, const uint8_t* data, int64_t row, float* to) {
  const uint8_t* values = data + row * of.kept_row_bytes();
  const uint8_t* mask = data + of.rows * of.kept_row_bytes() + row * of.mask_row_bytes();
  int64_t index = 0, done = 0;
  if (of.values < kInt8 && level() >= kAvx2) {
    done = of.columns / 8 * 8;
    index = avx2_expand(of, values, mask, done / 8, to);
  }
  for (int64_t k = done; k < of.columns; ++k)
    to[k] = mask[k / 8] >> (k % 8) & 1 ? load_value(values, of.values, index++) : 0.0f;
}

float stored_scale(const uint8_t* at) {
  float scale;
  std::memcpy(&scale, at, 4);
  return scale;
}
float short_scale(const uint8_t* at) {
  uint16_t scale;
  std::memcpy(&scale, at, 2);
  return bfloat16_to_float(scale);
}

EACH_CPU void scale_row(float* row, float scale, int64_t count) {
  for (int64_t k = 0; k < count; ++k) row[k] *= scale;
}

// The scales of rows, which follow all panels.
const uint8_t* row_scales(const Header& of, const uint8_t* data) {
  return data + of.tiles() * of.blocks() * of.panel_bytes();
}

void expand_dense(const Header& of, const uint8_t* data, int64_t row, float* to) {
  for (int64_t block = 0; block < of.blocks(); ++block, to += kBlock) {
    const uint8_t* from = data + (row / 4 * of.blocks() + block) * of.panel_bytes() + row % 4 * of.dense_block_bytes();
    if (of.values == kInt4) {  // the first 32 columns are the low halves
      const float scale = short_scale(from + 32);
      for (int k = 0; k < 64; ++k) to[k] = scale * float((k < 32 ? from[k] & 15 : from[k - 32] >> 4) - 8);
    } else {
      const float scale = of.values == kInt8 ? stored_scale(row_scales(of, data) + 4 * row) : 1.0f;
      for (int k = 0; k < 64; ++k) to[k] = scale * load_value(from, of.values, k);
    }
  }
}

void expand_panels(const Header& of, const uint8_t* data, int64_t row, float* to) {
  const int64_t tile = row / of.tile_rows(), row_in_tile = row % of.tile_rows();
  const int width = int(of.group());
  const float row_scale = of.values == kInt8 ? stored_scale(row_scales(of, data) + 4 * row) : 1.0f;
  std::fill(to, to + of.padded(), 0.0f);
  for (int64_t block = 0; block < of.blocks(); ++block, to += kBlock) {
    const uint8_t* panel = data + (tile * of.blocks() + block) * of.panel_bytes();
    const float scale = of.values == kInt4 ? short_scale(panel + 96 + 2 * row_in_tile) : row_scale;
    for (int group = 0; group < kBlock / width; ++group)
      for (int slot = 0; slot < width / of.m * of.n; ++slot) {
        const Place place = place_in_panel(of, row_in_tile, group, slot);
        const int column = width * group + (panel[place.mask_byte] >> place.mask_shift & (width - 1));
        const float value = of.values == kInt4 ? float((panel[place.value] >> place.value_shift & 15) - 8)
                                               : load_value(panel + place.value, of.values, 0);
        if (value != 0) to[column] = scale * value;
      }
  }
}

// Value `bit` of a panel of dense int4 or int6.
int code_of_bit(const Header& of, const uint8_t* panel, int bit) {
  const Nibble at = nibble_of_bit(of, bit);
  const int low = panel[at.low] >> at.shift & 15;
  if (of.values == kInt4) return (low ^ (of.is_unsigned ? 0 : 8)) - 8;
  return (low | (panel[at.high] >> at.high_shift & 3) << 4) - 32;
}

// The kept values of a panel of kLanes to 64 columns of 16 rows, without their scales.
template <int values>
void expand_lanes_panel(const Header& of, const uint8_t* panel, float* to, int64_t ld) {
  const uint8_t *mask = panel, *kept = panel + of.lane_mask_bytes();
  int64_t taken[2] = {0, 0};  // of each half of int4
  for (int bit = 0; bit < 1024; ++bit) {
    const Lane lane = lane_of_bit(of, bit);
    float& value = to[lane.row * ld + lane.column];
    value = 0;
    if (of.m && !(mask[bit / 8] >> (bit % 8) & 1)) continue;
    const int half = in_nibbles(values) ? bit / 64 % 2 : 0;
    const int64_t index = taken[half]++;
    if (values == kInt8) value = float(int8_t(kept[index] ^ (of.is_unsigned ? 0x80 : 0)));
    else if (values == kInt4) value = float(((kept[index] >> 4 * half & 15) ^ (of.is_unsigned ? 0 : 8)) - 8);
    else if (values == kInt6) value = float(code_of_bit(of, panel, bit));
    else value = load_value(kept, values, index);
  }
}

// The same of a panel of pairs.
void expand_pairs_panel(const Header& of, const uint8_t* panel, float* to, int64_t ld) {
  for (int row = 0; row < 16; ++row) std::fill(to + row * ld, to + row * ld + kBlock, 0.0f);
  for (int slot = 0; slot < kBlock / 2; ++slot)
    for (int row = 0; row < 16; ++row) {
      uint32_t columns;
      std::memcpy(&columns, panel + slot % 2 * 64 + 4 * row, 4);
      const int column = slot / 2 * 4 + int(columns >> slot / 2 * 2 & 3);
      to[row * ld + column] = load_value(panel + of.lane_mask_bytes(), of.values, index_of_pair(of, row, slot));
    }
}

// Sixteen sums that do not depend on each other, so that the compiler may use vectors without changing a sum's order.
EACH_CPU float dot(const float* a, const float* b, int64_t count) {
  float sums[16] = {};
  for (int64_t k = 0; k < count; k += 16)
    for (int i = 0; i < 16; ++i) sums[i] += a[k + i] * b[k + i];
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

}  // namespace

void expand_row(const Header& of, const uint8_t* data, int64_t row, float* to) {
  if (of.layout == kDense) return expand_dense(of, data, row, to);
  if (of.layout == kPanels) return expand_panels(of, data, row, to);
  std::fill(to + of.columns, to + of.padded(), 0.0f);
  expand_kept(of, data, row, to);
  const uint8_t* scales = data + of.rows * (of.kept_row_bytes() + of.mask_row_bytes());
  if (of.values == kInt8) scale_row(to, stored_scale(scales + 4 * row), of.columns);
  if (of.values == kInt4)
    for (int64_t i = 0; i < of.blocks(); ++i)
      scale_row(to + i * kBlock, short_scale(scales + 2 * (row * of.blocks() + i)), kBlock);
}

void gather_row(const Header& of, const uint8_t* data, int64_t row, float* to) {
  if (of.layout != kLanes) return expand_row(of, data, row, to);
  const int64_t tile = row / 16, blocks = of.blocks();
  const int in_tile = int(row % 16);
  if (of.m) {
    float* const rows = static_cast<float*>(scratch<0>(16 * of.padded() * 4));
    expand_lanes(of, data, tile, rows, of.padded());
    std::copy_n(rows + in_tile * of.padded(), of.padded(), to);
    return;
  }
  const uint8_t* panel = data + tile * blocks * of.panel_bytes();
  for (int64_t block = 0; block < blocks; ++block, panel += of.panel_bytes(), to += kBlock) {
    for (int k = 0; k < kBlock; ++k) {
      const int bit = bit_of_lane(of, in_tile, k);
      if (of.values == kInt8) to[k] = float(int8_t(panel[bit] ^ (of.is_unsigned ? 0x80 : 0)));
      else if (in_nibbles(of.values)) to[k] = float(code_of_bit(of, panel, bit));
      else to[k] = load_value(panel, of.values, bit);
    }
    if (in_nibbles(of.values)) scale_row(to, short_scale(panel + of.panel_bytes() - 32 + 2 * in_tile), kBlock);
    if (of.values == kInt8) scale_row(to, stored_scale(row_scales(of, data) + 4 * row), kBlock);
  }
}

void expand_lanes(const Header& of, const uint8_t* data, int64_t tile, float* to, int64_t ld) {
  const uint8_t *panel = data + tile * of.blocks() * of.panel_bytes(), *of_rows = row_scales(of, data) + 64 * tile;
  for (int64_t block = 0; block < of.blocks(); ++block, panel += of.panel_bytes(), to += kBlock) {
    if (of.in_pairs()) {
      expand_pairs_panel(of, panel, to, ld);
      continue;
    }
    switch (of.values) {
      case kBFloat16: expand_lanes_panel<kBFloat16>(of, panel, to, ld); break;
      case kFloat16: expand_lanes_panel<kFloat16>(of, panel, to, ld); break;
      case kFloat32: expand_lanes_panel<kFloat32>(of, panel, to, ld); break;
      case kInt8: expand_lanes_panel<kInt8>(of, panel, to, ld); break;
      case kInt4: expand_lanes_panel<kInt4>(of, panel, to, ld); break;
      default: expand_lanes_panel<kInt6>(of, panel, to, ld);
    }
    const uint8_t* of_block = panel + of.panel_bytes() - 32;  // scales of int4 and int6
    for (int row = 0; row < 16 && of.values >= kInt8; ++row)
      scale_row(to + row * ld, of.values == kInt8 ? stored_scale(of_rows + 4 * row) : short_scale(of_block + 2 * row), kBlock);
  }
}

namespace {

// Weights become fp32, a row or the rows of a tile at a time, in any layout.
void plain_multiply(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                    int64_t last) {
  const int64_t tile_rows = of.tile_rows(), width = of.padded();
  float* rows = static_cast<float*>(scratch<0>(tile_rows * width * 4));
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile * tile_rows, count = std::min(tile_rows, of.rows - row);
    if (of.layout == kLanes) expand_lanes(of, data, tile, rows, width);
    else for (int64_t r = 0; r < count; ++r) expand_row(of, data, row + r, rows + r * width);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t b = 0; b < x.batch; ++b) y[b * ldy + row + r] = dot(rows + r * width, x.wide + b * width, width);
  }
}

// Blocks of x as int8 with the largest magnitude at 127.
EACH_CPU void quantize(const float* x, int64_t width, int8_t* narrow, float* scales) {
  for (int64_t k = 0; k < width; k += kBlock) {
    float most = 0, finite = 0;
    for (int64_t i = k; i < k + kBlock; ++i) {
      most = std::max(most, std::fabs(x[i]));
      finite += x[i] * 0.0f;  // 0, or NaN if a value is NaN or infinite: the scale then carries it into the result
    }
    scales[k / kBlock] = most / 127.0f + finite;
    const float factor = most > 1e-30f ? 127.0f / most : 0.0f;
    for (int64_t i = k; i < k + kBlock; ++i) {
      const float scaled = x[i] * factor;
      narrow[i] = int8_t(std::fabs(scaled) < 127.5f ? std::lrint(scaled) : 0);  // not of NaN: that is undefined
    }
  }
}

}  // namespace

Activations plain_integers(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  return as_integers(of, x, rows, first, last, room, quantize);
}

Kernel plain_kernels(const Header&, int64_t, bool) { return {as_floats, plain_multiply}; }

}  // namespace castlm
