// The product inside a step: rows of a (h, or gradients of the gates) times a packed weight, all gates of a
// block of units in one register tile; then `epilogue` runs the cell on each vector of units while they are
// in L1.
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// The tile for G gates: kUnits blocks of W units, up to kRows rows; accumulators fill the register file.
template <int G>
struct TileShape {
  static constexpr int kAccumulators = FASTRNN_VECTOR_BYTES == 64 ? 24 : 12;
  static constexpr int kUnits = G >= 3 ? 1 : G == 2 ? 2 : 4;
  static constexpr int kRows = kAccumulators / (G * kUnits);
  // One row alone: more blocks, or the latency of the multiply-add would be waited for.
  static constexpr int kUnitsOneRow = G >= 3 ? 2 : G == 2 ? 4 : 8;
};

// `ahead`: K vectors of weights to bring into the second-level cache meanwhile.
// out [M][U][G][W] = a [M rows][K] * w [U blocks][K][G][W] + bias [G][ld_bias]. K is never split, so the bits
// do not depend on how rows and units were shared out.
template <class E, int G, int U, int M>
__attribute__((noinline)) void tile(const E* a, int64_t lda, const E* w, int64_t K, const E* bias,
                                    int64_t ld_bias, const E* ahead, E* out) {
  using S = Simd<E>;
  S acc[M][U][G];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const S b = bias ? S::load(bias + g * ld_bias + u * S::W) : S(0);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][u][g] = b;
    }
  const int64_t block = K * G * S::W;
  for (int64_t k = 0; k < K; ++k) {
    __builtin_prefetch(ahead + k * S::W, 0, 2);
    S wk[U][G];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) wk[u][g] = S::load(w + u * block + (k * G + g) * S::W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const S am(a[m * lda + k]);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[m][u][g] = acc[m][u][g] + am * wk[u][g];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) acc[m][u][g].store(out + ((m * U + u) * G + g) * S::W);
}

template <class E, int G, int U, int M>
FASTRNN_HD void tile_of(int m, const E* a, int64_t lda, const E* w, int64_t K, const E* bias, int64_t ld_bias,
                        const E* ahead, E* out) {
  if constexpr (M > 0) {
    if (m == M) return tile<E, G, U, M>(a, lda, w, K, bias, ld_bias, ahead, out);
    tile_of<E, G, U, M - 1>(m, a, lda, w, K, bias, ld_bias, ahead, out);
  }
}

// What an epilogue will read of memory that is far: `columns` pieces of each row, `column` apart. Fetched
// while the tile runs, since rows that lie a power of two apart defeat the hardware's own prefetching.
template <class E>
struct Reads {
  const E* data = nullptr;
  int64_t ld = 0, column = 0;
  int columns = 0;
  FASTRNN_HD void fetch(int64_t row, int rows, int64_t unit, int units) const {
    for (int m = 0; m < rows; ++m) {
      for (int g = 0; g < columns; ++g) {
        for (int u = 0; u < units; ++u) {
          __builtin_prefetch(data + (row + m) * ld + g * column + unit + u * Simd<E>::W);
        }
      }
    }
  }
};

// Rows [row0, row1) x blocks [block0, block1). epilogue(row, unit, lanes, Vec<Simd, G>). `backwards` sweeps
// the blocks from the last: where w outgrows the cache, the next step then begins with what this one left
// there.
template <int G, class E, class Epilogue>
FASTRNN_HD void product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units, const E* a,
                        int64_t lda, const E* w, int64_t K, const E* bias, int64_t ld_bias, bool backwards,
                        const Reads<E>& reads, Epilogue&& epilogue) {
  using S = Simd<E>;
  using Tile = TileShape<G>;
  constexpr int kMostUnits = Tile::kUnitsOneRow > Tile::kUnits ? Tile::kUnitsOneRow : Tile::kUnits;
  constexpr int kMost =
      (Tile::kRows * Tile::kUnits > kMostUnits ? Tile::kRows * Tile::kUnits : kMostUnits) * G;
  alignas(64) E out[kMost * S::W];
  const int64_t rows = row1 - row0;
  if (rows <= 0) return;
  const int64_t tiles = (rows + Tile::kRows - 1) / Tile::kRows;
  const int wide = rows == 1 ? Tile::kUnitsOneRow : Tile::kUnits;
  const int64_t wides = (block1 - block0) / wide, sweeps = wides + (block1 - block0) % wide;
  for (int64_t j = 0; j < sweeps; ++j) {
    const int64_t at = backwards ? sweeps - 1 - j : j;
    const int U = at < wides ? wide : 1;
    const int64_t b = block0 + (at < wides ? at * wide : wides * wide + at - wides);
    const E* wb = w + b * K * G * S::W;
    const int64_t after = backwards ? b - wide : b + U;
    const E* next = after >= block0 && after < block1 ? w + after * K * G * S::W : nullptr;
    const E* bias_b = bias ? bias + b * S::W : nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t r = row0 + rows * i / tiles;
      const int M = static_cast<int>(row0 + rows * (i + 1) / tiles - r);
      // While this sweep's tiles are worked on, the next sweep's weights come nearer, K vectors a tile.
      const E* ahead = next && i < U * G ? next + i * K * S::W : wb;
      reads.fetch(r, M, b * S::W, U);
      if (U == 1) {
        tile_of<E, G, 1, Tile::kRows>(M, a + r * lda, lda, wb, K, bias_b, ld_bias, ahead, out);
      } else if (rows == 1) {
        tile<E, G, Tile::kUnitsOneRow, 1>(a + r * lda, lda, wb, K, bias_b, ld_bias, ahead, out);
      } else {
        tile_of<E, G, Tile::kUnits, Tile::kRows>(M, a + r * lda, lda, wb, K, bias_b, ld_bias, ahead, out);
      }
#pragma GCC unroll 1
      for (int mu = 0; mu < M * U; ++mu) {
        const int64_t unit = (b + mu % U) * S::W;
        Vec<S, G> v;
        for (int g = 0; g < G; ++g) v[g] = S::load(out + (mu * G + g) * S::W);
        const int64_t left = units - unit;
        epilogue(r + mu / U, unit, static_cast<int>(left < S::W ? left : S::W), v);
      }
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
