// Integer weights times many rows of x (prompts, large batches) with AVX2.
//
// A single row of x is bound by the bytes of the weights, and `kernels_avx2.cpp` decodes them again for every four rows.
// Many rows are bound by instructions. Here the weights of four tiles are decoded once per `kPromptRows` rows of x into the
// operands of the instructions, in a buffer that stays in the first-level cache, while x comes from the second:
//
//   n:m, a panel (4 rows by 64 columns of 2:4, 8 rows of 1:4), a record for each half of its rows:
//     int8: | control 0 | w 0 | magnitude 0 | control 1 | w 1 | magnitude 1 |     32 bytes each
//             columns 0..31: which byte of x each kept weight meets, w, |w|   columns 32..63
//     int4: | control 0 | w 0 | control 1 | w 1 | scales | -128 times the sum of the weights of each 32-bit lane |
//   dense, a record for each of the four rows of a block of 64 columns:
//     | w 0 | magnitude 0 | w 1 | magnitude 1 |  of int8,  | w + 8, columns 0..31 | columns 32..63 | scale |  of int4
//
// One record then meets four rows of x. For 32 kept weights, which stand for 64 columns of 2:4, that is a shuffle of x,
// a sign, a product (`vpmaddubsw`), a widening sum (`vpmaddwd`) and an addition. Products of int4 are so small that x can
// be the unsigned factor, as x + 128, without the sign; one addition takes 128 times the weights off again. The integer
// sums are exact and the others run in the order of `kernels_avx2.cpp`, so that both give the same bits.

#include "avx2.h"

#if defined(CASTLM_AVX2)

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace {

constexpr int kBias = 128;            // added to x where it is the unsigned factor
constexpr int kRowsAtOnce = 4;        // rows of x that share a record while it is in registers
constexpr int kTilesAtOnce = 4;       // tiles that share rows of x, and complete a cache line of each row of y
constexpr int64_t kDecodedBlocks = 12;  // blocks of 64 columns of these tiles that are decoded at once: 18 KiB of 2:4 int8

INLINE __m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
INLINE __m256i load_x(const int8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE void store(uint8_t*& to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes), to += 32; }

// ---- n:m

constexpr int64_t kPanelRecord = 6 * 32;

// Decodes `blocks` panels: the records of the first half of their rows, then the others.
template <int n, bool is_int4>
INLINE void decode_panels(const uint8_t* panel, int64_t blocks, uint8_t* decoded) {
  const __m256i ones = _mm256_set1_epi16(1), bias = _mm256_set1_epi8(char(kBias));
  for (int64_t block = 0; block < blocks; block++, panel += integer_panel_bytes<n, is_int4>()) {
    const __m256i meta = load_bytes(panel);
    __m256 scales[2];
    if (is_int4) row_scales<n>(panel + 96, scales);
    for (int half = 0; half < 2; half++) {
      uint8_t* to = decoded + (half * blocks + block) * kPanelRecord;
      __m256i excess = _mm256_setzero_si256();
      for (int columns = 0; columns < 2; columns++) {  // 0..31 and 32..63
        const int step = 2 * half + columns;
        const __m256i w = kept_of_step<is_int4>(panel, step);
        store(to, control_of_step<n>(meta, step));
        store(to, w);
        if (!is_int4) store(to, _mm256_abs_epi8(w));
        else excess = _mm256_sub_epi32(excess, _mm256_madd_epi16(_mm256_maddubs_epi16(bias, w), ones));
      }
      if (is_int4) store(to, _mm256_castps_si256(scales[half])), store(to, excess);
    }
  }
}

// The records of one half times four rows of x, added to `sums`: 8 floats for each row of x.
template <bool is_int4>
INLINE void multiply_panels(const uint8_t* record, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                            int64_t ld_scales, bool starts, float* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[kRowsAtOnce];
  for (int b = 0; b < kRowsAtOnce; b++) sum[b] = starts ? _mm256_setzero_ps() : _mm256_load_ps(sums + 8 * b);
  for (int64_t block = 0; block < blocks; block++, record += kPanelRecord, x += kBlock, scales++) {
    constexpr int kSecond = is_int4 ? 64 : 96;  // the record's part for columns 32..63
    const __m256i control[2] = {load(record), load(record + kSecond)};
    const __m256i w[2] = {load(record + 32), load(record + kSecond + 32)};
    const __m256i magnitude[2] = {load(record + 64), load(record + 160)};  // of int8 alone
    const __m256 w_scale = _mm256_castsi256_ps(load(record + 128));        // of int4 alone
    const __m256i excess = load(record + 160);                             // of int4 alone
#pragma GCC unroll 4
    for (int b = 0; b < kRowsAtOnce; b++) {
      const int8_t* row = x + b * ldx;
      const __m256i first = _mm256_shuffle_epi8(load_x(row), control[0]);
      const __m256i second = _mm256_shuffle_epi8(load_x(row + 32), control[1]);
      __m256 scale = _mm256_broadcast_ss(scales + b * ld_scales);
      __m256i total;
      if (is_int4) {  // at most 4 * 8 * 255 in 16 bits
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(first, w[0]), _mm256_maddubs_epi16(second, w[1]));
        total = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), excess);
        scale = _mm256_mul_ps(scale, w_scale);
      } else {
        total = _mm256_add_epi32(_mm256_madd_epi16(dot_bytes(magnitude[0], w[0], first), ones),
                                 _mm256_madd_epi16(dot_bytes(magnitude[1], w[1], second), ones));
      }
      sum[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sum[b]);
    }
  }
  for (int b = 0; b < kRowsAtOnce; b++) _mm256_store_ps(sums + 8 * b, sum[b]);
}

// ---- dense

template <bool is_int4>
constexpr int64_t dense_record() { return is_int4 ? 3 * 32 : 4 * 32; }

// Decodes `blocks` blocks of four rows: the records of the first row, then those of the others.
template <bool is_int4>
INLINE void decode_rows(const uint8_t* row, int64_t blocks, uint8_t* decoded) {
  constexpr int kBytes = is_int4 ? 34 : 64;
  const __m256i low_four = _mm256_set1_epi8(15);
  for (int64_t block = 0; block < blocks; block++)
    for (int r = 0; r < 4; r++, row += kBytes) {
      uint8_t* to = decoded + (r * blocks + block) * dense_record<is_int4>();
      for (int columns = 0; columns < 2; columns++) {
        const __m256i bytes = load_bytes(row + (is_int4 ? 0 : 32 * columns));
        if (is_int4) store(to, _mm256_and_si256(columns ? _mm256_srli_epi16(bytes, 4) : bytes, low_four));
        else store(to, bytes), store(to, _mm256_abs_epi8(bytes));
      }
      if (is_int4) store(to, _mm256_castps_si256(high_halves(load32(row + 30))));
    }
}

// The records of one row times four rows of x. `offsets` takes off the 8 that int4 have added.
template <bool is_int4>
INLINE void multiply_row(const uint8_t* record, int64_t blocks, const int8_t* x, int64_t ldx, const float* scales,
                         const int32_t* offsets, int64_t ld_scales, bool starts, float* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[kRowsAtOnce];
  for (int b = 0; b < kRowsAtOnce; b++) sum[b] = starts ? _mm256_setzero_ps() : _mm256_load_ps(sums + 8 * b);
  for (int64_t block = 0; block < blocks; block++, record += dense_record<is_int4>(), x += kBlock, scales++) {
    const __m256i w[2] = {load(record), load(record + (is_int4 ? 32 : 64))};
    const __m256i magnitude[2] = {load(record + 32), load(record + (is_int4 ? 32 : 96))};  // of int8 alone
    const __m256 w_scale = _mm256_castsi256_ps(load(record + 64));                         // of int4 alone
#pragma GCC unroll 4
    for (int b = 0; b < kRowsAtOnce; b++) {
      const __m256i v[2] = {load_x(x + b * ldx), load_x(x + b * ldx + 32)};
      __m256 scale = _mm256_broadcast_ss(scales + b * ld_scales);
      __m256i total;
      if (is_int4) {
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], v[0]), _mm256_maddubs_epi16(w[1], v[1]));
        const int32_t offset = offsets[block + b * ld_scales];
        total = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), _mm256_castsi128_si256(_mm_cvtsi32_si128(offset)));
        scale = _mm256_mul_ps(w_scale, scale);
      } else {
        total = _mm256_add_epi32(_mm256_madd_epi16(dot_bytes(magnitude[0], w[0], v[0]), ones),
                                 _mm256_madd_epi16(dot_bytes(magnitude[1], w[1], v[1]), ones));
      }
      sum[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sum[b]);
    }
  }
  for (int b = 0; b < kRowsAtOnce; b++) _mm256_store_ps(sums + 8 * b, sum[b]);
}

// ---- tiles

constexpr int kSums = kRowsAtOnce * 8;  // of a part (a half of a panel's rows, or a dense row) by four rows of x

// The outputs of a tile for four rows of x: `sums` has those of each part.
template <int n, int values>
INLINE void write_tile(const float (*sums)[kSums], const float* row_scales, int64_t num_rows, float* y, int64_t ldy) {
  constexpr int kParts = n ? 2 : 4, kTileRows = n == 1 ? 8 : 4;
  for (int b = 0; b < kRowsAtOnce; b++, y += ldy) {
    __m256 parts[kParts];
    for (int part = 0; part < kParts; part++) parts[part] = _mm256_load_ps(sums[part] + 8 * b);
    __m128 outputs[kTileRows / 4];
    tile_outputs<n>(parts, outputs);
    for (int four = 0; four < kTileRows / 4; four++) {
      if (values == kInt8) outputs[four] = _mm_mul_ps(outputs[four], _mm_loadu_ps(row_scales + 4 * four));
      if (num_rows == kTileRows) _mm_storeu_ps(y + 4 * four, outputs[four]);
    }
    if (num_rows < kTileRows) std::memcpy(y, outputs, num_rows * 4);
  }
}

// As `Multiply`, for up to `kPromptRows` rows of x. n = 0 is dense.
template <int n, int values>
void multiply_prompt(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first,
                     int64_t last) {
  constexpr bool is_int4 = values == kInt4;
  constexpr int kParts = n ? 2 : 4;
  constexpr int kTileRows = n == 1 ? 8 : 4;
  constexpr int64_t kRecord = n ? kPanelRecord : dense_record<is_int4>();
  alignas(64) uint8_t decoded[kTilesAtOnce][kParts * kDecodedBlocks * kRecord];
  alignas(64) float sums[kPromptRows / kRowsAtOnce][kTilesAtOnce][kParts][kSums];
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t blocks = of.blocks(), width = of.padded(), bytes = of.panel_bytes();
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * blocks * bytes);  // of int8 alone
  for (int64_t tile = first; tile < last; tile += kTilesAtOnce) {
    const int64_t tiles = smaller(kTilesAtOnce, last - tile);
    for (int64_t k = 0; k < blocks; k += kDecodedBlocks) {
      const int64_t count = smaller(kDecodedBlocks, blocks - k);
      for (int64_t t = 0; t < tiles; t++) {
        const uint8_t* weights = data + ((tile + t) * blocks + k) * bytes;
        if constexpr (n > 0) decode_panels<n, is_int4>(weights, count, decoded[t]);
        else decode_rows<is_int4>(weights, count, decoded[t]);
      }
      for (int64_t b = 0; b < x.batch; b += kRowsAtOnce) {
        const int8_t* narrow = x.narrow + b * width + k * kBlock;
        const int64_t scale = b * blocks + k;
        for (int64_t t = 0; t < tiles; t++) {
          float(*to)[kSums] = sums[blocks > kDecodedBlocks ? b / kRowsAtOnce : 0][t];
          for (int part = 0; part < kParts; part++) {
            const uint8_t* records = decoded[t] + part * count * kRecord;
            if constexpr (n > 0)
              multiply_panels<is_int4>(records, count, narrow, width, x.scales + scale, blocks, k == 0, to[part]);
            else
              multiply_row<is_int4>(records, count, narrow, width, x.scales + scale,
                                    is_int4 ? x.offsets + scale : nullptr, blocks, k == 0, to[part]);
          }
          if (k + count < blocks) continue;
          const int64_t row = (tile + t) * kTileRows;
          write_tile<n, values>(to, row_scales + row, smaller(kTileRows, of.rows - row), y + b * ldy + row, ldy);
        }
      }
    }
  }
}

template <int values>
Multiply prompt_kernel(const Header& of) {
  return of.n == 0 ? multiply_prompt<0, values> : of.n == 1 ? multiply_prompt<1, values> : multiply_prompt<2, values>;
}

}  // namespace

bool avx2_prompt_gains(const Header& of, int64_t batch) { return of.values >= kInt8 && batch > kMaxBatch; }

Multiply avx2_prompt(const Header& of) {
  return of.values == kInt4 ? prompt_kernel<kInt4>(of) : prompt_kernel<kInt8>(of);
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool avx2_prompt_gains(const Header&, int64_t) { return false; }
Multiply avx2_prompt(const Header&) { return nullptr; }
}  // namespace castlm

#endif
