// The factors of a product: how rows and packed weights are walked, in which pieces, and how many registers
// there are for it.
#pragma once

#include "params.h"
#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// The sums that a tile holds in registers, beside its weights. AVX-512 multiplies by an element in memory;
// aarch64 has 32 registers too, but the compiler first fetches an element of each row, and 24 sums spill.
#if defined(__aarch64__)
inline constexpr int kRegisters = 32, kAccumulators = 21;
#else
inline constexpr int kRegisters = FASTRNN_VECTOR_BYTES == 64 ? 32 : 16;
inline constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
#endif

// A register's worth of factors along k, of a dot product, or of one k in each lane, of a tile; sums are of
// Sum.
template <class A>
struct Terms {
  using Sum = A;
  static constexpr int N = Simd<A>::W;
  Simd<A> v;
  static FASTRNN_HD Terms load(const A* p) { return {Simd<A>::load(p)}; }
  static FASTRNN_HD Terms load(const A* p, int n) { return {Simd<A>::load(p, n)}; }
  static FASTRNN_HD Terms all(const A* p) { return {Simd<A>(*p)}; }
  FASTRNN_HD Simd<A> add_product(const Terms& w, const Simd<A>& sum) const { return sum + v * w.v; }
};
template <class F>
using Sum = typename Terms<F>::Sum;

template <class F>
inline constexpr int kWidth = FASTRNN_VECTOR_BYTES / sizeof(F);
// Vectors in a line of memory.
inline constexpr int kLineVectors = 64 / FASTRNN_VECTOR_BYTES;
// From one row of a panel of factors to the next.
template <class F>
inline constexpr int64_t kPanelRow = kWidth<F>;

// Of a longer K a tile's weights and the next one's would not lie in the second-level cache together, nor its
// rows in the first: it is walked in pieces, the sums waiting in memory. Each piece sums up its own products
// before it is added to them. Two vectors a k, of a tile of 16 registers, stay in the first level themselves.
template <class F>
inline constexpr int64_t kLongest = (kRegisters == 32 ? 4096 : 1024) / sizeof(F);
// Or, where a longer sum would be rounded too often: its error grows with its length, and libraries split K.
template <class F>
inline constexpr int64_t kShortSum = 512 / sizeof(F);

// Weights that come into the second-level cache while a tile is worked on.
template <class F>
struct Ahead {
  // At most so much a k: a line, or where there are few registers, and fetches for two k at once, half of
  // one.
  static constexpr int64_t kMost = 64 / sizeof(F) / (kRegisters == 32 ? 1 : 2);
  const F* data;
  int64_t step;                    // a k
  FASTRNN_HD void fetch(int ks) {  // for the next ks k
    __builtin_prefetch(data, 0, 2);
    data += ks * step;
  }
  FASTRNN_HD Ahead from(int64_t k) const { return {data + k * step, step}; }
};

// The left factor of a product, by how its memory is walked: `each` calls add(k, row), where element k of
// row m lies at row(m), for M rows, and `piece` is how many k are walked at a time. It fetches what lies
// `ahead` meanwhile; not for one row, which waits for its loads, so that one more a k costs a tenth.

// [rows][K], rows of ld.
template <class F>
struct InRows {
  const F* data;
  int64_t ld;
  int64_t longest = kLongest<F>;  // of a piece
  FASTRNN_HD InRows from(int64_t row, int64_t k) const { return {data + row * ld + k, ld, longest}; }
  // Whatever K is, the cuts are the same: zeros behind a row's end, as trees have them, do not move them.
  FASTRNN_HD int64_t piece(int64_t K) const { return K < longest ? K : longest; }
  template <int M, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<F> ahead, Add&& add) const {
    int64_t k = 0;
    if constexpr (kRegisters == 16 && M > 4) {
      // x86 reaches three rows from one address. Left to itself the compiler counts up to each row of each k:
      // a fifth of all instructions, which are what a tile of 16 registers waits for.
      const F *first = data, *fourth = data + 3 * ld;
      const auto row = [&](int m) __attribute__((always_inline)) {
        return m < 3 ? first + m * ld : fourth + (m - 3) * ld;
      };
      for (; k + 1 < K; k += 2, first += 2, fourth += 2) {
        asm("" : "+r"(first), "+r"(fourth));
        ahead.fetch(2);
        add(k, row);
        add(k + 1, [&](int m) __attribute__((always_inline)) { return row(m) + 1; });
      }
    }
#pragma GCC unroll 2
    for (; k < K; ++k) {
      if constexpr (M > 1) ahead.fetch(1);
      add(k, [&](int m) __attribute__((always_inline)) { return data + k + m * ld; });
    }
  }
};

// Rows of h [rows][P] and then of x, as if they stood in one row. h's sums are the smaller ones: they are
// rounded less where they come first.
template <class F>
struct InBoth {
  InRows<F> h, x;
  int64_t P;
  FASTRNN_HD InBoth from(int64_t row, int64_t k) const {
    const int64_t of_h = k < P ? k : P;
    return {h.from(row, of_h), x.from(row, k - of_h), P - of_h};
  }
  FASTRNN_HD int64_t piece(int64_t K) const { return h.piece(K); }
  template <int M, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<F> ahead, Add&& add) const {
    const int64_t of_h = P < K ? P : K;
    h.template each<M>(of_h, ahead, add);
    x.template each<M>(K - of_h, ahead.from(of_h),
                       [&](int64_t k, const auto& of_row)
                           __attribute__((always_inline)) { add(of_h + k, of_row); });
  }
};

// Panels [gates][units/W][...][W] of rows, `panel` apart: k counts a gate's units, from `unit` on, then the
// gates.
template <class F>
struct InPanels {
  const F* data;
  int64_t panel, units, unit = 0;
  FASTRNN_HD int64_t panel_of(int64_t k) const {
    constexpr int64_t W = kWidth<F>;
    return k / units * ((units + W - 1) / W) + k % units / W;
  }
  FASTRNN_HD InPanels from(int64_t row, int64_t k) const {
    const F* const here = data + row * kWidth<F>;
    if (k == 0) return {here, panel, units, unit};
    return {here + (panel_of(unit + k) - panel_of(unit)) * panel, panel, units, (unit + k) % units};
  }
  // Gradients of gates have no order of size that a long sum of them could go by.
  FASTRNN_HD int64_t piece(int64_t K) const { return K < kShortSum<F> ? K : kShortSum<F>; }
  template <int M, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<F> ahead, Add&& add) const {
    constexpr int64_t W = kWidth<F>;
    // Of so many lanes one fetch: all of a panel's bring the lines of a tile's rows.
    constexpr int kLanes = kLineVectors < W / 2 ? kLineVectors : W / 2;
    const F* at = data;
    int64_t k = 0, u = unit;
    const auto left = [&] { return units - u < K - k ? units - u : K - k; };  // of this gate
    for (; k < K; u = u == units ? 0 : u) {
      for (int64_t whole = u % W ? 0 : left() / W; whole > 0; --whole, k += W, u += W, at += panel) {
#pragma GCC unroll 2
        for (int lane = 0; lane < W; lane += kLanes) {
          // No hardware looks this far ahead: the panels' rows of this tile, and of the one after.
          __builtin_prefetch(at + 2 * panel + lane * W);
          if constexpr (M > 1) ahead.fetch(kLanes);
#pragma GCC unroll 4
          for (int j = lane; j < lane + kLanes; ++j) {
            add(k + j, [&](int m) __attribute__((always_inline)) { return at + j + m * W; });
          }
        }
      }
      if (left() == 0) continue;
      const int64_t lane0 = u % W, count = left() < W - lane0 ? left() : W - lane0;
      for (int64_t lane = lane0; lane < lane0 + count; ++lane, ++k) {
        add(k, [&](int m) __attribute__((always_inline)) { return at + lane + m * W; });
      }
      u += count;
      at += panel;
    }
  }
};

// The tile of an outer product: it divides a panel, and its accumulators fill the register file.
template <class F>
struct OuterTile {
  static constexpr int W = kWidth<F>;
  static constexpr int kLanes = W >= 8 ? W / 2 : W;
  static constexpr int kBlocks = kAccumulators / kLanes < 6 ? kAccumulators / kLanes : 6;
};

// One panel [K][W], transposed: its lanes are the rows. Meanwhile sums come nearer, `lanes` rows of U vectors
// `ld` apart, a few at a time: all at once would keep the factors waiting.
template <class F, int U>
struct InLanes {
  const F* data;
  int lanes;
  const Sum<F>* to;
  int64_t ld;
  template <int, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<F>, Add&& add) const {
    const int64_t few = K / OuterTile<F>::kLanes;
    int64_t k = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      for (int u = 0; u < U; ++u) __builtin_prefetch(to + lane * ld + u * kWidth<F>, 1);
#pragma GCC unroll 2
      for (const int64_t end = lane + 1 < lanes ? k + few : K; k < end; ++k)
        add(k, [&](int m) __attribute__((always_inline)) { return data + k * kPanelRow<F> + m; });
    }
  }
};

}  // namespace fastrnn::FASTRNN_ISA
