// The forward scan: state_t = cell(gx_t, R h_{t-1}, state_{t-1}), a chunk of steps at a time.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class E>
struct Forward {
  using S = Simd<E>;
  static constexpr int kLast = last_stage_gates<Cell>();
  static constexpr int kFirst = Cell::kGates - kLast;  // gates of the stage before, if there is one

  const Scan<E>& p;
  const Direction<E>& d;
  const Share& share;
  Step now, next;
  const E* h_in;
  E* h_out;
  E* gates;        // of the step's first row
  bool backwards;  // which way this step sweeps the weights

  template <int N>
  FASTRNN_HD void load_gx(int64_t i, int64_t unit, int lanes, int gate0, Vec<S, N>& gx) const {
    for (int g = 0; g < N; ++g) {
      gx[g] = S::load(gates + i * d.ld_gates + (gate0 + g) * p.H + unit, lanes) +
              S::load(d.bx + (gate0 + g) * d.ld_state + unit);
    }
  }

  template <int N>
  FASTRNN_HD void save(int64_t i, int64_t unit, int lanes, int column0, const Vec<S, N>& v) const {
    for (int k = 0; k < N; ++k) v[k].store(gates + i * d.ld_gates + (column0 + k) * p.H + unit, lanes);
  }

  FASTRNN_HD Reads<E> gx_of(int gate0, int count) const {
    return {gates + gate0 * p.H, d.ld_gates, p.H, count};
  }

  FASTRNN_HD void write_h(int64_t i, int64_t unit, int lanes, const S& h) const {
    const S stored = store(d.y, p.rows.at(now.first + i), unit, lanes, h);
    if_kept(kept(next, i), stored).store(h_out + i * d.ld_ring + unit);
  }

  // The first of two stages: mid, and gates that the second will read, kept in gx's place.
  FASTRNN_HD void first_stage(int64_t row0, int64_t row1) const {
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    product<kFirst>(row0, row1, block0, block1, p.H, h_in, d.ld_ring, d.w[0], p.H, d.bh, d.ld_state,
                    backwards, gx_of(0, kFirst),
                    [&](int64_t i, int64_t unit, int lanes, const Vec<S, kFirst>& gh) {
                      Vec<S, kFirst> gx, first;
                      Vec<S, Cell::kStates> s;
                      S mid;
                      load_gx(i, unit, lanes, 0, gx);
                      s[0] = S::load(h_in + i * d.ld_ring + unit);
                      Cell::forward_first(gx, gh, s, mid, first);
                      save(i, unit, lanes, 0, first);
                      mid.store(d.mid + i * d.ld_state + unit);
                    });
    end_phase(share);
  }

  FASTRNN_HD void last_stage(int64_t row0, int64_t row1) const {
    constexpr bool kTwo = Cell::kStages == 2;
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    const E* source = kTwo ? d.mid : h_in;
    const int64_t ld = kTwo ? d.ld_state : d.ld_ring, K = kTwo ? p.H : p.P;
    product<kLast>(row0, row1, block0, block1, p.H, source, ld, d.w[Cell::kStages - 1], K,
                   d.bh + kFirst * d.ld_state, d.ld_state, backwards, gx_of(kFirst, kLast),
                   [&](int64_t i, int64_t unit, int lanes, const Vec<S, kLast>& gh) {
                     Vec<S, kLast> gx;
                     Vec<S, Cell::kStates> s, s_new;
                     load_gx(i, unit, lanes, kFirst, gx);
                     // Under a projection h has another width; such cells do not read it elementwise.
                     s[0] = d.w_proj ? S(0) : S::load(h_in + i * d.ld_ring + unit);
                     for (int j = 1; j < Cell::kStates; ++j)
                       s[j] = S::load(d.state[j] + i * d.ld_state + unit);
                     if constexpr (kTwo) {
                       Vec<S, kFirst> first;
                       Vec<S, Cell::kSaved - kFirst> saved;
                       for (int k = 0; k < kFirst; ++k) {
                         first[k] = S::load(gates + i * d.ld_gates + k * p.H + unit, lanes);
                       }
                       Cell::forward(gx, gh, s, first, s_new, saved);
                       if (d.save) save(i, unit, lanes, kFirst, saved);
                     } else {
                       Vec<S, Cell::kSaved> saved;
                       Cell::forward(gx, gh, s, s_new, saved);
                       if (d.save) save(i, unit, lanes, 0, saved);
                     }
                     for (int j = 1; j < Cell::kStates; ++j) {
                       if (d.seq[j - 1])
                         s_new[j].store(d.seq[j - 1] + p.rows.at(now.first + i) * p.H + unit, lanes);
                       if_kept(kept(next, i), s_new[j]).store(d.state[j] + i * d.ld_state + unit);
                     }
                     if (d.w_proj) {
                       s_new[0].store(d.mid + i * d.ld_state + unit);
                       if (d.raw) s_new[0].store(d.raw + (now.first + i) * p.H + unit, lanes);
                     } else {
                       write_h(i, unit, lanes, s_new[0]);
                     }
                   });
    end_phase(share);
  }

  FASTRNN_HD void projection(int64_t row0, int64_t row1) const {
    int64_t block0, block1;
    my_blocks<E>(share, p.P, block0, block1);
    product<1>(
        row0, row1, block0, block1, p.P, d.mid, d.ld_state, d.w_proj, p.H, static_cast<const E*>(nullptr), 0,
        backwards, Reads<E>{},
        [&](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& h) { write_h(i, unit, lanes, h[0]); });
    end_phase(share);
  }

  static void run(const Scan<E>& p, const Share& share) {
    for (int which = share.dir0; which < share.dir1; ++which) {
      const Direction<E>& d = p.dir[which];
      const auto time = [&](int64_t k) { return d.reverse ? p.rows.T - 1 - k : k; };
      // The chunk's first row in memory is that of its earliest step.
      const int64_t chunk_first = p.rows.offset[d.reverse ? time(p.k1 - 1) : time(p.k0)];
      for (int64_t k = p.k0; k < p.k1; ++k) {
        const Step now = step_at(p, d, time(k)), next = step_at(p, d, time(k + 1));
        const Forward f{p,
                        d,
                        share,
                        now,
                        next,
                        d.ring[k & 1],
                        d.ring[(k + 1) & 1],
                        d.gates + (now.first - chunk_first) * d.ld_gates,
                        (k & 1) != 0};
        const int64_t row1 = at_most(share.row1, now.active);
        if constexpr (Cell::kStages == 2) f.first_stage(share.row0, row1);
        f.last_stage(share.row0, row1);
        if (d.w_proj) f.projection(share.row0, row1);
      }
    }
  }
};

}  // namespace fastrnn::FASTRNN_ISA
