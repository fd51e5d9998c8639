// From the tensors of a file to the order in which the kernels read a matrix.

#include <algorithm>
#include <array>
#include <vector>

#include "plain.h"
#include "team.h"

namespace castlm {
namespace {

void store_short_scale(uint8_t* at, float scale) {
  const uint16_t bits = float_to_bfloat16(scale);
  std::memcpy(at, &bits, 2);
}

// Value `index` of a row of int4 plus 8, 0 to 15: flipping the highest bit of two's complement adds 8.
INLINE uint8_t nibble(const uint8_t* row, int64_t index) { return uint8_t((row[index / 2] >> (index % 2 * 4) & 15) ^ 8); }

void fill_dense_row(const Header& of, const uint8_t* values, const float* scales, int64_t row, uint8_t* data) {
  for (int64_t block = 0; block < of.blocks(); ++block) {
    uint8_t* to = data + (row / 4 * of.blocks() + block) * of.panel_bytes() + row % 4 * of.dense_block_bytes();
    const int64_t first = block * kBlock, count = std::min(kBlock, of.columns - first);
    if (of.values != kInt4) {
      std::memcpy(to, values + first * of.value_bytes(), count * of.value_bytes());
      continue;
    }
    for (int k = 0; k < kBlock; ++k) to[k % 32] |= uint8_t((k < count ? nibble(values, first + k) : 8) << (k < 32 ? 0 : 4));
    store_short_scale(to + 32, scales[row * of.blocks() + block]);
  }
}

void fill_rows(const Header& of, const uint8_t* values, const uint8_t* mask, const float* scales, uint8_t* data) {
  std::memcpy(data, values, of.rows * of.kept_row_bytes());
  data += of.rows * of.kept_row_bytes();
  std::memcpy(data, mask, of.rows * of.mask_row_bytes());
  data += of.rows * of.mask_row_bytes();
  if (of.values == kInt8) std::memcpy(data, scales, 4 * of.rows);
  if (of.values == kInt4)
    for (int64_t i = 0; i < of.rows * of.blocks(); ++i) store_short_scale(data + 2 * i, scales[i]);
}

// The places of the kept values of a row of a tile in a panel, group by group.
using Places = std::array<Place, kBlock / 2>;

// A row of kept values of `bytes` bytes, or of int4 with `bytes` 0, where 8 stands for 0 and is there already.
template <int bytes>
void fill_panel_row(const Header& of, const Places& places, const uint8_t* values, const uint8_t* mask, uint8_t* panel) {
  const int64_t width = of.group();
  int64_t index = 0;
  for (int64_t block = 0; block < of.blocks(); ++block, panel += of.panel_bytes()) {
    const int64_t end = std::min((block + 1) * kBlock, of.columns);
    const Place* place = places.data();
    for (int64_t column = block * kBlock; column < end; column += width) {
      unsigned bits = mask[column / 8] >> (column % 8);
      if (width == 4) bits &= 15;
      else if (column + 8 < end) bits |= unsigned(mask[column / 8 + 1]) << 8;
      // The kept columns of a group, from the lowest: 0b1010 keeps columns 1 and 3.
      for (; bits; bits &= bits - 1, ++place, ++index) {
        panel[place->mask_byte] |= uint8_t(__builtin_ctz(bits) << place->mask_shift);
        if constexpr (bytes == 0) panel[place->value] ^= uint8_t((nibble(values, index) ^ 8) << place->value_shift);
        else std::memcpy(panel + place->value, values + index * bytes, bytes);
      }
    }
    // A last group of 1:2 that has two columns lacks a kept value, which stays zero, for column 3.
    if (width == 4 && of.n == 2 && end % 4) panel[place->mask_byte] |= uint8_t(3 << place->mask_shift);
  }
}

void fill_panels(const Header& of, const uint8_t* values, const uint8_t* mask, const float* scales, int64_t first,
                 int64_t last, uint8_t* data) {
  std::vector<Places> places(of.tile_rows());
  const int kept = int(of.group() / of.m * of.n);  // of a group
  for (int64_t row = 0; row < of.tile_rows(); ++row)
    for (int i = 0; i < kBlock / of.group() * kept; ++i) places[row][i] = place_in_panel(of, row, i / kept, i % kept);
  const auto fill = of.values == kInt4      ? fill_panel_row<0>
                    : of.values == kInt8    ? fill_panel_row<1>
                    : of.values == kFloat32 ? fill_panel_row<4>
                                            : fill_panel_row<2>;
  for (int64_t row = first * of.tile_rows(); row < std::min(last * of.tile_rows(), of.rows); ++row) {
    uint8_t* panels = data + row / of.tile_rows() * of.blocks() * of.panel_bytes();
    const int64_t row_in_tile = row % of.tile_rows();
    for (int64_t block = 0; of.values == kInt4 && block < of.blocks(); ++block) {
      uint8_t* panel = panels + block * of.panel_bytes();
      if (row_in_tile == 0) std::memset(panel + 32, 0x88, 64);  // two nibbles of 8, which stand for 0
      store_short_scale(panel + 96 + 2 * row_in_tile, scales[row * of.blocks() + block]);
    }
    fill(of, places[row_in_tile], values + row * of.kept_row_bytes(), mask + row * of.mask_row_bytes(), panels);
  }
}

// ---- kLanes

INLINE uint64_t word_at(const uint8_t* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

INLINE uint64_t mask_of_block(const Header& of, const uint8_t* mask, int64_t block) {  // of a row
  if (8 * block + 8 <= of.mask_row_bytes()) return word_at(mask + 8 * block);
  uint64_t bits = 0;
  for (int64_t i = 0; i < 8 && 8 * block + i < of.mask_row_bytes(); ++i) bits |= uint64_t(mask[8 * block + i]) << 8 * i;
  return bits;
}

// Eight codes of six bits, the first in the lowest ones, as the bytes of a word.
INLINE uint64_t bytes_of_sixes(uint64_t codes) {
  codes = (codes & 0xffffff) | (codes & 0xffffff000000) << 8;
  codes = (codes & 0x00000fff00000fff) | (codes & 0x00fff00000fff000) << 4;
  return (codes & 0x003f003f003f003f) | (codes & 0x0fc00fc00fc00fc0) << 2;
}

// The panels of 16 rows of int6, with 32 added: flipping the highest bit of two's complement adds it. A column that a row lacks
// has 0, for which 32 stands. The eight codes of a lane are a word.
EACH_CPU void fill_int6_tile(const Header& of, const uint8_t* from, const uint8_t*, const float* scales, int64_t tile, uint8_t* data) {
  const int64_t rows = std::min<int64_t>(16, of.rows - 16 * tile), row_bytes = of.kept_row_bytes();
  uint8_t* panel = data + tile * of.blocks() * of.panel_bytes();
  for (int64_t block = 0; block < of.blocks(); ++block, panel += of.panel_bytes()) {
    for (int step = 0; step < kBlock / 8; ++step) {
      const int64_t column = block * kBlock + 8 * step, count = std::clamp<int64_t>(of.columns - column, 0, 8);
      uint64_t low[8] = {}, high[4] = {};
      for (int lane = 0; lane < 16; ++lane) {
        const int64_t row = lane_of_bit(of, 8 * lane).row;
        uint64_t codes = 0;
        if (row < rows) {
          const uint8_t* at = from + (16 * tile + row) * row_bytes + column / 8 * 6;
          if (count == 8) std::memcpy(&codes, at, 6);
          else std::memcpy(&codes, at, (6 * count + 7) / 8), codes &= (uint64_t(1) << 6 * count) - 1;
        }
        codes = bytes_of_sixes(codes) ^ 0x2020202020202020;
        low[lane % 8] |= (codes & 0x0f0f0f0f0f0f0f0f) << lane / 8 * 4;
        high[lane % 4] |= (codes >> 4 & 0x0303030303030303) << lane / 4 * 2;
      }
      std::memcpy(panel + step * kInt6Step, low, 64);
      std::memcpy(panel + step * kInt6Step + 64, high, 32);
    }
    for (int64_t row = 0; row < rows; ++row)
      store_short_scale(panel + of.panel_bytes() - 32 + 2 * row, scales[(16 * tile + row) * of.blocks() + block]);
  }
}

// The panels of 16 rows. A lane of a step takes the next kept values of its row: they are copied by as many bytes as a lane can
// have, and the next lane overwrites what is too much. `staged` has the kept values of a row in a block, with zeros behind them.
template <int values>
INLINE void fill_lanes_tile(Header of, const uint8_t* from, const uint8_t* mask, const float* scales, int64_t tile, uint8_t* data) {
  of.values = values;  // which the compiler knows now
  constexpr int kBytes = values == kFloat32 ? 4 : values >= kInt8 ? 1 : 2;  // of a value in `staged`
  const int columns = int(of.lane_columns()), rows = int(std::min<int64_t>(16, of.rows - 16 * tile)), lane_bytes = columns * kBytes;
  const int64_t half_bytes = of.panel_bytes() - of.lane_mask_bytes() - (values == kInt4 ? 32 : 0);  // that `kept` has, or each half of int4
  const uint8_t flip = !of.is_unsigned ? 0 : values == kInt8 ? 0x80 : values == kInt4 ? 0x88 : 0;
  uint8_t* panel = data + tile * of.blocks() * of.panel_bytes();
  int64_t taken[16] = {};
  uint8_t kept[4096 + 64], staged[16][64 * kBytes + 8] = {};
  for (int64_t block = 0; block < of.blocks(); ++block, panel += of.panel_bytes()) {
    uint64_t bits[16] = {};
    const uint8_t* next[16];
    const int64_t width = std::min(kBlock, of.columns - block * kBlock);
    for (int row = 0; row < 16; ++row) {
      next[row] = staged[row];
      if (row >= rows) continue;  // no bits, and zeros are staged
      bits[row] = of.m ? mask_of_block(of, mask + (16 * tile + row) * of.mask_row_bytes(), block) : ~uint64_t(0) >> (64 - width);
      const int64_t count = __builtin_popcountll(bits[row]);
      const uint8_t* const row_from = from + (16 * tile + row) * of.kept_row_bytes();
      if constexpr (values == kInt4) {
        const int64_t odd = taken[row] % 2;
        uint8_t pairs[32] = {};
        std::memcpy(pairs, row_from + taken[row] / 2, (odd + count + 1) / 2);
        for (int i = 0; i < 32; ++i) staged[row][2 * i] = pairs[i] & 15, staged[row][2 * i + 1] = pairs[i] >> 4;
        next[row] += odd;
        std::memset(staged[row] + odd + count, 0, 8);
      } else {
        std::memcpy(staged[row], row_from + taken[row] * kBytes, count * kBytes);
        std::memset(staged[row] + count * kBytes, 0, 8);
      }
      taken[row] += count;
    }
    uint8_t* const begins[2] = {kept, kept + 1040};  // the halves of int4, a byte a value; others use the first
    uint8_t* to[2] = {begins[0], begins[1]};
    for (int bit = 0; bit < 1024; bit += columns) {
      const Lane lane = lane_of_bit(of, bit);
      const unsigned here = unsigned(bits[lane.row] >> lane.column) & ((1u << columns) - 1);
      const int count = __builtin_popcount(here), half = values == kInt4 ? bit / 64 % 2 : 0;
      if (of.m) panel[bit / 8] |= uint8_t(here << bit % 8);
      std::memcpy(to[half], next[lane.row], lane_bytes);
      next[lane.row] += count * kBytes;
      to[half] += of.m ? count * kBytes : lane_bytes;  // a dense row has room for the columns that it lacks
    }
    for (int half = 0; half < (values == kInt4 ? 2 : 1); ++half)  // of rows that there are not
      std::memset(to[half], 0, half_bytes - (to[half] - begins[half]));
    uint8_t* values_at = panel + of.lane_mask_bytes();
    if constexpr (values == kInt4) {
      for (int64_t i = 0; i < half_bytes; ++i) values_at[i] = uint8_t(kept[i] | kept[1040 + i] << 4) ^ flip;
      for (int row = 0; row < rows; ++row)
        store_short_scale(values_at + half_bytes + 2 * row, scales[(16 * tile + row) * of.blocks() + block]);
    } else {
      for (int64_t i = 0; i < half_bytes; ++i) values_at[i] = kept[i] ^ flip;
    }
  }
}

// A function that is compiled for each processor cannot be a template.
#define FILL_LANES(name, values)                                                                                              \
  EACH_CPU void name(const Header& of, const uint8_t* from, const uint8_t* mask, const float* scales, int64_t tile, uint8_t* data) { \
    fill_lanes_tile<values>(of, from, mask, scales, tile, data);                                                             \
  }
FILL_LANES(fill_int4_tile, kInt4)
FILL_LANES(fill_int8_tile, kInt8)
FILL_LANES(fill_bf16_tile, kBFloat16)
FILL_LANES(fill_fp16_tile, kFloat16)
FILL_LANES(fill_fp32_tile, kFloat32)
#undef FILL_LANES

// The panels of 16 rows in pairs. A value that a last group of 1:2 lacks stays zero, for column 3.
template <int bytes>
void fill_pairs_tile(const Header& of, const uint8_t* from, const uint8_t* mask, const float*, int64_t tile, uint8_t* data) {
  const int rows = int(std::min<int64_t>(16, of.rows - 16 * tile));
  for (int row = 0; row < rows; ++row) {
    uint8_t* panel = data + tile * of.blocks() * of.panel_bytes();
    const uint8_t* value = from + (16 * tile + row) * of.kept_row_bytes();
    for (int64_t block = 0; block < of.blocks(); ++block, panel += of.panel_bytes()) {
      const uint64_t bits = mask_of_block(of, mask + (16 * tile + row) * of.mask_row_bytes(), block);
      uint32_t columns[2] = {0, 0};
      for (int slot = 0; slot < kBlock / 2 && bits >> slot / 2 * 4; ++slot) {
        unsigned kept = unsigned(bits >> slot / 2 * 4) & 15;
        if (slot % 2) kept &= kept - 1;
        columns[slot % 2] |= uint32_t(kept ? __builtin_ctz(kept) : 3) << slot / 2 * 2;
        if (!kept) continue;
        std::memcpy(panel + of.lane_mask_bytes() + bytes * index_of_pair(of, row, slot), value, bytes);
        value += bytes;
      }
      for (int second = 0; second < 2; ++second) std::memcpy(panel + 64 * second + 4 * row, columns + second, 4);
    }
  }
}

void fill_lanes(const Header& of, const uint8_t* values, const uint8_t* mask, const float* scales, int64_t first,
                int64_t last, uint8_t* data) {
  constexpr decltype(&fill_int4_tile) kFills[] = {fill_bf16_tile, fill_fp16_tile, fill_fp32_tile, fill_int8_tile, fill_int4_tile, fill_int6_tile};
  const auto fill = !of.in_pairs()          ? kFills[of.values]
                    : of.values == kFloat32 ? fill_pairs_tile<4>
                                            : fill_pairs_tile<2>;
  for (int64_t tile = first; tile < last; ++tile) fill(of, values, mask, scales, tile, data);
}

// Of each byte of a mask, whether all of its groups keep n.
std::array<bool, 256> whole_bytes(const Header& of) {
  std::array<bool, 256> whole;
  for (int byte = 0; byte < 256; ++byte) {
    whole[byte] = true;
    for (int k = 0; k < 8; k += of.m) whole[byte] &= __builtin_popcount(byte >> k & ((1 << of.m) - 1)) == of.n;
  }
  return whole;
}

}  // namespace

EACH_CPU bool mask_is_nm(const Header& of, const uint8_t* mask) {
  const bool in_bytes = 8 % of.m == 0;
  const std::array<bool, 256> whole = in_bytes ? whole_bytes(of) : std::array<bool, 256>{};
  for (int64_t row = 0; row < of.rows; ++row, mask += of.mask_row_bytes()) {
    const int64_t checked = in_bytes ? of.columns / 8 : 0;
    bool good = true;
    for (int64_t i = 0; i < checked; ++i) good &= whole[mask[i]];
    if (!good) return false;
    for (int64_t k = 8 * checked; k < of.columns; k += of.m) {
      int count = 0;
      if (of.m == 64) count = __builtin_popcountll(word_at(mask + k / 8));
      else if (of.m % 8 == 0) for (int64_t i = k / 8; i < (k + of.m) / 8; ++i) count += __builtin_popcount(mask[i]);
      else for (int64_t i = k; i < k + of.m; ++i) count += mask[i / 8] >> (i % 8) & 1;  // they end in no byte, as of 3:5
      if (count != of.n) return false;
    }
    // A bit past the last column would make the kernels read a value of the next row.
    for (int64_t k = of.columns; k < 8 * of.mask_row_bytes(); ++k)
      if (mask[k / 8] >> (k % 8) & 1) return false;
  }
  return true;
}

std::vector<uint8_t> dense_int4(const Header& of, const uint8_t* values, const uint8_t* mask) {
  const int64_t row_bytes = (of.columns + 1) / 2;
  std::vector<uint8_t> dense(of.rows * row_bytes);
  for (int64_t row = 0; row < of.rows; ++row, values += of.kept_row_bytes(), mask += of.mask_row_bytes()) {
    uint8_t* const to = dense.data() + row * row_bytes;
    int64_t index = 0;
    for (int64_t i = 0; i < of.mask_row_bytes(); ++i)
      for (unsigned bits = mask[i]; bits; bits &= bits - 1, ++index) {
        const int64_t column = 8 * i + __builtin_ctz(bits);
        to[column / 2] |= uint8_t((values[index / 2] >> index % 2 * 4 & 15) << column % 2 * 4);
      }
  }
  return dense;
}

void repack(const Header& of, const uint8_t* values, const uint8_t* mask, const float* scales, uint8_t* data, int threads) {
  if (of.layout == kRows) return fill_rows(of, values, mask, scales, data);
  in_parallel(of.tiles(), 16, threads, [&](int64_t first, int64_t last) {
    if (of.layout == kLanes) return fill_lanes(of, values, mask, scales, first, last, data);
    if (of.layout == kPanels) return fill_panels(of, values, mask, scales, first, last, data);
    for (int64_t row = 4 * first; row < std::min(4 * last, of.rows); ++row)
      fill_dense_row(of, values + row * of.kept_row_bytes(), scales, row, data);
  });
  if (of.values == kInt8) std::memcpy(data + of.tiles() * of.blocks() * of.panel_bytes(), scales, 4 * of.rows);
}

}  // namespace castlm
