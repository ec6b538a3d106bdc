// The TreeLSTMs (Tai, Socher & Manning 2015): one forget gate for each child. With gx = W x + b and gh the
// recurrent part of a gate:
//   f_k = sigmoid(gx_f + gh_fk)            fc = sum of f_k * c_k over the children
//   i, o = sigmoid(gx + gh)    g = tanh(gx + gh)
//   c = i * g + fc                         h = o * tanh(c)
#pragma once

#include "math.h"

namespace fastrnn {

struct TreeLstm {
  static constexpr int kGates = 4;  // of the input: i, f, g, o

  template <class T>
  static FASTRNN_HD T forget(const T& gx_f, const T& gh_f) {
    return sigmoid(gx_f + gh_f);
  }

  // Gates i, g, o.
  template <class T>
  static FASTRNN_HD void forward(const Vec<T, 3>& gx, const Vec<T, 3>& gh, const T& fc, T& h, T& c,
                                 Vec<T, 3>& saved) {
    const T i = sigmoid(gx[0] + gh[0]);
    const T g = tanh_(gx[1] + gh[1]);
    const T o = sigmoid(gx[2] + gh[2]);
    c = i * g + fc;
    h = o * tanh_(c);
    saved = {{i, g, o}};
  }

  // dc comes in as what reached c from above, and leaves as all of it: a child's c gets f_k * dc.
  template <class T>
  static FASTRNN_HD void backward(const Vec<T, 3>& saved, const T& c, const T& dh, T& dc, Vec<T, 3>& dg) {
    const T i = saved[0], g = saved[1], o = saved[2];
    const T tc = tanh_(c);
    dc = dc + dh * o * dtanh(tc);
    dg = {{dc * g * dsigmoid(i), dc * i * dtanh(g), dh * tc * dsigmoid(o)}};
  }

  template <class T>
  static FASTRNN_HD T backward_forget(const T& f, const T& c_k, const T& dc) {
    return dc * c_k * dsigmoid(f);
  }
};

}  // namespace fastrnn
