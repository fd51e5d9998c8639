// How a weight lies in memory while it is multiplied by: a header, then the data in one of four layouts. The buffer is
// built for the processor at hand (`repack` in repack.cpp) and never written to a file. table.h says which layout a weight takes, and
// which kernels multiply by it.

#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "each_cpu.h"

namespace castlm {

constexpr uint32_t kMagic = 0x6e6d3031;
constexpr int64_t kBlock = 64;  // columns that share a panel, a scale of int4, and a scale of int8 activations
constexpr int64_t kMaxBatch = 16;  // rows of x that are multiplied at once
constexpr int64_t kHeaderBytes = 64;

enum Values : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kInt8 = 3, kInt4 = 4, kInt6 = 5 };

// Whether values are integers with a scale for each block, whose lowest four bits lie in halves of bytes.
INLINE constexpr bool in_nibbles(int32_t values) { return values >= kInt4; }

// kRows: kept values row by row, then the bits of the mask, then the scales; any pattern, plain C++.
// kPanels: 1:4 and 2:4, and patterns that keep 8 of every 16 columns, of all values but int4: a few rows by 64 columns at a time in the
// order in which vector kernels read them.
// kDense: all values but int6, four rows by 64 columns at a time.
// kLanes: every n:m whose m divides 64, and dense weights: 16 rows by 64 columns at a time, a bit mask before the kept values. Floats of
// which every four columns keep two have columns in place of the mask (`in_pairs`). int6
// is always dense, and lies so for every level.
enum Layout : int32_t { kRows = 0, kPanels = 1, kDense = 2, kLanes = 3 };

// m = 0 is a dense weight, and 1:2 of a file is 2:4 here, whose last group may have two columns. `columns` may be any number; a row is
// padded with zeros to `padded()` columns.
struct Header {
  uint32_t magic;
  int32_t entry;  // of table.h, chosen when the weight was repacked
  int32_t layout, values, n, m;
  int32_t is_unsigned;  // of integers in kLanes: int8 has 128 added, int4 8; int6 always 32
  int64_t rows, columns;
  int64_t data_bytes;

  int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
  int64_t kept() const { return m ? columns * n / m : columns; }  // values in a row
  int64_t group() const { return m == 0 || m == 4 ? 4 : 16; }  // of kPanels: columns whose kept weights share a code of columns
  bool in_pairs() const { return layout == kLanes && values < kInt8 && n == 2 && m == 4; }
  int64_t tile_rows() const { return layout == kLanes ? 16 : layout == kPanels && n == 1 && m == 4 ? 8 : 4; }
  int64_t tiles() const { return (rows + tile_rows() - 1) / tile_rows(); }
  int64_t panel_bytes() const {  // of a tile of rows by 64 columns
    if (layout == kLanes) {
      const int64_t count = 16 * (m ? kBlock / m * n : kBlock);
      return lane_mask_bytes() + (in_nibbles(values) ? count * bits() / 8 + 32 : count * value_bytes());
    }
    if (m == 0) return tile_rows() * dense_block_bytes();
    if (group() == 16) return 64 + 128 * value_bytes();
    return 32 + (values == kInt8 ? 128 : values == kInt4 ? 64 + 2 * tile_rows() : 128 * value_bytes());
  }
  int64_t lane_mask_bytes() const { return m ? 128 : 0; }  // of a panel of kLanes
  int64_t lane_columns() const { return in_nibbles(values) ? 8 : values == kInt8 ? 4 : values == kBFloat16 ? 2 : 1; }
  int64_t dense_block_bytes() const { return values == kInt4 ? kBlock / 2 + 2 : kBlock * value_bytes(); }
  int64_t value_bytes() const { return values == kFloat32 ? 4 : values == kInt8 ? 1 : 2; }  // of all but int4 and int6
  int64_t bits() const { return values == kInt4 ? 4 : values == kInt6 ? 6 : 8 * value_bytes(); }  // of a value
  int64_t kept_row_bytes() const { return (kept() * bits() + 7) / 8; }
  int64_t mask_row_bytes() const { return (columns + 7) / 8; }
  int64_t scales_per_row() const { return values == kInt8 ? 1 : in_nibbles(values) ? blocks() : 0; }
};
static_assert(sizeof(Header) <= kHeaderBytes, "the data begin after the header");

// Rows of x as a kernel takes them; what of this is there, and in which order, is the kernel's own matter (`Kernel::form`). Rows are
// padded to whole blocks. Integers are int8 with a scale for each block of 64 columns. `offsets` cancels the constants that are
// added to weights: 8 to int4 and 32 to int6 in kLanes, and with AVX-512 128 to int8.
struct Activations {
  const float* wide;
  const int8_t* narrow;
  const float* scales;     // (batch, blocks)
  const int32_t* offsets;  // (batch, blocks), or null
  int64_t batch;
};

INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
INLINE float bfloat16_to_float(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }
INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float float16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent, subnormal numbers included
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));
}

// A panel: the kept weights of a few rows by 64 columns, in the order in which the instructions consume them. 2:4 bf16, 4 rows:
//
//   byte   0               32              64                                  288
//          | 8 words: columns | step 0: 16 bf16 | step 1 | ... | step 7: 16 bf16 |
//
//   One step is 8 columns. Its 16 bf16, rows 0 and 1 in the even places and rows 2 and 3 in the odd ones, by lane of x:
//
//   lane          0       1       2       3       4       5       6       7
//   columns       c..c+3  (group 0)               c+4..c+7  (group 1)
//   even: row     0 a     0 b     1 a     1 b     0 a     0 b     1 a     1 b      a, b: the two kept weights of a group
//   odd: row      2 a     2 b     3 a     3 b     2 a     2 b     3 a     3 b
//
//   Bits 2 s and 2 s + 1 of word `lane` say which of the four columns of x that weight meets at step s (rows 0, 1), bits
//   16 + 2 s those of rows 2, 3: `vpermilps` moves that column to the lane, and one multiplication serves two rows.
//
// 2:4 int8, 4 rows, 160 bytes: 32 bytes of columns (2 bits for each of four steps), then four steps of 32 kept bytes. A step is
// 32 columns of two rows, and `vpshufb` moves the columns of x. int4 puts two steps into the halves of 32 bytes and ends
// with a bf16 scale for each row. Panels of 1:4 hold 8 rows in the same places: a group has one kept weight.
//
// 8 of 16 columns, 4 rows: 64 bytes of columns, 4 bits each, then the kept weights. In int8 these are the same four steps of 32
// bytes: a lane of 16 columns of x has 8 kept weights of each of two rows, in ascending order, and its four bits of columns (of the
// even step in the low half of a byte) are the control of `vpshufb` as they are. Of floats, a step is 16 columns of two rows, whose
// 8 kept weights are the lanes of a register: of bf16, those of the first row in the even places. Bits 4 j of word `slot` of the
// first 32 bytes of columns are those of row j % 4 in columns 16 (j / 4) on, of the second 32 bytes those of columns 32 on.
//
// The place of kept value `slot` of `group` (16 groups of four columns, or 4 of 16) of row `row` in a panel: the bits of its column
// within the group, and its value, at byte `value` (`value_shift` bits into it for int4).
//   floats: 8 words of metadata, word l for lane l = 4 * (group % 2) + n * (row % R) + slot, bits 16 h + 2 s of half
//     h = row / R and step s = group / 2, with R = 4 / n; then of bf16 per step 16 values, the halves interleaved, and of the
//     others per two steps and half 16 values, one step after the other.
//   8 and 4 bits, groups of four: 32 bytes of metadata, byte i = 16 * (group / 4 % 2) + 4 n * (row % R) + n * (group % 4) + slot, bits
//     2 s of step s = 2 h + group / 8; then per step 32 bytes, or of int4 per two steps, the first in the low halves.
struct Place {
  int mask_byte, mask_shift, value, value_shift;
};
INLINE Place place_in_panel(const Header& of, int64_t row, int group, int slot) {
  if (of.group() == 16 && of.values < kInt8) {
    const int j = 4 * (group % 2) + int(row), step = 2 * group + int(row / 2), half = int(row % 2);
    const int index = of.values == kBFloat16 ? 16 * step + 2 * slot + half : (step / 2 * 2 + half) * 16 + 8 * (step % 2) + slot;
    return {32 * (group / 2) + 4 * slot + j / 2, 4 * (j % 2), 64 + int(of.value_bytes()) * index, 0};
  }
  if (of.group() == 16) {
    const int byte = 16 * (group % 2) + int(8 * (row % 2)) + slot, step = 2 * int(row / 2) + group / 2;
    return {32 * (step / 2) + byte, 4 * (step % 2), 64 + 32 * step + byte, 0};
  }
  const int n = of.n, half = int(row / (4 / n)), row_of_half = int(row % (4 / n));
  if (of.values < kInt8) {
    const int lane = 4 * (group % 2) + n * row_of_half + slot, step = group / 2;
    const int pair = (step / 2 * 2 + half) * 16;
    const int index = of.values == kBFloat16 ? 16 * step + 2 * lane + half : pair + 8 * (step % 2) + lane;
    return {4 * lane + 2 * half + step / 4, step % 4 * 2, 32 + int(of.value_bytes()) * index, 0};
  }
  const int byte = 16 * (group / 4 % 2) + 4 * n * row_of_half + n * (group % 4) + slot, step = 2 * half + group / 8;
  if (of.values == kInt8) return {byte, 2 * step, 32 + 32 * step + byte, 0};
  return {byte, 2 * step, 32 + 32 * half + byte, step % 2 * 4};
}

// A panel of kLanes: the weights of 16 rows by 64 columns in steps of a few columns (`lane_columns`): 4 of int8, 2 of bf16, 1
// of fp16 and fp32. A step is 16 lanes, one for each row, and each lane has the columns of the step. int8:
//
//   step            0                                                        1                ...   15
//   row             0                1               ...   15                0
//   columns         0  1  2  3       0  1  2  3            0  1  2  3        4  5  6  7
//
// That is the order of the 1,024 bits of the mask, 128 bytes, the lowest bit of a byte first. The kept values follow in the
// same order without gaps, as many in each panel, since every row keeps n / m of its 64 columns: the bits of a step say how
// many of them it takes. A dense weight has all values and no mask. int4 has steps of 8 columns in two halves of eight rows:
//
//   half 0, the low four bits of each byte of values:    rows 0  1  4  5  8  9  12  13
//   half 1, the high four bits:                          rows 2  3  6  7 10 11  14  15
//
// The mask has the 64 bits of half 0 of step 0, then those of half 1, then step 1. Kept values of a half follow each other in
// its bits of the bytes, and 16 bf16 scales end the panel. So even columns of four, as 32-bit words of both halves, make the
// same 16 lanes as a step of int8. Of int8, fp32 scales of the rows follow all panels.
//
// int6 has 32 added, and its lowest four bits like a dense int4. Behind those 64 bytes of a step are 32 with the two highest bits:
//
//   bits of byte i of 32        0, 1                 2, 3                   4, 5                 6, 7
//   of byte of the 64           i, half 0            32 + i, half 0         i, half 1            32 + i, half 1
//
// Floats of which every four columns keep two need no mask. The first 64 bytes are a word for each row, with 2 bits for each group of
// four columns, the lowest ones for the first group: the column of its first kept value. The next 64 bytes are those of its
// second kept value. The values follow like those of a dense weight of 32 columns, of which a group takes two (`index_of_pair`).
struct Lane {
  int row, column;
};
INLINE Lane lane_of_bit(const Header& of, int bit) {  // of the mask of a panel
  const int columns = int(of.lane_columns()), lane = bit / columns % 16, column = bit / columns / 16 * columns + bit % columns;
  return {in_nibbles(of.values) ? lane % 8 / 2 * 4 + lane / 8 * 2 + lane % 2 : lane, column};
}
INLINE int bit_of_lane(const Header& of, int row, int column) {  // the opposite
  const int columns = int(of.lane_columns()), lane = in_nibbles(of.values) ? row % 4 / 2 * 8 + row / 4 * 2 + row % 2 : row;
  return (column / columns * 16 + lane) * columns + column % columns;
}
// The bytes of value `bit` of a dense panel of int4 or int6: its lowest four bits are at `shift` of byte `low`, and the two highest of
// int6 at `high_shift` of byte `high`.
struct Nibble {
  int low, shift, high, high_shift;
};
INLINE Nibble nibble_of_bit(const Header& of, int bit) {
  const int step = bit / 128 * int(of.panel_bytes() - 32) / 8;
  return {step + bit % 64, bit % 128 / 64 * 4, step + 64 + bit % 32, bit % 128 / 32 * 2};
}
constexpr int kInt6Step = 96;  // bytes of a step of int6
INLINE int64_t index_of_pair(const Header& of, int row, int slot) {  // of kept value `slot` of 32 among the values of a panel of pairs
  const int64_t columns = of.lane_columns();
  return (slot / columns * 16 + row) * columns + slot % columns;
}
constexpr int64_t kLanesSlack = 64;  // bytes after the data, which a load of the last values may reach

// For the kernels of panels: 0 of a dense weight, 1 and 2 of 1:4 and 2:4, 4 of 4:8, 8 of 8:16.
INLINE int panel_kind(const Header& of) { return of.m == 0 || of.m == 4 ? of.n : of.m == 16 ? 8 : 4; }

// What an entry point returns.
enum Error : int { kOk = 0, kBadSize = 1, kBadMask = 2, kNoMemory = 3 };

// Runs an entry point, whose caller in Python knows no exceptions of C++: the kernels throw none but for want of memory.
template <class Entry>
int guarded(Entry entry) {
  try {
    return entry();
  } catch (const std::exception&) {
    return kNoMemory;
  }
}

// Whether the mask of a file keeps exactly n of every m.
bool mask_is_nm(const Header&, const uint8_t* mask);
// Rows of int4 with the zeros between the kept values, as a file has them where a weight is dense.
std::vector<uint8_t> dense_int4(const Header&, const uint8_t* values, const uint8_t* mask);
// Writes the tensors of a file to `data`, which is zero, in the layout of the header.
void repack(const Header&, const uint8_t* values, const uint8_t* mask, const float* scales, uint8_t* data, int threads);

// A packed weight, and where its product with x goes.
struct Product {
  const uint8_t* packed;
  int64_t bytes;
  uint8_t* y;  // (batch, rows)
  int64_t rows;
};
// `castlm_multiply` of x by several weights, with exceptions. x takes the form of a kernel once for weights in a row that are stored
// alike.
int multiply(const Product* products, int64_t count, const uint8_t* x, int is_bfloat16, int64_t batch, int64_t columns, int threads);

// Rows of tiles [first, last) times x: y[b * ldy + row].
using Multiply = void (*)(const Header&, const uint8_t* data, const Activations&, float* y, int64_t ldy, int64_t first,
                          int64_t last);

// Brings rows [first, last) of fp32 x (rows, padded columns) into the order that a kernel reads, in `room` (`form_bytes`), and says
// where all rows are or will be: several threads may fill rows of one room.
using Form = Activations (*)(const Header&, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room);
inline int64_t form_bytes(const Header& of, int64_t rows) { return (rows + 16) * of.padded() * 4; }  // that any of the forms needs

// How a level multiplies rows of x by a matrix.
struct Kernel {
  Form form;
  Multiply multiply;
  int64_t multiple_of_rows = 1;     // rows of x that it takes; more are filled up with zeros
  int64_t multiple_of_tiles = 1;    // tiles of the matrix that a thread should take
  int64_t multiple_of_outputs = 1;  // outputs that it writes: y has room for those that the matrix lacks
};

// The header of a buffer of `bytes` bytes; false where it is none.
bool read_header(const uint8_t* packed, int64_t bytes, Header& of);

extern const bool is_intel;  // whether the processor is Intel's

// ---- what the files for AVX2 share with others

int64_t avx2_expand(const Header&, const uint8_t* from, const uint8_t* mask, int64_t num_bytes, float* to);
// A tile of panels as fp32, all of its rows, `padded()` columns of each, `ld` apart.
void avx2_expand_tile(const Header& of, const uint8_t* data, int64_t tile, float* to, int64_t ld);
// x as int8 with a scale for each block, row by row.
Activations avx2_integers(const Header&, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room);
// What a block of int8 activations adds to its products with int4 that have 8 added, negative.
int32_t avx2_offset(const int8_t* narrow);

}  // namespace castlm
