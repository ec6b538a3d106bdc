// The table of attention.h for one instruction set. A translation unit defines FASTRNN_ISA and
// FASTRNN_VECTOR_BYTES, includes this, and is compiled with that set's flags.
#pragma once

#include "attend_rows.h"
#include "decode.h"

namespace fastrnn::FASTRNN_ISA {

template <class E>
const cpu::AttentionKernels<E>* attention_kernels() {
  static constexpr cpu::AttentionKernels<E> kernels{
      &Decode<E>::run,         &Decode<E>::run_backward,   &AttendForward<E>::run,
      &AttendBackward<E>::run, &AttendForward<E>::scratch, &AttendBackward<E>::scratch};
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
