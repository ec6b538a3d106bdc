// avx512, and products of bfloat16 by AMX.
#define FASTRNN_ISA isa_amx
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_BF16_ONLY
#include "amx_gradients.h"
// After the product that its scans are to find.
#include "kernels.h"

namespace fastrnn::cpu {

Kernels<float, Bf16> bf16_amx() {
  Kernels<float, Bf16> k = isa_amx::kernels<float, Bf16>();
  k.packing = Packing::kTiles;
  k.pair_rows = &isa_amx::pair_rows;
  return k;
}

}  // namespace fastrnn::cpu
