// The instructions that the kernels are made of, wrapped; without nvcc tests/cuda_on_cpu.h has their like,
// and the same kernels run on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define FASTRNN_SHARED(name) extern __shared__ uint4 name[]

namespace fastrnn::cuda {

__device__ __forceinline__ void give_up() { __trap(); }

// Relaxed: each 32-bit word is read whole, and from the cache that all multiprocessors share.
__device__ __forceinline__ uint4 load_relaxed(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Loads that keep their place: before a wait, so that it hides theirs.
__device__ __forceinline__ uint16_t load_early(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_early(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint16_t bf16_bits(float x) {
  uint16_t v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(x));
  return v;
}
__device__ __forceinline__ uint16_t fp16_bits(float x) {
  uint16_t v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(x));
  return v;
}
__device__ __forceinline__ float fp16_float(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
// Volatile: to split the weights once for all steps, the compiler would need twice the registers.
__device__ __forceinline__ uint32_t tf32_bits(float x) {
  uint32_t v;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(x));
  return v;
}
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }

// Tensor cores: c [16, 8] += a [16, k] b [k, 8]; a0, a2 are of row lane / 4, a1, a3 of the row 8 further.
#define FASTRNN_MMA(name, shape)                                                                          \
  __device__ __forceinline__ void name(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                       uint32_t b0, uint32_t b1) {                                        \
    asm volatile("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                 \
  }
FASTRNN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRNN_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRNN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTRNN_MMA

}  // namespace fastrnn::cuda
#else
#include "cuda_on_cpu.h"
#endif
