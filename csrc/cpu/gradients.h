// After a chunk of the backward scan: the gradients of the weights, outer products summed over the chunk's
// rows, and of the input. Their rows stand in panels [columns/W][rows][W], so that the tile walks through
// memory in order whichever factor it is that a panel holds.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

// One row of a panelled matrix, `panel` apart; zeros where there is no source.
template <class E>
void to_panels(const Border<E>& from, int64_t columns, E* to, int64_t panel) {
  using S = Simd<E>;
  for (int64_t c = 0; c < columns; c += S::W, to += panel) {
    const int lanes = static_cast<int>(at_most(columns - c, S::W));
    (from.data ? load(from, 0, c, lanes) : S(0)).store(to);
  }
}

// `lanes` rows of U blocks of out, of which the last has `left` columns. b's blocks are `b_block` apart.
// `next`: the sums that come nearer meanwhile, as many as these.
template <class F, int U, class E>
void outer_tile(const F* a, const F* b, int64_t b_block, int64_t rows, int lanes, int left, E* out,
                int64_t ld_out, bool add, const E* next) {
  using S = Simd<E>;
  constexpr int W = S::W, kLanes = OuterTile<F>::kLanes;
  alignas(64) E sums[kLanes * U * W];
  tile<F, 1, U, kLanes>(InLanes<F, U>{a, lanes, next, ld_out}, b, kPanelRow<F>, b_block, rows, From<E>{},
                        Ahead<F>{}, sums);
  const auto sum = [&](int m, int u) { return S::load(sums + (m * U + u) * W); };
  if (add && lanes == kLanes && left == W) {
    for (int m = 0; m < kLanes; ++m) {
#pragma GCC unroll 6
      for (int u = 0; u < U; ++u) {
        E* to = out + m * ld_out + u * W;
        (S::load(to) + sum(m, u)).store(to);
      }
    }
    return;
  }
  for (int m = 0; m < lanes; ++m) {
    for (int u = 0; u < U; ++u) {
      E* to = out + m * ld_out + u * W;
      const int columns = u + 1 < U ? W : left;
      (add ? S::load(to, columns) + sum(m, u) : sum(m, u)).store(to, columns);
    }
  }
}

template <class F, int U, class... Rest>
FASTRNN_HD void outer_tile_of(int u, Rest... rest) {
  if constexpr (U > 0) {
    if (u == U) return outer_tile<F, U>(rest...);
    outer_tile_of<F, U - 1>(u, rest...);
  }
}

// out[lane][column] (+)= the sum over rows of a[row][lane] b[row][column], in pieces of `longest` rows: one
// accumulator over thousands would lose a digit to torch.nn's sums of per-step products.
template <class E>
void outer_product(const cpu::OuterProduct<E>& p) {
  constexpr int W = Simd<E>::W, kLanes = OuterTile<E>::kLanes, kBlocks = OuterTile<E>::kBlocks;
  const int64_t pieces = (p.rows + p.longest - 1) / p.longest;
  const int64_t blocks = (p.columns + W - 1) / W, tiles = (blocks + kBlocks - 1) / kBlocks;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t row0 = p.rows * piece / pieces, rows = p.rows * (piece + 1) / pieces - row0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t block = blocks * i / tiles, after = blocks * (i + 1) / tiles;
      const int left = static_cast<int>(at_most(p.columns - (after - 1) * W, W));
      for (int lane = 0; lane < p.lanes; lane += kLanes) {
        // A tile is done before memory has answered: it fetches the sums of the one after, the last of all
        // those of the next panel.
        const bool more_lanes = lane + kLanes < p.lanes, more_blocks = i + 1 < tiles;
        const int64_t next_lane = more_lanes ? lane + kLanes : more_blocks ? 0 : p.lanes;
        const int64_t next_block = more_lanes ? block : more_blocks ? after : 0;
        const E* next = p.out + next_lane * p.ld_out + next_block * W;
        outer_tile_of<E, kBlocks>(static_cast<int>(after - block), p.a + row0 * W + lane,
                                  p.b + block * p.b_panel + row0 * W, p.b_panel, rows,
                                  static_cast<int>(at_most(p.lanes - lane, kLanes)), left,
                                  p.out + lane * p.ld_out + block * W, p.ld_out, p.add || piece > 0, next);
      }
    }
  }
}

// to[lane] += the sum of a panel's rows. Few rows in E, those sums in double: thousands of terms in one float
// accumulator would lose two digits.
template <class E>
void add_rows(const E* panel, int64_t rows, double* to) {
  using S = Simd<E>;
  constexpr int64_t kRows = 8;
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    S sum(0);
    for (int64_t r = r0; r < r0 + kRows && r < rows; ++r) sum = sum + S::load(panel + r * S::W);
    alignas(64) E sums[S::W];
    sum.store(sums);
    for (int lane = 0; lane < S::W; ++lane) to[lane] += static_cast<double>(sums[lane]);
  }
}

// Rows [row0, row1) of the input's gradient: dg W, or += it.
template <class E, class A>
void input_gradient_from(const InPanels<A>& dg, const cpu::InputGradient<E, A>& p, int64_t row0,
                         int64_t row1) {
  using S = Simd<E>;
  product<1>(row0, row1, 0, (p.columns + S::W - 1) / S::W, p.columns, dg, p.w, p.gates * p.units,
             static_cast<const E*>(nullptr), 0, false, Reads<E>{},
             [out = p.out, add = p.add](int64_t row, int64_t unit, int lanes, const Vec<S, 1>& v) {
               store(out, row, unit, lanes, add ? load(out, row, unit, lanes) + v[0] : v[0]);
             });
}
template <class E>
void input_gradient(const cpu::InputGradient<E>& p, int64_t row0, int64_t row1) {
  input_gradient_from(InPanels<E>{p.dg, p.panel, p.units}, p, row0, row1);
}

}  // namespace fastrnn::FASTRNN_ISA
