// Packs a weight, or whatever is to be one, for the product.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

// dst [blocks][K][gates][W], zeros where units end.
template <class E>
void pack(const cpu::Pack& p, E* dst, int64_t block0, int64_t block1) {
  using S = Simd<E>;
  constexpr int W = S::W;
  const Border<E> src{const_cast<void*>(p.src), 0, p.bf16};
  const int64_t step = (p.to_gates ? p.to_gates : p.gates) * W, all_K = p.to_K ? p.to_K : p.K;
  // Where a vector is a line, one gate's rows to their ends: all gates' are more than the hardware's
  // prefetching follows. Else all gates of a few k before the next ones: the parts of a line are written one
  // soon after the other.
  const int64_t run = W * sizeof(E) == 64 ? p.K : W;
  for (int64_t b = block0; b < block1; ++b) {
    const int lanes = static_cast<int>(at_most(p.units - b * W, W));
    for (int64_t k0 = 0; k0 < p.K; k0 += run) {
      const int64_t k1 = at_most(k0 + run, p.K);
      for (int64_t g = 0; g < p.gates; ++g) {
        for (int64_t k = k0; k < k1; k += W) {
          const int columns = static_cast<int>(at_most(p.K - k, W));
          const int64_t from = g * p.gate_stride + b * W * p.unit_stride + k * p.k_stride;
          E* to = dst + (b * all_K + k) * step + g * W;
          if (p.unit_stride == 1) {
            for (int j = 0; j < columns; ++j) {
              load(src, 0, from + j * p.k_stride, lanes).store(to + j * step);
            }
            continue;
          }
          S v[W];
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
