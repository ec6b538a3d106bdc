// Every registered cell as a step of one hidden unit with a scalar recurrence, gh = R * h, for finite
// differences in Python. Built by torch.utils.cpp_extension with ninja and pybind11; no part of the library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/cells/registry.h"

namespace {

using fastrnn::Vec;
using Row = std::vector<double>;

template <int N>
Vec<double, N> vec(const Row& row, int first = 0) {
  Vec<double, N> v;
  for (int i = 0; i < N; ++i) v[i] = row.at(first + i);
  return v;
}
template <int N>
Row row(const Vec<double, N>& v) {
  return Row(v.v, v.v + N);
}
template <int N>
Vec<double, N> times(const Vec<double, N>& R, double h) {
  Vec<double, N> gh;
  for (int i = 0; i < N; ++i) gh[i] = R[i] * h;
  return gh;
}
Row joined(Row a, const Row& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// (gx [G], s [S], R [G]) -> (s_new [S], saved)
template <class C>
std::tuple<Row, Row> forward(const Row& gx, const Row& s_row, const Row& R) {
  const auto s = vec<C::kStates>(s_row);
  Vec<double, C::kStates> s_new;
  if constexpr (C::kStages == 1) {
    Vec<double, C::kSaved> saved;
    C::forward(vec<C::kGates>(gx), times(vec<C::kGates>(R), s[0]), s, s_new, saved);
    return {row(s_new), row(saved)};
  } else {
    constexpr int A = C::kStageGates[0], B = C::kStageGates[1];
    double mid;
    Vec<double, A> first;
    Vec<double, B> second;
    C::forward_first(vec<A>(gx), times(vec<A>(R), s[0]), s, mid, first);
    C::forward(vec<B>(gx, A), times(vec<B>(R, A), mid), s, first, s_new, second);
    return {row(s_new), joined(row(first), row(second))};
  }
}

// -> (dgx [G], ds [S], dR [G])
template <class C>
std::tuple<Row, Row, Row> backward(const Row& saved_row, const Row& s_row, const Row& s_new,
                                   const Row& ds_new_row, const Row& R) {
  const auto saved = vec<C::kSaved>(saved_row);
  const auto s = vec<C::kStates>(s_row), ds_new = vec<C::kStates>(ds_new_row);
  Vec<double, C::kStates> ds;
  Row dgx, dR;
  const auto recurrent = [&](double dgh, double h, int gate) {
    dR.push_back(dgh * h);
    return dgh * R.at(gate);
  };
  if constexpr (C::kStages == 1) {
    Vec<double, C::kGrads> dg;
    C::backward(saved, s, vec<C::kStates>(s_new), ds_new, dg, ds);
    for (int k = 0; k < C::kGates; ++k) {
      dgx.push_back(dg[k]);
      ds[0] += recurrent(dg[C::kHiddenGrad[k]], s[0], k);
    }
  } else {
    constexpr int A = C::kStageGates[0], B = C::kStageGates[1];
    Vec<double, A> first;
    Vec<double, B> second;
    C::backward(saved, s, vec<C::kStates>(s_new), ds_new, second, ds);
    double dmid = 0, mid;
    for (int k = 0; k < B; ++k) dmid += second[k] * R.at(A + k);
    C::backward_first(saved, s, dmid, ds_new[0], first, ds, mid);
    for (int k = 0; k < A; ++k) ds[0] += recurrent(first[k], s[0], k);
    for (int k = 0; k < B; ++k) recurrent(second[k], mid, A + k);
    dgx = joined(row(first), row(second));
  }
  return {dgx, row(ds), dR};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::dict cells;
#define ADD(C)                                                                   \
  cells[C::kName] = pybind11::make_tuple(                                        \
      int{C::kGates}, int{C::kStates}, int{C::kSaved}, bool{C::kSavesH},         \
      pybind11::cpp_function(&forward<C>), pybind11::cpp_function(&backward<C>), \
      Row(C::kHiddenGrad, C::kHiddenGrad + C::kGates), bool{C::kReadsH}, C::kStages == 2);
  FASTRNN_CELLS(ADD)
#undef ADD
  m.attr("cells") = cells;
}
