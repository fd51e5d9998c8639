// What attention by products of fp32 has for each instruction set. Included by attention.cpp before token_attention.h and
// prompt_attention.h, inside the same namespace.

// Number j of each word as fp32.
template <int N>
INLINE Vector number_of(Integers words, int j) {
  Integers bits = words;
  if (N == 2) bits = j ? words & int32_t(0xffff0000) : words << 16;
  if (N == 4) return __builtin_convertvector((words << (24 - 8 * j)) >> 24, Vector);
  Vector numbers;
  std::memcpy(&numbers, &bits, sizeof numbers);
  return numbers;
}

INLINE Integers load_words(const uint32_t* at) {
  Integers words;
  std::memcpy(&words, at, sizeof words);
  return words;
}

// ---- the factors of prompt_attention.h: the numbers themselves

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
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));  // they wrap where x is below -126
  Bits bits, exponent;
  std::memcpy(&bits, &p, sizeof p);
  std::memcpy(&exponent, &shifted, sizeof p);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return x < all(-126.0f) ? all(0.0f) : p;
}

// The weights of scores as a factor of each lane, which are added to the totals.
INLINE Factors weights_of(const float* scores, Units, Vector largest, Vector& totals) {
  const Vector weights = power_of_two(load_factors(scores) - largest);
  totals += weights;
  return weights;
}

// The keys (width, 64) and values (64, width) of a block as factors: where they are, or in `room`.
struct Brought {
  const Factor *keys, *values;
  Units units;
};
template <int N>
INLINE Brought bring_words(const uint8_t* at, int64_t half_bytes, int64_t width, Factor* room) {
  const auto* const keys = reinterpret_cast<const uint32_t*>(at);
  const auto* const values = reinterpret_cast<const uint32_t*>(at + half_bytes);
  const auto* const scales = reinterpret_cast<const float*>(at + 2 * half_bytes);  // of int8
  Factor* const to_values = room + kBlockTokens * width;
  for (int64_t i = 0; i < width / N; ++i)
    for (int64_t t = 0; t < kBlockTokens; t += kLanes)
      for (int j = 0; j < N; ++j) {
        const Vector numbers = number_of<N>(load_words(keys + i * kBlockTokens + t), j);
        store(room + (i * N + j) * kBlockTokens + t, N == 4 ? numbers * load(scales + t) : numbers);
      }
  for (int64_t t = 0; t < kBlockTokens / N; ++t)
    for (int64_t i = 0; i < width; i += kLanes)
      for (int j = 0; j < N; ++j) {
        const Vector numbers = number_of<N>(load_words(values + t * width + i), j);
        store(to_values + (t * N + j) * width + i, N == 4 ? numbers * all(scales[kBlockTokens + t * N + j]) : numbers);
      }
  return {room, to_values, {}};
}
INLINE Brought bring(const HeadBlocks& of, int64_t t, Factor* room) {
  const uint8_t* const at = of.at(t);
  if (of.kind == kCacheBFloat16) return bring_words<2>(at, of.half_bytes, of.width, room);
  if (of.kind == kCacheInt8) return bring_words<4>(at, of.half_bytes, of.width, room);
  return {reinterpret_cast<const Factor*>(at), reinterpret_cast<const Factor*>(at + of.half_bytes), {}};
}
