// The factors of prompt_attention.h where products are of fp32: the numbers themselves. Included by attention.cpp before it, inside
// the same namespace.

using Factor = float;
using Factors = Vector;
typedef float Four __attribute__((vector_size(16)));  // four factors, too
constexpr int kNumbers = 1;                           // in a factor

INLINE Factors all_of(Factor factor) { return all(factor); }
INLINE Factors load_factors(const Factor* at) {
  Factors factors;
  std::memcpy(&factors, at, sizeof factors);
  return factors;
}
INLINE void add_products(Vector& sums, Factors a, Factors b) { sums += a * b; }

// Numbers times `scale` as factors.
INLINE Four four_factors(const float* from, float scale) {
  Four four;
  std::memcpy(&four, from, sizeof four);
  return four * scale;
}
INLINE Factor one_factor(const float* from, float scale) { return *from * scale; }

// 2^x to within 2e-7 of its value for x <= 0, and 0 below -126.
INLINE Vector power_of_two(Vector x) {
  const Vector shifted = x + all(12582912.0f);  // 1.5 * 2^23: the low bits are the nearest integer
  const Vector r = x - (shifted - all(12582912.0f));
  Vector p = all(1.535336188e-4f);
  p = p * r + all(1.339887440e-3f);
  p = p * r + all(9.618437357e-3f);
  p = p * r + all(5.550332471e-2f);
  p = p * r + all(2.402264791e-1f);
  p = p * r + all(6.931472028e-1f);
  p = p * r + all(1.0f);
  Integers bits, exponent;
  std::memcpy(&bits, &p, sizeof p);
  std::memcpy(&exponent, &shifted, sizeof p);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return x < all(-126.0f) ? all(0.0f) : p;
}

// The weights of scores as a factor of each lane, which are added to the totals.
INLINE Factors weights_of(const float* scores, Vector largest, Vector& totals) {
  const Vector weights = power_of_two(load_factors(scores) - largest);
  totals += weights;
  return weights;
}

// Keys and values (count, width) as factors.
struct Brought {
  const Factor *keys, *values;
};
INLINE Brought bring(const float* keys, const float* values, int64_t, int64_t, Factor*) { return {keys, values}; }
