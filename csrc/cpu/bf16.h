// What the instruction sets that multiply bfloat16 share: rows and weights of it with sums of float, which
// then take the same way through the cell as those of any other.
#pragma once

#include <immintrin.h>

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

using cpu::Bf16;

// Without a Sum, so that the product of product.h is none for weights of bfloat16.
template <>
struct Terms<Bf16> {
  static constexpr int N = 32;
  __m512i v;
  static FASTRNN_HD Terms load(const Bf16* p, int64_t n) {
    const __mmask32 mask = n >= N ? ~0u : (1u << n) - 1;
    return {_mm512_maskz_loadu_epi16(mask, p)};
  }
  FASTRNN_HD Simd<float> add_product(const Terms& w, const Simd<float>& sum) const {
    return Simd<float>::Native(_mm512_dpbf16_ps(sum.v, (__m512bh)v, (__m512bh)w.v));
  }
};

// From weights where torch keeps them, for few rows.
template <int G, class Epilogue>
FASTRNN_HD void dot_product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units,
                            const InRows<Bf16>& in, const cpu::Weight<Bf16>& weight, int64_t K,
                            const float* bias, int64_t ld_bias, bool backwards, const Epilogue& epilogue) {
  using S = Simd<float>;
  constexpr int W = S::W;
  alignas(64) float out[4 * G * W];
  for (int64_t j = 0; j < block1 - block0; ++j) {
    const int64_t unit = (backwards ? block1 - 1 - j : block0 + j) * W;
    const int lanes = static_cast<int>(at_most(units - unit, W));
    for (int64_t r = row0; r < row1; r += 4) {
      const int M = static_cast<int>(at_most(row1 - r, 4));
      const auto run = M == 1   ? &dot_tile<float, G, 1, Bf16>
                       : M == 2 ? &dot_tile<float, G, 2, Bf16>
                       : M == 3 ? &dot_tile<float, G, 3, Bf16>
                                : &dot_tile<float, G, 4, Bf16>;
      run(in.data + r * in.ld, in.ld, weight.data + unit * weight.ld, units * weight.ld, weight.ld, K, lanes,
          bias ? bias + unit : nullptr, ld_bias, out);
      for (int m = 0; m < M; ++m) {
        Vec<S, G> v;
        for (int g = 0; g < G; ++g) v[g] = S::load(out + (m * G + g) * W);
        epilogue(r + m, unit, lanes, v);
      }
    }
  }
}

// Pairs of bfloat16, moved as if each were one float.
FASTRNN_HD Simd<float> load_pairs(const Bf16* p, int64_t elements) {
  return Simd<float>::Native(_mm512_castsi512_ps(Terms<Bf16>::load(p, elements).v));
}

// Calls to(block, step, gate, k), for each pair 32 * step + 2 * k of a weight, for where [W][2] of it go:
// zeros where units or K end.
template <class To>
void pack_pairs(const cpu::Pack& p, int64_t block0, int64_t block1, To&& to) {
  using S = Simd<float>;
  constexpr int W = S::W;
  const Bf16* src = static_cast<const Bf16*>(p.src);
  const int64_t steps = (p.K + 31) / 32;
  for (int64_t b = block0; b < block1; ++b) {
    const int lanes = static_cast<int>(at_most(p.units - b * W, W));
    for (int64_t g = 0; g < p.gates; ++g) {  // the outer loop, as in pack.h
      for (int64_t step = 0; step < steps; ++step) {
        const Bf16* from = src + g * p.gate_stride + b * W * p.unit_stride + step * 32 * p.k_stride;
        const int64_t left = at_most(p.K - step * 32, 32);
        S v[W];
        if (p.k_stride == 1) {
          for (int lane = 0; lane < W; ++lane) {
            v[lane] = lane < lanes ? load_pairs(from + lane * p.unit_stride, left) : S(0);
          }
          transpose(v);
        } else {
          // Rows along the units: each two of them are interleaved.
          for (int k = 0; k < W; ++k) {
            const auto row = [&](int64_t i) {
              return i < left ? _mm256_maskz_loadu_epi16(first(lanes), from + i * p.k_stride)
                              : _mm256_setzero_si256();
            };
            const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, row(2 * k));
            const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, row(2 * k + 1));
            const __m512i pairs = _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16));
            v[k] = S::Native(_mm512_castsi512_ps(pairs));
          }
        }
        for (int k = 0; k < W; ++k) {
          if (Bf16* at = to(b, step, g, k)) v[k].store(reinterpret_cast<float*>(at));
        }
      }
    }
  }
}

inline constexpr int64_t kPanelColumns = kPanel<float, Bf16>;

inline void to_panels(const Border<float>& from, int64_t columns, Bf16* to, int64_t panel) {
  using S = Simd<float>;
  for (int64_t c = 0; c < columns; c += kPanelColumns, to += panel) {
    for (int64_t half = 0; half < kPanelColumns; half += S::W) {
      const int lanes = static_cast<int>(at_most(columns - c - half, S::W));
      store_row(from.data && lanes > 0 ? load(from, 0, c + half, lanes) : S(0), to + half, S::W);
    }
  }
}

// Pairs from two rows, a0 b0 a1 b1 ... of the columns 0 to 15, or of 16 to 31.
FASTRNN_HD __m512i paired(const __m512i& a, const __m512i& b, bool high) {
  const auto half = [&](const __m512i& row) {
    __m256i halves[2];
    std::memcpy(halves, &row, sizeof row);
    return _mm512_maskz_cvtepu16_epi32(0xffff, halves[high]);
  };
  return _mm512_or_si512(half(a), _mm512_maskz_slli_epi32(0xffff, half(b), 16));
}

FASTRNN_HD __m512i panel_row(const Bf16* panel, int64_t row, int64_t rows) {
  return row < rows ? _mm512_loadu_si512(panel + row * kPanelColumns) : _mm512_setzero_si512();
}

// [rows][32] to [rows/2][2][16][2], which may be in its place, and zeros up to `end`, an even number.
FASTRNN_HD void pair_rows(const Bf16* panel, int64_t rows, int64_t end, Bf16* to) {
  for (int64_t r = 0; r < end; r += 2) {
    const __m512i a = panel_row(panel, r, rows), b = panel_row(panel, r + 1, rows);
    _mm512_storeu_si512(to + r * kPanelColumns, paired(a, b, false));
    _mm512_storeu_si512(to + (r + 1) * kPanelColumns, paired(a, b, true));
  }
}
// In place, and zeros up to whole tiles.
inline void pair_rows(Bf16* panel, int64_t rows) { pair_rows(panel, rows, round_up(rows, 32), panel); }

inline void add_rows(const Bf16* panel, int64_t rows, double* to) {
  using S = Simd<float>;
  constexpr int64_t kRows = 8;
  for (int64_t half = 0; half < kPanelColumns; half += S::W) {
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      S sum(0);
      for (int64_t r = r0; r < r0 + kRows && r < rows; ++r)
        sum = sum + load_row(panel + r * kPanelColumns + half);
      alignas(64) float sums[S::W];
      sum.store(sums);
      for (int lane = 0; lane < S::W; ++lane) to[half + lane] += static_cast<double>(sums[lane]);
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA

// The table of such a set; for its translation unit, which includes kernels.h too.
#define FASTRNN_BF16_KERNELS(NAME, PACKING)                       \
  namespace fastrnn::cpu {                                        \
  Kernels<float, Bf16> bf16_##NAME() {                            \
    Kernels<float, Bf16> k = FASTRNN_ISA::kernels<float, Bf16>(); \
    k.packing = Packing::PACKING;                                 \
    k.pair_rows = &FASTRNN_ISA::pair_rows;                        \
    return k;                                                     \
  }                                                               \
  }
