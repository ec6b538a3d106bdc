// The product of a step where rows and weights are bfloat16, by AMX: a tile of up to 16 rows x 32 k times one
// of 32 k x 16 units adds to one of float sums. The sums then take the same way through the cell as those of
// any other instruction set.
#pragma once

#include <type_traits>

#include "bf16.h"

namespace fastrnn::FASTRNN_ISA {

inline constexpr int64_t kTileRows = 16, kTileElements = 512;  // of bfloat16: 1 KB

template <>
inline constexpr bool kTakesBoth<Bf16> = false;

// Sets this thread's tiles for up to 16 rows while it lives. The intrinsics tell the compiler nothing of the
// memory they read, hence the barriers.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } c;
    for (int i = 0; i < 8; ++i) {
      c.row_bytes[i] = 64;
      c.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);  // 0 to 3 sums, 4 and 5 rows, 6 and 7 weights
    }
    asm volatile("" : : "r"(&c) : "memory");
    _tile_loadconfig(&c);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// What a tile product multiplies: two sets of rows (or one), and up to four columns of weights. A column is
// one gate of 16 units. The walk along k: `outer` times `inner` steps of 32.
struct TileArgs {
  const Bf16* a[2];
  int64_t lda, outer, a_outer, inner, a_inner;
  const Bf16* w[4];
  int64_t ldw, w_step;
  const float* from[2][4];  // what the sums begin with
  int64_t ld_from;
  float* out[2];  // rows of ld_out, a column after the other
  int64_t ld_out;
};

// Two sets of rows, up to two columns. Weights pass the first-level cache by: the rows are to stay there.
template <int C>
__attribute__((noinline)) void tile_2(const TileArgs& p) {
  asm volatile("" : : : "memory");
  const int64_t ld_from = p.ld_from * 4;
  _tile_loadd(0, p.from[0][0], ld_from);
  _tile_loadd(2, p.from[1][0], ld_from);
  if constexpr (C > 1) {
    _tile_loadd(1, p.from[0][1], ld_from);
    _tile_loadd(3, p.from[1][1], ld_from);
  }
  const int64_t lda = p.lda * 2, ldw = p.ldw * 2, step = p.w_step, a_inner = p.a_inner;
  const Bf16 *w0 = p.w[0], *w1 = p.w[C - 1];
  for (int64_t k = 0; k < p.outer; ++k) {
    const Bf16 *a0 = p.a[0] + k * p.a_outer, *a1 = p.a[1] + k * p.a_outer;
    for (int64_t i = 0; i < p.inner; ++i, a0 += a_inner, a1 += a_inner, w0 += step, w1 += step) {
      _tile_stream_loadd(6, w0, ldw);
      _tile_loadd(4, a0, lda);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a1, lda);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) {
        _tile_stream_loadd(7, w1, ldw);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  const int64_t ld_out = p.ld_out * 4;
  _tile_stored(0, p.out[0], ld_out);
  _tile_stored(2, p.out[1], ld_out);
  if constexpr (C > 1) {
    _tile_stored(1, p.out[0] + 16, ld_out);
    _tile_stored(3, p.out[1] + 16, ld_out);
  }
  asm volatile("" : : : "memory");
}

// One set of rows, up to four columns: enough sums at once that none waits for the one before.
template <int C>
__attribute__((noinline)) void tile_1(const TileArgs& p) {
  asm volatile("" : : : "memory");
  const int64_t ld_from = p.ld_from * 4;
  _tile_loadd(0, p.from[0][0], ld_from);
  if constexpr (C > 1) _tile_loadd(1, p.from[0][1], ld_from);
  if constexpr (C > 2) _tile_loadd(2, p.from[0][2], ld_from);
  if constexpr (C > 3) _tile_loadd(3, p.from[0][3], ld_from);
  const int64_t lda = p.lda * 2, ldw = p.ldw * 2;
  int64_t at = 0;
  for (int64_t k = 0; k < p.outer; ++k) {
    const Bf16* a = p.a[0] + k * p.a_outer;
    for (int64_t i = 0; i < p.inner; ++i, a += p.a_inner, at += p.w_step) {
      _tile_loadd(4, a, lda);
      _tile_stream_loadd(6, p.w[0] + at, ldw);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (C > 1) {
        _tile_stream_loadd(7, p.w[1] + at, ldw);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (C > 2) {
        _tile_stream_loadd(6, p.w[2] + at, ldw);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (C > 3) {
        _tile_stream_loadd(7, p.w[3] + at, ldw);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  const int64_t ld_out = p.ld_out * 4;
  _tile_stored(0, p.out[0], ld_out);
  if constexpr (C > 1) _tile_stored(1, p.out[0] + 16, ld_out);
  if constexpr (C > 2) _tile_stored(2, p.out[0] + 32, ld_out);
  if constexpr (C > 3) _tile_stored(3, p.out[0] + 48, ld_out);
  asm volatile("" : : : "memory");
}

// Rows as the first factor: where one begins, and how k walks along it.
FASTRNN_HD const Bf16* walk(const InRows<Bf16>& in, int64_t K, TileArgs& t) {
  t.lda = in.ld;
  t.outer = (K + 31) / 32;
  t.a_outer = 32;
  t.inner = 1;
  return in.data;
}
// Panels of 32 columns, [gates][units/32][...][32]: k goes through the gates, then the units.
FASTRNN_HD const Bf16* walk(const InPanels<Bf16>& in, int64_t K, TileArgs& t) {
  t.lda = 32;
  t.outer = (in.units + 31) / 32;
  t.a_outer = in.panel;
  t.inner = in.units > 0 ? K / in.units : 0;
  t.a_inner = t.outer * in.panel;
  return in.data;
}

// As the product of product.h.
template <int G, class In, class Fetches, class Epilogue>
FASTRNN_HD void product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units,
                        const In& in, const cpu::Weight<Bf16>& weight, int64_t K, const float* bias,
                        int64_t ld_bias, bool backwards, const Fetches& reads, Epilogue&& epilogue) {
  using S = Simd<float>;
  constexpr int W = S::W, kUnits = TileShape<G>::kUnits, kColumns = G * kUnits;
  alignas(64) static constexpr float kNoBias[W] = {};
  alignas(64) float out[2 * kTileRows * kColumns * W];
  const int64_t rows = row1 - row0;
  if (rows <= 0 || block0 >= block1) return;
  if constexpr (std::is_same_v<In, InRows<Bf16>>) {
    if (weight.layout == cpu::Weight<Bf16>::kRows) {
      dot_product<G>(row0, row1, block0, block1, units, in, weight, K, bias, ld_bias, backwards, epilogue);
      return;
    }
  }
  TileArgs t{};
  const Bf16* a = walk(in, K, t);
  const int64_t block = t.outer * t.inner * G * kTileElements;
  t.ldw = 32;
  t.w_step = G * kTileElements;
  t.ld_out = kColumns * W;
  // Sets of equal size, so that one configuration serves all; the last may begin among the rows before.
  const int64_t sets = (rows + kTileRows - 1) / kTileRows, M = (rows + sets - 1) / sets;
  const int64_t sweeps = (block1 - block0 + kUnits - 1) / kUnits;
  const Tiles tiles(M);
  for (int64_t j = 0; j < sweeps; ++j) {
    const int64_t b = block0 + (backwards ? sweeps - 1 - j : j) * kUnits;
    const int U = static_cast<int>(at_most(block1 - b, kUnits)), columns = U * G;
    for (int64_t set = 0; set < sets; set += 2) {
      const bool two = set + 1 < sets;
      const int64_t from = row0 + at_most(set * M, rows - M), to = row0 + at_most((set + 1) * M, rows - M);
      const int64_t first = row0 + set * M, count = at_most((two ? 2 : 1) * M, row1 - first);
      t.a[0] = a + from * t.lda;
      t.a[1] = a + to * t.lda;
      reads.fetch(first, static_cast<int>(count), b * W, U);
      for (int c = 0; c < columns;) {
        const int n = static_cast<int>(at_most(columns - c, two ? 2 : 4));
        for (int i = 0; i < n; ++i) {
          const int64_t u = b + (c + i) / G, g = (c + i) % G;
          t.w[i] = weight.data + u * block + g * kTileElements;
          t.from[0][i] = t.from[1][i] = bias ? bias + g * ld_bias + u * W : kNoBias;
        }
        t.out[0] = out + c * W;
        t.out[1] = t.out[0] + kTileRows * kColumns * W;
        if (two) {
          n == 2 ? tile_2<2>(t) : tile_2<1>(t);
        } else {
          n == 4 ? tile_1<4>(t) : n == 3 ? tile_1<3>(t) : n == 2 ? tile_1<2>(t) : tile_1<1>(t);
        }
        c += n;
      }
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + i;
        const float* sums = row < to || !two ? out + (row - from) * kColumns * W
                                             : out + (kTileRows + row - to) * kColumns * W;
#pragma GCC unroll 1
        for (int u = 0; u < U; ++u, sums += G * W) {
          Vec<S, G> v;
          for (int g = 0; g < G; ++g) v[g] = S::load(sums + g * W);
          const int64_t unit = (b + u) * W;
          epilogue(row, unit, static_cast<int>(at_most(units - unit, W)), v);
        }
      }
    }
  }
}

// dst [blocks][K/32][gates][16][W][2].
inline void pack(const cpu::Pack& p, Bf16* dst, int64_t block0, int64_t block1) {
  const int64_t steps = (p.K + 31) / 32;
  pack_pairs(p, block0, block1, [&](int64_t b, int64_t step, int64_t g, int64_t k) {
    return dst + ((b * steps + step) * p.gates + g) * kTileElements + k * 32;
  });
}

}  // namespace fastrnn::FASTRNN_ISA
