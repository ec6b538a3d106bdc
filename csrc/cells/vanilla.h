// The vanilla (Elman 1990) cell: h' = tanh(gx + gh) or relu(gx + gh).
#pragma once

#include "math.h"

namespace fastrnn {

struct VanillaBase {
  static constexpr int kGates = 1, kStates = 1, kSaved = 1, kGrads = 1, kStages = 1;
  static constexpr bool kSavesH = true;  // what is saved is the new h, and nothing else
  static constexpr bool kSums = true, kReadsH = false;
  static constexpr int kStageGates[1] = {1};
  static constexpr int kHiddenGrad[1] = {0};
};

struct RnnTanh : VanillaBase {
  static constexpr const char* kName = "rnn_tanh";
  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 1>& gx, const Vec<T, 1>& gh, const Vec<T, 1>&, Vec<T, 1>& s_new,
                                 Vec<T, 1>& saved) {
    s_new = saved = {{tanh_(gx[0] + gh[0])}};
  }
  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 1>& saved, const Vec<T, 1>&, const Vec<T, 1>&,
                                  const Vec<T, 1>& ds_new, Vec<T, 1>& dg, Vec<T, 1>& ds) {
    dg = {{ds_new[0] * dtanh(saved[0])}};
    ds = {{T(0)}};
  }
};

struct RnnRelu : VanillaBase {
  static constexpr const char* kName = "rnn_relu";
  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 1>& gx, const Vec<T, 1>& gh, const Vec<T, 1>&, Vec<T, 1>& s_new,
                                 Vec<T, 1>& saved) {
    s_new = saved = {{relu(gx[0] + gh[0])}};
  }
  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 1>& saved, const Vec<T, 1>&, const Vec<T, 1>&,
                                  const Vec<T, 1>& ds_new, Vec<T, 1>& dg, Vec<T, 1>& ds) {
    dg = {{relu_gradient(saved[0], ds_new[0])}};
    ds = {{T(0)}};
  }
};

}  // namespace fastrnn
