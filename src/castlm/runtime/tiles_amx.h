// Weights as the tiles of AMX. Included by kernels_amx.cpp inside its target pragma and its unnamed namespace. Word (k, r) of a
// tile has the two bf16 or four int8 of row r of the matrix that meet row k of a column of tiles; a tile has 16 of each. So a row
// of a tile is a step of a panel of kLanes.

// A panel to one tile, or to two of bf16.
template <int values, bool is_masked>
INLINE void expand_panel(const uint8_t* panel, uint8_t* to) {
  if constexpr (values == kBFloat16) {
    FloatReader<values, is_masked> reader;
    reader.start(panel);
    for (int step = 0; step < 32; step++, to += 64) _mm512_storeu_si512(to, reader.next_short());
  } else {
    Reader<values, is_masked> reader;
    reader.start(panel);
    for (int step = 0; step < 16; step += 2, to += 128) {
      __m512i first, second;
      next_steps(reader, first, second);
      const __m512i added = _mm512_set1_epi8(values == kInt4 ? 8 : char(128));
      _mm512_storeu_si512(to, _mm512_sub_epi8(first, added));
      _mm512_storeu_si512(to + 64, _mm512_sub_epi8(second, added));
    }
  }
}

// Rows [row, row + 32) of the matrix, `blocks` of their blocks from `block` on: the tiles of the first 16 rows, then those
// of the others, and of int4 the scales (blocks, 32).
template <int values, bool is_masked>
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
      if (is_here) expand_panel<values, is_masked>(panel, to + k * kBytes);
      if (values == kInt4)
        _mm512_storeu_ps(scales + 32 * k + 16 * half, is_here ? short_scales(panel + bytes - 32) : _mm512_setzero_ps());
    }
  }
}
