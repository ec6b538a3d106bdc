#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

namespace fastrnn::cpu {

InstructionSet instruction_set_baseline();
InstructionSet instruction_set_avx2();
InstructionSet instruction_set_avx512();
Int8Kernels int8_avx512vnni();

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> s{instruction_set_baseline()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) s.push_back(instruction_set_avx2());
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      s.push_back(instruction_set_avx512());
      if (__builtin_cpu_supports("avx512vnni")) {
        s.push_back(s.back());
        s.back().name = "avx512vnni";
        s.back().int8 = int8_avx512vnni();
      }
    }
#endif
    return s;
  }();
  return sets;
}

const InstructionSet& instruction_set() {
  const auto& sets = instruction_sets();
  const char* forced = std::getenv("FASTRNN_CPU_ISA");
  if (!forced || !*forced) return sets.back();
  std::string names;
  for (const auto& s : sets) {
    if (s.name == std::string(forced)) return s;
    names += std::string(names.empty() ? "" : ", ") + s.name;
  }
  STD_TORCH_CHECK(false, "FASTRNN_CPU_ISA must be one of ", names, " on this processor, got ", forced);
}

template <>
const Kernels<float>& kernels() {
  return instruction_set().f32;
}
template <>
const Kernels<double>& kernels() {
  return instruction_set().f64;
}

template <class E>
const CellKernels<E>& cell_kernels(const std::string& name) {
  const Kernels<E>& k = kernels<E>();
  for (int i = 0; i < k.count; ++i) {
    if (name == k.cells[i].name) return k.cells[i];
  }
  STD_TORCH_CHECK(false, "unknown cell ", name);
}
template const CellKernels<float>& cell_kernels(const std::string&);
template const CellKernels<double>& cell_kernels(const std::string&);

}  // namespace fastrnn::cpu
