// Packs a weight, or whatever is to be one, for the product.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

// dst [blocks][K][gates][W], zeros where units end. What is read next is fetched by hand: rows are further
// apart than the hardware's prefetching follows.
template <class E>
void pack(const cpu::Pack& p, E* dst, int64_t block0, int64_t block1) {
  using S = Simd<E>;
  constexpr int W = S::W;
  const Border<E> src{const_cast<void*>(p.src), 0, p.bf16};
  constexpr int64_t kLine = 64 / sizeof(E);  // of a bfloat16 source half a line: then it is asked for twice
  const int64_t step = (p.to_gates ? p.to_gates : p.gates) * W, all_K = p.to_K ? p.to_K : p.K;
  const int64_t end = at_most(block1 * W, p.units);
  const int64_t size = p.bf16 ? sizeof(uint16_t) : sizeof(E);
  const auto fetch = [&](int64_t at) { __builtin_prefetch(static_cast<const char*>(p.src) + at * size); };
  if (p.unit_stride == 1) {
    // Some lines of each k at once: block by block, a line would come once for each block that has a part of
    // it.
    constexpr int64_t kRowsAhead = 8, kAcross = 4 * kLine < 8 * W ? 4 * kLine : 8 * W;
    const bool aligned = (reinterpret_cast<intptr_t>(p.src) | p.k_stride * size) % 64 == 0;
    for (int64_t unit0 = block0 * W, unit1; unit0 < block1 * W; unit0 = unit1) {
      unit1 = at_most((unit0 / kAcross + 1) * kAcross, block1 * W);
      const int64_t last = at_most(unit1, end) - 1;
      for (int64_t g = 0; g < p.gates; ++g) {
        for (int64_t k = 0; k < p.K; ++k) {
          const int64_t from = g * p.gate_stride + k * p.k_stride;
          if (k + kRowsAhead < p.K) {
            const int64_t ahead = from + kRowsAhead * p.k_stride;
            for (int64_t unit = unit0; unit <= last; unit += kLine) fetch(ahead + unit);
            if (!aligned || unit0 % kLine) fetch(ahead + last);
          }
          E* to = dst + (unit0 / W * all_K + k) * step + g * W;
          int64_t unit = unit0;
          for (; unit < unit1 && unit + W <= p.units; unit += W, to += all_K * step) {
            load(src, 0, from + unit, W).store(to);
          }
          if (unit < unit1) load(src, 0, from + unit, static_cast<int>(p.units - unit)).store(to);
        }
      }
    }
    return;
  }
  // Where a vector is a line, one gate's rows to their ends: all gates' are more than the hardware's
  // prefetching follows. Else all gates of a few k before the next ones: the parts of a line are written one
  // soon after the other.
  constexpr bool kWhole = W == kLine;
  const int64_t run = kWhole ? p.K : W;
  const int64_t lines_ahead = at_most(4 * kLine, round_up(p.K, kLine));
  for (int64_t b = block0; b < block1; ++b) {
    const int lanes = static_cast<int>(at_most(p.units - b * W, W));
    for (int64_t k0 = 0; k0 < p.K; k0 += run) {
      const int64_t k1 = at_most(k0 + run, p.K);
      for (int64_t g = 0; g < p.gates; ++g) {
        // What is read where its rows end: the next gate's or the next block's.
        const bool gate = kWhole && g + 1 < p.gates;
        const int64_t jump = gate ? p.gate_stride : W * p.unit_stride - (kWhole ? g * p.gate_stride : 0);
        const int64_t jump_rows = gate ? lanes : at_most(end - (b + 1) * W, W);
        for (int64_t k = k0; k < k1; k += W) {
          const int columns = static_cast<int>(at_most(p.K - k, W));
          const int64_t from = g * p.gate_stride + b * W * p.unit_stride + k;
          if (k % kLine == 0) {
            const bool ends = k + lines_ahead >= p.K;
            const int64_t ahead = from + lines_ahead + (ends ? jump - round_up(p.K, kLine) : 0);
            const int64_t rows = ends ? jump_rows : lanes;
            for (int64_t row = 0; row < rows; ++row) fetch(ahead + row * p.unit_stride);
          }
          E* to = dst + (b * all_K + k) * step + g * W;
          S v[W];
          if (lanes == W && columns == W) {  // in registers all the way
#pragma GCC unroll 16
            for (int lane = 0; lane < W; ++lane) v[lane] = load(src, 0, from + lane * p.unit_stride, W);
            transpose(v);
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) v[j].store(to + j * step);
            continue;
          }
          for (int lane = 0; lane < W; ++lane) {
            v[lane] = lane < lanes ? load(src, 0, from + lane * p.unit_stride, columns) : S(0);
          }
          transpose(v);
          for (int j = 0; j < columns; ++j) v[j].store(to + j * step);
        }
      }
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
