// Many rows of x times integers of kLanes of which at most half are kept: only kept weights are multiplied.
//
// A tile is rearranged once for all rows of x. Of each row of the matrix, the kept weights of a block of 64 columns come first,
// and beside them the columns that they meet. A step is four of them for each of the 16 rows, 32:64 has 8 steps:
//
//   lane        0                      1              ...   15        of both registers of a step
//   columns     c0 c1 c2 c3 of row 0   c0 .. of row 1       row 15    one byte each, 0 to 63
//   weights     w0 w1 w2 w3            w0 ..                          signed bytes
//
// `vpermb` brings the 64 columns of a row of x, which are a whole register, to the lanes, and `vpdpbusd` multiplies and adds. Dense
// weights take 16 steps of one `vpdpbusd`, and a processor that permutes and multiplies in different units, as Zen 4 does, needs
// less time for 8 steps of both. `vpdpbusd` takes unsigned bytes first, so 128 is added to x, and the sums start at -128 times the
// sum of the weights. They are exact, and have the bits of `multiply_many` in lanes_avx512.cpp.

#include "avx512.h"

#if defined(CASTLM_AVX512)

#include <algorithm>
#include <array>

#include "plain.h"

BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")

namespace castlm {
namespace {

#include "lanes_avx512.h"

constexpr int kRowsAtOnce = 12;          // 12 sums of integers and 12 of fp32, all in registers
constexpr int64_t kPassBytes = 1 << 20;  // of x for each rearrangement: half as much is 4 % slower, though x alone fills Zen 4's second level

int steps_of(const Header& of) { return int((kBlock / of.m * of.n + 3) / 4); }
int64_t block_bytes(int steps) { return 64 + 128 * steps; }  // the first sums, then columns and weights of each step

// The blocks of a tile with their kept weights first, `block_bytes` each.
template <int values>
void gather(const uint8_t* panel, int64_t bytes, int64_t blocks, int steps, uint8_t* to) {
  const __m512i added = _mm512_set1_epi8(char(kExcess<values>));
  alignas(64) uint8_t places[kBlock];
  for (int i = 0; i < kBlock; i++) places[i] = uint8_t(i);
  const __m512i columns = load(places);
  for (int64_t i = 0; i < blocks; i++, panel += bytes, to += block_bytes(steps)) {
    Reader<values, true> reader;
    reader.start(panel);
    __m512i rows[16];  // first the steps of `Reader`, four columns of all rows; then the 64 columns of each row
#pragma GCC unroll 8
    for (int step = 0; step < 16; step += 2) next_steps(reader, rows[step], rows[step + 1]);
    transpose(rows);
#pragma GCC unroll 16
    for (__m512i& row : rows) {  // a kept weight of zero may be passed over
      const __mmask64 kept = _mm512_cmpneq_epi8_mask(row, added);
      const __m512i weights = _mm512_maskz_compress_epi8(kept, _mm512_sub_epi8(row, added));
      row = _mm512_inserti64x4(_mm512_maskz_compress_epi8(kept, columns), _mm512_castsi512_si256(weights), 1);
    }
    transpose(rows);  // columns of step s in register s, weights in 8 + s
    __m512i sums = _mm512_setzero_si512();
    for (int step = 0; step < steps; step++) {
      _mm512_store_si512(to + 64 + 128 * step, rows[step]);
      _mm512_store_si512(to + 128 + 128 * step, rows[8 + step]);
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(char(128)), rows[8 + step]);
    }
    _mm512_store_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
  }
}

// R rows of x times a gathered tile. x is (blocks, kRowsAtOnce, 64), its scales (blocks, kRowsAtOnce).
template <int values, int R>
void multiply_tile(const uint8_t* w, int steps, const uint8_t* panel, int64_t bytes, int64_t blocks, const int8_t* x,
                   const float* scales, __m512* to) {
  __m512 sums[R];
#pragma GCC unroll 12
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  panel += bytes - 32;
  for (int64_t i = 0; i < blocks; i++, x += kRowsAtOnce * kBlock, scales += kRowsAtOnce, panel += bytes) {
    __m512i c[R];
#pragma GCC unroll 12
    for (__m512i& sum : c) sum = load(w);
    w += 64;
    for (int step = 0; step < steps; step++, w += 128) {
      const __m512i columns = load(w), weights = load(w + 64);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) add_products(c[r], _mm512_permutexvar_epi8(columns, load(x + r * kBlock)), weights);
    }
    const __m512 of_rows = values == kInt4 ? short_scales(panel) : _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const __m512 whole = _mm512_cvtepi32_ps(c[r]);
      sums[r] = _mm512_fmadd_ps(values == kInt4 ? _mm512_mul_ps(whole, of_rows) : whole, _mm512_set1_ps(scales[r]), sums[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) to[r] = sums[r];
}

template <int values>
constexpr auto kTile =
    std::array{multiply_tile<values, 1>, multiply_tile<values, 2>, multiply_tile<values, 3>,  multiply_tile<values, 4>,
               multiply_tile<values, 5>, multiply_tile<values, 6>, multiply_tile<values, 7>,  multiply_tile<values, 8>,
               multiply_tile<values, 9>, multiply_tile<values, 10>, multiply_tile<values, 11>, multiply_tile<values, 12>};

template <int values>
void multiply(const Header& of, const uint8_t* data, const Activations& x, float* y, int64_t ldy, int64_t first, int64_t last) {
  const int64_t blocks = of.blocks(), bytes = of.panel_bytes(), stride = blocks * bytes, width = of.padded();
  const int64_t pass = std::max<int64_t>(96, kPassBytes / width / kRowsAtOnce * kRowsAtOnce);
  const float* row_scales = reinterpret_cast<const float*>(data + of.tiles() * stride);  // of int8
  const int steps = steps_of(of);
  auto* room = static_cast<uint8_t*>(scratch<0>(blocks * block_bytes(steps)));
  for (int64_t b0 = 0; b0 < x.batch; b0 += pass)
    for (int64_t tile = first; tile < last; tile++) {
      const uint8_t* panel = data + tile * stride;
      gather<values>(panel, bytes, blocks, steps, room);
      const int64_t row = 16 * tile;
      const __mmask16 here = rows_here(of, row);
      const __m512 factor = values == kInt8 ? _mm512_loadu_ps(row_scales + row) : _mm512_set1_ps(1);
      for (int64_t b = b0; b < std::min(b0 + pass, x.batch); b += kRowsAtOnce) {
        const int64_t at = b * blocks, rows = std::min<int64_t>(kRowsAtOnce, x.batch - b);
        __m512 sums[kRowsAtOnce];
        for (int64_t r = 0; r < rows; r++) __builtin_prefetch(y + (b + r) * ldy + row, 1);  // lines far apart, before they are written
        kTile<values>[rows - 1](room, steps, panel, bytes, blocks, x.narrow + at * kBlock, x.scales + at, sums);
        for (int64_t r = 0; r < rows; r++) _mm512_mask_storeu_ps(y + (b + r) * ldy + row, here, _mm512_mul_ps(sums[r], factor));
      }
    }
}

}  // namespace

bool has_fast_vpermb() { return __builtin_cpu_supports("avx512vbmi") && !is_intel; }

Kernel avx512_gathered(const Header& of, int64_t, bool) {
  return {in_groups<kRowsAtOnce, true>, of.values == kInt8 ? multiply<kInt8> : multiply<kInt4>, 1, 2};
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
bool has_fast_vpermb() { return false; }
Kernel avx512_gathered(const Header&, int64_t, bool) { return {}; }
}  // namespace castlm

#endif
