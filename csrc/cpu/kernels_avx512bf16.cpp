// avx512, and products of bfloat16 by its own instruction for pairs of them.
#define FASTRNN_ISA isa_avx512bf16
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_BF16_ONLY
#include "pairs.h"
// After the product that its scans are to find.
#include "kernels.h"

namespace fastrnn::cpu {

Kernels<float, Bf16> bf16_avx512() {
  Kernels<float, Bf16> k = isa_avx512bf16::kernels<float, Bf16>();
  k.packing = Packing::kPairs;
  k.pair_rows = &isa_avx512bf16::pair_rows;
  return k;
}

}  // namespace fastrnn::cpu
