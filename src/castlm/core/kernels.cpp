// The AdamS step and the refresh of its masks on a CPU, each in one pass over memory. These are plain loops that a
// compiler vectorizes. torch.compile does the same on a GPU, but on a CPU it neither reads every m-th weight in vectors
// nor tests the bits of a mask in registers. `update.py`, `nm.py` and `moments.py` hold the same arithmetic in torch, and
// the tests compare the two. Pointers are not checked here: `native.py` checks every tensor before it calls.
//
// Memory of one parameter, (rows, width), and what one turn of the innermost loops takes of it, at 2:4:
//
//   weight      | w0   w1   w2   w3 | w4   w5   w6   w7 | ...  w31 | w32 ...    4 bytes a weight, row after row
//   grad        | g0   g1   g2   g3 | ...                                       4 bytes
//   exp_avg     | mu0  mu1  mu2 mu3 | ...                                       4 bytes, or 1 byte (a code) in 8 bits
//   exp_avg_sq  | v0   v1   v2   v3 | ...                                       4 bytes, or 1 byte
//   scales      | s0                                        (8 bits only)       4 bytes for each block of 32 to 256
//   mask        | b0 b1 b2 b3 b4 b5 b6 b7 | b8 ... b15 | b16 ... | b24 ... b31  1 bit a weight, bit k of byte j: 8j + k
//               '-- group 0 -- group 1 --'
//
//   update_word  takes 32 weights and one 32-bit word of the mask: 4 vectors of 8 lanes on AVX2, whose bits of the word
//                become lanes of ones or zeros. It reads 16 and writes 12 bytes a weight, and is bound by that traffic.
//   keep_codes   takes one group of m weights at a time: lane g of the vector for place j holds |w| of weight j of group
//                g, so that the m (m - 1) / 2 comparisons of a group compare a whole vector of groups. It writes one byte
//                a group; 8 / m of them make a byte of the mask.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "each_cpu.h"
#include "pool.h"

extern "C" {

// The part of one parameter on this rank, contiguous. Each row of `mask` starts at a byte, and `width` is the number of
// weights in such a row; where rows fill whole bytes, the parameter is passed as a single row. The moments are fp32, or
// uint8 if `block` is not 0, with one scale for each `block` weights.
struct Parameter {
  float* weight;
  const float* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  uint8_t* mask;  // null if all weights are kept
  int64_t rows, width, block;
};

// In the order of `castlm.core.update.hyperparameters`.
struct Hyper {
  float rate, eps, one_less_beta1, one_less_beta2, pull, keep, remaining;
};

// A piece of the map from 8-bit codes to values, see `castlm.core.moments.code_pieces`. The code of a value of at least
// `least` is value * per_value - offset, rounded to the nearest integer and at most `last`.
struct Piece {
  float last, per_value, offset, least;
};

// The map of one moment: the value of each code, and eight pieces. `zero` is the code of 0.
struct Codes {
  float value[256];
  Piece pieces[8];
  int32_t zero;
};
}

namespace {

constexpr int64_t kRun = 65536;  // about how many weights a thread takes at a time
constexpr int64_t kBlock = 256;  // the largest number of weights that share a scale
constexpr int64_t kGroup = 256;  // the largest m of an n:m pattern

// Weights `begin` to `end` of a row.
struct Run {
  const Parameter& of;
  int64_t row, begin, end;

  int64_t at() const { return row * of.width + begin; }
  int64_t length() const { return end - begin; }
  uint8_t* mask() const { return of.mask ? of.mask + row * ((of.width + 7) / 8) + begin / 8 : nullptr; }
};

// What a thread takes at a time: part of a row, or several rows.
struct Chunk {
  const Parameter* of;
  int64_t first_row, last_row, begin, end;
};

// Calls `work` for all rows of the parameters, in runs of at most `size` weights. Uses one thread for every `size`
// weights, but at most `num_threads`.
template <class Work>
void for_each_run(const Parameter* parameters, int64_t count, int64_t size, int num_threads, Work work) {
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (const Parameter* p = parameters; p < parameters + count; ++p) {
    if (p->rows <= 0 || p->width <= 0) continue;
    total += p->rows * p->width;
    const int64_t rows = std::max<int64_t>(1, size / p->width);
    for (int64_t row = 0; row < p->rows; row += rows)
      for (int64_t begin = 0; begin < p->width; begin += size)
        chunks.push_back({p, row, std::min(row + rows, p->rows), begin, std::min(begin + size, p->width)});
  }
  castlm::in_parallel(chunks.size(), 1, std::min<int64_t>(num_threads, total / size), [&](int64_t i, int64_t) {
    for (int64_t row = chunks[i].first_row; row < chunks[i].last_row; ++row)
      work(Run{*chunks[i].of, row, chunks[i].begin, chunks[i].end});
  });
}

// Updates `count` weights, at most 32, with their bits of the mask:
//
//   kept_bits  31 ............ 3 2 1 0     lane of weight k = bit k
//   mix        mu where the bit is 1, else keep * mu + pull * sign(w)
//
// CAST, arXiv 2509.25996, Alg. 1; the names of `Hyper` are as in `castlm.core.update.hyperparameters`.
template <bool square_mix>
INLINE void update_word(float* __restrict weight, const float* __restrict grad, float* __restrict exp_avg,
                        float* __restrict exp_avg_sq, uint32_t kept_bits, int64_t count,
                        Hyper hyper) {
  for (int k = 0; k < count; ++k) {
    const bool kept = kept_bits >> k & 1;
    const float g = grad[k], w = weight[k], old = exp_avg[k], old_sq = exp_avg_sq[k];
    const float momentum = old + (g - old) * hyper.one_less_beta1;  // mu_t, of the raw gradient
    const float sign = w > 0 ? 1.0f : w < 0 ? -1.0f : 0.0f;
    const float mix = kept ? momentum : momentum * hyper.keep + hyper.pull * sign;  // Eq. 7
    const float squared = square_mix ? mix * mix : g * g;                           // Eq. 8, or Adam's
    const float second = old_sq + (squared - old_sq) * hyper.one_less_beta2;
    const float moved = w - hyper.rate * mix / (__builtin_sqrtf(second) + hyper.eps);
    weight[k] = kept ? moved : moved * hyper.remaining;  // "horizon"
    exp_avg[k] = momentum;
    exp_avg_sq[k] = second;
  }
}

template <bool square_mix>
INLINE void update_words(float* weight, const float* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask,
                         int64_t count, Hyper hyper) {
  for (int64_t at = 0; at < count; at += 32) {
    const int64_t length = std::min<int64_t>(32, count - at);
    uint32_t kept = 0xffffffff;
    if (length == 32) {  // a constant count, so that the compiler unrolls the whole word
      if (mask) std::memcpy(&kept, mask + at / 8, 4);
      update_word<square_mix>(weight + at, grad + at, exp_avg + at, exp_avg_sq + at, kept, 32, hyper);
    } else {
      if (mask) std::memcpy(&kept, mask + at / 8, (length + 7) / 8);
      update_word<square_mix>(weight + at, grad + at, exp_avg + at, exp_avg_sq + at, kept, length, hyper);
    }
  }
}

INLINE void update_run(float* weight, const float* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask,
                       int64_t count, Hyper hyper, bool square_mix) {
  if (square_mix)
    update_words<true>(weight, grad, exp_avg, exp_avg_sq, mask, count, hyper);
  else
    update_words<false>(weight, grad, exp_avg, exp_avg_sq, mask, count, hyper);
}

// A block of `count` moments: one byte each, and one scale.
//
//   code     0 ......... 127 ........ 255     of the first moment; of the second, 0 is 0 and 255 is 1
//   value  -0.993 ....... 0 .......... 1      seven decades of values, each with twice as many codes as the one below
//   moment = value[code] * scale              scale = the largest |moment| of the block
INLINE void decode(const uint8_t* codes, float scale, const Codes& map, float* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = map.value[codes[k]] * scale;
}

// Writes the nearest code of each value, and returns the scale: the largest magnitude. A search in the table would be a
// chain of loads for each value; the pieces of the map are straight lines, so that code = value * slope - offset of the
// piece that the value lies in, which vectorizes.
INLINE float encode(const float* values, const Codes& map, uint8_t* to, int64_t count) {
  int32_t largest_bits = 0;  // of magnitudes, which have the order of their bits
  for (int64_t k = 0; k < count; ++k) {
    int32_t bits;
    std::memcpy(&bits, values + k, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  float scale;
  std::memcpy(&scale, &largest_bits, 4);
  scale = scale < 1e-30f ? 1e-30f : scale;
  for (int64_t k = 0; k < count; ++k) {
    const float value = values[k] / scale, magnitude = std::fabs(value);
    float per_value = 0, offset = 0, last = 0;
#pragma GCC unroll 8
    for (int decade = 0; decade < 8; ++decade) {  // the last one with `least` below the magnitude counts
      const Piece& piece = map.pieces[decade];
      const bool in_piece = magnitude >= piece.least;
      per_value = in_piece ? piece.per_value : per_value;
      offset = in_piece ? piece.offset : offset;
      last = in_piece ? piece.last : last;
    }
    constexpr float to_whole = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    float index = ((magnitude * per_value - offset) + to_whole) - to_whole;
    index = index < last ? index : last;
    const int32_t code = map.zero + int32_t(value < 0 ? -index : index);
    to[k] = uint8_t(code < 0 ? 0 : code);  // there is a code for 1 but none for -1
  }
  return scale;
}

// Writes one code for each group of m weights: bit k is set if the weight at place k is among the n kept. The rank of a
// weight is the number of weights that beat it; the earlier of two equal weights wins. Returns the bits of the largest
// magnitude. At 2:4, n = 2:
//
//   group      |  1.0  -3.0   2.0   2.0 |      magnitudes are compared as integers: the bits of |w| have its order
//   starts at     0     1     2     3          every weight is beaten by all that come before it,
//   rank          3     0     1     2          and a comparison that the later weight wins moves one to the earlier
//   code            0b0110                     places 1 and 2
template <int m>
INLINE int32_t keep_codes(const float* weight, int64_t num_groups, int n, uint8_t* codes) {
  int32_t largest = 0;
  for (int64_t group = 0; group < num_groups; ++group) {
    int32_t magnitude[m], rank[m];
#pragma GCC unroll 8
    for (int place = 0; place < m; ++place) {
      std::memcpy(&magnitude[place], weight + group * m + place, 4);
      magnitude[place] &= 0x7fffffff;  // without the sign bit
      rank[place] = place;
      largest = std::max(largest, magnitude[place]);
    }
#pragma GCC unroll 8
    for (int later = 1; later < m; ++later)
#pragma GCC unroll 8
      for (int earlier = 0; earlier < later; ++earlier) {
        const int32_t later_wins = magnitude[later] > magnitude[earlier];
        rank[earlier] += later_wins;
        rank[later] -= later_wins;
      }
    int32_t code = 0;
#pragma GCC unroll 8
    for (int place = 0; place < m; ++place) code |= rank[place] < n ? 1 << place : 0;
    codes[group] = uint8_t(code);
  }
  return largest;
}

struct Refreshed {
  int64_t flips = 0;
  int32_t largest = 0;  // bits of the largest magnitude; a NaN has more than infinity
};

INLINE void replace(uint8_t* mask, const uint8_t* fresh, int64_t num_bytes, Refreshed& result) {
  for (int64_t i = 0; i < num_bytes; i += 8) {
    const int64_t length = std::min<int64_t>(8, num_bytes - i);
    uint64_t before = 0, after = 0;
    std::memcpy(&before, mask + i, length);
    std::memcpy(&after, fresh + i, length);
    result.flips += __builtin_popcountll(before ^ after);
  }
  std::memcpy(mask, fresh, num_bytes);
}

// For an m that divides 8. `count` is a multiple of 8, except at the end of a row that ends within a byte. 4,096 weights
// at a time, so that codes (1 byte a group) and new mask (1 bit a weight) stay in the first-level cache:
//
//   codes  | c0: 4 bits | c1: 4 bits | c2 ...       m = 4: byte 0 of the mask = c0 | c1 << 4
template <int m>
INLINE Refreshed refresh_run(const float* weight, uint8_t* mask, int64_t count, int n) {
  constexpr int64_t bytes = 512;
  Refreshed result;
  uint8_t codes[bytes * 8 / m], fresh[bytes];
  constexpr int groups_a_byte = 8 / m;
  for (int64_t at = 0; at < count; at += 8 * bytes) {
    const int64_t length = std::min(8 * bytes, count - at), num_groups = length / m, num_bytes = (length + 7) / 8;
    result.largest = std::max(result.largest, keep_codes<m>(weight + at, num_groups, n, codes));
    std::fill(codes + num_groups, codes + num_bytes * groups_a_byte, 0);
    for (int64_t byte = 0; byte < num_bytes; ++byte) {
      int32_t bits = 0;
#pragma GCC unroll 8
      for (int k = 0; k < groups_a_byte; ++k) bits |= codes[byte * groups_a_byte + k] << (k * m);
      fresh[byte] = uint8_t(bits);
    }
    replace(mask + at / 8, fresh, num_bytes, result);
  }
  return result;
}

// The largest `least` such that at least n of the m magnitudes are as large, or any that exactly n reach: found by halving the
// range of their bits, first by octaves (1 << 23) from the largest magnitude down. A group of 64 takes some 9 counts of 64
// comparisons each, where ranks take 64.
INLINE int32_t least_kept(const int32_t* magnitude, int m, int n, int32_t largest) {
  const auto reached_by = [&](int32_t least) {
    int32_t count = 0;
    for (int place = 0; place < m; ++place) count += magnitude[place] >= least;
    return count;
  };
  int32_t low = largest, high = largest + 1;  // reached by at least n, and by fewer than n
  for (int32_t octave = 1 << 23;; low = low > octave ? low - octave : 0) {
    const int32_t count = reached_by(low);
    if (count == n) return low;
    if (count > n) break;
    high = low;
  }
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2, count = reached_by(middle);
    if (count == n) return middle;
    (count > n ? low : high) = middle;
  }
  return low;
}

// Bytes of 0 and 1 to bits, as `_GATHER` of nm.py: byte k of eight becomes bit k.
INLINE uint8_t gathered(const uint8_t* bytes) {
  uint64_t eight;
  std::memcpy(&eight, bytes, 8);
  return uint8_t(eight * 0x0102040810204080 >> 56);
}

// For any m up to kGroup. Eight groups fill m whole bytes of the mask and are done at a time.
INLINE Refreshed refresh_groups(const float* weight, uint8_t* mask, int64_t count, int n, int m) {
  Refreshed result;
  int32_t magnitude[kGroup];
  uint8_t kept[8 * kGroup], fresh[kGroup];
  for (int64_t at = 0; at < count; at += 8 * m) {
    const int64_t length = std::min<int64_t>(8 * m, count - at), num_bytes = (length + 7) / 8;
    std::fill(kept + length, kept + 8 * num_bytes, 0);
    for (int64_t group = 0; group < length; group += m) {
      std::memcpy(magnitude, weight + at + group, 4 * m);
      int32_t largest = 0;
      for (int place = 0; place < m; ++place) largest = std::max(largest, magnitude[place] &= 0x7fffffff);
      result.largest = std::max(result.largest, largest);
      const int32_t least = least_kept(magnitude, m, n, largest);
      int32_t num_kept = 0;
      for (int place = 0; place < m; ++place) num_kept += kept[group + place] = magnitude[place] >= least;
      for (int place = m; num_kept > n;)  // of equal weights the earlier ones are kept
        if (magnitude[--place] == least) kept[group + place] = 0, --num_kept;
    }
    for (int64_t byte = 0; byte < num_bytes; ++byte) fresh[byte] = gathered(kept + 8 * byte);
    replace(mask + at / 8, fresh, num_bytes, result);
  }
  return result;
}

}  // namespace

// Each handles one run. They are not templates, because GCC does not clone templates for several processors.
EACH_CPU static void update_fp32(const Run& run, const Hyper& hyper, bool square_mix) {
  const Parameter& p = run.of;
  const int64_t at = run.at();
  update_run(p.weight + at, p.grad + at, static_cast<float*>(p.exp_avg) + at, static_cast<float*>(p.exp_avg_sq) + at,
             run.mask(), run.length(), hyper, square_mix);
}

EACH_CPU static void update_8bit(const Run& run, const Hyper& hyper, bool square_mix, const Codes* maps) {
  const Parameter& p = run.of;
  const uint8_t* mask = run.mask();
  float exp_avg[kBlock], exp_avg_sq[kBlock];
  for (int64_t i = run.at(); i < run.at() + run.length(); i += p.block) {
    uint8_t *codes = static_cast<uint8_t*>(p.exp_avg) + i, *codes_sq = static_cast<uint8_t*>(p.exp_avg_sq) + i;
    float &scale = p.exp_avg_scale[i / p.block], &scale_sq = p.exp_avg_sq_scale[i / p.block];
    decode(codes, scale, maps[0], exp_avg, p.block);
    decode(codes_sq, scale_sq, maps[1], exp_avg_sq, p.block);
    update_run(p.weight + i, p.grad + i, exp_avg, exp_avg_sq, mask, p.block, hyper, square_mix);
    if (mask) mask += p.block / 8;
    scale = encode(exp_avg, maps[0], codes, p.block);
    scale_sq = encode(exp_avg_sq, maps[1], codes_sq, p.block);
  }
}

EACH_CPU static Refreshed refresh_2(const float* weight, uint8_t* mask, int64_t count, int n) {
  return refresh_run<2>(weight, mask, count, n);
}
EACH_CPU static Refreshed refresh_4(const float* weight, uint8_t* mask, int64_t count, int n) {
  return refresh_run<4>(weight, mask, count, n);
}
EACH_CPU static Refreshed refresh_8(const float* weight, uint8_t* mask, int64_t count, int n) {
  return refresh_run<8>(weight, mask, count, n);
}

EACH_CPU static Refreshed refresh_any(const float* weight, uint8_t* mask, int64_t count, int n, int m) {
  return refresh_groups(weight, mask, count, n, m);
}

extern "C" {

int32_t castlm_kernels_version = 4;  // of these structures and signatures; `native.py` expects its own number

// `castlm.core.update.adams_update` of all parameters, in place. `maps` holds the codes of the first moment and of the
// second.
void castlm_update(const Parameter* parameters, int64_t count, const Hyper* hyper, int square_mix, const Codes* maps,
                   int num_threads) {
  for_each_run(parameters, count, kRun, num_threads, [=](const Run& run) {
    if (run.of.block)
      update_8bit(run, *hyper, square_mix, maps);
    else
      update_fp32(run, *hyper, square_mix);
  });
}

// `castlm.core.nm.refresh_mask_` of all parameters. Returns how many entries changed, or -1 if a weight is NaN.
int64_t castlm_refresh(const Parameter* parameters, int64_t count, int n, int m, int num_threads) {
  std::atomic<int64_t> flips{0};
  std::atomic<bool> has_nan{false};
  const int64_t size = std::max<int64_t>(1, kRun / (8 * m)) * 8 * m;  // whole groups and whole bytes
  for_each_run(parameters, count, size, num_threads, [&](const Run& run) {
    const float* weight = run.of.weight + run.at();
    const Refreshed result = m == 2   ? refresh_2(weight, run.mask(), run.length(), n)
                             : m == 4 ? refresh_4(weight, run.mask(), run.length(), n)
                             : m == 8 ? refresh_8(weight, run.mask(), run.length(), n)
                                      : refresh_any(weight, run.mask(), run.length(), n, m);
    flips += result.flips;
    if (result.largest > 0x7f800000) has_nan = true;
  });
  return has_nan ? -1 : flips.load();
}
}
