// gradients.h for panels of bfloat16, by AMX.
#pragma once

#include "amx.h"

namespace fastrnn::FASTRNN_ISA {

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

// In place, [rows][32] to [rows/2][2][16][2], and zeros up to whole tiles.
inline void pair_rows(Bf16* panel, int64_t rows) {
  for (int64_t r = 0; r < rows || r % 32 != 0; r += 2) {
    const __m512i a = panel_row(panel, r, rows), b = panel_row(panel, r + 1, rows);
    _mm512_storeu_si512(panel + r * kPanelColumns, paired(a, b, false));
    _mm512_storeu_si512(panel + (r + 1) * kPanelColumns, paired(a, b, true));
  }
}

// `steps` pairs of tiles [16 columns][32 rows] from a panel's rows.
FASTRNN_HD void transposed_tiles(const Bf16* panel, int64_t rows, int64_t steps, Bf16* out) {
  using S = Simd<float>;
  for (int64_t i = 0; i < steps; ++i) {
    for (int half = 0; half < 2; ++half) {
      S v[S::W];
      for (int k = 0; k < S::W; ++k) {
        const int64_t r = i * 32 + 2 * k;
        v[k] = S::Native(
            _mm512_castsi512_ps(paired(panel_row(panel, r, rows), panel_row(panel, r + 1, rows), half != 0)));
      }
      transpose(v);
      float* to = reinterpret_cast<float*>(out + (2 * i + half) * kTileElements);
      for (int k = 0; k < S::W; ++k) v[k].store(to + k * S::W);
    }
  }
}

inline void outer_product(const cpu::OuterProduct<float, Bf16>& p) {
  using S = Simd<float>;
  constexpr int64_t kPiece = 1024;  // a longer one passes less often over the weight
  alignas(64) static constexpr float kZeros[S::W] = {};
  alignas(64) Bf16 a[kPiece / 32 * 2 * kTileElements];
  alignas(64) float edge[kPanelColumns * kPanelColumns];
  const Tiles tiles(kTileRows);
  for (int64_t row0 = 0; row0 < p.rows; row0 += kPiece) {
    const int64_t rows = at_most(p.rows - row0, kPiece), steps = (rows + 31) / 32;
    const bool add = p.add || row0 > 0;
    transposed_tiles(p.a + row0 * kPanelColumns, rows, steps, a);
    for (int64_t c = 0; c < p.columns; c += kPanelColumns) {
      const int64_t columns = at_most(p.columns - c, kPanelColumns);
      const Bf16* b = p.b + c / kPanelColumns * p.b_panel + row0 * kPanelColumns;
      float* to = p.out + c;
      const bool whole = columns == kPanelColumns && p.lanes == kPanelColumns;
      const auto copy = [&](const float* src, int64_t ld, float* dst, int64_t ld_dst) {
        for (int lane = 0; lane < p.lanes; ++lane) {
          for (int64_t u = 0; u < columns; u += S::W) {
            const int n = static_cast<int>(at_most(columns - u, S::W));
            S::load(src + lane * ld + u, n).store(dst + lane * ld_dst + u, n);
          }
        }
      };
      if (!whole && add) copy(to, p.ld_out, edge, kPanelColumns);
      float* sums = whole ? to : edge;
      const int64_t ld = whole ? p.ld_out : kPanelColumns;
      TileArgs t{};
      t.a[0] = a;
      t.a[1] = a + kTileElements;
      t.lda = 32;
      t.outer = steps;
      t.a_outer = 2 * kTileElements;
      t.inner = 1;
      t.w[0] = b;
      t.w[1] = b + kPanelColumns;
      t.ldw = 2 * kPanelColumns;
      t.w_step = 32 * kPanelColumns;
      for (int i = 0; i < 2; ++i) {
        t.out[i] = sums + i * kTileRows * ld;
        for (int j = 0; j < 2; ++j) t.from[i][j] = add ? t.out[i] + j * S::W : kZeros;
      }
      t.ld_from = add ? ld : 0;
      t.ld_out = ld;
      tile_2<2>(t);
      if (!whole) copy(edge, kPanelColumns, to, p.ld_out);
    }
  }
}

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

inline void input_gradient(const cpu::InputGradient<float, Bf16>& p, int64_t row0, int64_t row1) {
  using S = Simd<float>;
  // Rows that stay in the second-level cache beside a block of weights while all blocks pass.
  constexpr int64_t kGroup = 128;
  for (int64_t r = row0 + kGroup; r < row1; r += kGroup, row0 += kGroup) input_gradient(p, row0, r);
  product<1>(row0, row1, 0, (p.columns + S::W - 1) / S::W, p.columns, InPanels<Bf16>{p.dg, p.panel, p.units},
             p.w, p.gates * p.units, static_cast<const float*>(nullptr), 0, false, Reads<float>{},
             [&](int64_t row, int64_t unit, int lanes, const Vec<S, 1>& v) {
               store(p.out, row, unit, lanes, p.add ? load(p.out, row, unit, lanes) + v[0] : v[0]);
             });
}

}  // namespace fastrnn::FASTRNN_ISA
