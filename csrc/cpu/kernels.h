// The table of one instruction set. A translation unit defines FASTRNN_ISA and FASTRNN_VECTOR_BYTES, includes
// this, and is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "gradients.h"
#include "int8_kernels.h"
#include "tree_kernels.h"

namespace fastrnn::FASTRNN_ISA {

// dst [blocks][K][gates][W], zeros where units end.
template <class E>
void pack(const cpu::Pack& p, E* dst, int64_t block0, int64_t block1) {
  using S = Simd<E>;
  constexpr int W = S::W;
  const Border<E> src{const_cast<void*>(p.src), 0, p.bf16};
  const int64_t step = (p.to_gates ? p.to_gates : p.gates) * W, all_K = p.to_K ? p.to_K : p.K;
  for (int64_t b = block0; b < block1; ++b) {
    const int lanes = static_cast<int>(at_most(p.units - b * W, W));
    // All gates of a few k before the next ones: what is written lies together.
    for (int64_t k = 0; k < p.K; k += W) {
      const int columns = static_cast<int>(at_most(p.K - k, W));
      for (int64_t g = 0; g < p.gates; ++g) {
        const int64_t from = g * p.gate_stride + b * W * p.unit_stride + k * p.k_stride;
        E* to = dst + (b * all_K + k) * step + g * W;
        if (p.unit_stride == 1) {
          for (int j = 0; j < columns; ++j) load(src, 0, from + j * p.k_stride, lanes).store(to + j * step);
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

template <class Cell, class E, class A = E>
constexpr cpu::CellKernels<E, A> cell_kernels() {
  // The rows of saved values receive the input product first; the first of two stages saves its gates.
  static_assert(Cell::kSaved >= Cell::kGates, "a cell saves at least as many values as it has gates");
  static_assert(Cell::kStages == 1 || Cell::kStages == 2, "one or two stages a step");
  return {Cell::kName,
          Cell::kGates,
          Cell::kStates,
          Cell::kSaved,
          Cell::kGrads,
          Cell::kStages,
          Cell::kStageGates,
          Cell::kHiddenGrad,
          &Forward<Cell, E, A>::run,
          &Backward<Cell, E, A>::run,
          &Backward<Cell, E, A>::finish};
}

template <class E, class A = E>
cpu::Kernels<E, A> kernels() {
#define FASTRNN_ENTRY(Cell) cell_kernels<Cell, E, A>(),
  static constexpr cpu::CellKernels<E, A> cells[] = {FASTRNN_CELLS(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
  cpu::Kernels<E, A> k{};
  k.width = Simd<E>::W;
  k.panel = kPanel<E, A>;
  k.count = sizeof(cells) / sizeof(cells[0]);
  k.cells = cells;
  k.pack = &pack;
  k.to_panels = &to_panels;
  k.outer_product = &outer_product;
  k.add_rows = &add_rows;
  k.input_gradient = &input_gradient;
  if constexpr (sizeof(A) == sizeof(E)) k.trees = tree_kernels<E>();
  return k;
}

}  // namespace fastrnn::FASTRNN_ISA

#define FASTRNN_INSTRUCTION_SET(NAME)                                    \
  namespace fastrnn::cpu {                                               \
  InstructionSet instruction_set_##NAME() {                              \
    using namespace ::fastrnn::FASTRNN_ISA;                              \
    return {#NAME, kernels<float>(), kernels<double>(), int8_kernels()}; \
  }                                                                      \
  }
