// The kernels of int8.h for one instruction set.
#pragma once

#include "product.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastrnn::FASTRNN_ISA {

// A register of 32-bit lanes; unsigned, for these sums may wrap on their way.
typedef uint32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
inline constexpr int kLanes = FASTRNN_VECTOR_BYTES / 4;

FASTRNN_HD Words load_words(const void* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
FASTRNN_HD Words all_lanes(const void* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof x);
  return Words{} + x;
}

#if defined(__AVX512VNNI__)

// The instruction multiplies unsigned bytes by signed ones. So a value is kept with kOffset added, its low
// bytes in one plane and its high bytes in the other, and the offset's share is taken off at the end.
inline constexpr int32_t kOffset = 1 << 15;
using Sums = Vec<Words, 2>;

FASTRNN_HD void add_products(Sums& sums, const Words& w, const Words& a0, const Words& a1) {
  sums[0] = Words(_mm512_dpbusd_epi32(__m512i(sums[0]), __m512i(a0), __m512i(w)));
  sums[1] = Words(_mm512_dpbusd_epi32(__m512i(sums[1]), __m512i(a1), __m512i(w)));
}
FASTRNN_HD Words total(const Sums& sums, const Words& weights) {
  return sums[0] + (sums[1] << 8) - weights * static_cast<uint32_t>(kOffset);
}

FASTRNN_HD void put(const Words& q, int64_t k, uint8_t* plane0, uint8_t* plane1) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(plane0 + k), _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(plane1 + k),
                   _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(q >> 8)));
}

#else

// Pairs of 16-bit products: the weights' even bytes with plane 0, the even k, and their odd ones with
// plane 1.
inline constexpr int32_t kOffset = 0;
using Sums = Vec<Words, 1>;
typedef int16_t Halves __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

FASTRNN_HD Words pair_products(const Halves& a, const Words& b) {
#if FASTRNN_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return Words(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif FASTRNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return Words(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif FASTRNN_VECTOR_BYTES == 16 && defined(__SSE2__)
  return Words(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  typedef int32_t Ints __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  const Ints x = Ints(a), y = Ints(b);  // the low halves' signs by way of the high ones' place
  return Words(((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16));
#endif
}
FASTRNN_HD void add_products(Sums& sums, const Words& w, const Words& a0, const Words& a1) {
  const Halves bytes = Halves(w), even = Halves(bytes << 8) >> 8, odd = bytes >> 8;
#if FASTRNN_VECTOR_BYTES == 16 && defined(__aarch64__)
  const int16x8_t x0 = int16x8_t(even), x1 = int16x8_t(odd), y0 = int16x8_t(a0), y1 = int16x8_t(a1);
  const int32x4_t low = vmull_s16(vget_low_s16(x0), vget_low_s16(y0)), high = vmull_high_s16(x0, y0);
  sums[0] = sums[0] + Words(vpaddq_s32(vmlal_s16(low, vget_low_s16(x1), vget_low_s16(y1)),
                                       vmlal_high_s16(high, x1, y1)));
#else
  sums[0] = sums[0] + pair_products(even, a0) + pair_products(odd, a1);
#endif
}
FASTRNN_HD Words total(const Sums& sums, const Words&) { return sums[0]; }

FASTRNN_HD void put(const Words& q, int64_t k, uint8_t* plane0, uint8_t* plane1) {
  int16_t even[kLanes / 2], odd[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) {
    even[i] = static_cast<int16_t>(q[2 * i]);
    odd[i] = static_cast<int16_t>(q[2 * i + 1]);
  }
  std::memcpy(plane0 + k, even, sizeof even);
  std::memcpy(plane1 + k, odd, sizeof odd);
}

#endif

// A row that holds a NaN or an infinity becomes NaN throughout, by its scale.
inline void int8_quantize(const float* a, int64_t K, float* row) {
  using S = Simd<float>;
  typename S::NativeBits most{};
  for (int64_t k = 0; k < K; k += S::W) {
    const S x = S::load(a + k, static_cast<int>(K - k < S::W ? K - k : S::W));
    typename S::NativeBits bits;
    std::memcpy(&bits, &x.v, sizeof bits);
    bits &= 0x7fffffff;  // among these, of greater numbers the bits are greater too
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int i = 0; i < S::W; ++i) largest = most[i] > largest ? most[i] : largest;
  float peak;
  std::memcpy(&peak, &largest, sizeof peak);
  const float levels = cpu::int8_levels(K);
  const bool finite = largest < 0x7f800000;
  row[0] = finite ? peak / levels : peak - peak;
  // Of less than 1e-30 the inverse might not be finite.
  const S inverse(finite && peak > 1e-30f ? levels / peak : 0.0f), magic(Limits<float>::kMagic);
  uint8_t* const plane0 = reinterpret_cast<uint8_t*>(row + cpu::kInt8Head);
  uint8_t* const plane1 = plane0 + 4 * cpu::int8_plane(K);
  const Words offset = Words{} + static_cast<uint32_t>(kOffset), magic_bits = load_words(&magic.v);
  for (int64_t k = 0; k < K; k += S::W) {
    S x = S::load(a + k, static_cast<int>(K - k < S::W ? K - k : S::W));
    if (!finite) x = S(0);
    const S rounded = x * inverse + magic;
    put(load_words(&rounded.v) - magic_bits + offset, k, plane0, plane1);
  }
}

template <int G, int U, int M>
__attribute__((noinline)) void int8_tile(const cpu::Int8Tile& t) {
  using S = Simd<float>;
  constexpr int W = S::W;
  const int64_t fours = cpu::int8_fours(t.K), plane = cpu::int8_plane(t.K);
  Sums sums[M][U][G] = {};
  const float* w = t.w + 2 * G * W;
  const float* a = t.a + cpu::kInt8Head;
  for (int64_t k = 0; k < fours; ++k, w += G * W, ++a) {
    Words wk[U][G];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) wk[u][g] = load_words(w + u * t.block + g * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Words a0 = all_lanes(a + m * t.lda), a1 = all_lanes(a + m * t.lda + plane);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) add_products(sums[m][u][g], wk[u][g], a0, a1);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const float* head = t.w + u * t.block + g * W;
        const Words sum = total(sums[m][u][g], load_words(head + G * W));
        typename S::NativeBits bits;
        std::memcpy(&bits, &sum, sizeof bits);
        const S value(__builtin_convertvector(bits, S::Native)), scale = S(t.a[m * t.lda]) * S::load(head);
        const S bias = t.bias ? S::load(t.bias + g * t.ld_bias + u * W) : S(0);
        (value * scale + bias).store(t.out + ((m * U + u) * G + g) * W);
      }
    }
  }
}

template <int G, int U, int M>
FASTRNN_HD void int8_tile_of(int m, const cpu::Int8Tile& t) {
  if constexpr (M > 0) {
    if (m == M) return int8_tile<G, U, M>(t);
    int8_tile_of<G, U, M - 1>(m, t);
  }
}

template <int G>
void int8_tiles(int M, int U, const cpu::Int8Tile& t) {
  using Tile = TileShape<G>;
  if (U == 1) return int8_tile_of<G, 1, Tile::kInt8Rows>(M, t);
  if (U == Tile::kUnits) return int8_tile_of<G, Tile::kUnits, Tile::kInt8Rows>(M, t);
  int8_tile<G, Tile::kUnitsOneRow, 1>(t);
}

constexpr cpu::Int8Kernels int8_kernels() {
  return {&int8_quantize, {&int8_tiles<1>, &int8_tiles<2>, &int8_tiles<3>, &int8_tiles<4>}};
}

}  // namespace fastrnn::FASTRNN_ISA
