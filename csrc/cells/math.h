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
// relu's gradient dy of its output y, passed on: chosen, not multiplied, so that an infinite one ends where
// relu cuts off. Of a NaN all of it, as torch has it.
FASTRNN_HD float relu_gradient(float y, float dy) { return y <= 0.0f ? 0.0f : dy; }
FASTRNN_HD double relu_gradient(double y, double dy) { return y <= 0.0 ? 0.0 : dy; }

template <class T>
FASTRNN_HD T dsigmoid(T y) {
  return y * (T(1) - y);
}
template <class T>
FASTRNN_HD T dtanh(T y) {
  return T(1) - y * y;
}

}  // namespace fastrnn
