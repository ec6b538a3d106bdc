// The types that layers come in, as the kernels store them, and a step of their products: c += w b.
#pragma once

#include "device.h"

namespace fastrnn::cuda {

constexpr uint32_t kPending = 0xffffffffu;  // a NaN that no number is stored as: what nobody has written yet

// Bits is what a word of memory holds. Of 16 bits a NaN is stored as the one that conversions give, never as
// kPending's.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ Bits store(float x) { return float_bits(x); }
  static __device__ __forceinline__ float load(Bits bits) { return bits_float(bits); }

  static __device__ __forceinline__ uint32_t rest(float x, uint32_t high) {
    const float low = x - bits_float(high);
    return tf32_bits(low == low ? low : 0.0f);  // of an infinity nothing is left
  }
  static __device__ __forceinline__ void add(float (&c)[4], bool exact, const uint4& w, uint32_t b0,
                                             uint32_t b1) {
    const float a[4] = {bits_float(w.x), bits_float(w.y), bits_float(w.z), bits_float(w.w)};
    const float b[2] = {bits_float(b0), bits_float(b1)};
    uint32_t ah[4], bh[2];
#pragma unroll
    for (int i = 0; i < 4; i++) ah[i] = tf32_bits(a[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) bh[i] = tf32_bits(b[i]);
    if (exact) {
      mma_tf32(c, rest(a[0], ah[0]), rest(a[1], ah[1]), rest(a[2], ah[2]), rest(a[3], ah[3]), bh[0], bh[1]);
      mma_tf32(c, ah[0], ah[1], ah[2], ah[3], rest(b[0], bh[0]), rest(b[1], bh[1]));
    }
    mma_tf32(c, ah[0], ah[1], ah[2], ah[3], bh[0], bh[1]);
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ Bits store(float x) { return bf16_bits(x); }
  static __device__ __forceinline__ float load(Bits bits) { return bits_float(uint32_t(bits) << 16); }
  static __device__ __forceinline__ void add(float (&c)[4], bool, const uint4& w, uint32_t b0, uint32_t b1) {
    mma_bf16(c, w.x, w.y, w.z, w.w, b0, b1);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ Bits store(float x) { return fp16_bits(x); }
  static __device__ __forceinline__ float load(Bits bits) { return fp16_float(bits); }
  static __device__ __forceinline__ void add(float (&c)[4], bool, const uint4& w, uint32_t b0, uint32_t b1) {
    mma_fp16(c, w.x, w.y, w.z, w.w, b0, b1);
  }
};

}  // namespace fastrnn::cuda
