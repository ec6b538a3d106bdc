#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>

#include "attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn::cpu {

InstructionSet instruction_set_baseline();
InstructionSet instruction_set_avx2();
InstructionSet instruction_set_avx512();
void attention_baseline(InstructionSet& set);
void attention_avx2(InstructionSet& set);
void attention_avx512(InstructionSet& set);
Int8Kernels int8_avx512vnni();
Kernels<float, Bf16> bf16_avx512();
Kernels<float, Bf16> bf16_amx();

#if defined(__x86_64__)
namespace {

bool has_avx512bf16() {
  unsigned a, b, c, d;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
}

// Intel's multiply pairs of bfloat16 at half the rate of single floats, AMD's at the same rate.
bool pairs_are_fast() {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

// The processor has the tiles and their bfloat16 product; and the kernel lends this process the tiles.
bool amx_lent() {
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> s{instruction_set_baseline()};
    attention_baseline(s.back());
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) {
      s.push_back(instruction_set_avx2());
      attention_avx2(s.back());
    }
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      s.push_back(instruction_set_avx512());
      attention_avx512(s.back());
      if (__builtin_cpu_supports("avx512vnni")) {
        s.push_back(s.back());
        s.back().name = "avx512vnni";
        s.back().int8 = int8_avx512vnni();
      }
      if (has_avx512bf16()) {
        InstructionSet pairs = s.back();
        pairs.name = "avx512bf16";
        pairs.bf16 = bf16_avx512();
        // The last one is the default.
        s.insert(pairs_are_fast() ? s.end() : s.end() - 1, pairs);
        if (amx_lent()) {
          pairs.name = "amx";
          pairs.bf16 = bf16_amx();
          s.push_back(pairs);
        }
      }
    }
#endif
    return s;
  }();
  return sets;
}

namespace {

const InstructionSet& named(const std::string& name) {
  std::string names;
  for (const auto& s : instruction_sets()) {
    if (s.name == name) return s;
    names += (names.empty() ? "" : ", ") + std::string(s.name);
  }
  STD_TORCH_CHECK(false, "FASTRNN_CPU_ISA must be one of ", names, " on this processor, got ", name);
}

std::atomic<const InstructionSet*>& in_force() {
  static std::atomic<const InstructionSet*> set = [] {
    const char* forced = std::getenv("FASTRNN_CPU_ISA");
    return forced && *forced ? &named(forced) : &instruction_sets().back();
  }();
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *in_force().load(std::memory_order_acquire); }

std::string use_instruction_set(const std::string& name) {
  return in_force().exchange(&named(name), std::memory_order_acq_rel)->name;
}

template <>
const Kernels<float>& kernels<float>() {
  return instruction_set().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return instruction_set().f64;
}
template <>
const Kernels<float, Bf16>& kernels<float, Bf16>() {
  return instruction_set().bf16;
}

template <>
const AttentionKernels<float>& attention_kernels<float>() {
  return *instruction_set().attention_f32;
}
template <>
const AttentionKernels<double>& attention_kernels<double>() {
  return *instruction_set().attention_f64;
}

template <class E, class A>
const CellKernels<E, A>& cell_kernels(const std::string& name) {
  const Kernels<E, A>& k = kernels<E, A>();
  for (int i = 0; i < k.count; ++i) {
    if (name == k.cells[i].name) return k.cells[i];
  }
  STD_TORCH_CHECK(false, "unknown cell ", name);
}
template const CellKernels<float>& cell_kernels(const std::string&);
template const CellKernels<double>& cell_kernels(const std::string&);
template const CellKernels<float, Bf16>& cell_kernels(const std::string&);

}  // namespace fastrnn::cpu
