// The functions that cells are made of. Derivatives are written from the *output*, so that backward never
// needs the pre-activation. A SIMD type brings its own sigmoid, tanh_ and relu, found by argument-dependent
// lookup.
#pragma once

#include <cmath>

#include "vec.h"

namespace fastrnn {

#ifdef __CUDA_ARCH__  // within 1e-7, in a fraction of the instructions
FASTRNN_HD float sigmoid(float x) {
  float e, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.442695041f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
  return y;
}
#else
FASTRNN_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
#endif
FASTRNN_HD double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
FASTRNN_HD float tanh_(float x) { return tanhf(x); }
FASTRNN_HD double tanh_(double x) { return tanh(x); }
// `x < 0 ? 0 : x`, not max(x, 0): a NaN must stay one.
FASTRNN_HD float relu(float x) { return x < 0.0f ? 0.0f : x; }
FASTRNN_HD double relu(double x) { return x < 0.0 ? 0.0 : x; }
// Of a NaN 1, as torch has it: what is not cut off goes through.
FASTRNN_HD float drelu(float y) { return y <= 0.0f ? 0.0f : 1.0f; }
FASTRNN_HD double drelu(double y) { return y <= 0.0 ? 0.0 : 1.0; }

template <class T>
FASTRNN_HD T dsigmoid(T y) {
  return y * (T(1) - y);
}
template <class T>
FASTRNN_HD T dtanh(T y) {
  return T(1) - y * y;
}

}  // namespace fastrnn
