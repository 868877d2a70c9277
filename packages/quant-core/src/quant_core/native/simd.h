// Vectors of float32 in the widest registers that this file is compiled for, and what eight and sixteen bits become.
//
// One binary is made for each of torch's CPU capabilities (AVX512 with BW, DQ and VL; AVX2 with FMA and F16C; none of
// them), so a processor runs only instructions that torch has found in it.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QUANT_CORE_AVX512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QUANT_CORE_AVX2
#include <immintrin.h>
#endif

namespace {

// FP8 E4M3 values come out of vectors divided by the square of this: their bits then are those of a float32, with the
// exponents of its smallest numbers. So subnormal numbers must count (Subnormals, below), and half of it is multiplied
// into the other factor, so that products are of usual size.
constexpr float kE4M3Half = 0x1p60f;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The value of an E4M3 code, not divided; 0x7f and 0xff are NaN.
inline float e4m3_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  if (magnitude == 0x7f) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : bits_to_float((magnitude << 20) + (120u << 23));
  return code & 0x80 ? -value : value;
}

#if defined(QUANT_CORE_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Vec int8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static Vec e4m3(const uint8_t* p) {  // divided; NaN comes out as a number
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(wide, 20), _mm512_set1_epi32(static_cast<int>(0x87f00000)));
    return {_mm512_castsi512_ps(bits)};
  }
  static Vec from(const float* p) { return load(p); }
  static Vec from(const c10::Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec from(const c10::BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void to(float* p) const { store(p); }
  void to(c10::Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void to(c10::BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i all = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
  }
  // this · b + c
  Vec fma(Vec b, Vec c) const { return {_mm512_fmadd_ps(v, b.v, c.v)}; }
  Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
  Vec max(Vec b) const { return {_mm512_max_ps(v, b.v)}; }
  Vec min(Vec b) const { return {_mm512_min_ps(v, b.v)}; }
  Vec rounded() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // 2 to the power of an integer from -126 to 127
  static Vec power(Vec n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
  // `otherwise` where this is outside of low..high
  Vec inside(Vec value, Vec low, Vec high, Vec otherwise) const {
    const __mmask16 in = _mm512_cmp_ps_mask(v, low.v, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, high.v, _CMP_LE_OQ);
    return {_mm512_mask_blend_ps(in, otherwise.v, value.v)};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
};

#elif defined(QUANT_CORE_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Vec int8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static Vec e4m3(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(wide, 20), _mm256_set1_epi32(static_cast<int>(0x87f00000)));
    return {_mm256_castsi256_ps(bits)};
  }
  static Vec from(const float* p) { return load(p); }
  static Vec from(const c10::Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec from(const c10::BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void to(float* p) const { store(p); }
  void to(c10::Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void to(c10::BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i all = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m128i low = _mm256_castsi256_si128(all), high = _mm256_extracti128_si256(all, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  Vec fma(Vec b, Vec c) const { return {_mm256_fmadd_ps(v, b.v, c.v)}; }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
  Vec max(Vec b) const { return {_mm256_max_ps(v, b.v)}; }
  Vec min(Vec b) const { return {_mm256_min_ps(v, b.v)}; }
  Vec rounded() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec power(Vec n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
  Vec inside(Vec value, Vec low, Vec high, Vec otherwise) const {
    const __m256 in = _mm256_and_ps(_mm256_cmp_ps(v, low.v, _CMP_GE_OQ), _mm256_cmp_ps(v, high.v, _CMP_LE_OQ));
    return {_mm256_blendv_ps(otherwise.v, value.v, in)};
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
};

#else

struct Vec {
  static constexpr int kWidth = 8;
  float v[8];

  template <class F>
  static Vec each(F f) {
    Vec r;
    for (int i = 0; i < 8; ++i) {
      r.v[i] = f(i);
    }
    return r;
  }
  static Vec zero() { return all(0.0f); }
  static Vec all(float x) {
    return each([&](int) { return x; });
  }
  static Vec load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  static Vec int8(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
  }
  static Vec e4m3(const uint8_t* p) {
    return each([&](int i) { return e4m3_to_float(p[i]) / kE4M3Half / kE4M3Half; });
  }
  template <class T>
  static Vec from(const T* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  template <class T>
  void to(T* p) const {
    for (int i = 0; i < 8; ++i) {
      p[i] = static_cast<T>(v[i]);
    }
  }
  Vec fma(Vec b, Vec c) const {
    return each([&](int i) { return v[i] * b.v[i] + c.v[i]; });
  }
  Vec operator+(Vec b) const {
    return each([&](int i) { return v[i] + b.v[i]; });
  }
  Vec operator-(Vec b) const {
    return each([&](int i) { return v[i] - b.v[i]; });
  }
  Vec operator*(Vec b) const {
    return each([&](int i) { return v[i] * b.v[i]; });
  }
  Vec operator/(Vec b) const {
    return each([&](int i) { return v[i] / b.v[i]; });
  }
  Vec max(Vec b) const {
    return each([&](int i) { return v[i] > b.v[i] ? v[i] : b.v[i]; });
  }
  Vec min(Vec b) const {
    return each([&](int i) { return v[i] < b.v[i] ? v[i] : b.v[i]; });
  }
  Vec rounded() const {
    return each([&](int i) { return std::nearbyint(v[i]); });
  }
  static Vec power(Vec n) {
    return each([&](int i) { return bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23); });
  }
  Vec inside(Vec value, Vec low, Vec high, Vec otherwise) const {
    return each([&](int i) { return v[i] >= low.v[i] && v[i] <= high.v[i] ? value.v[i] : otherwise.v[i]; });
  }
  float sum() const {
    float r = 0;
    for (float x : v) {
      r += x;
    }
    return r;
  }
  float largest() const {
    float r = v[0];
    for (float x : v) {
      r = std::max(r, x);
    }
    return r;
  }
};

#endif

// While it lives, subnormal numbers of this thread are what they are, whatever torch.set_flush_denormal says.
class Subnormals {
#if defined(QUANT_CORE_AVX512) || defined(QUANT_CORE_AVX2)
 public:
  Subnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before_); }
  Subnormals(const Subnormals&) = delete;
  Subnormals& operator=(const Subnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// e to the power of x <= 0; 0 below -87; NaN stays one.
inline Vec exp(Vec x) {
  const Vec bounded = Vec::all(-87.0f).max(x);  // the second operand is what comes out for NaN
  const Vec n = (bounded * Vec::all(1.44269504088896341f)).rounded();
  // ln 2 in two parts, so that the remainder is exact
  Vec r = n.fma(Vec::all(-0.693359375f), bounded);
  r = n.fma(Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p.fma(r, Vec::all(c));
  }
  p = p.fma(r * r, r) + Vec::all(1.0f);
  const Vec result = p * Vec::power(n);
  const Vec lowest = Vec::all(-std::numeric_limits<float>::infinity());
  return x.inside(Vec::zero(), lowest, Vec::all(-87.0f), result);
}

template <class T>
void to_float(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    Vec::from(from + i).store(to + i);
  }
  for (; i < n; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

template <class T>
void from_float(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    Vec::load(from + i).to(to + i);
  }
  for (; i < n; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

// to[c][r] = from[r][c] for four rows; columns are a multiple of four.
inline void transpose_4(const float* from, int64_t from_row, int64_t columns, float* to, int64_t to_row) {
  for (int64_t c = 0; c < columns; c += 4) {
#if defined(QUANT_CORE_AVX512) || defined(QUANT_CORE_AVX2)
    __m128 r0 = _mm_loadu_ps(from + c), r1 = _mm_loadu_ps(from + from_row + c);
    __m128 r2 = _mm_loadu_ps(from + 2 * from_row + c), r3 = _mm_loadu_ps(from + 3 * from_row + c);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    _mm_storeu_ps(to + c * to_row, r0);
    _mm_storeu_ps(to + (c + 1) * to_row, r1);
    _mm_storeu_ps(to + (c + 2) * to_row, r2);
    _mm_storeu_ps(to + (c + 3) * to_row, r3);
#else
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t r = 0; r < 4; ++r) {
        to[(c + i) * to_row + r] = from[r * from_row + c + i];
      }
    }
#endif
  }
}

}  // namespace
