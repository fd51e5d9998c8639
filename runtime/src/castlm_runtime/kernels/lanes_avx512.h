// Readers of kLanes for AVX-512 (the registers of a panel in turn, with masked weights in their places) and the form of x. Included
// by the files of kernels inside their target pragma and their unnamed namespace.

template <int values>
constexpr int kHalves = in_nibbles(values) ? 2 : 1;  // registers of a step
template <int values>
constexpr int kExcess = values == kInt4 ? 8 : values == kInt6 ? 32 : 128;  // what is added to integers

// Reads the registers of a panel in turn, half by half of each step.
template <int values, bool is_masked>
struct Reader {
  const uint8_t *mask, *at[kHalves<values>];

  INLINE void start(const uint8_t* panel) {
    mask = panel;
    for (const uint8_t*& half : at) half = panel + (is_masked ? 128 : 0);
  }
  INLINE __m512i next(int half) {
    const uint8_t* from = at[half];
    static_assert(values != kInt6 || !is_masked, "int6 is dense");
    if (!is_masked) {
      at[half] += values == kInt6 ? kInt6Step : 64;
      if (values == kInt6) return six_bits(from, half);
      return values == kInt4 ? nibbles(from, half) : load(from);
    }
    const auto* bits = reinterpret_cast<const uint64_t*>(mask);
    __mmask64 places;
    asm("kmovq %1, %0" : "=k"(places) : "m"(*bits));  // from memory: by way of a register it takes longer
    uint64_t same;
    std::memcpy(&same, bits, 8);
    mask += 8, at[half] += __builtin_popcountll(same);
    if (values == kInt8) return _mm512_mask_expandloadu_epi8(_mm512_set1_epi8(char(128)), places, from);
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(8), places, nibbles(from, half));
  }

 private:
  static INLINE __m512i nibbles(const uint8_t* from, int half) {
    const __m512i both = load(from);
    return _mm512_and_si512(half ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
  }
  // The two highest bits go to bits 4 and 5: each half of a register turns its copy of the same 32 bytes by as many bits as it needs.
  static INLINE __m512i six_bits(const uint8_t* from, int half) {
    const __m512i four = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64)));
    const __m512i left = half ? _mm512_setr_epi64(0, 0, 0, 0, kBy30, kBy30, kBy30, kBy30) : _mm512_setr_epi64(kBy4, kBy4, kBy4, kBy4, kBy2, kBy2, kBy2, kBy2);
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    return _mm512_ternarylogic_epi32(nibbles(from, half), _mm512_rolv_epi32(four, left), _mm512_set1_epi8(0x30), kOrAnd);
  }
  static constexpr int64_t kBy2 = 0x200000002, kBy4 = 0x400000004, kBy30 = 0x1e0000001e;
};

// Columns 0 to 3 of both halves of int4 or int6, or columns 4 to 7, as a step of int8 has them.
template <int odd>
INLINE __m512i half_step(__m512i half0, __m512i half1) {
  constexpr int kTake = odd ? 0xdd : 0x88;
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(half0), _mm512_castsi512_ps(half1), kTake));
}

// The next two steps of 16 outputs by 4 columns of integers, a byte each.
template <int values, bool is_masked>
INLINE void next_steps(Reader<values, is_masked>& reader, __m512i& first, __m512i& second) {
  first = reader.next(0), second = reader.next(kHalves<values> - 1);
  if constexpr (in_nibbles(values)) {
    const __m512i halves[2] = {first, second};
    first = half_step<0>(halves[0], halves[1]), second = half_step<1>(halves[0], halves[1]);
  }
}

// Adds products of unsigned and signed bytes. In assembly: GCC 12 copies the sums of the intrinsic, and spills them all.
INLINE void add_products(__m512i& sums, __m512i of_unsigned, __m512i of_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(of_unsigned), "v"(of_signed));
}

// The same of four signed bytes for all lanes.
INLINE void add_products_of_all(__m512i& sums, __m512i of_unsigned, const int8_t* of_signed) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(of_unsigned), "m"(*reinterpret_cast<const int32_t*>(of_signed)));
}

INLINE __mmask16 rows_here(const Header& of, int64_t row) {  // of the 16 from `row` on
  return of.rows - row >= 16 ? 0xffff : __mmask16((1 << (of.rows - row)) - 1);
}

INLINE __m512 short_scales(const uint8_t* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// How a weight of floats lies in its panels: whole, the kept values by a bit mask, or in pairs (`Header::in_pairs`).
enum Kept : int { kWhole, kMasked, kPairs };

// 32 bf16 as fp32: the first ones of all lanes, then the second ones.
INLINE void widen_bfloat16(__m512i both, __m512* to) {
  to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  to[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}
// 32 weights that lie at `at` without gaps, in the order of a step.
template <int values>
INLINE void load_floats(const uint8_t* at, __m512* to) {
  if (values == kBFloat16) return widen_bfloat16(load(at), to);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    to[i] = values == kFloat32 ? _mm512_loadu_ps(at + 64 * i)
                               : _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i)));
}
template <int values>
constexpr int kStepBytes = values == kFloat32 ? 128 : 64;  // of those

// The same of floats: two columns at a time, each 16 outputs in fp32.
template <int values, Kept kept>
struct FloatReader {
  static constexpr bool is_masked = kept == kMasked;
  static constexpr int kColumns = 2;  // that `next` passes
  const uint8_t *mask, *at;
  __m512i zero;

  INLINE void start(const uint8_t* panel) {
    mask = panel, at = panel + (is_masked ? 128 : 0);
    zero = _mm512_setzero_si512();
    // A variable, not a constant: expansion that fills with zeros by itself waits for its register's last value on Zen 4.
    asm("" : "+v"(zero));
  }
  // The next 32 values as they are stored: of bf16 the columns of an output side by side, of fp16 the first column, then the second.
  INLINE __m512i next_short() {
    if (!is_masked) return at += 64, load(at - 64);
    const auto* bits = reinterpret_cast<const uint32_t*>(mask);
    __mmask32 places;
    asm("kmovd %1, %0" : "=k"(places) : "m"(*bits));
    const __m512i both = _mm512_mask_expandloadu_epi16(zero, places, at);
    uint32_t same;
    std::memcpy(&same, bits, 4);
    mask += 4, at += 2 * __builtin_popcount(same);
    return both;
  }
  INLINE void next(__m512* columns) {
    if (!is_masked) {
      load_floats<values>(at, columns), at += kStepBytes<values>;
    } else if (values == kFloat32) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        uint16_t bits;
        std::memcpy(&bits, mask, 2);
        columns[i] = _mm512_mask_expandloadu_ps(_mm512_castsi512_ps(zero), bits, at);
        mask += 2, at += 4 * __builtin_popcount(bits);
      }
    } else if (values == kFloat16) {
      const __m512i both = next_short();
      columns[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(both)), columns[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    } else {
      widen_bfloat16(next_short(), columns);
    }
  }
  // What weight `i` of the last two meets of the columns at `x`.
  INLINE __m512 meets(const float* x, int i) const { return _mm512_set1_ps(x[i]); }
};

// The same of pairs: `next` has the two kept values of four columns.
template <int values>
struct FloatReader<values, kPairs> {
  static constexpr int kColumns = 4;
  const uint8_t* at;
  __m512i columns[2], following[2];  // of the last two weights and of the next ones, in the lowest bits

  INLINE void start(const uint8_t* panel) {
    at = panel + 128;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) following[i] = load(panel + 64 * i);
  }
  INLINE const uint8_t* pass() {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) columns[i] = following[i], following[i] = _mm512_srli_epi32(following[i], 2);
    return at += kStepBytes<values>, at - kStepBytes<values>;
  }
  INLINE __m512i next_short() { return load(pass()); }
  INLINE void next(__m512* weights) { load_floats<values>(pass(), weights); }
  INLINE __m512 meets(const float* x, int i) const {
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), columns[i]);
  }
};

// 64 columns of x as int8 with the largest magnitude at 127, as `avx2_integers` rounds. NaN and infinity make the scale NaN, and so
// the outputs.
INLINE __m512i rounded(const float* x, float* scale) {
  __m512 v[4];
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  const float most = from_bits(uint32_t(_mm512_reduce_max_epi32(largest)));  // numbers without a sign are in the order of their bits
  *scale = most / 127.0f + most * 0.0f;
  const __m512 factor = _mm512_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);
  __m512i q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], factor));
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));  // fours of columns
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// The form of x for integers: groups of `group` rows, block by block, so that one address serves all rows of a group. With `added`,
// 128 is added to x; otherwise there are offsets, which cancel what is added to weights.
template <int64_t group, bool added>
Activations in_groups(const Header& of, const float* x, int64_t rows, int64_t first, int64_t last, uint8_t* room) {
  const int64_t blocks = of.blocks(), whole = (rows + group - 1) / group * group;
  auto* narrow = reinterpret_cast<int8_t*>(room);
  auto* scales = reinterpret_cast<float*>(narrow + whole * blocks * kBlock);
  auto* offsets = reinterpret_cast<int32_t*>(scales + whole * blocks);
  const int32_t excess = of.values == kInt4 ? kExcess<kInt4> : of.values == kInt6 ? kExcess<kInt6> : kExcess<kInt8>;
  const float* from = x + first * of.padded();
  for (int64_t b = first; b < last; b++)
    for (int64_t i = 0; i < blocks; i++, from += kBlock) {
      const int64_t at = (b / group * blocks + i) * group + b % group;
      const __m512i columns = rounded(from, scales + at);
      if (added) {
        _mm512_store_si512(narrow + at * kBlock, _mm512_xor_si512(columns, _mm512_set1_epi8(char(128))));
      } else {
        _mm512_store_si512(narrow + at * kBlock, columns);
        const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), columns);
        offsets[at] = -excess * _mm512_reduce_add_epi32(sums);
      }
    }
  return {x, narrow, scales, added ? nullptr : offsets, rows};
}
