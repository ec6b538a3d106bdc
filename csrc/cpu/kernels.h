// The table of one instruction set. A translation unit defines FASTRNN_ISA and FASTRNN_VECTOR_BYTES, includes
// this, and is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "gradients.h"
#include "int8_kernels.h"
#include "pack.h"
#include "tree_kernels.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class E, class A = E>
constexpr cpu::CellKernels<E, A> cell_kernels() {
  // On GPUs the rows of saved values receive the input product first; the first of two stages saves its
  // gates.
  static_assert(Cell::kSaved >= Cell::kGates, "a cell saves at least as many values as it has gates");
  static_assert(!Cell::kSavesH || (Cell::kSaved == 1 && Cell::kStates == 1), "h is all that it saves");
  static_assert(Cell::kStages == 1 || Cell::kStages == 2, "one or two stages a step");
  static_assert(Cell::kGates <= cpu::kMaxGates && Cell::kStates <= cpu::kMaxStates, "that many have room");
  static_assert(Cell::kStages == 1 || (Cell::kStates == 1 && Cell::kStageGates[Cell::kStages - 1] == 1 &&
                                       Cell::kGrads == Cell::kGates),
                "of two stages the second has one gate, whose gradient and those of the others' are h's too");
  cpu::CellKernels<E, A> k{Cell::kName,
                           Cell::kGates,
                           Cell::kStates,
                           Cell::kSavesH ? 0 : Cell::kSaved,
                           Cell::kGrads,
                           Cell::kStages,
                           Cell::kStageGates,
                           Cell::kHiddenGrad,
                           &Forward<Cell, E, A>::run,
                           &Backward<Cell, E, A>::run,
                           &Backward<Cell, E, A>::finish,
                           Forward<Cell, E, A>::kJoins};
  if constexpr (sizeof(A) == sizeof(E)) {
    k.step = &Forward<Cell, E, A>::step_alone;
    k.step_backward = &Backward<Cell, E, A>::step_alone;
  }
  return k;
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
