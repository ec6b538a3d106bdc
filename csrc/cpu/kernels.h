// The table of one instruction set. A translation unit defines FASTRNN_ISA and FASTRNN_VECTOR_BYTES, includes
// this, and is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"

namespace fastrnn::FASTRNN_ISA {

// dst [blocks][K][gates][W], zeros where units end.
template <class E>
void pack(const cpu::Pack& p, E* dst, int64_t block0, int64_t block1) {
  constexpr int W = Simd<E>::W;
  const E* src = static_cast<const E*>(p.src);
  for (int64_t b = block0; b < block1; ++b) {
    const int64_t lanes = at_most(p.units - b * W, W);
    for (int64_t g = 0; g < p.gates; ++g) {
      const E* from = src + g * p.gate_stride + b * W * p.unit_stride;
      E* to = dst + b * p.K * p.gates * W + g * W;
      if (p.unit_stride == 1) {
        for (int64_t k = 0; k < p.K; ++k) {
          Simd<E>::load(from + k * p.k_stride, static_cast<int>(lanes)).store(to + k * p.gates * W);
        }
        continue;
      }
      constexpr int64_t kTile = 16;  // so that what is written stays in L1 while the lanes fill it
      for (int64_t k0 = 0; k0 < p.K; k0 += kTile) {
        const int64_t k1 = at_most(k0 + kTile, p.K);
        for (int64_t lane = 0; lane < W; ++lane) {
          for (int64_t k = k0; k < k1; ++k) {
            to[k * p.gates * W + lane] = lane < lanes ? from[lane * p.unit_stride + k * p.k_stride] : E(0);
          }
        }
      }
    }
  }
}

template <class Cell, class E>
constexpr cpu::CellKernels<E> cell_kernels() {
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
          &Forward<Cell, E>::run,
          &Backward<Cell, E>::run,
          &Backward<Cell, E>::finish};
}

template <class E>
cpu::Kernels<E> kernels() {
#define FASTRNN_ENTRY(Cell) cell_kernels<Cell, E>(),
  static constexpr cpu::CellKernels<E> cells[] = {FASTRNN_CELLS(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
  return {Simd<E>::W, sizeof(cells) / sizeof(cells[0]), cells, &pack<E>, &small_product<E>};
}

}  // namespace fastrnn::FASTRNN_ISA

#define FASTRNN_INSTRUCTION_SET(NAME)                                                                    \
  namespace fastrnn::cpu {                                                                               \
  InstructionSet instruction_set_##NAME() {                                                              \
    return {#NAME, ::fastrnn::FASTRNN_ISA::kernels<float>(), ::fastrnn::FASTRNN_ISA::kernels<double>()}; \
  }                                                                                                      \
  }
