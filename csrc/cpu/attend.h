// Attention of one query over one sequence's memory: scores, their softmax, the weighted sum of the values,
// and back.
#pragma once

#include <limits>

#include "../cells/math.h"
#include "attention.h"
#include "step.h"

namespace fastrnn::FASTRNN_ISA {

using cpu::Memory;

// e^x for x <= 0; the least results are some 1e-38 (1e-308), not 0.
template <class E>
FASTRNN_HD Simd<E> exp_(const Simd<E>& x) {
  Simd<E> p, power;
  exp_parts<E>(clamp(x, Limits<E>::kExpLow, E(0)), p, power);
  return power * p + power;
}

// f of all lanes, in halves: one after the other they would wait for each other.
template <int H, class E, class F>
FASTRNN_HD E over_lanes(const Simd<E>& x, F&& f) {
  const Simd<E> y = f(halves<H, false>(x, x), halves<H, true>(x, x));
  if constexpr (H > 1) return over_lanes<H / 2>(y, f);
  return y.v[0];
}

template <class E>
FASTRNN_HD E sum_of(const Simd<E>& x) {
  return over_lanes<Simd<E>::W / 2>(x, [](const Simd<E>& a, const Simd<E>& b) { return a + b; });
}

template <class E>
FASTRNN_HD int64_t vectors(int64_t n) {
  return (n + Simd<E>::W - 1) / Simd<E>::W;
}

// to[s] = row . rows[s], whole vectors of them.
template <class E, class Store>
FASTRNN_HD void dots(const E* row, const E* rows, int64_t ld, int64_t S, int64_t K, const Store& store) {
  using cpu::Weight;
  product<1>(0, 1, 0, vectors<E>(S), S, InRows<E>{row, 0}, Weight<E>{rows, Weight<E>::kRows, ld}, K,
             static_cast<const E*>(nullptr), 0, false, Reads<E>{}, store);
}

// to = the sum of factor[s] * rows[s], whole vectors of it.
template <class E>
FASTRNN_HD void weighted_sum(const E* factor, const E* rows, int64_t ld, int64_t S, int64_t width, E* to) {
  using cpu::Weight;
  product<1>(0, 1, 0, vectors<E>(width), width, InRows<E>{factor, 0},
             Weight<E>{rows, Weight<E>::kColumns, ld}, S, static_cast<const E*>(nullptr), 0, false,
             Reads<E>{},
             [to](int64_t, int64_t unit, int, const Vec<Simd<E>, 1>& v) { v[0].store(to + unit); });
}

// score[s] = v . tanh(query + keys[s]), a few s at a time: a tanh alone would wait for its own steps.
template <class E>
__attribute__((noinline)) void additive_scores(const Memory<E>& m, const E* query, E* score) {
  using S = Simd<E>;
  constexpr int kFew = 4;
  for (int64_t s0 = 0; s0 < m.S; s0 += kFew) {
    const int few = static_cast<int>(at_most(m.S - s0, kFew));
    const E* key[kFew];
    S sum[kFew];
    for (int j = 0; j < kFew; ++j) {
      key[j] = m.keys + (s0 + (j < few ? j : 0)) * m.ld_keys;
      sum[j] = S(0);
    }
    for (int64_t u = 0; u < m.K; u += S::W) {
      const S q = S::load(query + u), v = S::load(m.v + u);
#pragma GCC unroll 4
      for (int j = 0; j < kFew; ++j) sum[j] = sum[j] + v * tanh_(q + S::load(key[j] + u));
    }
    for (int j = 0; j < few; ++j) score[s0 + j] = m.scale * sum_of(sum[j]);
  }
}

// The largest of whole vectors of a row, and `least`; it may pass a NaN by. Several at once: a comparison
// would wait for the one before.
template <class E>
FASTRNN_HD E highest(const E* row, int64_t end, E least) {
  using S = Simd<E>;
  constexpr int kFew = 4;
  S high[kFew];
  for (S& h : high) h = S(least);
  const auto higher = [](const S& a, const S& b) { return select<E>(a.v > b.v, a, b); };
  int64_t s = 0;
  for (; s + kFew * S::W <= end; s += kFew * S::W) {
#pragma GCC unroll 4
    for (int j = 0; j < kFew; ++j) high[j] = higher(S::load(row + s + j * S::W), high[j]);
  }
  for (; s < end; s += S::W) high[0] = higher(S::load(row + s), high[0]);
  for (int j = 1; j < kFew; ++j) high[0] = higher(high[j], high[0]);
  return over_lanes<S::W / 2>(high[0], higher);
}

// row [S, whole vectors]: scores to weights. What the mask leaves out is 0, and so is all where it leaves
// nothing; without a mask, scores of -inf alone have no softmax: NaN.
template <class E>
FASTRNN_HD void softmax(const Memory<E>& m, E* row) {
  using S = Simd<E>;
  const E lowest = -std::numeric_limits<E>::infinity();
  const int64_t count = m.S;
  for (int64_t s = 0; s < count && m.mask; ++s) row[s] = m.mask[s] ? row[s] : lowest;
  const int64_t end = vectors<E>(count) * S::W;
  for (int64_t s = count; s < end; ++s) row[s] = lowest;
  const E top = highest(row, end, lowest);
  S sum(0);
  const S least(lowest), zero(0), most(top == lowest ? E(0) : top);
  for (int64_t s = 0; s < end; s += S::W) {
    const S e = S::load(row + s), w = select<E>(e.v == least.v, zero, exp_(e - most));
    w.store(row + s);
    sum = sum + w;
  }
  const E total = sum_of(sum);
  if (m.masked && total == E(0)) return;
  const S share(E(1) / total);
  for (int64_t s = 0; s < end; s += S::W) (S::load(row + s) * share).store(row + s);
}

// query, and mixed as a result, of whole vectors.
template <class E>
FASTRNN_HD void attend(const Memory<E>& m, const E* query, E* row, E* mixed) {
  if (m.v) {
    additive_scores(m, query, row);
  } else {
    dots(query, m.keys, m.ld_keys, m.S, m.K,
         [row, scale = Simd<E>(m.scale)](int64_t, int64_t s, int, const Vec<Simd<E>, 1>& score) {
           (score[0] * scale).store(row + s);
         });
  }
  softmax(m, row);
  weighted_sum(row, m.values, m.ld_values, m.S, m.V, mixed);
}

// The additive score's, of units [begin, end), whole vectors: dquery [K], and dkeys [S][ld_keys] and dv [K]
// added to; null where not needed. ds has the scale in it.
template <class E>
__attribute__((noinline)) void additive_backward(const Memory<E>& m, int64_t begin, int64_t end,
                                                 const E* query, const E* ds, E* dquery, E* dkeys, E* dv) {
  using S = Simd<E>;
  constexpr int kFew = 4;
  for (int64_t u0 = begin; u0 < end; u0 += kFew * S::W) {
    const int few = static_cast<int>(at_most((end - u0) / S::W, kFew));
    S q[kFew], v[kFew], dq[kFew], sum[kFew];
    for (int j = 0; j < few; ++j) {
      q[j] = S::load(query + u0 + j * S::W);
      v[j] = S::load(m.v + u0 + j * S::W);
      dq[j] = sum[j] = S(0);
    }
    for (int64_t s = 0; s < m.S; ++s) {
      if (ds[s] == E(0)) continue;
      const S d(ds[s]);
      const E* key = m.keys + s * m.ld_keys + u0;
      E* dkey = dkeys ? dkeys + s * m.ld_keys + u0 : nullptr;
#pragma GCC unroll 4
      for (int j = 0; j < kFew; ++j) {
        if (j >= few) break;
        const S th = tanh_(q[j] + S::load(key + j * S::W));
        const S g = d * v[j] * dtanh(th);
        dq[j] = dq[j] + g;
        sum[j] = sum[j] + d * th;
        if (dkey) (S::load(dkey + j * S::W) + g).store(dkey + j * S::W);
      }
    }
    for (int j = 0; j < few; ++j) {
      if (dquery) dq[j].store(dquery + u0 + j * S::W);
      if (dv) (S::load(dv + u0 + j * S::W) + sum[j]).store(dv + u0 + j * S::W);
    }
  }
}

// ds = scale * w * (dw - sum of w dw) with dw = dmixed . values (and dweights, where given); weights, ds and
// dmixed of whole vectors.
template <class E>
FASTRNN_HD void softmax_backward(const Memory<E>& m, const E* weights, const E* dmixed, const E* dweights,
                                 E* ds) {
  using S = Simd<E>;
  S all(0);
  dots(dmixed, m.values, m.ld_values, m.S, m.V,
       [&all, weights, dweights, ds](int64_t, int64_t s, int lanes, const Vec<S, 1>& v) {
         const S dw = dweights ? v[0] + S::load(dweights + s, lanes) : v[0];
         const S w = S::load(weights + s);
         // A weight of 0 takes part in nothing, whatever came for it.
         const S kept = select<E>(w.v == S(0).v, S(0), dw);
         kept.store(ds + s);
         all = all + w * kept;
       });
  const S delta(sum_of(all)), scale(m.scale);
  for (int64_t s = 0; s < m.S; s += S::W) {
    const S w = S::load(weights + s);
    select<E>(w.v == S(0).v, S(0), scale * w * (S::load(ds + s) - delta)).store(ds + s);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
