// Integer weights times many rows of x (prompts, large batches) with AVX2.
//
// A single row of x is bound by the bytes of the weights, and `kernels_avx2.cpp` decodes them again for every four rows.
// Many rows are bound by instructions, and most of all by those that multiply. `vpmaddubsw` takes one unsigned factor, |w|, so
// that x needs the sign of w. x therefore lies beside its negative, and the shuffle that picks the columns of the kept weights
// picks the signs with them.
//
//   a lane of 16 bytes of x:         | columns c .. c + 7 | the same, negative |
//   a vector, i = 0, 1, q = 0, 1:    | lane of c = 32 i + 8 q | lane of c = 32 i + 8 q + 16 |
//   eight rows by 64 columns:        | row 0: i = 0, 1 | row 1: i = 0, 1 | ... |     those of all blocks for q = 0, then q = 1
//
// The weights of four tiles are decoded once per `kPromptRows` rows of x into the operands of the instructions, in a buffer
// that stays in the first-level cache. A record is half of the columns (q) of a block of 64, for four rows of 2:4,
// whose weights for its columns a lane holds side by side:
//
//   2:4:     | 4 of row 0 | 4 of row 1 | 4 of row 2 | 4 of row 3 |
//   record:  | control 0 | magnitude 0 | control 1 | magnitude 1 |     32 bytes each, for i = 0, 1; of int4 | scales | too
//   1:4:     | 2 of row 0 | ... | 2 of row 7 |                         one record for both q
//   4:8:     as 2:4: eight columns and their negatives hold what four kept weights of a row meet
//
// 8 of 16 columns need all 16 bytes of a lane, so that x lies there as it is, the sign is an instruction of its own, and a record
// is two rows by all columns of a block:
//
//   a vector of x, i = 0, 1:         | columns 32 i .. 32 i + 15 | 32 i + 16 .. 32 i + 31 |
//   8:16:    | 8 of row 0 | 8 of row 1 |            | control 0 | magnitude 0 | weights 0 | control 1 | magnitude 1 | weights 1 |
//
// One record meets eight rows of x. For 32 kept weights, which stand for 64 columns of 2:4, that is a shuffle of x, a
// product (`vpmaddubsw`), a widening sum (`vpmaddwd`) and an addition. The integer sums are exact and the others run in the
// order of `kernels_avx2.cpp`, so that both give the same bits.

#include <algorithm>

#include "avx2.h"
#include "plain.h"

#if defined(CASTLM_AVX2)

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace {

constexpr int kRowsAtOnce = 8;          // rows of x that share a record while it is in registers
constexpr int kTilesAtOnce = 4;         // tiles that share rows of x, and complete a cache line of each row of y
constexpr int64_t kDecodedBlocks = 12;  // blocks of 64 columns of these tiles that are decoded at once: 12 KiB of 2:4 int8
constexpr int64_t kPromptRows = 128;    // rows of x that these meet

INLINE __m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
INLINE void store(uint8_t*& to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes), to += 32; }

// A load that stays one: compilers repeat it for each use, as an operand in memory, and here loads are short.
INLINE __m256i load_once(const void* at) {
  __m256i bytes = load(at);
  asm("" : "+x"(bytes));
  return bytes;
}

// Whether x has its negative beside it, in two parts: q = 0 and 1.
template <int n>
constexpr bool has_negative() { return n != 8; }
constexpr int64_t kRowBytes = 64;  // of a row of x by a record's columns of a block
constexpr int64_t num_parts_of_x(bool negative) { return negative ? 2 : 1; }

// Where weights `w` find their x: `columns`, or the same place of the negative.
INLINE void store_signed(uint8_t*& to, __m256i columns, __m256i w) {
  const __m256i negative = _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(8));
  store(to, _mm256_or_si256(columns, negative));
  store(to, _mm256_abs_epi8(w));
}

// ---- records of weights

template <int n, bool is_int4>
constexpr int64_t record_bytes() {
  if (n == 1) return 8 * 32 + (is_int4 ? 2 * 32 : 0);
  return (has_negative<n>() ? 4 : 6) * 32 + (is_int4 ? 32 : 0);
}

// Records of a tile: 2:4 has those of q = 0, then of q = 1; 8:16 has those of rows 0 and 1, then of rows 2 and 3.
template <int n>
constexpr int num_records() { return n == 1 ? 1 : 2; }

// The weights of both halves of a panel's rows at one step, in the order of the records of `q`.
template <int n>
INLINE __m256i of_columns(__m256i first, __m256i second, int q) {
  if (n != 1) {
    const __m256 a = _mm256_castsi256_ps(first), b = _mm256_castsi256_ps(second);
    return _mm256_castps_si256(q ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88));
  }
  const __m256i low = _mm256_set1_epi32(0xffff);
  return q ? _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16))
           : _mm256_packus_epi32(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
}

template <int n, bool is_int4>
INLINE void decode_panels(const uint8_t* panel, int64_t blocks, uint8_t* decoded) {
  constexpr int64_t kRecord = record_bytes<n, is_int4>();
  const __m256i groups = n == 2 ? _mm256_set1_epi32(0x04040000) : _mm256_set1_epi16(0x0400);
  const __m256i low_two = _mm256_set1_epi8(3), low_three = _mm256_set1_epi8(7);
  for (int64_t block = 0; block < blocks; block++, panel += integer_panel_bytes<n, is_int4>()) {
    const __m256i meta = load_bytes(panel);
    const auto columns = [&](int step) {  // of eight
      if (n == 4) return _mm256_and_si256(control_of_step<n>(panel, meta, step), low_three);
      return _mm256_and_si256(_mm256_srli_epi16(meta, 2 * step), low_two);
    };
    uint8_t* to = decoded + block * kRecord;
    for (int q = 0; q < 2; q++) {
      for (int i = 0; i < 2; i++) {  // columns 0..31 and 32..63
        const __m256i w = of_columns<n>(kept_of_step<n, is_int4>(panel, i), kept_of_step<n, is_int4>(panel, 2 + i), q);
        const __m256i here = of_columns<n>(columns(i), columns(2 + i), q);
        store_signed(to, n == 4 ? here : _mm256_or_si256(here, groups), w);
      }
      if (n == 2 && is_int4) {
        const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel + 96))), 16);
        store(to, _mm256_broadcastsi128_si256(wide));
      }
      if (n != 1) to = decoded + (blocks + block) * kRecord;
    }
    if (n == 1 && is_int4) {
      __m256 scales[2];
      row_scales<n>(panel + 96, scales);
      for (const __m256& half : scales) store(to, _mm256_castps_si256(half));
    }
  }
}

// The records of 8:16.
INLINE void decode_halves(const uint8_t* panel, int64_t blocks, uint8_t* decoded) {
  for (int64_t block = 0; block < blocks; block++, panel += integer_panel_bytes<8, false>())
    for (int step = 0; step < 4; step++) {
      uint8_t* to = decoded + (step / 2 * blocks + block) * record_bytes<8, false>() + step % 2 * 96;
      const __m256i w = kept_of_step<8, false>(panel, step);
      store(to, control_of_step<8>(panel, w, step)), store(to, _mm256_abs_epi8(w)), store(to, w);
    }
}

// Two rows by 32 columns as two vectors: q = 0 and q = 1.
INLINE __m256i of_two_rows(__m256i first, __m256i second, int q) {
  return q ? _mm256_unpackhi_epi64(first, second) : _mm256_unpacklo_epi64(first, second);
}

// ---- products

// The records of half of the columns, or of two rows, times eight rows of x, added to `sums`: 8 floats for each row of x.
template <bool negative, bool is_int4>
INLINE void multiply_half(const uint8_t* record, int64_t blocks, const int8_t* x, const float* scales, bool starts, float* sums) {
  constexpr int kStep = negative ? 64 : 96;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[kRowsAtOnce];
  for (int b = 0; b < kRowsAtOnce; b++) sum[b] = starts ? _mm256_setzero_ps() : _mm256_load_ps(sums + 8 * b);
  for (int64_t block = 0; block < blocks; block++, record += 2 * kStep + (is_int4 ? 32 : 0), x += kRowsAtOnce * kRowBytes, scales += kRowsAtOnce) {
    __m256i control[2], w[2];
    for (int i = 0; i < 2; i++) {
      control[i] = load_once(record + kStep * i);
      w[i] = load_once(record + kStep * i + 32);
    }
    const __m256 w_scale = is_int4 ? _mm256_castsi256_ps(load_once(record + 2 * kStep)) : _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int b = 0; b < kRowsAtOnce; b++) {
      const int8_t* row = x + b * kRowBytes;
      __m256i pairs[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        __m256i v = _mm256_shuffle_epi8(load(row + 32 * i), control[i]);
        if (!negative) v = _mm256_sign_epi8(v, load(record + kStep * i + 64));
        pairs[i] = _mm256_maddubs_epi16(w[i], v);
      }
      __m256 scale = _mm256_broadcast_ss(scales + b);
      __m256i total;
      if (is_int4) {  // at most 4 * 15 * 127 in 16 bits
        total = _mm256_madd_epi16(_mm256_add_epi16(pairs[0], pairs[1]), ones);
        scale = _mm256_mul_ps(scale, w_scale);
      } else {
        total = _mm256_add_epi32(_mm256_madd_epi16(pairs[0], ones), _mm256_madd_epi16(pairs[1], ones));
      }
      sum[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sum[b]);
    }
  }
  for (int b = 0; b < kRowsAtOnce; b++) _mm256_store_ps(sums + 8 * b, sum[b]);
}

// The records of 1:4 times two rows of x: rows 0 to 3 of the panel in `sums`, rows 4 to 7 in `more`. `second`: x of q = 1.
template <bool is_int4>
INLINE void multiply_eight(const uint8_t* record, int64_t blocks, const int8_t* x, const int8_t* second,
                           const float* scales, bool starts, float* sums, float* more) {
  constexpr int64_t kStep = kRowsAtOnce * kRowBytes;
  const __m256i ones = _mm256_set1_epi16(1);
  const auto low = [&](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), ones); };
  const auto high = [&](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), ones); };
  __m256 sum[2][2];
  for (int b = 0; b < 2; b++) {
    sum[b][0] = starts ? _mm256_setzero_ps() : _mm256_load_ps(sums + 8 * b);
    sum[b][1] = starts ? _mm256_setzero_ps() : _mm256_load_ps(more + 8 * b);
  }
  for (int64_t block = 0; block < blocks;
       block++, record += record_bytes<1, is_int4>(), x += kStep, second += kStep, scales += kRowsAtOnce) {
    __m256i total[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const __m256i control[2] = {load_once(record + 64 * i), load_once(record + 128 + 64 * i)};
      const __m256i w[2] = {load_once(record + 64 * i + 32), load_once(record + 128 + 64 * i + 32)};
#pragma GCC unroll 2
      for (int b = 0; b < 2; b++) {
        const __m256i first = _mm256_maddubs_epi16(w[0], _mm256_shuffle_epi8(load(x + 64 * b + 32 * i), control[0]));
        const __m256i last = _mm256_maddubs_epi16(w[1], _mm256_shuffle_epi8(load(second + 64 * b + 32 * i), control[1]));
        if (is_int4) {  // 16 bits hold both steps
          total[b][0] = i ? _mm256_add_epi16(total[b][0], first) : first;
          total[b][1] = i ? _mm256_add_epi16(total[b][1], last) : last;
        } else {
          total[b][0] = i ? _mm256_add_epi32(total[b][0], low(first, last)) : low(first, last);
          total[b][1] = i ? _mm256_add_epi32(total[b][1], high(first, last)) : high(first, last);
        }
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < 2; b++) {
      const __m256i rows[2] = {is_int4 ? low(total[b][0], total[b][1]) : total[b][0],
                               is_int4 ? high(total[b][0], total[b][1]) : total[b][1]};
      const __m256 scale = _mm256_broadcast_ss(scales + b);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m256 w_scale = _mm256_castsi256_ps(load(record + (is_int4 ? 256 + 32 * half : 0)));
        sum[b][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(rows[half]), is_int4 ? _mm256_mul_ps(scale, w_scale) : scale,
                                       sum[b][half]);
      }
    }
  }
  for (int b = 0; b < 2; b++) _mm256_store_ps(sums + 8 * b, sum[b][0]), _mm256_store_ps(more + 8 * b, sum[b][1]);
}

// ---- tiles

constexpr int kSums = kRowsAtOnce * 8;  // of a record, or of half of the rows of 1:4, by eight rows of x

constexpr int kParts = 2;  // sums of a tile: of its records, or of halves of the rows of 1:4

// All records of `count` blocks of a tile times eight rows of x. `second`: x of q = 1.
template <int n, bool is_int4>
INLINE void multiply_tile(const uint8_t* records, int64_t count, const int8_t* x, const int8_t* second, const float* scales, bool starts,
                          float (*sums)[kSums]) {
  if constexpr (n == 1) {
    for (int b = 0; b < kRowsAtOnce; b += 2)
      multiply_eight<is_int4>(records, count, x + 64 * b, second + 64 * b, scales + b, starts, sums[0] + 8 * b, sums[1] + 8 * b);
  } else {
    multiply_half<has_negative<n>(), is_int4>(records, count, x, scales, starts, sums[0]);
    multiply_half<has_negative<n>(), is_int4>(records + count * record_bytes<n, is_int4>(), count, second, scales, starts, sums[1]);
  }
}

// The outputs of a tile for up to eight rows of x.
template <int n, int values>
INLINE void write_tile(const float (*sums)[kSums], const float* row_scales, int64_t num_rows, int64_t batch, float* y,
                       int64_t ldy) {
  constexpr int kTileRows = n == 1 ? 8 : 4;
  for (int64_t b = 0; b < batch; b++, y += ldy) {
    __m128 four[kParts];
    for (int part = 0; part < kParts; part++)
      four[part] = _mm_add_ps(_mm_load_ps(sums[part] + 8 * b), _mm_load_ps(sums[part] + 8 * b + 4));
    __m128 outputs[kTileRows / 4];
    if constexpr (n == 1) {
      outputs[0] = four[0], outputs[1] = four[1];
    } else if constexpr (n == 8) {
      outputs[0] = _mm_hadd_ps(four[0], four[1]);
    } else {
      outputs[0] = _mm_add_ps(four[0], four[1]);
    }
    for (int half = 0; half < kTileRows / 4; half++) {
      if (values == kInt8) outputs[half] = _mm_mul_ps(outputs[half], _mm_loadu_ps(row_scales + 4 * half));
      if (num_rows == kTileRows) _mm_storeu_ps(y + 4 * half, outputs[half]);
    }
    if (num_rows < kTileRows) std::memcpy(y, outputs, num_rows * 4);
  }
}

// As `Multiply`, for x as `in_groups` lays it out.
template <int n, int values>
void multiply_prompt(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                     int64_t last) {
  constexpr bool is_int4 = values == kInt4;
  constexpr int kTileRows = n == 1 ? 8 : 4;
  constexpr int64_t kPartsOfX = num_parts_of_x(has_negative<n>()), kPart = kRowsAtOnce * kRowBytes;
  alignas(64) uint8_t decoded[kTilesAtOnce][num_records<n>() * kDecodedBlocks * record_bytes<n, is_int4>()];
  alignas(64) float sums[kPromptRows / kRowsAtOnce][kTilesAtOnce][kParts][kSums];
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes();
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * blocks * bytes);  // of int8 alone
  for (int64_t start = 0; start < x.batch; start += kPromptRows)
    for (int64_t tile = first; tile < last; tile += kTilesAtOnce) {
      const int64_t tiles = smaller(kTilesAtOnce, last - tile);
      for (int64_t k = 0; k < blocks; k += kDecodedBlocks) {
        const int64_t count = smaller(kDecodedBlocks, blocks - k);
        for (int64_t t = 0; t < tiles; t++) {
          const uint8_t* weights = data + ((tile + t) * blocks + k) * bytes;
          if constexpr (n == 8) decode_halves(weights, count, decoded[t]);
          else decode_panels<n, is_int4>(weights, count, decoded[t]);
        }
        for (int64_t b = start; b < smaller(start + kPromptRows, x.batch); b += kRowsAtOnce) {
          const int8_t* narrow = x.narrow + (kPartsOfX * b / kRowsAtOnce * blocks + k) * kPart;
          const float* scales = x.scales + b * blocks + k * kRowsAtOnce;
          for (int64_t t = 0; t < tiles; t++) {
            float(*to)[kSums] = sums[blocks > kDecodedBlocks ? (b - start) / kRowsAtOnce : 0][t];
            multiply_tile<n, is_int4>(decoded[t], count, narrow, narrow + (kPartsOfX - 1) * blocks * kPart, scales, k == 0, to);
            if (k + count < blocks) continue;
            const int64_t row = (tile + t) * kTileRows, rows = smaller(kTileRows, of.rows - row);
            write_tile<n, values>(to, row_scales + row, rows, smaller(kRowsAtOnce, x.batch - b), y + b * ldy + row, ldy);
          }
        }
      }
    }
}

template <int values>
Multiply prompt_kernel(const Header& of) {
  if constexpr (values == kInt8)
    if (panel_kind(of) > 2) return panel_kind(of) == 4 ? multiply_prompt<4, values> : multiply_prompt<8, values>;
  return of.n == 1 ? multiply_prompt<1, values> : multiply_prompt<2, values>;
}

}  // namespace

// Rows of x as `multiply_prompt` takes them, in whole groups.
static Activations in_groups(const Header& of, const float* wide, int64_t batch, int64_t first, int64_t last, uint8_t* room) {
  const Activations x = avx2_integers(of, wide, batch, first, last, room);
  const bool negative = panel_kind(of) != 8;
  const int64_t blocks = of.blocks(), rows = (batch + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
  const int64_t part = kRowsAtOnce * kRowBytes, parts = num_parts_of_x(negative);
  auto* narrow = reinterpret_cast<int8_t*>(room + batch * blocks * (kBlock + 4) / 64 * 64 + 64);
  auto* scales = reinterpret_cast<float*>(narrow + rows * blocks * parts * kRowBytes);
  const auto put = [](int8_t* to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes); };
  for (int64_t row = first; row < (last == batch ? rows : last); row++) {
    const int64_t group = row / kRowsAtOnce, in_group = row % kRowsAtOnce;
    float* of_group = scales + group * blocks * kRowsAtOnce + in_group;
    if (row >= x.batch) {  // its sums are not written, whatever its integers
      for (int64_t block = 0; block < blocks; block++) of_group[block * kRowsAtOnce] = 0;
      continue;
    }
    int8_t* to = narrow + group * parts * blocks * part + in_group * kRowBytes;
    const int8_t* from = x.narrow + row * of.padded();
    for (int64_t block = 0; block < blocks; block++, to += part, from += kBlock) {
      of_group[block * kRowsAtOnce] = x.scales[row * blocks + block];
      for (int i = 0; i < 2; i++) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
        const __m256i beside = _mm256_sub_epi8(_mm256_setzero_si256(), v);
        if (!negative) put(to + 32 * i, v);
        for (int q = 0; negative && q < 2; q++) put(to + q * blocks * part + 32 * i, of_two_rows(v, beside, q));
      }
    }
  }
  return {wide, narrow, scales, nullptr, batch};
}

Kernel avx2_panels_of_many(const Header& of, int64_t, bool) {
  return {in_groups, of.values == kInt4 ? prompt_kernel<kInt4>(of) : prompt_kernel<kInt8>(of), 4, 4};
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
Kernel avx2_panels_of_many(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
