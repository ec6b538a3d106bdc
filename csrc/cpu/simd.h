// A register of floats or doubles by the compiler's vector types, so that one source serves SSE2, AVX2,
// AVX-512 and NEON. Everything lives in namespace FASTRNN_ISA: each instruction set's translation unit has
// types of its own, and the linker can never merge a function compiled for one with that of another.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "../cells/vec.h"

namespace fastrnn::FASTRNN_ISA {

// Where all that comes out is rounded to bfloat16, gate functions need no more than two digits beyond it.
#if defined(FASTRNN_BF16_ONLY)
inline constexpr bool kRough = true;
#else
inline constexpr bool kRough = false;
#endif

template <class E>
struct Limits;

template <>
struct Limits<float> {
  typedef float Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int32_t NativeBits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
#if defined(__FMA__) || defined(__aarch64__)
  // One part, where n * ln 2 is not rounded: an ulp of e^x at |x| = 17, where a sigmoid is 4e-8, 3 at 85.
  static constexpr float kLn2Hi = 0.693147182f, kLn2Lo = 0;
#else
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // n * kLn2Hi is exact
#endif
  // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, the highest power first: minimax (Remez). Its relative
  // error, 1.3e-7 or, where rough, 2e-4, is a third of an ulp of float's or 0.02 of bfloat16's in e^r - 1.
  static constexpr int kTerms = kRough ? 3 : 5;
  static constexpr float kExp[] = {1.39012850e-3f, 8.36314038e-3f, 4.16668533e-2f, 1.66665773e-1f,
                                   4.99999996e-1f};
  static constexpr float kRoughExp[] = {4.17083041e-2f, 1.67417878e-1f, 5.00005006e-1f};
  static constexpr float term(int i) { return kRough ? kRoughExp[i] : kExp[i]; }
  static constexpr float kExpLow = -87.0f, kExpHigh = 88.3f, kTanhLimit = 9.5f;
};
template <>
struct Limits<double> {
  typedef double Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef int64_t NativeBits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kTerms = 12;
  static constexpr double term(int i) {  // the Taylor series' 1/13! to 1/2!
    double factorial = 1;
    for (int k = 2; k <= 13 - i; ++k) factorial *= k;
    return 1 / factorial;
  }
  static constexpr double kExpLow = -708.0, kExpHigh = 709.0, kTanhLimit = 20.0;
};

// Half a line would wait for its other half, which is written much later.
inline constexpr bool kStreams = FASTRNN_VECTOR_BYTES == 64;

template <class E_>
struct Simd {
  using E = E_;
  static constexpr int W = FASTRNN_VECTOR_BYTES / sizeof(E);
  using Native = typename Limits<E>::Native;
  using NativeBits = typename Limits<E>::NativeBits;
  Native v;

  Simd() = default;
  FASTRNN_HD Simd(Native x) : v(x) {}
  FASTRNN_HD explicit Simd(E x) : v(x - Native{}) {}
  FASTRNN_HD explicit Simd(int x) : Simd(static_cast<E>(x)) {}

  static FASTRNN_HD Simd load(const E* p) {
    Simd r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  FASTRNN_HD void store(E* p) const { std::memcpy(p, &v, sizeof v); }
  // To memory past the caches, where a register is a line of them; p is where a line begins. Other threads
  // see it after streams_end().
  FASTRNN_HD void stream(E* p) const {
#if defined(__AVX512F__)
    if constexpr (kStreams) {
      __m512i bits;
      std::memcpy(&bits, &v, sizeof bits);
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
    }
#endif
    store(p);
  }
  // The first n lanes; the others read as 0 and are not written.
  static FASTRNN_HD Simd load(const E* p, int n) {
    if (n >= W) return load(p);
    Simd r;
    r.v = Native{};
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  FASTRNN_HD void store(E* p, int n) const {
    if (n >= W) return store(p);
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

FASTRNN_HD void streams_end() {
#if defined(__AVX512F__)
  if constexpr (kStreams) _mm_sfence();
#endif
}

template <class E>
FASTRNN_HD Simd<E> operator+(const Simd<E>& a, const Simd<E>& b) {
  return a.v + b.v;
}
template <class E>
FASTRNN_HD Simd<E> operator-(const Simd<E>& a, const Simd<E>& b) {
  return a.v - b.v;
}
template <class E>
FASTRNN_HD Simd<E> operator*(const Simd<E>& a, const Simd<E>& b) {
  return a.v * b.v;
}
template <class E>
FASTRNN_HD Simd<E> operator/(const Simd<E>& a, const Simd<E>& b) {
  return a.v / b.v;
}

template <class E>
FASTRNN_HD Simd<E> select(const typename Simd<E>::NativeBits& mask, const Simd<E>& a, const Simd<E>& b) {
  return mask ? a.v : b.v;
}
// A NaN passes through: comparisons with it are false.
template <class E>
FASTRNN_HD Simd<E> clamp(const Simd<E>& x, E low, E high) {
  const Simd<E> l(low), h(high);
  const Simd<E> y = select<E>(x.v < l.v, l, x);
  return select<E>(y.v > h.v, h, y);
}
template <class E>
FASTRNN_HD Simd<E> reciprocal(const Simd<E>& x) {
  return Simd<E>(1) / x;
}
// Where the compiler finds less than the instruction set has. max and min return their second operand for a
// NaN.
#if FASTRNN_VECTOR_BYTES == 32 && defined(__AVX__)
FASTRNN_HD Simd<float> clamp(const Simd<float>& x, float low, float high) {
  const __m256 above = _mm256_max_ps(_mm256_set1_ps(low), x.v);
  return Simd<float>::Native(_mm256_min_ps(_mm256_set1_ps(high), above));
}
#elif defined(__AVX512F__)
// (The maskz forms: g++ 12 warns of its own header's unmasked ones.)
FASTRNN_HD Simd<float> clamp(const Simd<float>& x, float low, float high) {
  const __m512 above = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x.v);
  return Simd<float>::Native(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), above));
}
// 14 bits and a Newton step, within an ulp; a division holds its port for 16 cycles. Not for zeros and
// infinities.
FASTRNN_HD Simd<float> reciprocal(const Simd<float>& x) {
  const Simd<float> y = Simd<float>::Native(_mm512_maskz_rcp14_ps(0xffff, x.v));
  if (kRough) return y;
  return y + y * (Simd<float>(1) - x * y);
}
#endif

template <class E, int... I>
FASTRNN_HD Simd<E> shuffle(const Simd<E>& a, const Simd<E>& b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a.v, b.v, I...);
#else
  return __builtin_shuffle(a.v, b.v, typename Simd<E>::NativeBits{I...});
#endif
}

// Of registers cut into groups of 2*H lanes: the low (or high) half of each group of a, beside that of b.
template <int W, int H, bool kHigh, int... L>
constexpr auto halves(std::integer_sequence<int, L...>) {
  return std::integer_sequence<int, ((L & H) ? W : 0) + (L & ~(2 * H - 1)) + (L & (H - 1)) + kHigh * H...>{};
}
template <int H, bool kHigh, class E>
FASTRNN_HD Simd<E> halves(const Simd<E>& a, const Simd<E>& b) {
  constexpr int W = Simd<E>::W;
  return shuffle(a, b, halves<W, H, kHigh>(std::make_integer_sequence<int, W>{}));
}

// v[i] lane j becomes v[j] lane i.
template <class E, int H = Simd<E>::W / 2>
FASTRNN_HD void transpose(Simd<E>* v) {
  constexpr int W = Simd<E>::W;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const Simd<E> a = v[i], b = v[i + H];
    v[i] = halves<H, false>(a, b);
    v[i + H] = halves<H, true>(a, b);
  }
  if constexpr (H > 1) transpose<E, H / 2>(v);
}

// The sums of N registers, each cut into groups of 2*H lanes: one register, in whose every group stand N
// parts, of v[0] first, 2*H / N lanes each.
template <int N, int H, class E>
FASTRNN_HD Simd<E> folded(Simd<E>* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      v[i] = halves<H, false>(v[i], v[i + N / 2]) + halves<H, true>(v[i], v[i + N / 2]);
    }
    return folded<N / 2, H / 2>(v);
  }
}

template <int W, int N, int... L>
constexpr auto regrouped(std::integer_sequence<int, L...>) {
  return std::integer_sequence<int, (L % N) * (W / N) + L / N...>{};
}

// e^x = power * p + power: x = n ln 2 + r with |r| <= ln(2)/2, power = 2^n, p = e^r - 1 by a polynomial.
template <class E>
FASTRNN_HD void exp_parts(const Simd<E>& x, Simd<E>& p, Simd<E>& power) {
  using L = Limits<E>;
  using S = Simd<E>;
  const S magic(L::kMagic);
  const S shifted = x * S(E(1.4426950408889634074)) + magic;
  const S n = shifted - magic;
  S r = x - n * S(L::kLn2Hi);
  if constexpr (L::kLn2Lo != 0) r = r - n * S(L::kLn2Lo);
  S q(L::term(0));
#pragma GCC unroll 16
  for (int i = 1; i < L::kTerms; ++i) q = q * r + S(L::term(i));
  p = q * (r * r) + r;
  typename S::NativeBits bits, magic_bits;
  std::memcpy(&bits, &shifted.v, sizeof bits);
  std::memcpy(&magic_bits, &magic.v, sizeof magic_bits);
  bits = (bits - magic_bits + L::kBias) << L::kMantissa;
  std::memcpy(&power.v, &bits, sizeof bits);
}

// Exactly 0 and 1 at the ends: the reciprocal of the largest power is a denormal, which the scan flushes to
// 0.
template <class E>
FASTRNN_HD Simd<E> sigmoid(const Simd<E>& x) {
  using S = Simd<E>;
  S p, power;
  exp_parts<E>(clamp(S(0) - x, Limits<E>::kExpLow, Limits<E>::kExpHigh), p, power);
  return reciprocal(S(1) + (power * p + power));
}

// tanh(x) = m / (m + 2) with m = e^2x - 1: full relative accuracy near 0, where most activations live.
template <class E>
FASTRNN_HD Simd<E> tanh_(const Simd<E>& x) {
  using S = Simd<E>;
  S p, power;
  const S y = clamp(x, -Limits<E>::kTanhLimit, Limits<E>::kTanhLimit);
  exp_parts<E>(y + y, p, power);
  const S m = power * p + (power - S(1));
  return m * reciprocal(m + S(2));
}

template <class E>
FASTRNN_HD Simd<E> relu(const Simd<E>& x) {
  const Simd<E> zero(0);
  return select<E>(x.v < zero.v, zero, x);
}
template <class E>
FASTRNN_HD Simd<E> relu_gradient(const Simd<E>& y, const Simd<E>& dy) {
  const Simd<E> zero(0);
  return select<E>(y.v <= zero.v, zero, dy);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
FASTRNN_HD Simd<float> from_bf16(__m256i x) {
  const __m512i bits = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, x), 16);
  return Simd<float>::Native(_mm512_castsi512_ps(bits));
}
FASTRNN_HD __m256i to_bf16(const Simd<float>& x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
}
FASTRNN_HD __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }
// Returns what was stored.
FASTRNN_HD Simd<float> store_bf16(const Simd<float>& x, uint16_t* p, int n) {
  const __m256i rounded = to_bf16(x);
  _mm256_mask_storeu_epi16(p, first(n), rounded);
  return from_bf16(rounded);
}
FASTRNN_HD Simd<float> load_bf16(const uint16_t* p, int n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
#else
// Round to bfloat16 (nearest, ties to even; a NaN stays one), still held as float.
FASTRNN_HD Simd<float> round_to_bf16(const Simd<float>& x) {
  using S = Simd<float>;
  S::NativeBits bits;
  std::memcpy(&bits, &x.v, sizeof bits);
  S::NativeBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000);
  S r;
  std::memcpy(&r.v, &rounded, sizeof rounded);
  return select<float>(x.v == x.v, r, x);
}

// Rows of 16-bit floats at the border. Returns what was stored.
FASTRNN_HD Simd<float> store_bf16(const Simd<float>& x, uint16_t* p, int n) {
  const Simd<float> rounded = round_to_bf16(x);
  uint32_t bits[Simd<float>::W];
  std::memcpy(bits, &rounded.v, sizeof bits);
  for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(bits[i] >> 16);
  return rounded;
}
FASTRNN_HD Simd<float> load_bf16(const uint16_t* p, int n) {
  uint32_t bits[Simd<float>::W] = {};
  for (int i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  Simd<float> r;
  std::memcpy(&r.v, bits, sizeof bits);
  return r;
}
#endif

}  // namespace fastrnn::FASTRNN_ISA
