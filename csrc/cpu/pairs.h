// Products of bfloat16 without tiles: an instruction multiplies two pairs and adds both products to a float.
// A pair along k then takes the place of one factor, and all of product.h serves.
#pragma once

#include "bf16.h"
#include "gradients.h"

namespace fastrnn::FASTRNN_ISA {

// As they lie in memory, on any even address.
struct Pair {
  Bf16 first, second;
};

template <>
struct Terms<Pair> {
  using Sum = float;
  __m512i v;
  static FASTRNN_HD Terms load(const Pair* p) { return {_mm512_loadu_si512(p)}; }
  static FASTRNN_HD Terms all(const Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return {_mm512_set1_epi32(bits)};
  }
  FASTRNN_HD Simd<float> add_product(const Terms& w, const Simd<float>& sum) const {
    return Simd<float>::Native(_mm512_dpbf16_ps(sum.v, (__m512bh)v, (__m512bh)w.v));
  }
};

// A panel's columns stand beside each other as two registers of pairs.
template <>
inline constexpr int64_t kPanelRow<Pair> = 2 * kWidth<Pair>;

FASTRNN_HD const Pair* as_pairs(const Bf16* p) { return reinterpret_cast<const Pair*>(p); }
FASTRNN_HD constexpr int64_t pairs(int64_t elements) { return (elements + 1) / 2; }

// Panels [gates][units/W][...][W] of rows: k goes through the gates, then the units.
template <>
struct InPanels<Pair> {
  static constexpr int64_t W = kWidth<Pair>;
  const Pair* data;
  int64_t panel, gate, gates;  // panel, gate: from one to the next
  InPanels from(int64_t row, int64_t k) const {
    return {data + (k ? k / (gates * W) * panel : 0) + row * W, panel, gate, gates};
  }
  int64_t piece(int64_t K) const {  // whole panels
    const int64_t all = gates * W;
    return K <= kLongest<Pair> || kLongest<Pair> < all ? K : kLongest<Pair> / all * all;
  }
  template <int M, class Add>
  FASTRNN_HD void each(int64_t K, Ahead<Pair> ahead, Add&& add) const {
    const Pair* at = data;
    for (int64_t k = 0; k < K; at += panel) {
      for (int64_t lane = 0; lane < W && k < K; ++lane) {
        for (int64_t g = 0; g < gates; ++g, ++k) {
          const Pair* a = at + g * gate + lane;
          __builtin_prefetch(a + panel + lane * (W - 1));  // this tile's rows in the next panel
          if constexpr (M > 1) ahead.fetch(1);
          add(k, [&](int m) __attribute__((always_inline)) { return a + m * W; });
        }
      }
    }
  }
};

FASTRNN_HD InRows<Pair> in_pairs(const InRows<Bf16>& in, int64_t) { return {as_pairs(in.data), in.ld / 2}; }
FASTRNN_HD InPanels<Pair> in_pairs(const InPanels<Bf16>& in, int64_t K) {
  const int64_t panels = (in.units + kPanelColumns - 1) / kPanelColumns;
  return {as_pairs(in.data), in.panel / 2, panels * in.panel / 2, in.units > 0 ? K / in.units : 0};
}

FASTRNN_HD InBoth<Pair> in_pairs(const InBoth<Bf16>& in, int64_t K) {
  return {in_pairs(in.h, K), in_pairs(in.x, K), in.P / 2};
}

// As the product of product.h.
template <int G, class In, class Fetches, class Epilogue>
FASTRNN_HD void product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units,
                        const In& in, const cpu::Weight<Bf16>& weight, int64_t K, const float* bias,
                        int64_t ld_bias, bool backwards, const Fetches& reads, const Epilogue& epilogue) {
  int64_t count = pairs(K);
  if constexpr (std::is_same_v<In, InRows<Bf16>>) {
    if (weight.layout == cpu::Weight<Bf16>::kRows) {
      dot_product<G>(row0, row1, block0, block1, units, in, weight, K, bias, ld_bias, backwards, epilogue);
      return;
    }
  } else if constexpr (std::is_same_v<In, InPanels<Bf16>>) {
    if (in.units > 0) count = K / in.units * pairs(in.units);  // each gate begins a panel
  }
  const cpu::Weight<Pair> of_pairs{as_pairs(weight.data), cpu::Weight<Pair>::kPacked, weight.ld / 2};
  product<G>(row0, row1, block0, block1, units, in_pairs(in, K), of_pairs, count, bias, ld_bias, backwards,
             reads, epilogue);
}

// dst [blocks][K/2][gates][W][2].
inline void pack(const cpu::Pack& p, Bf16* dst, int64_t block0, int64_t block1) {
  const int64_t all = pairs(p.to_K ? p.to_K : p.K);
  pack_pairs(p, block0, block1, [&](int64_t b, int64_t step, int64_t g, int64_t k) {
    const int64_t pair = step * 16 + k;
    return pair < all ? dst + ((b * all + pair) * p.gates + g) * 2 * kWidth<Pair> : nullptr;
  });
}

inline void outer_product(const cpu::OuterProduct<float, Bf16>& p) {
  constexpr int64_t kPiece = 256;  // rows of a and of a panel of b: half of a first-level cache each
  constexpr int kBlocks = kPanelColumns / kWidth<float>;
  alignas(64) Bf16 a[kPiece * kPanelColumns];
  for (int64_t row0 = 0; row0 < p.rows; row0 += kPiece) {
    const int64_t rows = at_most(p.rows - row0, kPiece);
    pair_rows(p.a + row0 * kPanelColumns, rows, pairs(rows) * 2, a);
    for (int64_t c = 0; c < p.columns; c += kPanelColumns) {
      const Bf16* b = p.b + c / kPanelColumns * p.b_panel + row0 * kPanelColumns;
      const int64_t columns = at_most(p.columns - c, kPanelColumns);
      const int blocks = static_cast<int>((columns + kWidth<float> - 1) / kWidth<float>);
      const int left = static_cast<int>(columns - (blocks - 1) * kWidth<float>);
      for (int lane = 0; lane < p.lanes; lane += OuterTile<Pair>::kLanes) {
        const int lanes = static_cast<int>(at_most(p.lanes - lane, OuterTile<Pair>::kLanes));
        float* const out = p.out + lane * p.ld_out + c;
        outer_tile_of<Pair, kBlocks>(blocks, as_pairs(a) + lane, as_pairs(b), int64_t{kWidth<Pair>},
                                     pairs(rows), lanes, left, out, p.ld_out, p.add || row0 > 0,
                                     static_cast<const float*>(out));
      }
    }
  }
}

inline void input_gradient(const cpu::InputGradient<float, Bf16>& p, int64_t row0, int64_t row1) {
  input_gradient_from(InPanels<Bf16>{p.dg, p.panel, p.units}, p, row0, row1);
}

}  // namespace fastrnn::FASTRNN_ISA
