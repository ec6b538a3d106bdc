// The product of a step where rows and weights are bfloat16, by AMX: a tile of up to 16 rows x 32 k times one
// of 32 k x 16 units adds to one of float sums. The sums then take the same way through the cell as those of
// any other instruction set.
#pragma once

#include <type_traits>

#include "bf16.h"

namespace fastrnn::FASTRNN_ISA {

inline constexpr int64_t kTileRows = 16, kTileElements = 512;  // of bfloat16: 1 KB

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
    asm volatile("" : : : "memory");
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// A way along k: rows `lda` apart, of so many steps of 32, `step` from one to the next, whose weights begin
// `skip` steps after their column's first.
struct Walk {
  const Bf16* a;
  int64_t lda, steps, step, skip;
  int64_t second = 0;  // from the first set of rows to the second
};

// What a tile product multiplies: two sets of rows (or one), along up to two walks, and up to four columns of
// weights. A column is one gate of 16 units.
struct TileArgs {
  Walk of[2];
  int walks;
  const Bf16* w[4];
  int64_t w_row, w_step;
  const float* from[2][4];  // what the sums begin with
  int64_t ld_from;
  float* out[2];  // rows of ld_out, a column after the other
  int64_t ld_out;
};

// What tiles leave to the vector units meanwhile: `count` pieces of work, evenly over `steps` calls.
template <class Run>
struct Meanwhile {
  const Run& run;
  int64_t count, steps, at = 0, due = 0;
  FASTRNN_HD void step() {
    for (due += count; due >= steps; due -= steps) run(at++);
  }
};

// Two sets of rows, up to two columns. Weights pass the first-level cache by: the rows are to stay there.
template <int C, class Work>
FASTRNN_HD void tile_2(const TileArgs& p, Work& work) {
  asm volatile("" : : : "memory");
  const int64_t ld_from = p.ld_from * 4;
  _tile_loadd(0, p.from[0][0], ld_from);
  _tile_loadd(2, p.from[1][0], ld_from);
  if constexpr (C > 1) {
    _tile_loadd(1, p.from[0][1], ld_from);
    _tile_loadd(3, p.from[1][1], ld_from);
  }
  const int64_t w_row = p.w_row * 2, w_step = p.w_step;
  for (int i = 0; i < p.walks; ++i) {
    const Walk& walk = p.of[i];
    const int64_t lda = walk.lda * 2;
    const Bf16 *a0 = walk.a, *a1 = a0 + walk.second;
    const Bf16 *w0 = p.w[0] + walk.skip * w_step, *w1 = p.w[C - 1] + walk.skip * w_step;
    for (int64_t k = 0; k < walk.steps; ++k) {
      _tile_stream_loadd(6, w0, w_row);
      _tile_loadd(4, a0, lda);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a1, lda);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) {
        _tile_stream_loadd(7, w1, w_row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      a0 += walk.step;
      a1 += walk.step;
      w0 += w_step;
      w1 += w_step;
      work.step();
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
template <int C, class Work>
FASTRNN_HD void tile_1(const TileArgs& p, Work& work) {
  asm volatile("" : : : "memory");
  const int64_t ld_from = p.ld_from * 4;
  _tile_loadd(0, p.from[0][0], ld_from);
  if constexpr (C > 1) _tile_loadd(1, p.from[0][1], ld_from);
  if constexpr (C > 2) _tile_loadd(2, p.from[0][2], ld_from);
  if constexpr (C > 3) _tile_loadd(3, p.from[0][3], ld_from);
  const int64_t w_row = p.w_row * 2;
  for (int i = 0; i < p.walks; ++i) {
    const Walk& walk = p.of[i];
    const int64_t lda = walk.lda * 2;
    const Bf16* a = walk.a;
    int64_t at = walk.skip * p.w_step;
    for (int64_t k = 0; k < walk.steps; ++k, a += walk.step, at += p.w_step) {
      _tile_loadd(4, a, lda);
      _tile_stream_loadd(6, p.w[0] + at, w_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (C > 1) {
        _tile_stream_loadd(7, p.w[1] + at, w_row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (C > 2) {
        _tile_stream_loadd(6, p.w[2] + at, w_row);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (C > 3) {
        _tile_stream_loadd(7, p.w[3] + at, w_row);
        _tile_dpbf16ps(3, 4, 7);
      }
      work.step();
    }
  }
  const int64_t ld_out = p.ld_out * 4;
  _tile_stored(0, p.out[0], ld_out);
  if constexpr (C > 1) _tile_stored(1, p.out[0] + 16, ld_out);
  if constexpr (C > 2) _tile_stored(2, p.out[0] + 32, ld_out);
  if constexpr (C > 3) _tile_stored(3, p.out[0] + 48, ld_out);
  asm volatile("" : : : "memory");
}

// Along which walks k goes, and how many there are.
FASTRNN_HD int walks(const InRows<Bf16>& in, int64_t K, Walk* to) {
  to[0] = {in.data, in.ld, (K + 31) / 32, 32, 0};
  return 1;
}
// Panels of 32 columns, [gates][units/32][...][32].
FASTRNN_HD int walks(const InPanels<Bf16>& in, int64_t K, Walk* to) {
  const int64_t gates = in.units > 0 ? K / in.units : 0;
  to[0] = {in.data, 32, gates * ((in.units + 31) / 32), in.panel, 0};
  return 1;
}
FASTRNN_HD int walks(const InBoth<Bf16>& in, int64_t K, Walk* to) {
  walks(in.h, in.P, to);
  walks(in.x, K - in.P, to + 1);
  to[1].skip = to[0].steps;
  return 2;
}

// As the product of product.h. The epilogue of a block runs beside the tiles of the next one, which keep the
// vector units idle: so it writes nothing that this product reads, and reads nothing that its tiles write.
template <int G, class In, class Fetches, class Epilogue>
FASTRNN_HD void product(int64_t row0, int64_t row1, int64_t block0, int64_t block1, int64_t units,
                        const In& in, const cpu::Weight<Bf16>& weight, int64_t K, const float* bias,
                        int64_t ld_bias, bool backwards, const Fetches& reads, const Epilogue& epilogue) {
  using S = Simd<float>;
  constexpr int W = S::W, kUnits = G == 1 ? 4 : G < 4 ? 2 : 1;
  constexpr int kColumns = G * kUnits;
  alignas(64) static constexpr float kNoBias[W] = {};
  alignas(64) float out[2][2 * kTileRows * kColumns * W];
  const int64_t rows = row1 - row0;
  if (rows <= 0 || block0 >= block1) return;
  if constexpr (std::is_same_v<In, InRows<Bf16>>) {
    if (weight.layout == cpu::Weight<Bf16>::kRows) {
      dot_product<G>(row0, row1, block0, block1, units, in, weight, K, bias, ld_bias, backwards, epilogue);
      return;
    }
  }
  TileArgs t{};
  Walk of[2];
  t.walks = walks(in, K, of);
  int64_t steps = 0;
  for (int i = 0; i < t.walks; ++i) steps += of[i].steps;
  const int64_t column = (weight.ld ? weight.ld / 32 : steps) * kTileElements;
  t.w_row = 32;
  t.w_step = kTileElements;
  t.ld_out = kColumns * W;
  // Sets of equal size, so that one configuration serves all; the last may begin among the rows before.
  const int64_t sets = (rows + kTileRows - 1) / kTileRows, M = (rows + sets - 1) / sets;
  const int64_t sweeps = (block1 - block0 + kUnits - 1) / kUnits;
  const Tiles tiles(M);
  // Rows [first, first + count) of the U blocks from b on, whose sets begin at the rows `begin` and `second`
  // (no row is beyond that where there is one set): those being multiplied, and those before them.
  struct Part {
    int64_t first = 0, count = 0, begin = 0, second = 0, b = 0, U = 1;
    const float* sums = nullptr;
  } now, done;
  int64_t row = 0, u = 0;  // of the epilogue's next vector
  const auto run = [&](int64_t at) __attribute__((noinline)) {
    if (at < now.count) reads.fetch(now.first + at, 1, now.b * W, static_cast<int>(now.U));
    if (at >= done.count * done.U) return;
    const int64_t place = row < done.second ? row - done.begin : kTileRows + row - done.second;
    Vec<S, G> v;
    for (int g = 0; g < G; ++g) v[g] = S::load(done.sums + (place * kColumns + u * G + g) * W);
    const int64_t unit = (done.b + u) * W;
    epilogue(row, unit, static_cast<int>(at_most(units - unit, W)), v);
    if (++u == done.U) {
      u = 0;
      ++row;
    }
  };
  for (int64_t j = 0; j < sweeps; ++j) {
    now.b = block0 + (backwards ? sweeps - 1 - j : j) * kUnits;
    now.U = at_most(block1 - now.b, kUnits);
    const int64_t columns = now.U * G;
    for (int64_t set = 0; set < sets; set += 2) {
      const bool two = set + 1 < sets;
      now.begin = row0 + at_most(set * M, rows - M);
      now.second = two ? row0 + at_most((set + 1) * M, rows - M) : row1;
      now.first = row0 + set * M;
      now.count = at_most((two ? 2 : 1) * M, row1 - now.first);
      float* sums = out[now.sums == out[0]];
      now.sums = sums;
      for (int i = 0; i < t.walks; ++i) {
        t.of[i] = of[i];
        t.of[i].a += now.begin * of[i].lda;
        t.of[i].second = (now.second - now.begin) * of[i].lda;
      }
      const int64_t each = two ? 2 : 4, calls = (columns + each - 1) / each;
      const int64_t pieces = done.count * done.U;
      Meanwhile<decltype(run)> work{run, pieces > now.count ? pieces : now.count, steps * calls};
      for (int64_t c = 0; c < columns;) {
        const int n = static_cast<int>(at_most(columns - c, each));
        for (int i = 0; i < n; ++i) {
          const int64_t b = now.b + (c + i) / G, g = (c + i) % G;
          t.w[i] = weight.data + (b * G + g) * column;
          t.from[0][i] = t.from[1][i] = bias ? bias + g * ld_bias + b * W : kNoBias;
        }
        t.out[0] = sums + c * W;
        t.out[1] = t.out[0] + kTileRows * kColumns * W;
        if (two) {
          n == 2 ? tile_2<2>(t, work) : tile_2<1>(t, work);
        } else {
          n == 4   ? tile_1<4>(t, work)
          : n == 3 ? tile_1<3>(t, work)
          : n == 2 ? tile_1<2>(t, work)
                   : tile_1<1>(t, work);
        }
        c += n;
      }
      while (work.at < work.count) run(work.at++);
      done = now;
      row = done.first;
    }
  }
  now.count = 0;
  for (int64_t at = 0; at < done.count * done.U; ++at) run(at);
}

// dst [blocks][gates][K/32][16][W][2].
inline void pack(const cpu::Pack& p, Bf16* dst, int64_t block0, int64_t block1) {
  const int64_t steps = ((p.to_K ? p.to_K : p.K) + 31) / 32;
  pack_pairs(p, block0, block1, [&](int64_t b, int64_t step, int64_t g, int64_t k) {
    return dst + ((b * p.gates + g) * steps + step) * kTileElements + k * 32;
  });
}

}  // namespace fastrnn::FASTRNN_ISA
