// Weights as the tiles of AMX. Included by kernels_amx.cpp inside its target pragma and its unnamed namespace. Word (k, r) of a
// tile has the two bf16 or four int8 of row r of the matrix that meet row k of a column of tiles; a tile has 16 of each. So a row
// of a tile is a step of a panel of kLanes.

// Four columns of pairs of bf16 to two rows of a tile. A shift by 16 times its column puts a weight to its half of the first two
// columns, and by 32 less of the others: shifts of more than 31 bits give 0.
INLINE void expand_pairs(__m512i weights, const __m512i* columns, uint8_t* to) {
  const __m512i each[2] = {_mm512_and_si512(weights, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(weights, 16)};
  __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int j = 0; j < 2; j++) {
    const __m512i shift = _mm512_and_si512(_mm512_slli_epi32(columns[j], 4), _mm512_set1_epi32(0x30));
    for (int i = 0; i < 2; i++) {
      const __m512i here = _mm512_sub_epi32(shift, _mm512_set1_epi32(32 * i));
      both[i] = _mm512_or_si512(both[i], _mm512_sllv_epi32(each[j], here));
    }
  }
  for (int i = 0; i < 2; i++) _mm512_storeu_si512(to + 64 * i, both[i]);
}

// A panel to one tile, or to two of bf16.
template <int values, Kept kept>
INLINE void expand_panel(const uint8_t* panel, uint8_t* to) {
  if constexpr (values == kBFloat16) {
    FloatReader<values, kept> reader;
    reader.start(panel);
    for (int step = 0; step < kBlock / reader.kColumns; step++, to += 32 * reader.kColumns) {
      const __m512i weights = reader.next_short();
      if constexpr (kept == kPairs) expand_pairs(weights, reader.columns, to);
      else _mm512_storeu_si512(to, weights);
    }
  } else {
    Reader<values, kept == kMasked> reader;
    reader.start(panel);
    for (int step = 0; step < 16; step += 2, to += 128) {
      __m512i first, second;
      next_steps(reader, first, second);
      const __m512i added = _mm512_set1_epi8(char(kExcess<values>));
      _mm512_storeu_si512(to, _mm512_sub_epi8(first, added));
      _mm512_storeu_si512(to + 64, _mm512_sub_epi8(second, added));
    }
  }
}

// Rows [row, row + 32) of the matrix, `blocks` of their blocks from `block` on: the tiles of the first 16 rows, then those
// of the others, and of int4 and int6 the scales (blocks, 32).
template <int values, Kept kept>
INLINE void expand(const Header& of, const uint8_t* data, int64_t row, int64_t block, int64_t blocks, uint8_t* to,
                   float* scales) {
  constexpr int64_t kBytes = (values == kBFloat16 ? 2 : 1) * kTileBytes;
  const int64_t bytes = of.panel_bytes();
  for (int64_t half = 0; half < 2; half++, to += blocks * kBytes) {
    const int64_t tile = row / 16 + half;
    const bool is_here = tile < of.tiles();
    if (!is_here) std::memset(to, 0, blocks * kBytes);
    const uint8_t* panel = data + (tile * of.blocks() + block) * bytes;
    for (int64_t k = 0; k < blocks; k++, panel += bytes) {
      if (is_here) expand_panel<values, kept>(panel, to + k * kBytes);
      if (in_nibbles(values))
        _mm512_storeu_ps(scales + 32 * k + 16 * half, is_here ? short_scales(panel + bytes - 32) : _mm512_setzero_ps());
    }
  }
}
