// Small fixed-size arrays of values, shared by every backend.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

namespace fastrnn {

// T is float, double, or a SIMD vector of them: one line of a cell serves a GPU thread and a CPU register.
template <class T, int N>
struct Vec {
  T v[N];
  FASTRNN_HD T& operator[](int i) { return v[i]; }
  FASTRNN_HD const T& operator[](int i) const { return v[i]; }
};

}  // namespace fastrnn
