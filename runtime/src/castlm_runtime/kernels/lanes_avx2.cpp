// The AVX2 kernels of kLanes (matrix.h draws a panel): every n:m whose m divides 64, and dense weights. The lanes of a register are
// outputs, so that x is broadcast and no sum crosses lanes.
//
// Kept values go to their columns by a table: a byte of the mask has the shuffle of eight columns, and the mask's population
// count moves the pointer to the next kept values. One row of x, and few, are multiplied as the weights are expanded. More rows
// meet a panel that is expanded once, in the first-level cache: floats to fp32, six rows by 16 outputs at a time, and integers four
// rows by 16 outputs. Steps of these:
//
//   int8: | controls of 8 outputs | of 8 more | magnitudes | of 8 more |     128 bytes: 4 columns, or 4 of 8
//   int4: | codes + 8 of 8 outputs by 4 columns | of 8 more |                64 bytes, int6 likewise with 32 added
//
// `vpmaddubsw` takes one unsigned factor: |w|, or the codes of int4 with 8 added, whose excess the offset of x takes off. For
// |w|, x lies beside its negative, eight columns of each in turns, and a shuffle (the control) picks the sign, which
// is faster than `vpsignb` on Zen 4. That shuffle can as well pick columns: a pattern that never keeps more than 4 of 8 columns
// takes half of the steps. 16 bits hold the sums of 32 columns of int4, and of 8 columns of int6.

#include <algorithm>
#include <array>

#include "avx2.h"
#include "lane_tables.h"
#include "plain.h"

#if defined(CASTLM_AVX2)

namespace castlm {
namespace {

// Made when the library is loaded, by any processor, and so not compiled for AVX2.
struct Tables : LaneTables {
  alignas(64) uint32_t first_kept[256];  // places of up to four kept columns of eight, a byte each, filled with 0x80
  Tables() {
    for (int byte = 0; byte < 256; byte++) {
      first_kept[byte] = 0x80808080;
      for (int column = 0, next = 0; column < 8; column++)
        if (byte >> column & 1 && next < 4) first_kept[byte] ^= uint32_t(column ^ 0x80) << 8 * next++;
    }
  }
};
const Tables kTables;

}  // namespace
}  // namespace castlm

BEGIN_TARGET("avx2,fma,f16c,popcnt,bmi2")

namespace castlm {
namespace {

constexpr int kSteps = 16;              // of four columns in a block
constexpr int kMaskBytes = 128;         // of a panel
constexpr int kFew = 4;                 // rows of x that are multiplied while weights are expanded, and at once after that
constexpr int64_t kExpandedBytes = 18 << 10;  // of the blocks of a tile that are expanded at a time: 9 of int8
constexpr int64_t kPrefetchAhead = 1536;

// The most rows of x of int8 that are multiplied four by four while weights are expanded, which costs a dense weight nothing.
INLINE int64_t most_few(const Header& of) { return of.m ? kFew : 3 * kFew; }

INLINE __m128i half_of(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
INLINE __m256i halves_of(const uint8_t* first, const uint8_t* second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(half_of(first)), half_of(second), 1);
}
INLINE uint64_t load64(const uint8_t* at) {
  uint64_t bits;
  std::memcpy(&bits, at, 8);
  return bits;
}

// An entry of a table of 16 bytes for byte `index` of a mask; a rotation leaves its multiple of 16 at once.
template <int index>
INLINE const uint8_t* entry(const uint8_t (*table)[16], uint64_t mask) {
  constexpr int by = (8 * index + 60) % 64;
  return table[0] + ((mask >> by | mask << (64 - by)) & 0xff0);
}

// 64 bytes, in two halves, of which `mask` says which are kept; the others are 0. Moves `kept` behind those that it takes.
INLINE void expand_bytes(uint64_t mask, const uint8_t*& kept, __m256i& first, __m256i& second) {
  const auto &low = kTables.low, &high = kTables.high;
  const __m256i control = _mm256_add_epi8(halves_of(entry<0>(low, mask), entry<2>(low, mask)),
                                          halves_of(entry<1>(high, mask), entry<3>(high, mask)));
  const __m256i more = _mm256_add_epi8(halves_of(entry<4>(low, mask), entry<6>(low, mask)),
                                       halves_of(entry<5>(high, mask), entry<7>(high, mask)));
  const uint8_t* const after[3] = {kept + __builtin_popcountll(mask << 48), kept + __builtin_popcountll(mask << 32),
                                   kept + __builtin_popcountll(mask << 16)};
  first = _mm256_shuffle_epi8(halves_of(kept, after[0]), control);
  second = _mm256_shuffle_epi8(halves_of(after[1], after[2]), more);
  kept += __builtin_popcountll(mask);
}

// 16 values of 2 bytes.
INLINE __m256i expand_words(uint32_t mask, const uint8_t*& kept) {
  const uint8_t* const second = kept + 2 * __builtin_popcount(mask & 255);
  const __m256i words = halves_of(kept, second);
  kept = second + 2 * __builtin_popcount(mask >> 8);
  return _mm256_shuffle_epi8(words, halves_of(kTables.words[mask & 255], kTables.words[mask >> 8]));
}

// Eight values of 4 bytes.
INLINE __m256 expand_singles(uint32_t mask, const uint8_t*& kept) {
  const __m256i take = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.low[mask])));
  const __m256 all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(kept)), take);
  kept += 4 * __builtin_popcount(mask);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(take, 31)), all);
}

// The codes of one half of a step of int4 or int6, with 8 or 32 added: part 0 or 1 of the half, whose nibbles are in `bytes`.
template <int values, int half>
INLINE __m256i codes_of(__m256i bytes, const uint8_t* panel, int step, int part) {
  const __m256i nibbles = _mm256_and_si256(half ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
  if (values == kInt4) return _mm256_xor_si256(nibbles, _mm256_set1_epi8(8));
  const __m256i four = load_bytes(panel + kInt6Step * step + 64);  // the two highest bits, from bit 4 half + 2 part on
  const __m256i high = half ? part ? _mm256_srli_epi16(four, 2) : four : _mm256_slli_epi16(four, part ? 2 : 4);
  return _mm256_or_si256(nibbles, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
}

// The 64 bytes of a step of a panel of bytes: of a half of int4, or of int8.
template <bool is_dense, int bytes = 64>
INLINE void step_of(const uint8_t* panel, int step, const uint8_t*& kept, __m256i* w) {
  if (!is_dense) return expand_bytes(load64(panel + 8 * step), kept, w[0], w[1]);
  w[0] = load_bytes(kept), w[1] = load_bytes(kept + 32), kept += bytes;
}

INLINE void prefetch(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchAhead + line), _MM_HINT_T0);
}

// fp32 scales of the rows of a panel of int4 or int6, eight at a time.
INLINE __m256 eight_scales(const uint8_t* at) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_of(at)), 16));
}

// Adds products of 4 columns, int32. In one piece: GCC would begin with all products of a loop, and find no registers for them.
INLINE void add_signed(__m256i& sum, const __m256i& magnitude, const __m256i& w, __m256i x, __m256i ones) {
  __m256i products;
  asm("vpsignb %[w], %[x], %[products]\n\t"
      "vpmaddubsw %[products], %[magnitude], %[products]\n\t"
      "vpmaddwd %[ones], %[products], %[products]\n\t"
      "vpaddd %[products], %[sum], %[sum]"
      : [sum] "+x"(sum), [products] "=&x"(products)
      : [w] "xm"(w), [magnitude] "x"(magnitude), [x] "x"(x), [ones] "x"(ones));
}

// The same of x beside its negative.
INLINE void add_shuffled(__m256i& sum, const __m256i& magnitude, const __m256i& control, __m256i x, __m256i ones) {
  __m256i products;
  asm("vpshufb %[control], %[x], %[products]\n\t"
      "vpmaddubsw %[products], %[magnitude], %[products]\n\t"
      "vpmaddwd %[ones], %[products], %[products]\n\t"
      "vpaddd %[products], %[sum], %[sum]"
      : [sum] "+x"(sum), [products] "=&x"(products)
      : [control] "xm"(control), [magnitude] "x"(magnitude), [x] "x"(x), [ones] "x"(ones));
}

// Adds products of 2 columns, int16.
INLINE void add_codes(__m256i& sum, const __m256i& codes, __m256i x) {
  __m256i products;
  asm("vpmaddubsw %[x], %[codes], %[products]\n\t"
      "vpaddw %[products], %[sum], %[sum]"
      : [sum] "+x"(sum), [products] "=&x"(products)
      : [codes] "x"(codes), [x] "x"(x));
}

INLINE __m256i four_of(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// ---- few rows of x

// One tile times B rows of x: `sums` (B, 2 vectors of eight outputs).
template <bool is_dense, int B>
INLINE void few_of_int8(const Header& of, const uint8_t* panel, const Activations& x, __m256 (*sums)[2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t blocks = of.blocks(), width = of.padded(), bytes = of.panel_bytes();
  for (int64_t block = 0; block < blocks; block++, panel += bytes) {
    prefetch(panel, bytes);
    const uint8_t* kept = panel + (is_dense ? 0 : kMaskBytes);
    __m256i total[B][2];
    for (int b = 0; b < B; b++) total[b][0] = total[b][1] = _mm256_setzero_si256();
    const int8_t* at = x.narrow + block * kBlock;
    for (int step = 0; step < kSteps; step++, at += 4) {
      __m256i w[2];
      step_of<is_dense>(panel, step, kept, w);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m256i magnitude = _mm256_abs_epi8(w[half]);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) add_signed(total[b][half], magnitude, w[half], four_of(at + b * width), ones);
      }
    }
    for (int b = 0; b < B; b++)
      for (int half = 0; half < 2; half++)
        sums[b][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[b][half]), _mm256_broadcast_ss(x.scales + b * blocks + block), sums[b][half]);
  }
}

// A dense weight of int4 or int6. A step is eight columns of eight rows of a half; 16 bits hold all steps of int4.
template <int values, int B>
INLINE void few_of_codes(const Header& of, const uint8_t* panel, const Activations& x, __m256 (*sums)[2]) {
  const int64_t blocks = of.blocks(), width = of.padded(), bytes = of.panel_bytes();
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t block = 0; block < blocks; block++, panel += bytes) {
    prefetch(panel, bytes);
    const uint8_t* nibbles = panel;
    __m256i total[B][4];
    for (int b = 0; b < B; b++)
      for (auto& sum : total[b]) sum = _mm256_setzero_si256();
    const int8_t* at = x.narrow + block * kBlock;
    for (int step = 0; step < kSteps / 2; step++, at += 8, nibbles += values == kInt6 ? kInt6Step : 64) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++) {
        const __m256i both = load_bytes(nibbles + 32 * part);
        const __m256i low = codes_of<values, 0>(both, panel, step, part), high = codes_of<values, 1>(both, panel, step, part);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          const __m256i eight = _mm256_set1_epi64x(int64_t(load64(reinterpret_cast<const uint8_t*>(at + b * width))));
          if constexpr (values == kInt4) {
            add_codes(total[b][part], low, eight), add_codes(total[b][2 + part], high, eight);
          } else {
            total[b][part] = _mm256_add_epi32(total[b][part], _mm256_madd_epi16(_mm256_maddubs_epi16(low, eight), ones));
            total[b][2 + part] = _mm256_add_epi32(total[b][2 + part], _mm256_madd_epi16(_mm256_maddubs_epi16(high, eight), ones));
          }
        }
      }
    }
    for (int b = 0; b < B; b++) {
      const __m256i offset = _mm256_set1_epi32(x.offsets[b * blocks + block]);
      const __m256 scale = _mm256_broadcast_ss(x.scales + b * blocks + block);
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++) {
        __m256i low = total[b][part], high = total[b][2 + part];
        if (values == kInt4) low = _mm256_madd_epi16(low, ones), high = _mm256_madd_epi16(high, ones);
        const __m256i pairs = _mm256_hadd_epi32(low, high);
        const __m256 whole = _mm256_cvtepi32_ps(_mm256_add_epi32(pairs, offset));
        const __m256 w_scale = eight_scales(panel + bytes - 32 + 16 * part);
        sums[b][part] = _mm256_fmadd_ps(whole, _mm256_mul_ps(scale, w_scale), sums[b][part]);
      }
    }
  }
}

// Two columns, from `column` on, of a panel of floats: 16 outputs of each in two halves. Moves `kept` behind them.
template <int values, bool is_dense>
INLINE void two_columns(const uint8_t* panel, int column, const uint8_t*& kept, __m256 (*w)[2]) {
  const uint32_t mask = is_dense ? 0 : load32(panel + 2 * column);  // of bf16, 16 rows by 2 columns
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; quarter++) {
    if constexpr (values == kBFloat16) {
      if (quarter >= 2) continue;
      const __m256i pairs = is_dense ? load_bytes(kept) : expand_words(mask >> 16 * quarter & 0xffff, kept);
      if (is_dense) kept += 32;
      w[0][quarter] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      w[1][quarter] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
    } else {
      const uint32_t byte = mask >> 8 * quarter & 255;
      __m256& eight = w[quarter / 2][quarter % 2];
      if constexpr (is_dense) {
        eight = load_contiguous<values>(kept), kept += (values == kFloat32 ? 4 : 2) * 8;
      } else if constexpr (values == kFloat16) {
        eight = _mm256_cvtph_ps(_mm_shuffle_epi8(half_of(kept), half_of(kTables.words[byte])));
        kept += 2 * __builtin_popcount(byte);
      } else {
        eight = expand_singles(byte, kept);
      }
    }
  }
}

template <int values, bool is_dense, int B>
INLINE void few_of_floats(const Header& of, const uint8_t* panel, const Activations& x, __m256 (*sums)[2]) {
  const int64_t blocks = of.blocks(), width = of.padded(), bytes = of.panel_bytes();
  __m256 more[B][2];  // sums of every second column: an FMA does not wait for the one before
  for (int b = 0; b < B; b++) more[b][0] = more[b][1] = _mm256_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, panel += bytes) {
    prefetch(panel, bytes);
    const uint8_t* kept = panel + (is_dense ? 0 : kMaskBytes);
    const float* at = x.wide + block * kBlock;
    for (int column = 0; column < kBlock; column += 2) {
      __m256 w[2][2];
      two_columns<values, is_dense>(panel, column, kept, w);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) {
        const __m256 first = _mm256_broadcast_ss(at + b * width + column), second = _mm256_broadcast_ss(at + b * width + column + 1);
        sums[b][0] = _mm256_fmadd_ps(w[0][0], first, sums[b][0]), sums[b][1] = _mm256_fmadd_ps(w[0][1], first, sums[b][1]);
        more[b][0] = _mm256_fmadd_ps(w[1][0], second, more[b][0]), more[b][1] = _mm256_fmadd_ps(w[1][1], second, more[b][1]);
      }
    }
  }
  for (int b = 0; b < B; b++)
    for (int half = 0; half < 2; half++) sums[b][half] = _mm256_add_ps(sums[b][half], more[b][half]);
}

// Where the outputs of a tile go, and the scales of its rows.
struct Outputs {
  int64_t row, count;
  __m256 scales[2];
  Outputs(const Header& of, const uint8_t* data, int64_t tile) : row(16 * tile), count(std::min<int64_t>(16, of.rows - row)) {
    const auto* of_rows = reinterpret_cast<const float*>(data + of.tiles() * of.blocks() * of.panel_bytes()) + row;  // of int8
    for (int half = 0; half < 2; half++) scales[half] = of.values == kInt8 ? _mm256_loadu_ps(of_rows + 8 * half) : _mm256_set1_ps(1.0f);
  }
  INLINE void write(__m256 first, __m256 second, float* y) const {
    alignas(32) float outputs[16];
    float* const to = count == 16 ? y + row : outputs;
    _mm256_storeu_ps(to, _mm256_mul_ps(first, scales[0])), _mm256_storeu_ps(to + 8, _mm256_mul_ps(second, scales[1]));
    if (count < 16) std::memcpy(y + row, outputs, count * 4);
  }
};

template <int values, bool is_dense, int B>
void multiply_few(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; tile++) {
    const uint8_t* const panels = data + tile * of.blocks() * of.panel_bytes();
    __m256 sums[B][2];
    for (int b = 0; b < B; b++) sums[b][0] = sums[b][1] = _mm256_setzero_ps();
    if constexpr (values == kInt8) few_of_int8<is_dense, B>(of, panels, x, sums);
    else if constexpr (in_nibbles(values)) few_of_codes<values, B>(of, panels, x, sums);
    else few_of_floats<values, is_dense, B>(of, panels, x, sums);
    const Outputs outputs(of, data, tile);
    for (int b = 0; b < B; b++) outputs.write(sums[b][0], sums[b][1], y + b * ldy);
  }
}

// ---- many rows of x

// Steps of an expanded block: of four columns, or of eight of which at most four are kept.
enum Kind { kCodes, kSixBits, kAll, kFourOfEight };
constexpr bool is_code(Kind kind) { return kind <= kSixBits; }  // of int4 or int6
constexpr int num_steps(Kind kind) { return kind == kFourOfEight ? 8 : 16; }
constexpr int64_t expanded_bytes(Kind kind) { return num_steps(kind) * (is_code(kind) ? 64 : 128); }

INLINE void put(uint8_t* to, __m256i bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes); }

// Control and magnitude of weights that lie at `columns` of eight.
INLINE void put_signed(uint8_t* to, __m256i columns, __m256i w) {
  put(to, _mm256_or_si256(columns, _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(8))));
  put(to + 64, _mm256_abs_epi8(w));
}

// The kept ones of 16 rows by eight columns, which are in `w` and `more` by fours: a dword for the four of a row.
INLINE void put_four_of_eight(uint8_t* to, uint64_t mask, uint64_t more_mask, const __m256i* w, const __m256i* more) {
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0f;
  const uint64_t even = (mask & kLow) | (more_mask & kLow) << 4, odd = (mask >> 4 & kLow) | (more_mask & ~kLow);  // rows
  const __m128i rows = _mm_unpacklo_epi8(_mm_cvtsi64_si128(int64_t(even)), _mm_cvtsi64_si128(int64_t(odd)));
  const __m256i second_row = _mm256_set1_epi64x(0x0808080800000000);
  for (int half = 0; half < 2; half++) {
    const __m256i bytes = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(rows, 8) : rows);
    const __m256i places = _mm256_i32gather_epi32(reinterpret_cast<const int*>(kTables.first_kept), bytes, 4);
    const __m256i take = _mm256_add_epi8(places, second_row);
    const __m256i low = _mm256_shuffle_epi8(_mm256_unpacklo_epi32(w[half], more[half]), take);    // rows 0, 1 of each lane
    const __m256i high = _mm256_shuffle_epi8(_mm256_unpackhi_epi32(w[half], more[half]), take);  // rows 2, 3
    put_signed(to + 32 * half, places, _mm256_blend_epi32(low, high, 0xcc));
  }
}

template <Kind kind, bool is_dense>
INLINE void expand_panel(const uint8_t* panel, int64_t bytes, uint8_t* to) {
  const uint8_t *kept = panel + (is_dense ? 0 : kMaskBytes), *kept_high = kept;
  constexpr int kStep = kind == kSixBits ? kInt6Step : 64;
  prefetch(panel, bytes);
  for (int step = 0; step < kSteps; step += 2) {
    __m256i w[2], more[2];
    step_of<is_dense, kStep>(panel, step, kept, w);
    step_of<is_dense, kStep>(panel, step + 1, is_code(kind) ? kept_high : kept, more);
    if constexpr (kind == kFourOfEight) {
      put_four_of_eight(to, load64(panel + 8 * step), load64(panel + 8 * step + 8), w, more), to += 128;
      continue;
    }
    for (int half = 0; half < 2; half++) {
      if constexpr (is_code(kind)) {
        constexpr int values = kind == kCodes ? kInt4 : kInt6;
        const __m256 a = _mm256_castsi256_ps(codes_of<values, 0>(w[half], panel, step / 2, half));
        const __m256 b = _mm256_castsi256_ps(codes_of<values, 1>(more[half], panel, step / 2, half));
        put(to + 32 * half, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)));
        put(to + 64 + 32 * half, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
      } else {
        put_signed(to + 32 * half, _mm256_set1_epi32(0x03020100), w[half]);
        put_signed(to + 128 + 32 * half, _mm256_set1_epi32(0x07060504), more[half]);
      }
    }
    to += is_code(kind) ? 128 : 256;
  }
}

// B rows of x by `count` expanded blocks, added to `sums` (B, 16). The bf16 scales of int4 or int6 of a block are `stride` bytes before
// those of the next one. The loops over steps are unrolled, as GCC keeps the sums in memory otherwise.
template <Kind kind, int B>
INLINE void multiply_expanded(const uint8_t* expanded, const uint8_t* w_scales, int64_t stride, int64_t count, const int8_t* x,
                              int64_t width, const float* scales, const int32_t* offsets, int64_t blocks, float* sums) {
  constexpr int kNum = num_steps(kind), kParts = kind == kCodes ? 2 : 8;  // whose sums are of 16 bits
  const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
  for (int64_t block = 0; block < count; block++, expanded += expanded_bytes(kind), w_scales += stride) {
    __m256i total[B][2];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) total[b][0] = total[b][1] = is_code(kind) ? _mm256_set1_epi32(offsets[b * blocks + block]) : zero;
    const uint8_t* at = expanded;
    if constexpr (is_code(kind)) {
      for (int part = 0; part < kParts; part++) {
        __m256i pairs[B][2];
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) pairs[b][0] = pairs[b][1] = zero;
#pragma GCC unroll 8
        for (int step = 0; step < kSteps / kParts; step++, at += 64, x += 4) {
          const __m256i first = load_bytes(at), second = load_bytes(at + 32);
#pragma GCC unroll 4
          for (int b = 0; b < B; b++) {
            const __m256i four = four_of(x + b * width);
            add_codes(pairs[b][0], first, four), add_codes(pairs[b][1], second, four);
          }
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          total[b][0] = _mm256_add_epi32(total[b][0], _mm256_madd_epi16(pairs[b][0], ones));
          total[b][1] = _mm256_add_epi32(total[b][1], _mm256_madd_epi16(pairs[b][1], ones));
        }
      }
    } else {
#pragma GCC unroll 16
      for (int step = 0; step < kNum; step++, at += 128) {
        const __m256i first = load_bytes(at), second = load_bytes(at + 32);
        const __m256i magnitude = load_bytes(at + 64), of_second = load_bytes(at + 96);
        const int8_t* const eight = x + 16 * (step * 8 / kNum);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          const __m256i both = _mm256_broadcastsi128_si256(half_of(reinterpret_cast<const uint8_t*>(eight + b * width)));
          add_shuffled(total[b][0], magnitude, first, both, ones), add_shuffled(total[b][1], of_second, second, both, ones);
        }
      }
      x += 2 * kBlock;
    }
    const __m256 first_scale = is_code(kind) ? eight_scales(w_scales) : _mm256_setzero_ps();
    const __m256 second_scale = is_code(kind) ? eight_scales(w_scales + 16) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
      const __m256 scale = _mm256_broadcast_ss(scales + b * blocks + block);
      const __m256 first = is_code(kind) ? _mm256_mul_ps(scale, first_scale) : scale;
      const __m256 second = is_code(kind) ? _mm256_mul_ps(scale, second_scale) : scale;
      float* const to = sums + 16 * b;
      _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[b][0]), first, _mm256_load_ps(to)));
      _mm256_store_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[b][1]), second, _mm256_load_ps(to + 8)));
    }
  }
}

template <Kind kind, bool is_dense>
void multiply_many(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  constexpr int kWide = is_code(kind) ? 1 : 2;  // bytes of x for a column
  constexpr int64_t kBytes = expanded_bytes(kind), kMostBlocks = kExpandedBytes / kBytes;
  alignas(64) uint8_t expanded[kExpandedBytes];
  const int64_t blocks = of.blocks(), width = of.padded() * kWide, bytes = of.panel_bytes();
  const int64_t parts = (blocks + kMostBlocks - 1) / kMostBlocks, part = (blocks + parts - 1) / parts;
  float* const sums = static_cast<float*>(scratch<0>(x.batch * 16 * 4));
  for (int64_t tile = first; tile < last; tile++) {
    std::fill_n(sums, x.batch * 16, 0.0f);
    for (int64_t k = 0; k < blocks; k += part) {
      const uint8_t* const panel = data + (tile * blocks + k) * bytes;
      const int64_t count = std::min(part, blocks - k);
      for (int64_t i = 0; i < count; i++) expand_panel<kind, is_dense>(panel + i * bytes, bytes, expanded + i * kBytes);
      const auto add = [&](auto rows, int64_t b) {
        constexpr int B = decltype(rows)::value;
        if (k + count == blocks)  // the outputs' lines, far apart, are asked for before they are written
          for (int r = 0; r < B; r++) __builtin_prefetch(y + (b + r) * ldy + 16 * tile, 1);
        multiply_expanded<kind, B>(expanded, panel + bytes - 32, bytes, count, x.narrow + b * width + k * kBlock * kWide, width,
                                   x.scales + b * blocks + k, x.offsets ? x.offsets + b * blocks + k : nullptr, blocks, sums + 16 * b);
      };
      int64_t b = 0;
      for (; b + kFew <= x.batch; b += kFew) add(std::integral_constant<int, kFew>(), b);
      for (; b < x.batch; b++) add(std::integral_constant<int, 1>(), b);
    }
    const Outputs outputs(of, data, tile);
    for (int64_t b = 0; b < x.batch; b++)
      outputs.write(_mm256_load_ps(sums + 16 * b), _mm256_load_ps(sums + 16 * b + 8), y + b * ldy);
  }
}

// B rows of x by `columns` columns of 16 outputs in fp32, added to `sums` (B, 16).
template <int B>
void multiply_columns(const float* w, int64_t columns, const float* x, int64_t width, float* sums) {
  __m256 total[B][2];
#pragma GCC unroll 6
  for (int b = 0; b < B; b++) total[b][0] = _mm256_load_ps(sums + 16 * b), total[b][1] = _mm256_load_ps(sums + 16 * b + 8);
#pragma GCC unroll 4
  for (int64_t k = 0; k < columns; k++, w += 16) {
    const __m256 first = _mm256_load_ps(w), second = _mm256_load_ps(w + 8);
#pragma GCC unroll 6
    for (int b = 0; b < B; b++) {
      const __m256 one = _mm256_broadcast_ss(x + b * width + k);
      total[b][0] = _mm256_fmadd_ps(first, one, total[b][0]), total[b][1] = _mm256_fmadd_ps(second, one, total[b][1]);
    }
  }
#pragma GCC unroll 6
  for (int b = 0; b < B; b++) _mm256_store_ps(sums + 16 * b, total[b][0]), _mm256_store_ps(sums + 16 * b + 8, total[b][1]);
}

// Floats: a part of a tile as fp32, (columns, 16), in the first-level cache, times six rows of x at a time, in passes over rows of x
// that stay in the second-level cache.
template <int values, bool is_dense>
void multiply_many_floats(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  constexpr int kRows = 6;  // 12 sums in registers
  constexpr int64_t kPart = 4, kPassBytes = 1 << 19;
  constexpr auto kKernels = std::array{multiply_columns<1>, multiply_columns<2>, multiply_columns<3>,
                                       multiply_columns<4>, multiply_columns<5>, multiply_columns<6>};
  alignas(64) float expanded[kPart * kBlock * 16];
  const int64_t blocks = of.blocks(), width = of.padded(), bytes = of.panel_bytes();
  const int64_t pass = std::max<int64_t>(8 * kRows, kPassBytes / (4 * width) / kRows * kRows);
  float* const sums = static_cast<float*>(scratch<0>(std::min(pass, x.batch) * 16 * 4));
  for (int64_t start = 0; start < x.batch; start += pass)
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t rows = std::min(pass, x.batch - start);
      std::fill_n(sums, rows * 16, 0.0f);
      for (int64_t k = 0; k < blocks; k += kPart) {
        const int64_t count = std::min(kPart, blocks - k);
        for (int64_t i = 0; i < count; i++) {
          const uint8_t *panel = data + (tile * blocks + k + i) * bytes, *kept = panel + (is_dense ? 0 : kMaskBytes);
          for (int column = 0; column < kBlock; column += 2) {
            __m256 w[2][2];
            two_columns<values, is_dense>(panel, column, kept, w);
            for (int j = 0; j < 4; j++) _mm256_store_ps(expanded + (i * kBlock + column) * 16 + 8 * j, w[j / 2][j % 2]);
          }
        }
        for (int64_t b = 0; b < rows; b += kRows)
          kKernels[std::min<int64_t>(kRows, rows - b) - 1](expanded, count * kBlock, x.wide + (start + b) * width + k * kBlock, width,
                                                           sums + 16 * b);
      }
      const Outputs outputs(of, data, tile);
      for (int64_t b = 0; b < rows; b++)
        outputs.write(_mm256_load_ps(sums + 16 * b), _mm256_load_ps(sums + 16 * b + 8), y + (start + b) * ldy);
    }
}

// ----

template <int values, bool is_dense>
void multiply_any(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  if constexpr (in_nibbles(values))
    if (x.batch > kFew) return multiply_many<values == kInt4 ? kCodes : kSixBits, true>(of, data, x, y, ldy, first, last);
  if constexpr (values == kInt8)
    if (x.batch > most_few(of)) {
      if (!is_dense && of.m <= 8 && 2 * of.n <= of.m) return multiply_many<kFourOfEight, is_dense>(of, data, x, y, ldy, first, last);
      return multiply_many<kAll, is_dense>(of, data, x, y, ldy, first, last);
    }
  if constexpr (values < kInt8)
    if (x.batch > kFew) return multiply_many_floats<values, is_dense>(of, data, x, y, ldy, first, last);
  for (int64_t b = 0; b < x.batch; b += kFew, y += kFew * ldy) {
    const int64_t at = b * of.blocks();
    const Activations some{x.wide + b * of.padded(), x.narrow ? x.narrow + b * of.padded() : nullptr, x.scales ? x.scales + at : nullptr,
                           x.offsets ? x.offsets + at : nullptr, std::min<int64_t>(kFew, x.batch - b)};
    const Multiply few = some.batch == 1   ? multiply_few<values, is_dense, 1>
                         : some.batch == 2 ? multiply_few<values, is_dense, 2>
                         : some.batch == 3 ? multiply_few<values, is_dense, 3>
                                           : multiply_few<values, is_dense, 4>;
    few(of, data, some, y, ldy, first, last);
  }
}

template <int values>
Multiply of_pattern(const Header& of) { return of.m ? multiply_any<values, false> : multiply_any<values, true>; }

}  // namespace

// x of int8 beside its negative, eight columns of each in turns.
static Activations with_negative(const Header& of, const float* wide, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  const Activations x = avx2_integers(of, wide, rows, first, last, room);
  const int8_t* from = x.narrow + first * of.padded();
  auto* const twice = room + rows * of.blocks() * (kBlock + 4) / 64 * 64 + 64;
  uint8_t* to = twice + 2 * first * of.padded();
  for (int64_t i = first * of.padded(); i < last * of.padded(); i += 32, from += 32, to += 64) {
    const __m256i v = load_bytes(reinterpret_cast<const uint8_t*>(from)), negative = _mm256_sub_epi8(_mm256_setzero_si256(), v);
    const __m256i low = _mm256_unpacklo_epi64(v, negative), high = _mm256_unpackhi_epi64(v, negative);  // eights 0, 2 and 1, 3
    put(to, _mm256_permute2x128_si256(low, high, 0x20)), put(to + 32, _mm256_permute2x128_si256(low, high, 0x31));
  }
  return {wide, reinterpret_cast<int8_t*>(twice), x.scales, nullptr, rows};
}

// x with the offsets of int4 or int6, which has 32 added and not 8.
static Activations with_offsets(const Header& of, const float* wide, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  Activations x = avx2_integers(of, wide, rows, first, last, room);
  auto* const offsets = reinterpret_cast<int32_t*>(room + rows * of.blocks() * (kBlock + 4));
  for (int64_t i = first * of.blocks(); i < last * of.blocks(); i++) offsets[i] = (of.values == kInt6 ? 4 : 1) * avx2_offset(x.narrow + i * kBlock);
  x.offsets = offsets;
  return x;
}

Kernel avx2_lanes(const Header& of, int64_t batch, bool) {
  switch (of.values) {
    case kBFloat16: return {as_floats, of_pattern<kBFloat16>(of)};
    case kFloat16: return {as_floats, of_pattern<kFloat16>(of)};
    case kFloat32: return {as_floats, of_pattern<kFloat32>(of)};
    case kInt8: return {batch > most_few(of) ? with_negative : avx2_integers, of_pattern<kInt8>(of)};
    case kInt4: return {with_offsets, multiply_any<kInt4, true>};
    default: return {with_offsets, multiply_any<kInt6, true>};
  }
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
Kernel avx2_lanes(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
