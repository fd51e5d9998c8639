// The table of kernels: how a level keeps a weight in memory, and multiplies by it. An entry is chosen when a weight is repacked, by
// its values and pattern, and its number stays in the weight's header. `kernel_for` finds the kernel for a number of rows of x from
// there on.

#pragma once

#include "matrix.h"

namespace castlm {

// The instruction sets that there are kernels for, the faster ones later.
enum Level : int32_t { kPlain = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3, kAmx = 4 };
constexpr int32_t kNumLevels = 5;
struct LevelFacts {
  const char* name;
  int longest_group, longest_of_half;  // with which weights are multiplied nearly as fast as in groups of four: of any share, of one half
};
// With AVX-512 integers of all groups have the speed of 2:4, and floats decode at 0.7 to 1.0 of it. With AVX2 alone 8:16 decodes at 0.8
// to 1.0 of the speed of 2:4, 32:64 at 0.6 to 0.9 (docs/performance.md).
constexpr LevelFacts kLevels[kNumLevels] = {{"plain", 1, 1}, {"neon", 1, 1}, {"avx2", 1, 16}, {"avx512", 64, 64}, {"amx", 64, 64}};
int32_t level();  // the one in use
bool runs(int32_t level);  // whether this processor has a level
void use_level(int32_t level);  // one that it has

// Patterns as the kernels tell them apart, a bit each.
enum Pattern : uint32_t {
  kNoMask = 1,
  kOneOfFour = 2,    // 1:4
  kTwoOfFour = 4,    // 2:4 and 1:2
  kEightOf16 = 8,    // 4:8 and 8:16
  kAtMostHalf = 16,  // others whose m divides 64, by the share that they keep
  kOverHalf = 32,
  kOther = 64,       // m does not divide 64
  kOneOrTwoOfFour = kOneOfFour | kTwoOfFour,
  kMasked64 = kOneOrTwoOfFour | kEightOf16 | kAtMostHalf | kOverHalf,
  kAny64 = kNoMask | kMasked64,
};

// Chooses among the kernels of one entry, which are compiled for each kind of values and pattern.
using Choose = Kernel (*)(const Header&, int64_t rows, bool is_bfloat16);

struct Entry {
  Level level;        // and those above, where no entry before this one takes the weight
  uint32_t values;    // a bit for each of `Values`
  uint32_t patterns;  // bits of `Pattern`
  int64_t from;       // rows of x; fewer take a later entry of this layout
  Layout layout;
  Choose choose;
  int64_t at_once;    // rows of x that a caller with many gives at a time; 0 where a GEMM of fp32 on the expanded weight is faster
  bool (*needs)() = nullptr;  // what the processor needs beside the level
  bool expands = false;       // whether the pattern is lost: zeros are stored
};

// The number of the entry that a weight is repacked by, in the wanted layout or the best one (-1); -1 where there is none.
int32_t entry_for(int32_t layout, int32_t values, int32_t n, int32_t m);
// An entry by its number; null where the processor lacks it, or it does not take such a weight.
const Entry* entry_at(int32_t number, int32_t values, int32_t n, int32_t m);
// The kernel that multiplies so many rows of x, which are bf16 or fp32, and whether two weights take the same form of x.
Kernel kernel_for(const Header&, int64_t rows, bool is_bfloat16);
bool same_form(const Header&, const Header&);

// ---- what the entries name

Kernel plain_kernels(const Header&, int64_t rows, bool is_bfloat16);
Kernel neon_panels(const Header&, int64_t rows, bool is_bfloat16);
Kernel neon_lanes(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx2_panels(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx2_panels_of_many(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx2_lanes(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx512_groups(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx512_many(const Header&, int64_t rows, bool is_bfloat16);
Kernel avx512_gathered(const Header&, int64_t rows, bool is_bfloat16);
Kernel amx_tiles(const Header&, int64_t rows, bool is_bfloat16);

bool has_neon();
bool has_sdot();     // sums four products of bytes at once
bool has_avx2();
bool has_avx512();
bool has_fast_vpermb();  // permutes bytes beside a multiplication: not with Intel, which does both in one unit
bool has_amx();

}  // namespace castlm
