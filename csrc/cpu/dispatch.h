// The instruction set in force.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace fastrnn::cpu {

// Those that are compiled in and that this processor runs, best last.
const std::vector<InstructionSet>& instruction_sets();
// The best one, or that of the environment's FASTRNN_CPU_ISA, read at every call so that tests can force
// each.
const InstructionSet& instruction_set();

template <class E, class A = E>
const Kernels<E, A>& kernels();

// Raises for a name that is not in the registry.
template <class E, class A = E>
const CellKernels<E, A>& cell_kernels(const std::string& name);

}  // namespace fastrnn::cpu
