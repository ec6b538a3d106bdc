// gradients.h for panels of bfloat16, by AMX.
#pragma once

#include "amx.h"
#include "gradients.h"

namespace fastrnn::FASTRNN_ISA {

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

// No work for the vector units.
struct Nothing {
  FASTRNN_HD void step() {}
};

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
      t.walks = 1;
      t.of[0] = {a, 32, steps, 2 * kTileElements, 0, kTileElements};
      t.w[0] = b;
      t.w[1] = b + kPanelColumns;
      t.w_row = 2 * kPanelColumns;
      t.w_step = 32 * kPanelColumns;
      for (int i = 0; i < 2; ++i) {
        t.out[i] = sums + i * kTileRows * ld;
        for (int j = 0; j < 2; ++j) t.from[i][j] = add ? t.out[i] + j * S::W : kZeros;
      }
      t.ld_from = add ? ld : 0;
      t.ld_out = ld;
      Nothing nothing;
      tile_2<2>(t, nothing);
      if (!whole) copy(edge, kPanelColumns, to, p.ld_out);
    }
  }
}

inline void input_gradient(const cpu::InputGradient<float, Bf16>& p, int64_t row0, int64_t row1) {
  // Rows that stay in the second-level cache beside a block of weights while all blocks pass.
  constexpr int64_t kGroup = 128;
  for (int64_t r = row0; r < row1; r += kGroup)
    input_gradient_from(InPanels<Bf16>{p.dg, p.panel, p.units}, p, r, at_most(r + kGroup, row1));
}

}  // namespace fastrnn::FASTRNN_ISA
