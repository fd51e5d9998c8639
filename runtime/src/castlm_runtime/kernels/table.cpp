// The entries of the table of kernels, the faster ones first, and the look-up.

#include "table.h"

#include <array>
#include <atomic>

namespace castlm {
namespace {

constexpr uint32_t bit(int32_t values) { return 1u << values; }
constexpr uint32_t kFloats = bit(kBFloat16) | bit(kFloat16) | bit(kFloat32), kIntegers = bit(kInt8) | bit(kInt4), kAll = kFloats | kIntegers, kSix = bit(kInt6);
constexpr uint32_t kUnpaired64 = kAny64 & ~kTwoOfFour;

// Against AVX-512 on an Emerald Rapids, AMX has 0.6 to 1.2 times its speed with 8 rows of x, and 1.3 to 2.4 with 16.
constexpr Entry kEntries[] = {
    // level  values                                   patterns         from  layout   kernels               at once
    {kAmx,    bit(kBFloat16) | kIntegers,              kAny64,          13,   kLanes,  amx_tiles,            512},
    {kAmx,    kSix,                                    kNoMask,         13,   kLanes,  amx_tiles,            512},
    {kAvx512, kIntegers,           kMasked64 & ~kOverHalf,              48,   kLanes,  avx512_gathered,      512, has_fast_vpermb},
    {kAvx512, kFloats,                                 kTwoOfFour,      1,    kLanes,  avx512_groups,        512},
    {kAvx512, kAll,                                    kMasked64,       37,   kLanes,  avx512_many,          512},
    {kAvx512, kAll | kSix,                             kNoMask,         96,   kLanes,  avx512_many,          512},
    {kAvx512, kAll,                                    kAny64,          1,    kLanes,  avx512_groups,        512},
    {kAvx512, kSix,                                    kNoMask,         1,    kLanes,  avx512_groups,        512},
    {kAvx2,   kIntegers,                               kOneOrTwoOfFour, 17,   kPanels, avx2_panels_of_many,  512},
    {kAvx2,   bit(kInt8),                              kEightOf16,      17,   kPanels, avx2_panels_of_many,  512},
    {kAvx2,   kIntegers,                               kOneOrTwoOfFour, 1,    kPanels, avx2_panels,          512},
    {kAvx2,   bit(kInt8),                              kEightOf16,      1,    kPanels, avx2_panels,          512},
    {kAvx2,   kFloats,                    kOneOrTwoOfFour | kEightOf16, 1,    kPanels, avx2_panels,          0},
    {kAvx2,   kFloats,                                 kUnpaired64,     1,    kLanes,  avx2_lanes,           512},
    {kAvx2,   bit(kInt8),                              kAny64,          1,    kLanes,  avx2_lanes,           512},
    // An expansion of int4 takes longer than the multiplication by zeros.
    {kAvx2,   bit(kInt4),                              kAny64,          1,    kLanes,  avx2_lanes,           512, nullptr, true},
    {kAvx2,   kSix,                                    kNoMask,         1,    kLanes,  avx2_lanes,           512},
    {kNeon,   kIntegers,                               kAny64,          1,    kLanes,  neon_lanes,           0,   has_sdot},
    {kNeon,   kAll,                                    kNoMask,         1,    kDense,  neon_panels,          0},
    {kNeon,   kAll,                                    kOneOrTwoOfFour, 1,    kPanels, neon_panels,          0},
    {kNeon,   kIntegers,                               kAny64,          1,    kLanes,  neon_lanes,           0},
    {kNeon,   kFloats,                                 kUnpaired64,     1,    kLanes,  neon_lanes,           0},
    {kNeon,   kSix,                                    kNoMask,         1,    kLanes,  neon_lanes,           0},
    {kPlain,  kAll,                                    kNoMask,         1,    kDense,  plain_kernels,        0},
    {kPlain,  kAll,                                    kMasked64 | kOther, 1, kRows,   plain_kernels,        0},
    {kPlain,  kAll,                                    kAny64,          1,    kLanes,  plain_kernels,        0},
    {kPlain,  kSix,                                    kNoMask,         1,    kLanes,  plain_kernels,        0},
};
constexpr int32_t kNumEntries = sizeof kEntries / sizeof kEntries[0];

constexpr bool is_compatible(const Entry& with, const Entry& of, uint32_t values, uint32_t pattern) {
  return of.layout == with.layout && (of.values & values) && (of.patterns & pattern);
}

// The entry, from `number` on, that multiplies one row of x by a weight; `kNumEntries` where there is none.
constexpr int32_t last_entry(int32_t number, uint32_t values, uint32_t pattern) {
  int32_t found = number;
  while (found < kNumEntries && (kEntries[found].from > 1 || !is_compatible(kEntries[number], kEntries[found], values, pattern))) ++found;
  return found;
}
constexpr bool is_complete() {
  bool complete = true;
  for (int32_t number = 0; number < kNumEntries; ++number)
    for (uint32_t values = 1; values <= kSix; values *= 2)
      for (uint32_t pattern = 1; pattern <= kOther; pattern *= 2)
        if (is_compatible(kEntries[number], kEntries[number], values, pattern)) {
          const int32_t last = last_entry(number, values, pattern);
          // Integers have the same excess in all of them.
          complete = complete && last < kNumEntries && (kEntries[last].level >= kAvx512) == (kEntries[number].level >= kAvx512);
        }
  return complete;
}
static_assert(is_complete(), "an entry for many rows of x has none for few");

uint32_t pattern_of(int32_t n, int32_t m) {
  if (m == 0) return kNoMask;
  if (kBlock % m) return kOther;
  if (m == 4 && n <= 2) return n == 1 ? kOneOfFour : kTwoOfFour;
  if (2 * n == m && m <= 16) return kEightOf16;
  return 2 * n <= m ? kAtMostHalf : kOverHalf;
}

const std::array<bool, kNumLevels>& levels_here() {
  static const std::array<bool, kNumLevels> here{true, has_neon(), has_avx2(), has_avx512(), has_amx()};
  return here;
}

// Of each entry whether this processor has it.
const std::array<bool, kNumEntries>& entries_here() {
  static const std::array<bool, kNumEntries> here = [] {
    std::array<bool, kNumEntries> found;
    for (int32_t i = 0; i < kNumEntries; ++i) found[i] = runs(kEntries[i].level) && (!kEntries[i].needs || kEntries[i].needs());
    return found;
  }();
  return here;
}

std::atomic<int32_t>& level_in_use() {
  static std::atomic<int32_t> used{[] {
    int32_t best = kNumLevels - 1;
    while (!runs(best)) --best;
    return best;
  }()};
  return used;
}

}  // namespace

bool runs(int32_t level) { return level >= 0 && level < kNumLevels && levels_here()[level]; }
int32_t level() { return level_in_use().load(std::memory_order_relaxed); }
void use_level(int32_t level) { level_in_use() = level; }

const Entry* entry_at(int32_t number, int32_t values, int32_t n, int32_t m) {
  if (number < 0 || number >= kNumEntries || !entries_here()[number]) return nullptr;
  const Entry& found = kEntries[number];
  return is_compatible(found, found, bit(values), pattern_of(n, m)) ? &found : nullptr;
}

int32_t entry_for(int32_t layout, int32_t values, int32_t n, int32_t m) {
  for (int32_t number = 0; number < kNumEntries; ++number) {
    const Entry* const found = kEntries[number].level <= level() ? entry_at(number, values, n, m) : nullptr;
    if (found && (layout < 0 || found->layout == layout)) return number;
  }
  return -1;
}

Kernel kernel_for(const Header& of, int64_t rows, bool is_bfloat16) {
  const Entry& first = kEntries[of.entry];
  const uint32_t pattern = pattern_of(of.n, of.m);
  int32_t number = of.entry;
  while (rows < kEntries[number].from || !entries_here()[number] || !is_compatible(first, kEntries[number], bit(of.values), pattern)) ++number;
  return kEntries[number].choose(of, rows, is_bfloat16);
}

bool same_form(const Header& a, const Header& b) { return a.entry == b.entry && a.values == b.values && a.n == b.n && a.m == b.m; }

}  // namespace castlm
