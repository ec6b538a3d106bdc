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

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes of the block's own.
__device__ __forceinline__ uint4 load_shared(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(p))
               : "memory");
  return v;
}

__device__ __forceinline__ float load_shared_float(const void* p) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared_address(p)) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(void* p, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Blocks of a cluster, which are one another's peers by blockIdx.y. What a block pushes into a peer's shared
// memory, the place as it is in its own, an *arrival* there counts: of turn after turn, each over when as
// many bytes have come as were expected of it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
__device__ __forceinline__ void start_arrival(uint64_t* arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Of the turn at hand; once each turn.
__device__ __forceinline__ void expect(uint64_t* arrival, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)),
               "r"(bytes)
               : "memory");
}
// Until the turns of this parity, 0 for the first, are over.
__device__ __forceinline__ void await(uint64_t* arrival, int parity, int patience) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(arrival)), "r"(parity)
        : "memory");
    if (!over && --patience < 0) give_up();
  }
}
// there: whether at all.
__device__ __forceinline__ void push(char* place, uint4 v, uint64_t* arrival, int peer, bool there) {
  asm volatile(
      "{\n.reg .b32 to, counts;\n.reg .pred there;\n"
      "setp.ne.u32 there, %7, 0;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 counts, %1, %6;\n"
      "@there st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%2, %3, %4, %5}, "
      "[counts];\n}" ::"r"(shared_address(place)),
      "r"(shared_address(arrival)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(peer), "r"(int(there))
      : "memory");
}
// All threads of the cluster meet.
__device__ __forceinline__ void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// So many threads of the block meet, whole warps, at its barrier of this number, 1 to 15.
__device__ __forceinline__ void meet_some(int number, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
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

// Into the cache.
__device__ __forceinline__ void load_ahead(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// Into a register of its own: two of 16 bits would be packed into one, for which their loads are waited for.
__device__ __forceinline__ uint32_t load_word(const uint16_t* p) {
  uint32_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_word(const uint32_t* p) { return load_early(p); }

__device__ __forceinline__ void store(uint16_t* p, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
__device__ __forceinline__ void store(uint32_t* p, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// p and a * b bytes: one instruction, where the compiler would make several of it.
__device__ __forceinline__ char* beyond(const char* p, int a, int b) {
  uint64_t sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(p));
  return reinterpret_cast<char*>(sum);
}

// Computed once: the compiler would do it again each time that it is needed.
template <class V>
__device__ __forceinline__ void pin(V*& v) {
  asm volatile("" : "+l"(v));
}
__device__ __forceinline__ void pin(int& v) { asm volatile("" : "+r"(v)); }

__device__ __forceinline__ uint16_t bf16_bits(float x) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(0.0f), "f"(x));  // of two: that of one is slow
  return uint16_t(v);
}
__device__ __forceinline__ uint16_t fp16_bits(float x) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(0.0f), "f"(x));
  return uint16_t(v);
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
