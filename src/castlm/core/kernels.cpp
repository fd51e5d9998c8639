// The AdamS step and the refresh of its masks on a CPU, each in one pass over memory. These are plain loops that a
// compiler vectorizes. torch.compile does the same on a GPU, but on a CPU it neither reads every m-th weight in vectors
// nor tests the bits of a mask in registers. `update.py`, `masks.py` and `moments.py` hold the same arithmetic in torch,
// and the tests compare the two. Pointers are not checked here: `native.py` checks every tensor before it calls.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

// A function that is compiled for each level of x86-64 and picked when the library is loaded. With clang, it is compiled
// once, for the baseline: before version 18, clang takes these levels and never selects them (llvm-project issue 55830),
// and later versions are untested.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

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
  std::atomic<size_t> next{0};
  auto take = [&] {
    for (size_t i = next++; i < chunks.size(); i = next++)
      for (int64_t row = chunks[i].first_row; row < chunks[i].last_row; ++row)
        work(Run{*chunks[i].of, row, chunks[i].begin, chunks[i].end});
  };
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < std::min<int64_t>(num_threads, total / size)) others.emplace_back(take);
  } catch (const std::exception&) {  // no more threads, or no memory for one: those that run share the work
  }
  take();
  for (std::thread& other : others) other.join();
}

// Updates `count` weights, at most 32, with their bits of the mask.
template <bool square_mix>
INLINE void update_word(float* __restrict weight, const float* __restrict grad, float* __restrict exp_avg,
                        float* __restrict exp_avg_sq, uint32_t kept_bits, int64_t count,
                        Hyper hyper) {
  for (int k = 0; k < count; ++k) {
    const bool kept = kept_bits >> k & 1;
    const float g = grad[k], w = weight[k], old = exp_avg[k], old_sq = exp_avg_sq[k];
    const float momentum = old + (g - old) * hyper.one_less_beta1;
    const float sign = w > 0 ? 1.0f : w < 0 ? -1.0f : 0.0f;
    const float mix = kept ? momentum : momentum * hyper.keep + hyper.pull * sign;
    const float squared = square_mix ? mix * mix : g * g;
    const float second = old_sq + (squared - old_sq) * hyper.one_less_beta2;
    const float moved = w - hyper.rate * mix / (__builtin_sqrtf(second) + hyper.eps);
    weight[k] = kept ? moved : moved * hyper.remaining;
    exp_avg[k] = momentum;
    exp_avg_sq[k] = second;
  }
}

template <bool square_mix>
INLINE void update_words(float* weight, const float* grad, float* exp_avg, float* exp_avg_sq, const uint8_t* mask,
                         int64_t count, Hyper hyper) {
  for (int64_t i = 0; i < count; i += 32) {
    const int64_t length = std::min<int64_t>(32, count - i);
    uint32_t kept = 0xffffffff;
    if (length == 32) {
      if (mask) std::memcpy(&kept, mask + i / 8, 4);
      update_word<square_mix>(weight + i, grad + i, exp_avg + i, exp_avg_sq + i, kept, 32, hyper);
    } else {
      if (mask) std::memcpy(&kept, mask + i / 8, (length + 7) / 8);
      update_word<square_mix>(weight + i, grad + i, exp_avg + i, exp_avg_sq + i, kept, length, hyper);
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

INLINE void decode(const uint8_t* codes, float scale, const Codes& map, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = map.value[codes[i]] * scale;
}

// Writes the nearest code of each value, and returns the scale: the largest magnitude.
INLINE float encode(const float* values, const Codes& map, uint8_t* to, int64_t count) {
  int32_t largest_bits = 0;  // of magnitudes, whose order is that of their bits
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  float scale;
  std::memcpy(&scale, &largest_bits, 4);
  scale = scale < 1e-30f ? 1e-30f : scale;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] / scale, magnitude = std::fabs(value);
    float per_value = 0, offset = 0, last = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const Piece& piece = map.pieces[k];
      const bool in_piece = magnitude >= piece.least;
      per_value = in_piece ? piece.per_value : per_value;
      offset = in_piece ? piece.offset : offset;
      last = in_piece ? piece.last : last;
    }
    constexpr float to_whole = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    float index = ((magnitude * per_value - offset) + to_whole) - to_whole;
    index = index < last ? index : last;
    const int32_t code = map.zero + int32_t(value < 0 ? -index : index);
    to[i] = uint8_t(code < 0 ? 0 : code);
  }
  return scale;
}

// Writes one code for each group of m weights: bit j is set if weight j is among the n kept. The rank of a weight is
// the number of weights that beat it; the earlier of two equal weights wins. Returns the bits of the largest magnitude.
template <int m>
INLINE int32_t keep_codes(const float* weight, int64_t num_groups, int n, uint8_t* codes) {
  int32_t largest = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    int32_t magnitude[m], rank[m];
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      std::memcpy(&magnitude[j], weight + g * m + j, 4);
      magnitude[j] &= 0x7fffffff;
      rank[j] = j;
      largest = std::max(largest, magnitude[j]);
    }
#pragma GCC unroll 8
    for (int j = 1; j < m; ++j)
#pragma GCC unroll 8
      for (int i = 0; i < j; ++i) {
        const int32_t later_wins = magnitude[j] > magnitude[i];
        rank[i] += later_wins;
        rank[j] -= later_wins;
      }
    int32_t code = 0;
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) code |= rank[j] < n ? 1 << j : 0;
    codes[g] = uint8_t(code);
  }
  return largest;
}

struct Refreshed {
  int64_t flips = 0;
  int32_t largest = 0;  // bits of the largest magnitude, which are above those of infinity for NaN
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

// For an m that divides 8. `count` is a multiple of 8, except at the end of a row that ends within a byte.
template <int m>
INLINE Refreshed refresh_run(const float* weight, uint8_t* mask, int64_t count, int n) {
  constexpr int64_t bytes = 512;
  Refreshed result;
  uint8_t codes[bytes * 8 / m], fresh[bytes];
  for (int64_t i = 0; i < count; i += 8 * bytes) {
    const int64_t length = std::min(8 * bytes, count - i), num_groups = length / m, num_bytes = (length + 7) / 8;
    result.largest = std::max(result.largest, keep_codes<m>(weight + i, num_groups, n, codes));
    std::fill(codes + num_groups, codes + num_bytes * (8 / m), 0);
    for (int64_t b = 0; b < num_bytes; ++b) {
      int32_t byte = 0;
#pragma GCC unroll 8
      for (int k = 0; k < 8 / m; ++k) byte |= codes[b * (8 / m) + k] << (k * m);
      fresh[b] = uint8_t(byte);
    }
    replace(mask + i / 8, fresh, num_bytes, result);
  }
  return result;
}

// For any m up to kGroup. Eight groups fill m whole bytes of the mask and are done at a time.
Refreshed refresh_any(const float* weight, uint8_t* mask, int64_t count, int n, int m) {
  Refreshed result;
  int32_t magnitude[kGroup];
  uint8_t fresh[kGroup];
  for (int64_t i = 0; i < count; i += 8 * m) {
    const int64_t length = std::min<int64_t>(8 * m, count - i), num_bytes = (length + 7) / 8;
    std::fill(fresh, fresh + num_bytes, 0);
    for (int64_t g = 0; g < length; g += m) {
      std::memcpy(magnitude, weight + i + g, 4 * m);
      for (int j = 0; j < m; ++j) result.largest = std::max(result.largest, magnitude[j] &= 0x7fffffff);
      for (int j = 0; j < m; ++j) {
        int rank = 0;
        for (int k = 0; k < m; ++k) rank += k < j ? magnitude[k] >= magnitude[j] : magnitude[k] > magnitude[j];
        if (rank < n) fresh[(g + j) / 8] |= 1 << ((g + j) % 8);
      }
    }
    replace(mask + i / 8, fresh, num_bytes, result);
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

extern "C" {

int32_t castlm_kernels_version = 2;  // of these structures and signatures; `native.py` expects its own number

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

// `castlm.core.masks.refresh_mask_` of all parameters. Returns how many entries changed, or -1 if a weight is NaN.
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
