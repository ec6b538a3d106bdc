// The instruction set in force.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace fastrnn::cpu {

// Those that are compiled in and that this processor runs, best last.
const std::vector<InstructionSet>& instruction_sets();
// The best one, or that of FASTRNN_CPU_ISA, which the first call reads from the environment: not each, since
// another thread might be changing that.
const InstructionSet& instruction_set();
// For tests, which have no other call under way: from now on that of this name. Returns the one before.
std::string use_instruction_set(const std::string& name);

template <class E, class A = E>
const Kernels<E, A>& kernels();

// Raises for a name that is not in the registry.
template <class E, class A = E>
const CellKernels<E, A>& cell_kernels(const std::string& name);

}  // namespace fastrnn::cpu
