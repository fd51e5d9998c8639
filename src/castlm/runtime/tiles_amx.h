// Weights as the tiles of AMX. Included by kernels_amx.cpp inside its target pragma and its unnamed namespace. Word (k, r) of a
// tile has the two bf16 or four int8 of row r of the matrix that meet row k of a column of tiles; a tile has 16 of each.

INLINE __m512i in_lanes(const uint8_t* bytes) {  // 16 bytes into all four lanes
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
INLINE float bfloat16_at(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bfloat16_to_float(bits);
}

// The four lanes of 16 bytes to rows of a tile that are `stride` bytes apart.
INLINE void store_lanes(__m512i lanes, uint8_t* to, int64_t stride) {
  const auto store = [&](int lane, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lane * stride), bytes); };
  store(0, _mm512_castsi512_si128(lanes));
  store(1, _mm512_extracti32x4_epi32(lanes, 1));
  store(2, _mm512_extracti32x4_epi32(lanes, 2));
  store(3, _mm512_extracti32x4_epi32(lanes, 3));
}

// 64 bytes of each of four rows to four words of each of the 16 rows of a tile.
INLINE void store_rows(const __m512i* rows, uint8_t* to) {
  const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]), low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]), high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
  store_lanes(_mm512_unpacklo_epi64(low01, low23), to, 256);
  store_lanes(_mm512_unpackhi_epi64(low01, low23), to + 64, 256);
  store_lanes(_mm512_unpacklo_epi64(high01, high23), to + 128, 256);
  store_lanes(_mm512_unpackhi_epi64(high01, high23), to + 192, 256);
}

// A panel of bf16 (`place_in_panel`) to two tiles: a lane holds a group of four columns, of all rows of the panel.
template <int n>
INLINE void expand_floats(const uint8_t* panel, uint8_t* to) {
  const __m512i meta = _mm512_srlv_epi32(load_twice(panel), in_halves(0, 2));
  for (int four = 0; four < 2 / n; four++) {  // rows 4 four to 4 four + 3
    __m512i take[n];  // of each slot, the value of each row, twice
    for (int slot = 0; slot < n; slot++) {
      uint8_t bytes[16];
      for (int i = 0; i < 8; i++) {
        const int row = i / 2, word = n == 2 ? 2 * (row % 2) + slot : row, half = n == 2 ? row / 2 : four;
        bytes[2 * i] = uint8_t(4 * word + 2 * half), bytes[2 * i + 1] = uint8_t(bytes[2 * i] + 1);
      }
      take[slot] = in_lanes(bytes);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {  // 16 columns
      const __m512i values = load(panel + 32 + 64 * t);
      const __m512i position = _mm512_and_si512(_mm512_srli_epi32(meta, 4 * t), _mm512_set1_epi32(0x00030003));
      for (int pair = 0; pair < 2; pair++) {
        const __m512i columns = _mm512_set1_epi32(pair ? 0x00030002 : 0x00010000);
        __m512i out = _mm512_setzero_si512();
        for (int slot = 0; slot < n; slot++) {
          const __mmask32 here = _mm512_cmpeq_epi16_mask(_mm512_shuffle_epi8(position, take[slot]), columns);
          out = _mm512_mask_mov_epi16(out, here, _mm512_shuffle_epi8(values, take[slot]));
        }
        store_lanes(out, to + kTileBytes * (t / 2) + 512 * (t % 2) + 64 * pair + 16 * four, 128);
      }
    }
  }
}

// A panel of integers to one tile.
template <int n, bool is_int4>
INLINE void expand_integers(const uint8_t* panel, uint8_t* to) {
  const __m512i columns = _mm512_set1_epi32(0x03020100), low_two = _mm512_set1_epi8(3);
  const __m512i meta = _mm512_srlv_epi16(load_twice(panel), in_halves(0, 0x00020002));
  constexpr int R = 4 / n;
  __m512i rows[4];
  for (int half = 0; half < 2; half++) {
    const __m512i position = _mm512_and_si512(half ? _mm512_srli_epi16(meta, 4) : meta, low_two);
    const __m512i values = is_int4 ? load_int4(panel + 32 + 32 * half) : load(panel + 32 + 64 * half);
    for (int r = 0; r < R; r++) {
      __m512i out = _mm512_setzero_si512();
      for (int slot = 0; slot < n; slot++) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = uint8_t(4 * n * r + n * (i / 4) + slot);
        const __m512i take = in_lanes(bytes);
        const __mmask64 here = _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(position, take), columns);
        out = _mm512_mask_mov_epi8(out, here, _mm512_shuffle_epi8(values, take));
      }
      rows[n == 2 ? 2 * half + r : r] = out;
    }
    if (n == 1) store_rows(rows, to + 16 * half);
  }
  if (n == 2) store_rows(rows, to);
}

// A block of four dense rows.
template <int values>
INLINE void expand_dense(const uint8_t* block, uint8_t* to) {
  constexpr int kBytes = values == kBFloat16 ? 128 : values == kInt8 ? 64 : 34;
  for (int part = 0; part < (values == kBFloat16 ? 2 : 1); part++) {
    __m512i rows[4];
    for (int r = 0; r < 4; r++)
      rows[r] = values == kInt4 ? load_int4(block + r * kBytes) : load(block + r * kBytes + 64 * part);
    store_rows(rows, to + kTileBytes * part);
  }
}

template <int n, int values>
INLINE void expand_block(const uint8_t* panel, uint8_t* to) {
  if constexpr (n == 0) expand_dense<values>(panel, to);
  else if constexpr (values == kBFloat16) expand_floats<n>(panel, to);
  else expand_integers<n, values == kInt4>(panel, to);
}

// Rows [row, row + 32) of the matrix, `blocks` of their blocks from `block` on: the tiles of the first 16 rows, then those
// of the others, and of int4, whose codes become 16 times as large, the scales (blocks, 32).
template <int n, int values>
INLINE void expand(const Header& of, const uint8_t* data, int64_t row, int64_t block, int64_t blocks, uint8_t* to,
                   float* scales) {
  constexpr int kRows = n == 1 ? 8 : 4, kTiles = values == kBFloat16 ? 2 : 1;
  const int64_t bytes = of.panel_bytes();
  if (row + 32 > of.tiles() * kRows) {
    std::memset(to, 0, 2 * blocks * kTiles * kTileBytes);
    if (values == kInt4) std::memset(scales, 0, blocks * 32 * sizeof(float));
  }
  for (int64_t r = 0; r < 32 && row + r < of.tiles() * kRows; r += kRows) {
    const uint8_t* panel = data + ((row + r) / kRows * of.blocks() + block) * bytes;
    uint8_t* at = to + (r / 16 * blocks * kTiles) * kTileBytes + r % 16 * 4;
    for (int64_t k = 0; k < blocks; k++, panel += bytes, at += kTiles * kTileBytes) {
      expand_block<n, values>(panel, at);
      for (int i = 0; values == kInt4 && i < kRows; i++)
        scales[32 * k + r + i] = bfloat16_at(n == 0 ? panel + 34 * i + 32 : panel + 96 + 2 * i) / 16;
    }
  }
}
