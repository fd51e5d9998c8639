// Loads and stores of vectors, and what prompt_attention.h asks of sums that are floats. Included by the files of attention inside a
// namespace that has `Vector`.

template <class V = Vector>
INLINE V load(const float* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
template <class V, class To>
INLINE void store(To* at, V v) { std::memcpy(at, &v, sizeof v); }
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

using Sums = Vector;
constexpr bool kRounds = false;
constexpr int64_t kUnitWords = 0;
constexpr float kWeightUnit = 1;
struct Units {
  Units from(int64_t) const { return {}; }
};
INLINE float scale_of_query(const float*, int64_t, float scale, float*) { return scale; }
INLINE Vector score_of(Vector sums, Units, int, const float*) { return sums; }
INLINE void begin_sums(Vector& sums, const float* to, Vector factor) { sums = load(to) * factor; }
INLINE void end_sums(Vector sums, float* to, Vector, Vector) { store(to, sums); }
