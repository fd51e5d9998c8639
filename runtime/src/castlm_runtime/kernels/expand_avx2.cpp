// Unpacks tiles and rows of weights to fp32 with AVX2, for a GEMM over many rows of x.

#include "avx2.h"

#if defined(CASTLM_AVX2)

BEGIN_TARGET("avx2,fma,f16c")

namespace castlm {
namespace {

// Columns 8 s to 8 s + 7 of a row: in each half of `w` and `position`, the row has lane `lane` and, of 2:4, the next one.
template <int n, int lane>
INLINE void store_floats(__m256 w, __m256i position, float* to) {
  const __m256i columns = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
  const auto place = [&](auto at) {
    constexpr int all = decltype(at)::value * 0x55;  // that lane in all four
    const __m256i here = _mm256_cmpeq_epi32(_mm256_shuffle_epi32(position, all), columns);
    return _mm256_and_ps(_mm256_permute_ps(w, all), _mm256_castsi256_ps(here));
  };
  __m256 out = place(std::integral_constant<int, lane>());
  if constexpr (n == 2) out = _mm256_or_ps(out, place(std::integral_constant<int, lane + 1>()));
  _mm256_storeu_ps(to, out);
}

template <int n, int values>
void expand_floats(const Header& of, const uint8_t* panel, float* to, int64_t ld) {
  constexpr int kStep = values == kFloat32 ? 64 : 32, R = 4 / n;
  for (int64_t block = 0; block < of.blocks(); block++, panel += 32 + 8 * kStep, to += kBlock) {
    const __m256i meta = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    for (int half = 0; half < 2; half++)
      for (int s = 0; s < 8; s++) {
        const __m256 w = load_step<values>(panel, s, half);
        const __m256i position = _mm256_and_si256(_mm256_srli_epi32(meta, 2 * s + 16 * half), _mm256_set1_epi32(3));
        float* at = to + half * R * ld + 8 * s;
        store_floats<n, 0>(w, position, at);
        store_floats<n, n>(w, position, at + ld);
        if constexpr (n == 1) {
          store_floats<n, 2>(w, position, at + 2 * ld);
          store_floats<n, 3>(w, position, at + 3 * ld);
        }
      }
  }
}

// 8 of 16 columns.
template <int values>
void expand_halves(const Header& of, const uint8_t* panel, float* to, int64_t ld) {
  for (int64_t block = 0; block < of.blocks(); block++, panel += of.panel_bytes(), to += kBlock)
    for (int k = 0; k < 4; k++)
      for (int row = 0; row < 4; row++) {
        alignas(32) float kept[8];
        alignas(32) uint32_t column[8];
        const __m256i codes = _mm256_srli_epi32(load_bytes(panel + k / 2 * 32), 4 * (k % 2 * 4 + row));
        _mm256_store_si256(reinterpret_cast<__m256i*>(column), _mm256_and_si256(codes, _mm256_set1_epi32(15)));
        _mm256_store_ps(kept, load_step<values, 64>(panel, 2 * k + row / 2, row % 2));
        float* const at = to + row * ld + 16 * k;
        for (int half = 0; half < 2; half++) _mm256_storeu_ps(at + 8 * half, _mm256_setzero_ps());
        for (int slot = 0; slot < 8; slot++)
          if (kept[slot] != 0) at[column[slot]] = kept[slot];  // a group at the end may have less than eight
      }
}

// 32 integers as fp32, times a scale.
INLINE void store_integers(__m256i bytes, __m256 scale, float* to) {
  const __m128i halves[2] = {_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)};
  for (int i = 0; i < 2; i++) {
    const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(halves[i]));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(halves[i], 8)));
    _mm256_storeu_ps(to + 16 * i, _mm256_mul_ps(scale, low));
    _mm256_storeu_ps(to + 16 * i + 8, _mm256_mul_ps(scale, high));
  }
}

// `row_scales`: of the rows of the tile, for int8; those of int4 follow the values of each panel.
template <int n, bool is_int4>
void expand_integers(const Header& of, const uint8_t* panel, const float* row_scales, float* to, int64_t ld) {
  constexpr int R = 4 / n;
  const __m256i columns = _mm256_set1_epi32(0x03020100), low_four = _mm256_set1_epi8(15);
  // The byte of each column's group within a row: slot 0 of groups 0 to 3.
  const __m256i groups = _mm256_broadcastsi128_si256(
      n == 2 ? _mm_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6)
             : _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  for (int64_t block = 0; block < of.blocks(); block++, panel += of.panel_bytes(), to += kBlock) {
    const __m256i meta = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    for (int s = 0; s < 4; s++) {
      const __m256i position = _mm256_and_si256(_mm256_srli_epi16(meta, 2 * s), _mm256_set1_epi8(3));
      __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 + 32 * (is_int4 ? s / 2 : s)));
      if (is_int4)
        w = _mm256_sub_epi8(_mm256_and_si256(s % 2 ? _mm256_srli_epi16(w, 4) : w, low_four), _mm256_set1_epi8(8));
      for (int r = 0; r < R; r++) {
        __m256i out = _mm256_setzero_si256();
        for (int slot = 0; slot < n; slot++) {
          const __m256i take = _mm256_add_epi8(groups, _mm256_set1_epi8(char(4 * n * r + slot)));
          const __m256i here = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(position, take), columns);
          out = _mm256_or_si256(out, _mm256_and_si256(_mm256_shuffle_epi8(w, take), here));
        }
        const int row = s / 2 * R + r;
        const float scale = is_int4 ? bfloat16_to_float(load16(panel + 96 + 2 * row)) : row_scales[row];
        store_integers(out, _mm256_set1_ps(scale), to + row * ld + 32 * (s % 2));
      }
    }
  }
}

template <int values>
void expand_of(const Header& of, const uint8_t* tile, const float* row_scales, float* to, int64_t ld) {
  if constexpr (values < kInt8) {
    if (of.group() == 16) return expand_halves<values>(of, tile, to, ld);
    return of.n == 1 ? expand_floats<1, values>(of, tile, to, ld) : expand_floats<2, values>(of, tile, to, ld);
  } else {
    return of.n == 1 ? expand_integers<1, values == kInt4>(of, tile, row_scales, to, ld)
                     : expand_integers<2, values == kInt4>(of, tile, row_scales, to, ld);
  }
}

}  // namespace

void avx2_expand_tile(const Header& of, const uint8_t* data, int64_t tile, float* to, int64_t ld) {
  const uint8_t* panels = data + tile * of.blocks() * of.panel_bytes();
  const float* scales = reinterpret_cast<const float*>(data + of.tiles() * of.blocks() * of.panel_bytes());
  const float* row_scales = scales + tile * of.tile_rows();  // of int8 alone
  switch (of.values) {
    case kBFloat16: return expand_of<kBFloat16>(of, panels, row_scales, to, ld);
    case kFloat16: return expand_of<kFloat16>(of, panels, row_scales, to, ld);
    case kFloat32: return expand_of<kFloat32>(of, panels, row_scales, to, ld);
    case kInt8: return expand_of<kInt8>(of, panels, row_scales, to, ld);
    default: return expand_of<kInt4>(of, panels, row_scales, to, ld);
  }
}

// Kept values of a row to their columns, by whole bytes of its mask; reads up to 32 bytes past the last value. How many
// values were used.
template <int values>
static int64_t expand_bytes(const uint8_t* from, const uint8_t* mask, int64_t num_bytes, float* to) {
  // Of each byte of a mask, which kept value each column takes, and 8 where it takes none.
  static const auto order = [] {
    struct { alignas(32) int32_t of[256][8]; } made;
    for (int byte = 0; byte < 256; byte++)
      for (int column = 0, next = 0; column < 8; column++) made.of[byte][column] = byte >> column & 1 ? next++ : 8;
    return made;
  }();
  constexpr int kBytes = values == kFloat32 ? 4 : 2;
  const uint8_t* at = from;
  for (int64_t i = 0; i < num_bytes; i++) {
    const __m256 wide = load_contiguous<values>(at);
    const __m256i take = _mm256_load_si256(reinterpret_cast<const __m256i*>(order.of[mask[i]]));
    const __m256i none = _mm256_cmpeq_epi32(take, _mm256_set1_epi32(8));
    _mm256_storeu_ps(to + 8 * i, _mm256_andnot_ps(_mm256_castsi256_ps(none), _mm256_permutevar8x32_ps(wide, take)));
    at += kBytes * __builtin_popcount(mask[i]);
  }
  return (at - from) / kBytes;
}

int64_t avx2_expand(const Header& of, const uint8_t* from, const uint8_t* mask, int64_t num_bytes, float* to) {
  return of.values == kBFloat16   ? expand_bytes<kBFloat16>(from, mask, num_bytes, to)
         : of.values == kFloat16 ? expand_bytes<kFloat16>(from, mask, num_bytes, to)
                                 : expand_bytes<kFloat32>(from, mask, num_bytes, to);
}

}  // namespace castlm
END_TARGET

#else

namespace castlm {
int64_t avx2_expand(const Header&, const uint8_t*, const uint8_t*, int64_t, float*) { return 0; }
void avx2_expand_tile(const Header&, const uint8_t*, int64_t, float*, int64_t) {}
}  // namespace castlm

#endif
