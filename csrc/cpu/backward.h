// The backward scan (backpropagation through time), a chunk of steps at a time, in the reverse of the forward
// order. It makes the gradients of the gates and of the first states; what is one big product is left to
// after the chunk.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class E, class A = E>
struct Backward {
  using S = Simd<E>;
  static constexpr int kLast = last_stage_gates<Cell>();
  static constexpr int kFirst = Cell::kGates - kLast;
  static constexpr int kRecurrent = Cell::kStageGates[0];  // gates that read h itself

  const Scan<E, A>& p;
  const Direction<E, A>& d;
  const Share& share;
  Step now, next, before;  // in the forward order of the scan
  const A* dgh_in;
  A* dgh_out;
  int64_t k, chunk_first;

  // Where the vector of units at `unit`, of the chunk's row i, lies in panels.
  FASTRNN_HD int64_t in_panels(int64_t i, int64_t unit) const {
    constexpr int64_t W = kPanel<E, A>;
    return unit / W * W * p.panel_rows + (now.first - chunk_first + i) * W + unit % W;
  }

  // dh before the cell (before the projection, where there is one): from step `next`, from y.
  FASTRNN_HD S arriving(int64_t i, int64_t unit, int lanes, const S& product_) const {
    S dh = if_kept(kept(next, i), product_ + S::load(d.state[0] + i * d.ld_state + unit));
    if (d.dy.data) dh = dh + load(d.dy, p.rows.at(now.first + i) - d.dy_first, unit, lanes);
    return dh;
  }

  // The states that entered the step, and those that left it.
  FASTRNN_HD void load_states(int64_t i, int64_t unit, int lanes, Vec<S, Cell::kStates>& s,
                              Vec<S, Cell::kStates>& s_new) const {
    s[0] = d.w_proj ? S(0) : load_row(d.h_prev + in_panels(i, unit));
    s_new[0] = S(0);
    for (int j = 1; j < Cell::kStates; ++j) {
      const E* from =
          i < before.active ? d.seq[j - 1] + p.rows.at(before.first + i) * p.H : d.s0[j - 1] + i * d.ld_state;
      s[j] = if_kept(kept(now, i), S::load(from + unit, lanes));
      s_new[j] = S::load(d.seq[j - 1] + p.rows.at(now.first + i) * p.H + unit, lanes);
    }
  }

  FASTRNN_HD void load_saved(int64_t i, int64_t unit, int lanes, Vec<S, Cell::kSaved>& saved) const {
    if constexpr (Cell::kSavesH) {
      saved[0] = load(d.y, p.rows.at(now.first + i), unit, lanes);
      return;
    }
    const E* from = d.saved + (now.first + i) * Cell::kSaved * p.H + unit;
    for (int j = 0; j < Cell::kSaved; ++j) saved[j] = S::load(from + j * p.H, lanes);
  }

  FASTRNN_HD void store_dg(int64_t i, int64_t unit, int lanes, int column, const S& v) const {
    store_row(v, d.dg + in_panels(i, column * round_up(p.H, kPanel<E, A>) + unit), lanes);
  }

  // Gate g's recurrent gradient, for the product of the step before; kept aside where this is a row's last.
  FASTRNN_HD void store_dgh(int64_t i, int64_t unit, int lanes, int g, const S& v) const {
    store_part(v, dgh_out + i * d.ld_ring + g * p.H + unit, lanes);
    if (i >= before.active) store_part(v, d.last_ring + i * d.ld_ring + g * p.H + unit, lanes);
  }

  // The cell's (last stage's) backward for one vector of units, given its dh.
  FASTRNN_HD void cell(int64_t i, int64_t unit, int lanes, const S& dh) const {
    Vec<S, Cell::kSaved> saved;
    Vec<S, Cell::kStates> s, s_new, ds_new, ds;
    load_saved(i, unit, lanes, saved);
    load_states(i, unit, lanes, s, s_new);
    ds_new[0] = dh;
    for (int j = 1; j < Cell::kStates; ++j) {
      ds_new[j] = if_kept(kept(next, i), S::load(d.state[j] + i * d.ld_state + unit));
      if (d.dseq[j - 1])
        ds_new[j] = ds_new[j] + S::load(d.dseq[j - 1] + p.rows.at(now.first + i) * p.H + unit, lanes);
    }
    if constexpr (Cell::kStages == 2) {
      Vec<S, kLast> dg;
      Cell::backward(saved, s, s_new, ds_new, dg, ds);
      for (int g = 0; g < kLast; ++g) {
        store_dg(i, unit, lanes, kFirst + g, dg[g]);
        store_part(dg[g], d.mid + i * d.ld_mid + g * p.H + unit, lanes);
      }
      dh.store(d.dh + i * d.ld_state + unit, lanes);
    } else {
      Vec<S, Cell::kGrads> dg;
      Cell::backward(saved, s, s_new, ds_new, dg, ds);
      for (int g = 0; g < Cell::kGrads; ++g) store_dg(i, unit, lanes, g, dg[g]);
      for (int g = 0; g < Cell::kGates; ++g) store_dgh(i, unit, lanes, g, dg[Cell::kHiddenGrad[g]]);
    }
    // Under a projection state[0] has h's width, and such cells pass nothing on elementwise.
    if (!d.w_proj) ds[0].store(d.state[0] + i * d.ld_state + unit);
    for (int j = 1; j < Cell::kStates; ++j) ds[j].store(d.state[j] + i * d.ld_state + unit);
  }

  // The first of two stages, given dmid = R_n^T dn.
  FASTRNN_HD void first_stage(int64_t i, int64_t unit, int lanes, const S& dmid) const {
    Vec<S, Cell::kSaved> saved;
    Vec<S, Cell::kStates> s, s_new, ds;
    Vec<S, kFirst> dg;
    S mid;
    load_saved(i, unit, lanes, saved);
    load_states(i, unit, lanes, s, s_new);
    ds[0] = S::load(d.state[0] + i * d.ld_state + unit);
    Cell::backward_first(saved, s, dmid, S::load(d.dh + i * d.ld_state + unit), dg, ds, mid);
    for (int g = 0; g < kFirst; ++g) {
      store_dg(i, unit, lanes, g, dg[g]);
      store_dgh(i, unit, lanes, g, dg[g]);
    }
    ds[0].store(d.state[0] + i * d.ld_state + unit);
    store_row(mid, d.mid_out + in_panels(i, unit), lanes);
  }

  // What the forward pass left in memory for the cell: its saved values, the states that entered the step
  // (those that left it were that of the step before this one), dy.
  FASTRNN_HD Streams<E> far() const {
    Streams<E> s{};
    const bool in_order = !p.rows.outside;
    const auto rows_of = [&](const cpu::Border<E>& b, int64_t first) {
      return Reads<E>{static_cast<const E*>(b.data) + first * b.ld, b.ld, 0, 1};
    };
    if (!Cell::kSavesH) {
      s.of[0] = {d.saved + now.first * Cell::kSaved * p.H, Cell::kSaved * p.H, p.H, Cell::kSaved};
    } else if (in_order && !d.y.bf16) {
      s.of[0] = rows_of(d.y, now.first);
    }
    if (Cell::kStates > 1 && in_order && before.active > 0) {
      s.of[1] = {d.seq[0] + before.first * p.H, p.H, 0, 1};
    }
    if (d.dy.data && in_order && !d.dy.bf16) s.of[2] = rows_of(d.dy, now.first - d.dy_first);
    return s;
  }

  template <class Fetches, class Epilogue>
  FASTRNN_HD void phase(int64_t row1, int64_t units, const A* a, int64_t lda, const cpu::Weight<A>& w,
                        int64_t K, const Fetches& reads, const Epilogue& epilogue) const {
    int64_t block0, block1;
    my_blocks<E>(share, units, block0, block1);
    fetch_rows(share, share.row0, row1, a, lda, K);
    product<1>(share.row0, row1, block0, block1, units, InRows<A>{a, lda}, w, K,
               static_cast<const E*>(nullptr), 0, (k & 1) != 0, reads, epilogue);
    end_phase(share);
  }

  FASTRNN_HD void step(int64_t row1) const {
    // At the very first step nothing arrives from a later one.
    const int64_t K = k == 0 ? 0 : kRecurrent * p.H;
    if (d.w_proj) {
      phase(row1, p.P, dgh_in, d.ld_ring, d.w[0], K, Reads<E>{},
            [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v)
                __attribute__((always_inline)) {
                  const S dh = arriving(i, unit, lanes, v[0]);
                  store_row(dh, d.mid + i * d.ld_mid + unit, lanes);
                  store_row(dh, d.dh_out + in_panels(i, unit), lanes);
                  S(0).store(d.state[0] + i * d.ld_state + unit);
                });
      phase(row1, p.H, d.mid, d.ld_mid, d.w_proj, p.P, far(),
            [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v)
                __attribute__((always_inline)) { cell(i, unit, lanes, v[0]); });
    } else {
      phase(row1, p.H, dgh_in, d.ld_ring, d.w[0], K, far(),
            [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v)
                __attribute__((always_inline)) { cell(i, unit, lanes, arriving(i, unit, lanes, v[0])); });
    }
    if constexpr (Cell::kStages == 2) {
      phase(row1, p.H, d.mid, d.ld_mid, d.w[1], kLast * p.H, Reads<E>{},
            [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v)
                __attribute__((always_inline)) { first_stage(i, unit, lanes, v[0]); });
    }
  }

  static int64_t time(const Scan<E, A>& p, const Direction<E, A>& d, int64_t k) {
    return d.reverse ? k : p.rows.T - 1 - k;
  }

  static void step(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, int64_t k,
                   int64_t chunk_first) {
    const int64_t forward = d.reverse ? -1 : 1;  // the forward scan's next step in time
    const int64_t t = time(p, d, k);
    const Backward b{p,
                     d,
                     share,
                     step_at(p, d, t),
                     step_at(p, d, t + forward),
                     step_at(p, d, t - forward),
                     d.ring[k & 1],
                     d.ring[(k + 1) & 1],
                     k,
                     chunk_first};
    b.step(at_most(share.row1, b.now.active));
  }

  static void run(const Scan<E, A>& p, const Share& share) {
    for (int which = share.dir0; which < share.dir1; ++which) {
      const Direction<E, A>& d = p.dir[which];
      const int64_t chunk_first = p.rows.offset[time(p, d, d.reverse ? p.k0 : p.k1 - 1)];
      for (int64_t k = p.k0; k < p.k1; ++k) step(p, d, share, k, chunk_first);
    }
  }

  // Step k of a decoder's layer; all of them are one chunk.
  static void step_alone(const Scan<E, A>& p, const Share& share, int64_t k) {
    step(p, p.dir[0], share, k, 0);
  }

  // ds of the first state, in state[0] (and the other states, cut where the first step is reset).
  static void finish(const Scan<E, A>& p, const Share& share) {
    for (int which = share.dir0; which < share.dir1; ++which) {
      const Direction<E, A>& d = p.dir[which];
      // In reverse no reset cuts a first state: the boundary before a sequence's last step is past its end.
      const Step first = d.reverse ? Step{0, 0, 0, nullptr} : step_at(p, d, int64_t{0});
      const Backward b{p, d, share, first, first, first, nullptr, nullptr, 0, 0};
      b.phase(share.row1, p.P, d.last_ring, d.ld_ring, d.w[0], kRecurrent * p.H, Reads<E>{},
              [&](int64_t i, int64_t unit, int, const Vec<S, 1>& v) {
                E* ds = d.state[0] + i * d.ld_state + unit;
                if_kept(kept(first, i), v[0] + S::load(ds)).store(ds);
              });
      if (share.part != 0) continue;
      for (int64_t i = share.row0; i < share.row1; ++i) {
        for (int j = 1; j < Cell::kStates && !kept(first, i); ++j) {
          for (int64_t u = 0; u < p.H; ++u) d.state[j][i * d.ld_state + u] = 0;
        }
      }
    }
  }
};

}  // namespace fastrnn::FASTRNN_ISA
