// Gradients of weights: outer products of rows in panels, summed over the rows.
#pragma once

#include "workspace.h"

namespace fastrnn::cpu {

template <class E, class A = E>
struct Outer {
  const Kernels<E, A>& kernels;
  int64_t panel_rows, rows;  // from one panel to the next; those that count
  int64_t gates;             // that share `out`

  int64_t panel() const { return panel_rows * kernels.panel; }

  // So many columns as stay in the second-level cache while the panels of the first factor pass. Of bfloat16
  // all at once: a panel is transposed, or paired, for each sweep.
  int64_t columns_at_once(int64_t columns) const {
    if (kDepth<A> > 1) return columns;
    const int64_t tiles = 6 * kernels.panel;  // whole ones of the outer product, on x86-64
    const int64_t bytes = std::max<int64_t>(columns * rows, 1) * sizeof(A);
    const int64_t sweeps = ceil_div(bytes, second_level_cache() / 8 * 3);
    return ceil_div(ceil_div(columns, sweeps), tiles) * tiles;
  }

  // The block-th panel of gradients of `units`, a, by `columns` of b: to those rows of out, or added to them.
  void operator()(const A* a, int64_t block, int64_t units, const A* b, int64_t columns, E* out,
                  int64_t ld_out, bool add) const {
    // A piece costs a pass over the weight, so that large ones take more rows.
    const int64_t longest = ld_out * units * gates <= kSmallWeight ? kSmallPiece : kLargePiece;
    const int lanes = static_cast<int>(std::min<int64_t>(units - block * kernels.panel, kernels.panel));
    kernels.outer_product(
        {a, b, panel(), rows, longest, lanes, columns, out + block * kernels.panel * ld_out, ld_out, add});
  }

  static constexpr int64_t kSmallWeight = 1 << 16, kSmallPiece = 64, kLargePiece = 128;
};

}  // namespace fastrnn::cpu
