// Loads and stores of vectors. Included by the files of attention inside a namespace that has `Vector`.

template <class V = Vector>
INLINE V load(const float* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
template <class V, class To>
INLINE void store(To* at, V v) { std::memcpy(at, &v, sizeof v); }
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
