// The table of attention.h for one instruction set. A translation unit defines FASTRNN_ISA and
// FASTRNN_VECTOR_BYTES, includes this, and is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "attend_rows.h"
#include "decode.h"

namespace fastrnn::FASTRNN_ISA {

template <class E>
const cpu::AttentionKernels<E>* attention_kernels() {
#define FASTRNN_ENTRY(Cell) {&Decode<Cell, E>::run, &DecodeBackward<Cell, E>::run},
  static constexpr cpu::DecoderKernels<E> decoders[] = {FASTRNN_CELLS(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
  static constexpr cpu::AttentionKernels<E> kernels{decoders, &AttendForward<E>::run, &AttendBackward<E>::run,
                                                    &AttendForward<E>::scratch, &AttendBackward<E>::scratch};
  return &kernels;
}

}  // namespace fastrnn::FASTRNN_ISA

#define FASTRNN_ATTENTION(NAME)                                              \
  namespace fastrnn::cpu {                                                   \
  void attention_##NAME(InstructionSet& set) {                               \
    set.attention_f32 = ::fastrnn::FASTRNN_ISA::attention_kernels<float>();  \
    set.attention_f64 = ::fastrnn::FASTRNN_ISA::attention_kernels<double>(); \
  }                                                                          \
  }
