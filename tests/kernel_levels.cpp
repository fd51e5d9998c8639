// Compares the inference kernels of every level that a processor has with the plain path: test_kernel_levels.py builds it,
// for another processor too, and runs it, there under emulation. Prints the levels; ends with 1 where two differ.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
int castlm_level();
int castlm_runs(int level);
int castlm_set_level(int level);
int64_t castlm_packed_bytes(int layout, int values, int n, int m, int64_t rows, int64_t columns);
int castlm_repack(int layout, int values, int n, int m, int64_t rows, int64_t columns, const uint8_t* from, int64_t from_bytes,
                  const uint8_t* mask, int64_t mask_bytes, const float* scales, int64_t num_scales, uint8_t* to,
                  int64_t to_bytes, int threads);
int castlm_multiply(const uint8_t* packed, int64_t bytes, const uint8_t* x, int is_bfloat16, int64_t batch, int64_t columns,
                    uint8_t* y, int64_t rows, int threads);
int castlm_unpack(const uint8_t* packed, int64_t bytes, int64_t first, int64_t last, float* to, int64_t count, int threads);
}

namespace {

constexpr const char* kLevels[] = {"plain", "neon", "avx2", "avx512", "amx"};
constexpr int kNumLevels = 5, kFloat32 = 2, kInt8 = 3, kInt4 = 4, kInt6 = 5;
std::mt19937 random_bits(0);

struct Case {
  int values, n, m;
  int64_t rows, columns, batch;
};

std::vector<uint8_t> random_mask(const Case& of) {
  const int64_t row_bytes = (of.columns + 7) / 8;
  std::vector<uint8_t> mask(of.m ? of.rows * row_bytes : 0);
  for (int64_t row = 0; of.m && row < of.rows; ++row)
    for (int64_t k = 0; k < of.columns; k += of.m)
      for (int kept = 0; kept < of.n;) {
        const int64_t column = k + random_bits() % of.m;
        uint8_t& byte = mask[row * row_bytes + column / 8];
        if (byte >> column % 8 & 1) continue;
        byte |= 1 << column % 8, ++kept;
      }
  return mask;
}

// Small values that every format holds, so that products of floats differ by the order of the sums alone.
std::vector<uint8_t> random_values(const Case& of) {
  const int64_t kept = of.m ? of.columns / of.m * of.n : of.columns, count = of.rows * kept;
  if (of.values >= kInt8) {
    std::vector<uint8_t> bytes(of.values == kInt8 ? count : of.rows * ((kept * (of.values == kInt4 ? 4 : 6) + 7) / 8));
    for (uint8_t& byte : bytes) byte = uint8_t(random_bits());
    return bytes;
  }
  const int size = of.values == kFloat32 ? 4 : 2;
  std::vector<uint8_t> bytes(count * size);
  for (int64_t i = 0; i < count; ++i) {
    const float value = float(int(random_bits() % 255) - 127) / 128;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (of.values == 1) {  // fp16, none of these is subnormal
      const uint32_t half = value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
      std::memcpy(&bytes[2 * i], &half, 2);
    } else {
      std::memcpy(&bytes[size * i], reinterpret_cast<uint8_t*>(&bits) + (4 - size), size);
    }
  }
  return bytes;
}

std::vector<float> product(const Case& of, const std::vector<uint8_t>& values, const std::vector<uint8_t>& mask,
                           const std::vector<float>& scales, const std::vector<float>& x, std::vector<float>& dense) {
  std::vector<uint8_t> buffer(castlm_packed_bytes(-1, of.values, of.n, of.m, of.rows, of.columns));
  std::vector<float> y(of.batch * of.rows);
  dense.assign(of.rows * of.columns, NAN);
  int code = castlm_repack(-1, of.values, of.n, of.m, of.rows, of.columns, values.data(), values.size(), mask.data(), mask.size(),
                           scales.data(), scales.size(), buffer.data(), buffer.size(), 1);
  code |= castlm_multiply(buffer.data(), buffer.size(), reinterpret_cast<const uint8_t*>(x.data()), 0, of.batch, of.columns,
                          reinterpret_cast<uint8_t*>(y.data()), of.rows, 2);
  code |= castlm_unpack(buffer.data(), buffer.size(), 0, of.rows, dense.data(), dense.size(), 1);
  if (code) std::printf("refused\n"), std::exit(1);
  return y;
}

// What a level makes of a case against the plain path.
void compare(int level, const Case& of) {
  const int64_t blocks = (of.columns + 63) / 64, num_scales = of.values == kInt8 ? 1 : of.values >= kInt4 ? blocks : 0;
  const std::vector<uint8_t> mask = random_mask(of), values = random_values(of);
  std::vector<float> scales(of.rows * num_scales), x(of.batch * of.columns), plain_dense, dense;
  for (float& scale : scales) scale = float(1 + random_bits() % 8) / 16;
  for (int64_t i = 0; i < int64_t(x.size()); ++i)  // whole numbers, 127 in each block: rounding to int8 changes nothing
    x[i] = i % of.columns % 64 ? float(int(random_bits() % 255) - 127) : 127.0f;
  castlm_set_level(0);
  const std::vector<float> expected = product(of, values, mask, scales, x, plain_dense);
  castlm_set_level(level);
  const std::vector<float> found = product(of, values, mask, scales, x, dense);
  bool same = plain_dense == dense;
  for (int64_t i = 0; i < int64_t(found.size()); ++i) {
    const int64_t b = i / of.rows, row = i % of.rows;
    double bound = 1e-30;
    for (int64_t k = 0; k < of.columns; ++k) bound += 2e-6 * std::fabs(x[b * of.columns + k] * dense[row * of.columns + k]);
    same &= std::fabs(found[i] - expected[i]) <= bound;
  }
  if (same) return;
  std::printf("%s differs: values %d, %d:%d, %d x %d, batch %d\n", kLevels[level], of.values, of.n, of.m, int(of.rows),
              int(of.columns), int(of.batch));
  std::exit(1);
}

}  // namespace

int main() {
  const int patterns[][2] = {{2, 4}, {1, 2}, {1, 4}, {3, 4}, {4, 8}, {7, 8}, {8, 16}, {5, 16}, {20, 32}, {1, 64}, {32, 64}, {63, 64}, {0, 0}};
  for (int level = 0; level < kNumLevels; ++level) {
    if (!castlm_runs(level)) continue;
    for (int values = 0; values <= kInt6; ++values)
      for (const auto& pattern : patterns)
        for (const int64_t rows : {13, 32})
          for (const int64_t columns : {44, 46, 64, 320})
            for (const int64_t batch : {1, 2, 3, 8, 17})
              if (!pattern[1] || (columns % pattern[1] == 0 && values != kInt6)) compare(level, {values, pattern[0], pattern[1], rows, columns, batch});
    std::printf("%s\n", kLevels[level]);
  }
  return 0;
}
