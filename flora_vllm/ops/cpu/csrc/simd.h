// The vector operations the op is made of, for float32 and bfloat16, on any CPU the compiler knows.
//
// Everything is counted in 32-bit lanes: one float32, or two neighbouring bfloat16 of a row of x with the two weights
// they meet. So both types share one layout and one set of loops; only `dot`, `multiply` and the conversions differ.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace flora {

#if defined(__AVX512F__)
constexpr int kVector = 16;       // lanes of one register
constexpr int kBlockVectors = 4;  // registers across: 6 x 4 sums + 4 weights + 1 broadcast fit in 32
constexpr int kBlockRows = 6;
#elif defined(__AVX__)
constexpr int kVector = 8;
constexpr int kBlockVectors = 2;
constexpr int kBlockRows = 6;
#else
constexpr int kVector = 4;
constexpr int kBlockVectors = 2;
constexpr int kBlockRows = 4;
#endif

using Lane = uint32_t;
typedef float Floats __attribute__((vector_size(kVector * 4)));
typedef uint32_t Lanes __attribute__((vector_size(kVector * 4)));
typedef uint16_t Halves __attribute__((vector_size(kVector * 2)));

struct Float32 {
  using Storage = float;
  static constexpr int kPerLane = 1;
};
struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kPerLane = 2;
};

template <class V, class P>
inline V load(const P* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class P>
inline void store(P* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}
inline Lanes spread(Lane lane) { return Lanes{} + lane; }
inline Floats spread(float value) {
  Lane bits;
  std::memcpy(&bits, &value, 4);
  return (Floats)spread(bits);
}

// The first and the second bfloat16 of each lane, as float32.
inline Floats first_half(Lanes lanes) { return (Floats)(lanes << 16); }
inline Floats second_half(Lanes lanes) { return (Floats)(lanes & 0xffff0000u); }

// Nearest even; NaN stays NaN whatever its payload.
inline Lane round_bits(float value) {
  Lane bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline Lanes round_bits(Floats values) {
  Lanes bits = (Lanes)values;
  Lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Lanes nan = (Lanes)(values != values);
  return (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
}

// Lanes of two bfloat16 each from their float32 values.
inline Lanes join_halves(Floats first, Floats second) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Lanes)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#else
  return round_bits(first) | (round_bits(second) << 16);
#endif
}

// sum + the products of each lane's values.
inline Floats dot(Float32, Floats sum, Lanes x, Lanes w) { return sum + (Floats)x * (Floats)w; }
inline Floats dot(BFloat16, Floats sum, Lanes x, Lanes w) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
  return sum + first_half(x) * first_half(w) + second_half(x) * second_half(w);
#endif
}

// Value by value product, rounded once.
inline Lanes multiply(Float32, Lanes x, Lanes y) { return (Lanes)((Floats)x * (Floats)y); }
inline Lanes multiply(BFloat16, Lanes x, Lanes y) {
  return join_halves(first_half(x) * first_half(y), second_half(x) * second_half(y));
}

// Component `half` of each lane (float32 lanes have only one).
inline Floats component(Float32, Lanes lanes, int) { return (Floats)lanes; }
inline Floats component(BFloat16, Lanes lanes, int half) { return half ? second_half(lanes) : first_half(lanes); }

inline void store_row(float* to, Floats values) { store(to, values); }
inline void store_row(uint16_t* to, Floats values) {
#if defined(__AVX512BF16__)
  store(to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  store(to, __builtin_convertvector(round_bits(values), Halves));
#endif
}
inline Floats load_row(const float* from) { return load<Floats>(from); }
inline Floats load_row(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Lanes) << 16);
}
inline float to_float(float value) { return value; }
inline float to_float(uint16_t bits) {
  Lane wide = Lane(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline void from_float(float* to, float value) { *to = value; }
inline void from_float(uint16_t* to, float value) { *to = uint16_t(round_bits(value)); }

}  // namespace flora
