// The product inside a step: rows of a (h, or gradients of the gates) times a packed weight, all gates of a
// block of units in one register tile, or two where registers are few; then `epilogue` runs the cell on each
// vector of units while they are in L1. What it captures by value, not what lies behind that, it has in
// registers, see EachVector.
#pragma once

#include <type_traits>

#include "factors.h"

namespace fastrnn::FASTRNN_ISA {

// The tile for G gates: kUnits blocks of W units, kGates of their gates at a time, up to kRows rows. Beside
// 12 sums, four vectors of weights and an element of a row would be one more than 16 registers.
template <int G>
struct TileShape {
  static constexpr int kAcross = kRegisters == 32 ? 4 : 2;
  static constexpr int kGates = G == 4 ? kAcross : G;
  static constexpr int kUnits = G < 3 ? kAcross / G : 1;
  static constexpr int kRows = kAccumulators / (kGates * kUnits);
  // Two rows: all gates, and as many blocks, or the sums would be too few to hide the multiply-add's latency.
  static constexpr int kUnitsTwoRows = G < 3 ? 4 / G : 1;
  // Of int8 weights, whose sums take two registers each where the instruction set wants it so.
  static constexpr int kInt8Rows = FASTRNN_VECTOR_BYTES == 64 ? kRows / 2 : 8 / (G * kUnits);
  // One row: more.
  static constexpr int kUnitsOneRow = G >= 3 ? 2 : G == 2 ? 4 : 8;
};

// What a tile's sums begin with, a bias, a row apart; or, where that is `out`, what they are added to: the
// sums of the pieces before. Null: zeros.
template <class E>
struct From {
  const E* data;
  int64_t row, unit, gate;
};

// out [M][U][Of][W] = a [M rows][K] * w [U blocks][K][Of][W] + from, of G of the Of gates, the blocks `block`
// apart and the k `step`. A sum's order is that of K alone, so the bits do not depend on how rows and units
// were shared out. `ahead`: to fetch meanwhile, of more rows than one.
template <class F, int G, int U, int M, int Of = G, class A>
__attribute__((noinline)) void tile(const A& a, const F* w, int64_t step, int64_t block, int64_t K,
                                    const From<Sum<F>>& from, const Ahead<F>& ahead, Sum<F>* out) {
  using S = Simd<Sum<F>>;
  const bool more = from.data == out;
  S acc[M][U][G];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        acc[m][u][g] =
            from.data && !more ? S::load(from.data + m * from.row + u * from.unit + g * from.gate) : S(0);
      }
  const auto add = [&](int64_t k, const auto& row) __attribute__((always_inline)) {
    Terms<F> wk[U][G];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        wk[u][g] = Terms<F>::load(w + u * block + k * step + g * kWidth<F>);
      }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto am = Terms<F>::all(row(m));
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) acc[m][u][g] = am.add_product(wk[u][g], acc[m][u][g]);
    }
  };
  a.template each<M>(K, ahead, add);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Sum<F>* const to = out + ((m * U + u) * Of + g) * S::W;
        (more ? S::load(to) + acc[m][u][g] : acc[m][u][g]).store(to);
      }
}

// By reference, here and in the tile: a struct that is copied by a wider load right after it was written
// waits until all earlier stores, among them the epilogue's to distant lines, have reached the cache.
template <class F, int G, int U, int M, int Of = G, class... Rest>
FASTRNN_HD void tile_of(int u, int m, const Rest&... rest) {
  if constexpr (U > 1) {
    if (u < U) return tile_of<F, G, U / 2, M, Of>(u, m, rest...);
  }
  if constexpr (M > 1) {
    if (m < M) return tile_of<F, G, U, M - 1, Of>(u, m, rest...);
  }
  tile<F, G, U, M, Of>(rest...);
}

// What is left after whole tiles goes in smaller ones of a power of two: blocks one by one would be too few
// sums to hide the multiply-add's latency. The units of tile `at` of those, and its first block among them.
FASTRNN_HD int rest_tile(int64_t rest, int64_t at, int64_t& first) {
  first = 0;
  for (int64_t units = 1 << 20;; units /= 2) {
    if (!(rest & units)) continue;
    if (at-- == 0) return static_cast<int>(units);
    first += units;
  }
}

// The same tile from w [G][units][K] where torch keeps it, for one block of units: packing it would cost more
// than the few rows gain. out [M][1][G][W].
template <class E, int G, int M, class A>
__attribute__((noinline)) void dot_tile(const A* a, int64_t lda, const A* w, int64_t gate, int64_t ld,
                                        int64_t K, int lanes, const E* bias, int64_t ld_bias, E* out) {
  using S = Simd<E>;
  constexpr int kTerms = Terms<A>::N;
  // Enough sums at once that none waits for the multiply-add, and no more than the registers hold.
  constexpr int W = S::W, kMost = M == 1 ? 8 : 4 * M + M + 1 <= kRegisters ? 4 : 2;
  constexpr int kDots = kMost < W ? kMost : W, kGroups = W / kDots;
  const int64_t whole = K / kTerms * kTerms;
  const int rest = static_cast<int>(K - whole);
  for (int g = 0; g < G; ++g) {
    S sums[M][kGroups];
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      const A* row[kDots];
      S acc[M][kDots];
#pragma GCC unroll 8
      for (int j = 0; j < kDots; ++j) {
        const int lane = group * kDots + j;
        row[j] = w + g * gate + (lane < lanes ? lane : lanes - 1) * ld;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][j] = S(0);
      }
      const auto add = [&](int64_t k, int n) __attribute__((always_inline)) {
        Terms<A> x[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) x[m] = Terms<A>::load(a + m * lda + k, n);
#pragma GCC unroll 8
        for (int j = 0; j < kDots; ++j) {
          const auto wk = Terms<A>::load(row[j] + k, n);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) acc[m][j] = x[m].add_product(wk, acc[m][j]);
        }
      };
      for (int64_t k = 0; k < whole; k += kTerms) add(k, kTerms);
      if (rest) add(whole, rest);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][group] = folded<kDots, W / 2>(acc[m]);
    }
    const S b = bias ? S::load(bias + g * ld_bias) : S(0);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const S sum = folded<kGroups, kGroups / 2>(sums[m]);
      const S in_order = shuffle(sum, sum, regrouped<W, kDots>(std::make_integer_sequence<int, W>{}));
      (b + in_order).store(out + (m * G + g) * W);
    }
  }
}

// What an epilogue will read of memory that is far: `columns` pieces of each row, `column` apart. Fetched
// while the tile runs, since rows that lie a power of two apart defeat the hardware's own prefetching.
template <class E>
struct Reads {
  const E* data = nullptr;
  int64_t ld = 0, column = 0;
  int columns = 0;
  // Vectors from `unit` on that one fetch brings.
  FASTRNN_HD int at_once(int64_t unit) const {
    constexpr int64_t kSize = sizeof(E);
    return (reinterpret_cast<intptr_t>(data) | (unit | ld | column) * kSize) % 64 == 0 ? kLineVectors : 1;
  }
  FASTRNN_HD void fetch(int64_t row, int rows, int64_t unit, int units) const {
    const int each = at_once(unit);
    for (int m = 0; m < rows; ++m) {
      for (int g = 0; g < columns; ++g) {
        for (int u = 0; u < units; u += each) {
          __builtin_prefetch(data + (row + m) * ld + g * column + unit + u * Simd<E>::W);
        }
      }
    }
  }
};

// Where that comes from memory, and is much: several of them, fetched a line at a time. All at once it would
// keep the tile's own weights waiting, and most of it would have left the first-level cache when its turn
// comes.
template <class E>
struct Streams {
  Reads<E> of[3];
  FASTRNN_HD void fetch(int64_t row, int rows, int64_t unit, int units) const {
    for (const Reads<E>& reads : of) reads.fetch(row, rows, unit, units);
  }
};

// The left factor of a product that meanwhile fetches the part-th of `parts` parts of that, of `rows` rows
// from `row` on and U vectors at `unit`.
template <class A, class E>
struct Fetching {
  const A& a;
  const Streams<E>& streams;
  int64_t row, unit;
  int rows, U, part, parts;
  template <int M, class F, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<F> ahead, Add&& add) const {
    int each[3], of[3], lines = 0;
    for (int j = 0; j < 3; ++j) {
      each[j] = streams.of[j].at_once(unit);
      of[j] = streams.of[j].columns * rows * ((U + each[j] - 1) / each[j]);
      lines += of[j];
    }
    const int begin = lines * part / parts, count = lines * (part + 1) / parts - begin;
    // The last of them arrive before the tile's end.
    const int64_t few = count > 0 ? K / 8 * 7 / count : 0;
    int64_t k = 0;
    const auto some = [&](int64_t n) __attribute__((always_inline)) {
      a.from(0, k).template each<M>(n, ahead.from(k),
                                    [&](int64_t i, const auto& of_row)
                                        __attribute__((always_inline)) { add(k + i, of_row); });
      k += n;
    };
    int j = 0, m = 0, g = 0, u = 0;
    if (begin > 0) {
      int n = begin;
      while (j < 2 && n >= of[j]) n -= of[j++];
      const int across = (U + each[j] - 1) / each[j], columns = streams.of[j].columns;
      u = n % across * each[j], g = n / across % columns, m = n / across / columns;
    }
    for (int i = 0; i < count; ++i) {
      while (of[j] == 0) ++j;
      const Reads<E>& reads = streams.of[j];
      __builtin_prefetch(reads.data + (row + m) * reads.ld + g * reads.column + unit + u * Simd<E>::W);
      some(few);
      if ((u += each[j]) < U) continue;
      u = 0;
      if (++g < reads.columns) continue;
      g = 0;
      if (++m < rows) continue;
      m = 0;
      ++j;
    }
    some(K - k);
  }
};

template <class A, class E>
FASTRNN_HD const A& while_fetching(const A& a, const Reads<E>&, int64_t, int64_t, int, int, int, int) {
  return a;
}
template <class A, class E>
FASTRNN_HD Fetching<A, E> while_fetching(const A& a, const Streams<E>& streams, int64_t row, int64_t unit,
                                         int rows, int U, int part, int parts) {
  return {a, streams, row, unit, rows, U, part, parts};
}

// What a tile's sums are handed to: `rows` rows from `row` on and U blocks from the one at `unit` on. By a
// pointer, a call a tile, so that the product is compiled once for all epilogues.
template <class E>
struct Finish {
  const void* self;
  void (*run)(const void* self, int64_t row, int rows, int64_t unit, int U, const E* sums);
  void operator()(int64_t row, int rows, int64_t unit, int U, const E* sums) const {
    run(self, row, rows, unit, U, sums);
  }
};

// `backwards` sweeps the blocks from the last: where w outgrows the cache, the next step then begins with
// what this one left there.
template <int G, class A, class F, class Fetches>
__attribute__((noinline)) void multiply(int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                                        int64_t units, const A& a, const cpu::Weight<F>& weight, int64_t K,
                                        const Sum<F>* bias, int64_t ld_bias, bool backwards,
                                        const Fetches& reads, const Finish<Sum<F>>& finish) {
  using E = Sum<F>;
  constexpr bool kSpread = std::is_same_v<Fetches, Streams<E>>;
  using S = Simd<E>;
  using Tile = TileShape<G>;
  constexpr int kFew = Tile::kUnitsTwoRows * 2;  // no less than kUnitsOneRow
  constexpr int kTile = Tile::kRows * Tile::kUnits > kFew ? Tile::kRows * Tile::kUnits : kFew;
  constexpr int kMost = (kTile > 4 ? kTile : 4) * G;
  constexpr int64_t kGroup = 16;  // tiles whose sums wait in the first-level cache
  alignas(64) E sums[kGroup * kMost * S::W];
  const int64_t rows = row1 - row0;
  if (rows <= 0) return;
  const bool dots = weight.layout == cpu::Weight<F>::kRows;
  const bool int8 = weight.layout == cpu::Weight<F>::kInt8;
  const int most = dots ? 4 : int8 ? Tile::kInt8Rows : Tile::kRows;
  const int64_t tiles = (rows + most - 1) / most;
  const int wide = dots               ? 1
                   : rows == 1        ? Tile::kUnitsOneRow
                   : rows > 2 || int8 ? Tile::kUnits
                                      : Tile::kUnitsTwoRows;
  const int64_t wides = (block1 - block0) / wide, rest = (block1 - block0) % wide;
  const int64_t sweeps = wides + (int8 ? rest : __builtin_popcountll(rest));
  const bool packed = weight.layout == cpu::Weight<F>::kPacked;
  const int64_t step = packed ? G * S::W : weight.ld;
  const int64_t block = packed ? (weight.ld ? weight.ld : K) * G * S::W
                        : int8 ? cpu::int8_block(K, G, S::W)
                        : dots ? S::W * weight.ld
                               : S::W;
  const int64_t piece = dots || int8 ? K : a.piece(K), group = piece < K ? kGroup : 1;
  // Few lines in each piece of K or, where there are registers for longer pieces, all of them in the last.
  const int fetches = piece < K && kRegisters == 16 ? static_cast<int>((K + piece - 1) / piece) : 1;
  // The blocks of the j-th sweep: U of them, from the one returned on.
  const auto blocks_of = [&](int64_t j, int& U) {
    const int64_t at = backwards ? sweeps - 1 - j : j;
    U = wide;
    if (at < wides) return block0 + at * wide;
    int64_t first = at - wides;
    U = int8 ? 1 : rest_tile(rest, at - wides, first);
    return block0 + wides * wide + first;
  };
  for (int64_t j = 0; j < sweeps; ++j) {
    int U;
    const int64_t b = blocks_of(j, U);
    const F* w = weight.data + b * block;
    int next_U = U;
    const F* const next = packed && j + 1 < sweeps ? weight.data + blocks_of(j + 1, next_U) * block : nullptr;
    const E* bias_b = bias ? bias + b * S::W : nullptr;
    for (int64_t tile0 = 0; tile0 < tiles; tile0 += group) {
      const int64_t tile1 = tile0 + group < tiles ? tile0 + group : tiles;
      int64_t k = 0, k1;
      do {
        k1 = k + piece < K ? k + piece : K;
        const F* w_k = w + k * step;
        // Meanwhile the weights of the next piece come nearer, an equal part by each tile: the first few
        // alone would ask for more lines at once than the core can wait for.
        const bool grouped = piece < K, sweep_ends = k1 == K && (tile1 == tiles || !grouped);
        const F* const follow = !packed ? nullptr : sweep_ends ? next : k1 < K ? w + k1 * step : w;
        const int follow_U = sweep_ends ? next_U : U;
        const int64_t follow_K = k1 < K && K - k1 < piece ? K - k1 : piece;
        const int64_t first = grouped ? tile0 : 0;  // of the tiles that meet this piece meanwhile
        const int64_t calls = ((grouped ? tile1 : tiles) - first) * (rows > 2 ? G / Tile::kGates : 1);
        const int64_t of_block = calls < follow_U ? 1 : calls / follow_U;
        const int64_t part = (G * S::W + of_block - 1) / of_block;
        const int64_t a_k = k1 > k ? (part * follow_K + k1 - k - 1) / (k1 - k) : 0;
        const auto ahead = [&](int64_t call) __attribute__((always_inline)) -> Ahead<F> {
          const int64_t u = call / of_block, at = call % of_block * part;
          if (!follow || u >= follow_U || at >= G * S::W) return {w_k, 0};
          return {follow + u * block + at * follow_K, a_k < Ahead<F>::kMost ? a_k : Ahead<F>::kMost};
        };
        for (int64_t i = tile0; i < tile1; ++i) {
          const int64_t r = row0 + rows * i / tiles;
          const int M = static_cast<int>(row0 + rows * (i + 1) / tiles - r);
          const A a_r = a.from(r, k);
          E* out = sums + (i - tile0) * kMost * S::W;
          const auto from_gate = [&](int g) __attribute__((always_inline)) {
            return k ? From<E>{out + g * S::W, U * G * S::W, G * S::W, S::W}
                     : From<E>{bias_b ? bias_b + g * ld_bias : nullptr, 0, S::W, ld_bias};
          };
          const From<E> from = from_gate(0);
          const bool fetches_now = fetches > 1 || k1 == K;
          const auto& factor = while_fetching(a_r, reads, r, b * S::W, fetches_now ? M : 0, U,
                                              fetches > 1 ? static_cast<int>(k / piece) : 0, fetches);
          if (k1 == K && (!kSpread || dots || int8)) reads.fetch(r, M, b * S::W, U);
          if (dots) {
            if constexpr (std::is_same_v<A, InRows<E>> && std::is_same_v<E, F>) {
              const int64_t left = units - b * S::W;
              const int lanes = static_cast<int>(left < S::W ? left : S::W);
              const auto run = M == 1   ? &dot_tile<E, G, 1, E>
                               : M == 2 ? &dot_tile<E, G, 2, E>
                               : M == 3 ? &dot_tile<E, G, 3, E>
                                        : &dot_tile<E, G, 4, E>;
              run(a_r.data, a_r.ld, w, units * weight.ld, weight.ld, K, lanes, bias_b, ld_bias, out);
            }
          } else if (int8) {
            if constexpr (std::is_same_v<A, InRows<float>> && std::is_same_v<E, F>) {
              weight.int8->tile[G - 1](M, U, {a_r.data, a_r.ld, w, block, K, bias_b, ld_bias, out});
            }
          } else if (rows == 1) {
            tile_of<F, G, Tile::kUnitsOneRow, 1>(U, M, factor, w_k, step, block, k1 - k, from,
                                                 ahead(i - first), out);
          } else if (rows == 2) {
            tile_of<F, G, Tile::kUnitsTwoRows, 2>(U, M, factor, w_k, step, block, k1 - k, from,
                                                  ahead(i - first), out);
          } else {
            const auto gates = [&](const auto& a_g, const From<E>& from_g,
                                   int g) __attribute__((always_inline)) {
              const int64_t call = (i - first) * (G / Tile::kGates) + g / Tile::kGates;
              tile_of<F, Tile::kGates, Tile::kUnits, Tile::kRows, G>(
                  U, M, a_g, w_k + g * S::W, step, block, k1 - k, from_g, ahead(call), out + g * S::W);
            };
            gates(factor, from, 0);
            if constexpr (Tile::kGates < G) gates(a_r, from_gate(Tile::kGates), Tile::kGates);
          }
          if (k1 < K) continue;
          finish(r, M, b * S::W, U, out);
        }
        k = k1;
      } while (k < K);
    }
  }
}

// Calls an epilogue for each vector of a tile's sums.
template <int G, class E, class Epilogue>
struct EachVector {
  const Epilogue& epilogue;
  int64_t units;
  // What the epilogue has captured by value it keeps in registers, in a copy that no store can reach.
  __attribute__((flatten)) static void run(const void* self, int64_t row, int rows, int64_t unit0, int U,
                                           const E* sums) {
    using S = Simd<E>;
    const EachVector& each = *static_cast<const EachVector*>(self);
    const Epilogue epilogue = each.epilogue;
    const int64_t units = each.units, end = unit0 + U * S::W;
#pragma GCC unroll 1
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 1
      for (int64_t unit = unit0; unit < end; unit += S::W, sums += G * S::W) {
        Vec<S, G> v;
        for (int g = 0; g < G; ++g) v[g] = S::load(sums + g * S::W);
        const int64_t left = units - unit;
        // Most are whole, and a number that the compiler knows spares each load and store of theirs a branch.
        if (left >= S::W) {
          epilogue(row + m, unit, S::W, v);
        } else {
          epilogue(row + m, unit, static_cast<int>(left), v);
        }
      }
    }
  }
};

// Rows [row0, row1) x blocks [block0, block1). epilogue(row, unit, lanes, Vec<Simd, G>).
template <int G, class A, class F, class Fetches, class Epilogue>
FASTRNN_HD void product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units, const A& a,
                        const cpu::Weight<F>& weight, int64_t K, const Sum<F>* bias, int64_t ld_bias,
                        bool backwards, const Fetches& reads, const Epilogue& epilogue) {
  using Each = EachVector<G, Sum<F>, Epilogue>;
  const Each each{epilogue, units};
  multiply<G>(row0, row1, block0, block1, units, a, weight, K, bias, ld_bias, backwards, reads,
              Finish<Sum<F>>{&each, &Each::run});
}

}  // namespace fastrnn::FASTRNN_ISA
