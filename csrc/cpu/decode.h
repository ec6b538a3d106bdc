// The decoder's scans. A step, with everything that it cannot have before:
//   h = cell(W x_t + W_feed a_{t-1}, h), and the layers above it on what they get from below
//   weights = softmax(scores of h, or W_query h, against the keys)
//   a_t = tanh(sum of weights * values + W_h h)
// Members share out the rows of the batch, or the units of every product and, for the attention, the rows:
// then they meet wherever one reads what others have made.
#pragma once

#include "attend.h"

namespace fastrnn::FASTRNN_ISA {

// A member's part of the scans.
template <class E>
struct Decode {
  using S = Simd<E>;
  const cpu::Decoder<E>& p;
  const Share& share;
  const Direction<E>& top;  // the layer whose h attends
  int64_t T, H;
  int64_t block0, block1;  // own blocks of H units
  int64_t row0, row1;      // own rows for the attention

  Decode(const cpu::Decoder<E>& decoder, const Share& s)
      : p(decoder), share(s), top(p.scan[p.layers - 1].dir[0]), T(p.scan->rows.T), H(p.scan->H) {
    my_blocks<E>(s, H, block0, block1);
    const int64_t rows = s.row1 - s.row0;
    row0 = s.row0 + rows * s.part / s.parts;
    row1 = s.row0 + rows * (s.part + 1) / s.parts;
  }

  // Rows [from, to) of a times w, for own units among `width`.
  template <class A, class Epilogue>
  FASTRNN_HD void units(int64_t from, int64_t to, int64_t width, const A& a, const cpu::Weight<E>& w,
                        int64_t K, int64_t t, const Epilogue& epilogue) const {
    int64_t b0, b1;
    my_blocks<E>(share, width, b0, b1);
    product<1>(from, to, b0, b1, width, a, w, K, static_cast<const E*>(nullptr), 0, (t & 1) != 0, Reads<E>{},
               epilogue);
  }

  // f(row, unit, lanes) for own units of rows of the batch.
  template <class F>
  FASTRNN_HD void own(F&& f) const {
    for (int64_t i = share.row0; i < share.row1; ++i) {
      for (int64_t unit = block0 * S::W; unit < block1 * S::W; unit += S::W) {
        f(i, unit, static_cast<int>(at_most(H - unit, S::W)));
      }
    }
  }

  // --- forward

  void drop(int k, int64_t t) const {
    const E *y = static_cast<const E*>(p.scan[k].dir[0].y.data), *drop = p.drops[k];
    own([&](int64_t i, int64_t unit, int lanes) {
      const int64_t at = (t * p.B + i) * H + unit;
      (S::load(y + at, lanes) * S::load(drop + at, lanes)).store(p.dropped[k] + at, lanes);
    });
  }

  void attention(int64_t t) const {
    const E *h = top.ring[(t + 1) & 1], *query = h;
    int64_t ld = top.ld_ring;
    if (p.w_query) {
      query = p.query;
      ld = p.ld_query;
      units(share.row0, share.row1, p.K, InRows<E>{h, top.ld_ring}, p.w_query, H, t,
            [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v) {
              v[0].store(p.query + i * p.ld_query + unit);
              if (p.queries) v[0].store(p.queries + (t * p.B + i) * p.K + unit, lanes);
            });
      end_phase(share);
    }
    for (int64_t i = row0; i < row1; ++i) {
      const Memory<E>& m = p.memory[i];
      E *row = p.row + i * p.ld_row, *weights = p.weights + (i * T + t) * p.S;
      attend(m, query + i * ld, row, p.mixed + i * p.ld_feed);
      if (m.S > 0) std::memcpy(weights, row, m.S * sizeof(E));
      for (int64_t s = m.S; s < p.S; ++s) weights[s] = 0;
    }
    end_phase(share);
  }

  void output(int64_t t) const {
    units(share.row0, share.row1, H, InRows<E>{top.ring[(t + 1) & 1], top.ld_ring}, p.w_h, H, t,
          [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v) {
            const S a = tanh_(v[0] + S::load(p.mixed + i * p.ld_feed + unit));
            a.store(p.feed[(t + 1) & 1] + i * p.ld_feed + unit);
            a.store(p.out + (t * p.B + i) * H + unit, lanes);
          });
    end_phase(share);
  }

  // --- backward

  // Where the vector at `unit` of step t's row i lies in panels by sequence.
  FASTRNN_HD E* in_panels(E* panels, int64_t t, int64_t i, int64_t unit) const {
    return panels + unit * p.panel + (i * T + t) * S::W;
  }

  // dz of step t, given the gradient of a_t that came from the step after it.
  FASTRNN_HD void begin(int64_t t, int64_t i, int64_t unit, int lanes, S da) const {
    const int64_t at = (t * p.B + i) * H + unit;
    if (p.dout) da = da + S::load(p.dout + at, lanes);
    const S dz = da * dtanh(S::load(p.out + at, lanes));
    dz.store(p.dz[t & 1] + i * p.ld_feed + unit);
    if (p.dz_panels) dz.store(in_panels(p.dz_panels, t, i, unit));
  }

  void begin() const {
    own([&](int64_t i, int64_t unit, int lanes) { begin(T - 1, i, unit, lanes, S(0)); });
    end_phase(share);
  }

  // Whole vectors of a row, into one sequence's own panels.
  FASTRNN_HD void keep(const E* row, int64_t count, E* panels, int64_t t) const {
    for (int64_t s = 0; s < count; s += S::W)
      S::load(row + s).store(panels + s * p.sequence_panel + t * S::W);
  }

  FASTRNN_HD E* dh(int64_t row, int64_t unit) const {
    return static_cast<E*>(top.dy.data) + row * top.dy.ld + unit;
  }

  // Own rows of the batch: through the weights to the scores, and to the query: dh, or dquery.
  void attention_backward(int64_t t) const {
    for (int64_t i = row0; i < row1; ++i) {
      const Memory<E>& m = p.memory[i];
      const int64_t whole = vectors<E>(m.S) * S::W, at = (i * T + t) * p.S;
      E *weights = p.row + i * p.ld_row, *ds = weights + p.ld_row / 2;
      for (int64_t s = 0; s < whole; ++s) weights[s] = s < m.S ? p.weights[at + s] : E(0);
      softmax_backward(m, weights, p.dz[t & 1] + i * p.ld_feed, p.dweights ? p.dweights + at : nullptr, ds);
      const int64_t panels = i * vectors<E>(p.S) * S::W * p.sequence_panel;
      if (p.weights_panels) keep(weights, whole, p.weights_panels + panels, t);
      if (m.v) {
        E *dquery = p.dquery + i * p.ld_query, *query = p.query + i * p.ld_query;
        std::memcpy(query, p.queries + (t * p.B + i) * p.K, p.K * sizeof(E));
        additive_backward(m, 0, vectors<E>(m.K) * S::W, query, ds, dquery,
                          p.dkeys ? p.dkeys + i * p.S * p.ld_query : nullptr,
                          p.dv ? p.dv + i * p.ld_query : nullptr);
        for (int64_t u = 0; u < m.K && p.dquery_panels; u += S::W) {
          S::load(dquery + u).store(in_panels(p.dquery_panels, t, i, u));
        }
      } else {
        if (p.ds_panels) keep(ds, whole, p.ds_panels + panels, t);
        weighted_sum(ds, m.keys, m.ld_keys, m.S, m.K, dh(t * p.B + i, 0));
      }
    }
    end_phase(share);
    units(share.row0, share.row1, H, InRows<E>{p.dz[t & 1], p.ld_feed}, p.w_h_t, H, t,
          [=, *this](int64_t i, int64_t unit, int, const Vec<S, 1>& v) {
            E* to = dh(t * p.B + i, unit);
            (p.w_query_t ? v[0] : S::load(to) + v[0]).store(to);
          });
    if (!p.w_query_t) return;
    units(share.row0, share.row1, H, InRows<E>{p.dquery, p.ld_query}, p.w_query_t, p.K, t,
          [=, *this](int64_t i, int64_t unit, int, const Vec<S, 1>& v) {
            E* to = dh(t * p.B + i, unit);
            (S::load(to) + v[0]).store(to);
          });
  }

  // From layer l's gates to what entered it: the layer below, or the a before.
  void below(int l, int64_t t, int gates) const {
    const int64_t first = t * p.B, from = first + share.row0, to = first + share.row1;
    const InPanels<E> dg{p.scan[l].dir[0].dg, p.scan[l].panel_rows * S::W, H};
    if (l > 0) {
      const Border<E>& dy = p.scan[l - 1].dir[0].dy;
      const E* drop = p.drops ? p.drops[l - 1] : nullptr;
      units(from, to, H, dg, p.w_below_t[l], gates * H, t,
            [=, *this](int64_t r, int64_t unit, int lanes, const Vec<S, 1>& v) {
              (drop ? v[0] * S::load(drop + r * H + unit, lanes) : v[0])
                  .store(static_cast<E*>(dy.data) + r * dy.ld + unit);
            });
      return;
    }
    units(from, to, H, dg, p.w_feed_t, gates * H, t,
          [=, *this](int64_t r, int64_t unit, int lanes, const Vec<S, 1>& v) {
            if (t > 0) return begin(t - 1, r - first, unit, lanes, v[0]);
            v[0].store(p.dfeed + (r - first) * p.ld_feed + unit);
          });
    end_phase(share);
  }

  // --- the scans, whose cells are the layers' own kernels

  static void run(const cpu::Decoder<E>& p, const Share& share) {
    const Decode f(p, share);
    for (int64_t t0 = 0; t0 < f.T; t0 += p.scan->steps) {
      const int64_t t1 = at_most(t0 + p.scan->steps, f.T);
      for (int64_t t = t0; t < t1; ++t) {
        const cpu::Feed<E> feed{p.w_feed, p.feed[t & 1], p.ld_feed};
        for (int k = 0; k < p.layers; ++k) {
          k ? p.cell->step(p.scan[k], share, t, t, t + 1, nullptr)
            : p.cell->step(p.scan[k], share, t, t0, t1, &feed);
          if (p.drops && k + 1 < p.layers) f.drop(k, t);
          end_phase(share);
        }
        f.attention(t);
        f.output(t);
      }
    }
  }

  static void run_backward(const cpu::Decoder<E>& p, const Share& share) {
    const Decode f(p, share);
    f.begin();
    for (int64_t t = f.T - 1; t >= 0; --t) {
      f.attention_backward(t);
      for (int l = p.layers - 1; l >= 0; --l) {
        p.cell->step_backward(p.scan[l], share, f.T - 1 - t);
        f.below(l, t, p.cell->gates);
      }
    }
    for (int l = 0; l < p.layers; ++l) p.cell->finish(p.scan[l], share);
  }
};

}  // namespace fastrnn::FASTRNN_ISA
