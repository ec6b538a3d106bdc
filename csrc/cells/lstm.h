// LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000), torch.nn's gate order i, f, g, o:
//   i, f, o = sigmoid(gx + gh)    g = tanh(gx + gh)
//   c' = f * c + i * g            h' = o * tanh(c')
#pragma once

#include "math.h"

namespace fastrnn {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kStates = 2, kSaved = 4, kGrads = 4, kStages = 1;
  static constexpr bool kSavesH = false;
  static constexpr bool kSums = true;     // of gx and gh it takes gx + gh alone
  static constexpr bool kReadsH = false;  // h goes into its products, and nowhere else
  static constexpr int kStageGates[1] = {4};
  // dg[kHiddenGrad[k]] is the gradient of gate k's recurrent part; dg[k] that of its input part.
  static constexpr int kHiddenGrad[4] = {0, 1, 2, 3};

  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 4>& gx, const Vec<T, 4>& gh, const Vec<T, 2>& s,  // s = h, c
                                 Vec<T, 2>& s_new, Vec<T, 4>& saved) {
    const T i = sigmoid(gx[0] + gh[0]);
    const T f = sigmoid(gx[1] + gh[1]);
    const T g = tanh_(gx[2] + gh[2]);
    const T o = sigmoid(gx[3] + gh[3]);
    const T c = f * s[1] + i * g;
    s_new = {{o * tanh_(c), c}};
    saved = {{i, f, g, o}};
  }

  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 4>& saved, const Vec<T, 2>& s, const Vec<T, 2>& s_new,
                                  const Vec<T, 2>& ds_new, Vec<T, 4>& dg, Vec<T, 2>& ds) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T tc = tanh_(s_new[1]);
    const T dc = ds_new[1] + ds_new[0] * o * dtanh(tc);
    dg = {{dc * g * dsigmoid(i), dc * s[1] * dsigmoid(f), dc * i * dtanh(g), ds_new[0] * tc * dsigmoid(o)}};
    ds = {{T(0), dc * f}};
  }
};

}  // namespace fastrnn
