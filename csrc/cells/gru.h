// GRU (Cho 2014), torch.nn's gate order r, z, n. Two forms, by where the reset gate acts:
//   r, z = sigmoid(gx + gh)     h' = (1 - z) * n + z * h
//   after:  n = tanh(gx_n + r * gh_n)                gh_n = R_n h + b_hn           (cuDNN, torch.nn)
//   before: n = tanh(gx_n + gh_n)                    gh_n = R_n (r * h) + b_hn     (v3 of the paper, the
//   textbook)
#pragma once

#include "math.h"

namespace fastrnn {

struct Gru {
  static constexpr const char* kName = "gru";
  // gh_n is saved beside r, z, n: the gradient of r needs it.
  static constexpr int kGates = 3, kStates = 1, kSaved = 4, kGrads = 4, kStages = 1;
  static constexpr bool kSavesH = false, kSums = false, kReadsH = true;
  static constexpr int kStageGates[1] = {3};
  static constexpr int kHiddenGrad[3] = {0, 1, 3};

  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 3>& gx, const Vec<T, 3>& gh, const Vec<T, 1>& s,
                                 Vec<T, 1>& s_new, Vec<T, 4>& saved) {
    const T r = sigmoid(gx[0] + gh[0]);
    const T z = sigmoid(gx[1] + gh[1]);
    const T n = tanh_(gx[2] + r * gh[2]);
    s_new = {{n + z * (s[0] - n)}};
    saved = {{r, z, n, gh[2]}};
  }

  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 4>& saved, const Vec<T, 1>& s, const Vec<T, 1>&,
                                  const Vec<T, 1>& ds_new, Vec<T, 4>& dg, Vec<T, 1>& ds) {
    const T r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3], dh = ds_new[0];
    const T dn = dh * (T(1) - z) * dtanh(n);
    dg = {{dn * gh_n * dsigmoid(r), dh * (s[0] - n) * dsigmoid(z), dn, dn * r}};
    ds = {{dh * z}};
  }
};

// Two stages a step: r and z read h; n reads mid = r * h.
struct GruResetBefore {
  static constexpr const char* kName = "gru_reset_before";
  static constexpr int kGates = 3, kStates = 1, kSaved = 3, kGrads = 3, kStages = 2;
  static constexpr bool kSavesH = false, kSums = true, kReadsH = true;
  static constexpr int kStageGates[2] = {2, 1};
  static constexpr int kHiddenGrad[3] = {0, 1, 2};

  template <class T>
  static FASTRNN_HD void forward_first(const Vec<T, 2>& gx, const Vec<T, 2>& gh, const Vec<T, 1>& s, T& mid,
                                       Vec<T, 2>& saved) {
    const T r = sigmoid(gx[0] + gh[0]);
    const T z = sigmoid(gx[1] + gh[1]);
    mid = r * s[0];
    saved = {{r, z}};
  }
  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 1>& gx, const Vec<T, 1>& gh, const Vec<T, 1>& s,
                                 const Vec<T, 2>& first, Vec<T, 1>& s_new, Vec<T, 1>& saved) {
    const T z = first[1], n = tanh_(gx[0] + gh[0]);
    s_new = {{n + z * (s[0] - n)}};
    saved = {{n}};
  }

  // Reversed: first the stage that made s_new, then, with dmid = R_n^T dn, the stage that made mid.
  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 3>& saved, const Vec<T, 1>&, const Vec<T, 1>&,
                                  const Vec<T, 1>& ds_new, Vec<T, 1>& dg, Vec<T, 1>& ds) {
    const T z = saved[1], n = saved[2], dh = ds_new[0];
    dg = {{dh * (T(1) - z) * dtanh(n)}};
    ds = {{dh * z}};
  }
  // ds comes in as backward left it; dh is ds_new[0] again.
  template <class T>
  static FASTRNN_HD void backward_first(const Vec<T, 3>& saved, const Vec<T, 1>& s, const T& dmid,
                                        const T& dh, Vec<T, 2>& dg, Vec<T, 1>& ds, T& mid) {
    const T r = saved[0], z = saved[1], n = saved[2];
    dg = {{dmid * s[0] * dsigmoid(r), dh * (s[0] - n) * dsigmoid(z)}};
    ds[0] = ds[0] + dmid * r;
    mid = r * s[0];
  }
};

}  // namespace fastrnn
