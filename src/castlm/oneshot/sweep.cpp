// SparseGPT's sweep over the columns of a weight on a CPU: the masks of a group and the updates of the columns to its right,
// in registers. `sweep_by_torch_` of `sparsegpt.py` holds the same arithmetic in torch, and the tests compare the two.
// Pointers are not checked here: `sparsegpt.py` checks every tensor before it calls.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../core/each_cpu.h"
#include "../core/pool.h"

extern "C" {

// A weight that SparseGPT prunes, transposed; the names are as in `sparsegpt.py`.
struct Sweep {
  float* weight;         // (columns, rows)
  float* lost;           // (columns, rows): old minus new weights of the columns that are done, old ones of the others
  const float* pull;     // (columns, columns)
  const float* scale;    // (columns,): 1 / U_jj
  const float* inverse;  // (columns / m, m, m): U_gg
  int64_t rows, columns;
};
}

namespace {

constexpr int64_t kGroup = 256;  // the largest m of an n:m pattern, and the most columns of one sweep

// Eight rows of a weight as one value, which is a vector of AVX2. A comparison gives -1 where it is true.
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// The columns `start` to `stop` of the rows `begin` to `end`, at most 8 V, in whole groups of m. All columns before `start`
// have acted on them already. `M` is m, or 0 if it is not known when this is compiled.
//
//   weight     | row 0  row 1 ... row 15 |  column first        V = 2: a group of m columns, in registers
//              | row 0  row 1 ... row 15 |  column first + 1
//   lost       | row 0  row 1 ... row 15 |  columns start to first, in the first-level cache: each adds `pull` times itself
//              ...                          to each column of the group
template <int M, int V>
INLINE void sweep_rows(const Sweep& of, int64_t begin, int64_t end, int64_t start, int64_t stop, int n, int any_m) {
  const int m = M ? M : any_m;
  const size_t num_bytes = 4 * (end - begin);
  Floats lost[kGroup][V], group[M ? M : kGroup][V], score[M ? M : kGroup];
  Ints rank[M ? M : kGroup];
  for (int64_t first = start; first < stop; first += m) {
    float* weight = of.weight + first * of.rows + begin;
    float* old = of.lost + first * of.rows + begin;
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      std::memset(group[j], 0, sizeof group[j]);
      std::memcpy(group[j], weight + j * of.rows, num_bytes);
    }
    const float* pull = of.pull + first * of.columns;
    for (int64_t column = start; column < first; ++column) {
      const Floats* lost_here = lost[column - start];
#pragma GCC unroll 8
      for (int j = 0; j < m; ++j) {
        const float share = pull[j * of.columns + column];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) group[j][v] += share * lost_here[v];
      }
    }
    const float* inverse = of.inverse + first * m;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int j = 0; j < m; ++j) {
        const Floats scaled = group[j][v] * of.scale[first + j];
        score[j] = Floats(Ints(scaled) & 0x7fffffff);  // without the sign bit
        rank[j] = Ints{} + j;                          // as in `keep_codes` of core: the earlier of two equal weights wins
      }
#pragma GCC unroll 8
      for (int later = 1; later < m; ++later)
#pragma GCC unroll 8
        for (int earlier = 0; earlier < later; ++earlier) {
          const Ints later_wins = score[later] > score[earlier];
          rank[earlier] -= later_wins;
          rank[later] += later_wins;
        }
#pragma GCC unroll 8
      for (int k = 0; k < m; ++k) {  // a zeroed weight passes its error to the later ones of its group
        const Ints pruned = rank[k] >= n;
        const Floats scaled = group[k][v] * of.scale[first + k], error = Floats(Ints(scaled) & pruned);
#pragma GCC unroll 8
        for (int j = k + 1; j < m; ++j) group[j][v] -= inverse[k * m + j] * error;
        group[k][v] = Floats(Ints(group[k][v]) & ~pruned);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      Floats* lost_here = lost[first + j - start];
      std::memset(lost_here, 0, sizeof lost[0]);
      std::memcpy(lost_here, old + j * of.rows, num_bytes);
      for (int v = 0; v < V; ++v) lost_here[v] -= group[j][v];
      std::memcpy(old + j * of.rows, lost_here, num_bytes);
      std::memcpy(weight + j * of.rows, group[j], num_bytes);
    }
  }
}

}  // namespace

// Each handles the rows `begin` to `end` of a weight.
EACH_CPU static void sweep_4(const Sweep& of, int64_t begin, int64_t end, int64_t start, int64_t stop, int n) {
  constexpr int64_t rows = 2 * kLanes;
  for (; begin + rows <= end; begin += rows) sweep_rows<4, 2>(of, begin, begin + rows, start, stop, n, 4);
  if (begin < end) sweep_rows<4, 2>(of, begin, end, start, stop, n, 4);
}
EACH_CPU static void sweep_any(const Sweep& of, int64_t begin, int64_t end, int64_t start, int64_t stop, int n, int m) {
  for (; begin < end; begin += kLanes) sweep_rows<0, 1>(of, begin, std::min(begin + kLanes, end), start, stop, n, m);
}

extern "C" {

int32_t castlm_sweep_version = 1;  // of this structure and signature; `sparsegpt.py` expects its own number

// Prunes the columns `start` to `stop` of a weight, at most kGroup, and updates those to their right within them.
void castlm_sweep(const Sweep* of, int64_t start, int64_t stop, int n, int m, int num_threads) {
  constexpr int64_t part = 8 * kLanes;  // rows that a thread takes at a time
  castlm::in_parallel(of->rows, part, std::min<int64_t>(num_threads, of->rows / part), [=](int64_t begin, int64_t end) {
    if (m == 4)
      sweep_4(*of, begin, end, start, stop, n);
    else
      sweep_any(*of, begin, end, start, stop, n, m);
  });
}
}
