// The forward scan: state_t = cell(gx_t, R h_{t-1}, state_{t-1}), with gx = W x + b of a chunk of steps at a
// time: many rows share the sweep over W, and a chunk's gx is still in cache when its steps read it. In a
// joint scan W x and R h are one product's sums, a step at a time.
#pragma once

#include "step.h"

namespace fastrnn::FASTRNN_ISA {

// The rows that a product takes: those given, or, where w is of int8, the same quantized.
template <class E>
FASTRNN_HD InRows<E> operand(const Share& share, const cpu::Weight<E>& w, int64_t row0, int64_t row1,
                             const E* rows, int64_t ld, int64_t K, int64_t longest = kLongest<E>) {
  if constexpr (sizeof(E) == sizeof(float)) {
    if (w.layout == cpu::Weight<E>::kInt8) {
      const int64_t to = cpu::int8_row(K);
      for (int64_t r = row0; r < row1; ++r) w.int8->quantize(rows + r * ld, K, share.quantized + r * to);
      return {share.quantized, to};
    }
  }
  return {rows, ld, longest};
}

template <class Cell, class E, class A = E>
struct Forward {
  using S = Simd<E>;
  static constexpr int kLast = last_stage_gates<Cell>();
  static constexpr int kFirst = Cell::kGates - kLast;  // gates of the stage before, if there is one
  static constexpr bool kTwo = Cell::kStages == 2, kJoins = Cell::kSums && !kTwo;
  // Of a step's sums: an Elman network's h has their error whole, where other cells' gates dampen it. (The
  // one gate of a second stage could do without, and gains as little by it as it loses. Products of bfloat16
  // cut k in their own way, see pairs.h and amx.h.)
  static constexpr int64_t kPiece = kLast == 1 ? kShortSum<A> : kLongest<A>;

  // Rows of gx: for each gate whole vectors of units.
  struct Gates {
    E* data;           // where row 0 and unit 0 would be
    int64_t ld, gate;  // from a row to the next, and from a gate
    FASTRNN_HD E* at(int64_t row, int64_t column, int64_t unit) const {
      return data + row * ld + column * gate + unit;
    }
  };

  const Scan<E, A>& p;
  const Direction<E, A>& d;
  const Share& share;
  Step now, next;
  const A* h_in;
  A* h_out;
  const Gates& gx;  // of the step's rows
  const A* x_in;    // the step's rows of x, where the scan is joint
  bool backwards;   // which way this step sweeps the weights

  template <int N>
  FASTRNN_HD void load_gx(int64_t i, int64_t unit, int gate0, Vec<S, N>& v) const {
    for (int g = 0; g < N; ++g) v[g] = S::load(gx.at(i, gate0 + g, unit));
  }

  template <int N>
  FASTRNN_HD void store_gx(int64_t i, int64_t unit, int gate0, const Vec<S, N>& v) const {
    for (int g = 0; g < N; ++g) v[g].store(gx.at(i, gate0 + g, unit));
  }

  // For the backward pass, before which nobody reads it.
  FASTRNN_HD void save(int64_t i, int64_t unit, int lanes, const Vec<S, Cell::kSaved>& saved,
                       const Vec<S, Cell::kStates>& s) const {
    const auto seq = [&](int j) { return d.seq[j - 1] + p.rows.at(now.first + i) * p.H + unit; };
    if (d.save) {
      E* const to = d.save + (now.first + i) * Cell::kSaved * p.H + unit;
      if (d.stream) {  // past the caches
        for (int k = 0; k < Cell::kSaved; ++k) saved[k].stream(to + k * p.H);
        for (int j = 1; j < Cell::kStates; ++j) s[j].stream(seq(j));
        return;
      }
      for (int k = 0; k < Cell::kSaved; ++k) saved[k].store(to + k * p.H, lanes);
    }
    for (int j = 1; j < Cell::kStates; ++j) {
      if (d.seq[j - 1]) s[j].store(seq(j), lanes);
    }
  }

  FASTRNN_HD Reads<E> reads_of(int gate0, int count) const {
    return {gx.at(0, gate0, 0), gx.ld, gx.gate, count};
  }

  FASTRNN_HD void write_h(int64_t i, int64_t unit, int lanes, const S& h) const {
    const S stored = store(d.y, p.rows.at(now.first + i), unit, lanes, h);
    store_row(if_kept(kept(next, i), stored), h_out + i * d.ld_ring + unit, lanes);
  }

  // The first of two stages: mid, and gates that the second will read, in the place of their gx.
  FASTRNN_HD void first_stage(int64_t row0, int64_t row1) const {
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    fetch_rows(share, row0, row1, h_in, d.ld_ring, p.H);
    product<kFirst>(row0, row1, block0, block1, p.H, operand(share, d.w[0], row0, row1, h_in, d.ld_ring, p.H),
                    d.w[0], p.H, d.bh, d.ld_b, backwards, reads_of(0, kFirst),
                    [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, kFirst>& gh) {
                      Vec<S, kFirst> v, first;
                      Vec<S, Cell::kStates> s;
                      S mid;
                      load_gx(i, unit, 0, v);
                      s[0] = load_row(h_in + i * d.ld_ring + unit);
                      Cell::forward_first(v, gh, s, mid, first);
                      store_gx(i, unit, 0, first);
                      store_row(mid, d.mid + i * d.ld_mid + unit, lanes);
                    });
    end_phase(share);
  }

  FASTRNN_HD void last_stage(int64_t row0, int64_t row1, int64_t block0, int64_t block1) const {
    const int64_t K = kTwo ? p.H : p.P;
    const cpu::Weight<A>& w = d.w[Cell::kStages - 1];
    const A* const rows = kTwo ? d.mid : h_in;
    const int64_t ld = kTwo ? d.ld_mid : d.ld_ring;
    if (kTwo || p.rows.T > 1) fetch_rows(share, row0, row1, rows, ld, K);
    const auto source = operand(share, w, row0, row1, rows, ld, K, kPiece);
    new_states<false>(row0, row1, block0, block1, source, w, K, d.bh + kFirst * d.ld_b,
                      reads_of(kFirst, kLast));
  }

  FASTRNN_HD void joint_stage(int64_t row0, int64_t row1, int64_t block0, int64_t block1) const {
    const int64_t P = round_up(p.P, cpu::kDepth<A>);
    fetch_rows(share, row0, row1, h_in, d.ld_ring, P);
    const InBoth<A> source{{h_in, d.ld_ring, kPiece}, {x_in, d.x_rows ? d.ld_x : p.I}, P};
    new_states<true>(row0, row1, block0, block1, source, d.w[0], P + p.I, d.b, Reads<E>{});
  }

  // The last product of a step, or where kJoint its only one, and the cell.
  template <bool kJoint, class Source>
  FASTRNN_HD void new_states(int64_t row0, int64_t row1, int64_t block0, int64_t block1, const Source& source,
                             const cpu::Weight<A>& w, int64_t K, const E* bias, const Reads<E>& reads) const {
    product<kLast>(row0, row1, block0, block1, p.H, source, w, K, bias, d.ld_b, backwards, reads,
                   [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, kLast>& gh) {
                     Vec<S, kLast> v;
                     Vec<S, Cell::kStates> s, s_new;
                     Vec<S, Cell::kSaved> saved;
                     if constexpr (kJoint) {
                       for (int g = 0; g < kLast; ++g) v[g] = S(0);
                     } else {
                       load_gx(i, unit, kFirst, v);
                     }
                     // Under a projection h has another width; such cells do not read it elementwise.
                     s[0] = d.w_proj ? S(0) : load_row(h_in + i * d.ld_ring + unit);
                     for (int j = 1; j < Cell::kStates; ++j)
                       s[j] = S::load(d.state[j] + i * d.ld_state + unit);
                     if constexpr (kTwo) {
                       Vec<S, kFirst> first;
                       Vec<S, Cell::kSaved - kFirst> last;
                       load_gx(i, unit, 0, first);
                       Cell::forward(v, gh, s, first, s_new, last);
                       for (int k = 0; k < kFirst; ++k) saved[k] = first[k];
                       for (int k = kFirst; k < Cell::kSaved; ++k) saved[k] = last[k - kFirst];
                     } else {
                       Cell::forward(v, gh, s, s_new, saved);
                     }
                     save(i, unit, lanes, saved, s_new);
                     for (int j = 1; j < Cell::kStates; ++j) {
                       if_kept(kept(next, i), s_new[j]).store(d.state[j] + i * d.ld_state + unit);
                     }
                     if (d.w_proj) {
                       store_row(s_new[0], d.mid + i * d.ld_mid + unit, lanes);
                       if (d.raw) s_new[0].store(d.raw + (now.first + i) * p.H + unit, lanes);
                     } else {
                       write_h(i, unit, lanes, s_new[0]);
                     }
                   });
  }

  FASTRNN_HD void projection(int64_t row0, int64_t row1) const {
    int64_t block0, block1;
    my_blocks<E>(share, p.P, block0, block1);
    fetch_rows(share, row0, row1, d.mid, d.ld_mid, p.H);
    product<1>(row0, row1, block0, block1, p.P,
               operand(share, d.w_proj, row0, row1, d.mid, d.ld_mid, p.H, kShortSum<A>), d.w_proj, p.H,
               static_cast<const E*>(nullptr), 0, backwards, Reads<E>{},
               [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& h) {
                 write_h(i, unit, lanes, h[0]);
               });
    end_phase(share);
  }

  // The steps [t0, t1) of a chunk.
  struct Chunk {
    int64_t t0, t1;
  };

  static bool whole_batch(const Scan<E, A>& p, const Share& share) {
    return share.row0 == 0 && share.row1 == p.rows.B;
  }

  // Where row 0 of a step would be among those that the member's part of the batch has in the chunk.
  static int64_t slot(const Scan<E, A>& p, const Share& share, const Chunk& c, int64_t t) {
    if (whole_batch(p, share)) return p.rows.offset[t] - p.rows.offset[c.t0];
    return (t - c.t0) * (share.row1 - share.row0) - share.row0;
  }

  // gx of step t's rows. Each member has a part of the chunk's memory for itself: parts of every row would be
  // neighbours, and each core's prefetching take lines from the other that it is about to write.
  static Gates gx_of(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, const Chunk& c,
                     int64_t t) {
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    constexpr int64_t G = Cell::kGates;
    // No power of two, where what pads a row of ld_state for each gate has room for it.
    const int64_t pad = share.parts <= G ? S::W : 0;
    const int64_t unit0 = block0 * S::W, gate = block1 * S::W - unit0, ld = G * gate + pad;
    const int64_t before =
        share.row0 * G * d.ld_state + (share.row1 - share.row0) * (G * unit0 + share.part * pad);
    return {d.gx + p.steps * before + slot(p, share, c, t) * ld - unit0, ld, gate};
  }

  static A* x_rows_of(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, const Chunk& c,
                      int64_t t) {
    return d.x_rows + (p.steps * share.row0 + slot(p, share, c, t)) * d.ld_x;
  }

  // The chunk's rows of x, each by one of those that will read it.
  static void gather_x(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, const Chunk& c) {
    for (int64_t t = c.t0 + share.part; t < c.t1; t += share.parts) {
      const int64_t row1 = at_most(share.row1, p.rows.active[t]);
      for (int64_t i = share.row0; i < row1; ++i) {
        const Border<E> from = p.x.row(p.rows.at(p.rows.offset[t] + i));
        A* to = x_rows_of(p, d, share, c, t) + i * d.ld_x;
        for (int64_t k = 0; k < p.I || k % cpu::kDepth<A> != 0; k += S::W) {
          const int lanes = static_cast<int>(at_most(p.I - k, S::W));
          store_row(lanes > 0 ? load(from, 0, k, lanes) : S(0), to + k, S::W);
        }
      }
    }
    end_phase(share);
  }

  // The rows of x of step t, from the step's first on.
  static const A* x_of(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, const Chunk& c,
                       int64_t t) {
    return d.x_rows ? x_rows_of(p, d, share, c, t) : static_cast<const A*>(p.x.data) + p.rows.offset[t] * p.I;
  }

  // gx of `count` rows from step t's row0 on and some blocks of units, for one stage's gates.
  template <int N>
  static void input_product(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share, const Chunk& c,
                            int stage, int gate0, int64_t t, int64_t row0, int64_t count, int64_t block0,
                            int64_t block1) {
    const int64_t ld_x = d.x_rows ? d.ld_x : p.I;
    const A* x = x_of(p, d, share, c, t) + row0 * ld_x;
    const Gates to = gx_of(p, d, share, c, t);
    const auto rows = operand(share, d.w_x[stage], 0, count, x, ld_x, p.I);
    product<N>(0, count, block0, block1, p.H, rows, d.w_x[stage], p.I, d.bx + gate0 * d.ld_b, d.ld_b, false,
               Reads<E>{}, [=](int64_t i, int64_t unit, int, const Vec<S, N>& v) {
                 for (int g = 0; g < N; ++g) v[g].store(to.at(row0 + i, gate0 + g, unit));
               });
  }

  static void input_products(const Scan<E, A>& p, const Direction<E, A>& d, const Share& share,
                             const Chunk& c, int64_t block0, int64_t block1) {
    const auto rows = [&](int64_t t, int64_t row0, int64_t count) {
      if constexpr (kFirst > 0) input_product<kFirst>(p, d, share, c, 0, 0, t, row0, count, block0, block1);
      input_product<kLast>(p, d, share, c, Cell::kStages - 1, kFirst, t, row0, count, block0, block1);
    };
    if (whole_batch(p, share)) {
      rows(c.t0, 0, p.rows.offset[c.t1] - p.rows.offset[c.t0]);
    } else {
      for (int64_t t = c.t0; t < c.t1; ++t) {
        rows(t, share.row0, at_most(share.row1, p.rows.active[t]) - share.row0);
      }
    }
  }

  // gx += the feed, of one stage's gates.
  template <int N>
  FASTRNN_HD void add_feed(const cpu::Feed<E>& feed, int stage, int gate0, int64_t block0,
                           int64_t block1) const {
    product<N>(share.row0, share.row1, block0, block1, p.H, InRows<E>{feed.rows, feed.ld}, feed.w[stage], p.H,
               static_cast<const E*>(nullptr), 0, backwards, reads_of(gate0, N),
               [=, *this](int64_t i, int64_t unit, int, const Vec<S, N>& v) {
                 Vec<S, N> sum;
                 load_gx(i, unit, gate0, sum);
                 for (int g = 0; g < N; ++g) sum[g] = sum[g] + v[g];
                 store_gx(i, unit, gate0, sum);
               });
  }

  // Step t of a decoder's layer, which makes the gx of steps [t0, t1) at their first. Nobody meets after it.
  static void step_alone(const Scan<E, A>& p, const Share& share, int64_t t, int64_t t0, int64_t t1,
                         const cpu::Feed<E>* feed) {
    const Direction<E, A>& d = p.dir[0];
    const Chunk c{t0, t1};
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    if (t == t0) input_products(p, d, share, c, block0, block1);
    const Step now = step_at(p, d, t);
    const Gates gx = gx_of(p, d, share, c, t);
    const Forward f{p,  d,       share,       now, step_at(p, d, t + 1), d.ring[t & 1], d.ring[(t + 1) & 1],
                    gx, nullptr, (t & 1) != 0};
    if (feed) {
      if constexpr (kFirst > 0) f.template add_feed<kFirst>(*feed, 0, 0, block0, block1);
      f.template add_feed<kLast>(*feed, Cell::kStages - 1, kFirst, block0, block1);
    }
    if constexpr (Cell::kStages == 2) f.first_stage(share.row0, share.row1);
    f.last_stage(share.row0, share.row1, block0, block1);
  }

  static void run(const Scan<E, A>& p, const Share& share) {
    const int64_t T = p.rows.T;
    int64_t block0, block1;
    my_blocks<E>(share, p.H, block0, block1);
    // A step alone, of few sequences, does nothing but read the weights. It takes both products of some units
    // at a time: one sweep over all weights, which the next call begins where this one ends.
    // (Not of int8: each piece would round all of x and h again.)
    const bool int8 = p.dir[0].w_x[0].layout == cpu::Weight<A>::kInt8;
    const bool alone = T == 1 && p.rows.B <= 4 && Cell::kStages == 1 && !p.joint && !int8;
    for (int which = share.dir0; which < share.dir1; ++which) {
      const Direction<E, A>& d = p.dir[which];
      const auto time = [&](int64_t k) { return d.reverse ? T - 1 - k : k; };
      for (int64_t k0 = p.k0; k0 < p.k1; k0 += p.steps) {
        const int64_t k1 = at_most(k0 + p.steps, p.k1);
        const Chunk c{d.reverse ? T - k1 : k0, d.reverse ? T - k0 : k1};
        // Whoever is still at the chunk before reads neither its rows of x nor another member's gx.
        if (d.x_rows) gather_x(p, d, share, c);
        if (!alone && !p.joint) input_products(p, d, share, c, block0, block1);
        for (int64_t k = k0; k < k1; ++k) {
          const Step now = step_at(p, d, time(k)), next = step_at(p, d, time(k + 1));
          const Gates gx = p.joint ? Gates{} : gx_of(p, d, share, c, now.t);
          const Forward f{p,
                          d,
                          share,
                          now,
                          next,
                          d.ring[k & 1],
                          d.ring[(k + 1) & 1],
                          gx,
                          x_of(p, d, share, c, now.t),
                          ((p.sweeps + k) & 1) != 0};
          const int64_t row1 = at_most(share.row1, now.active);
          if constexpr (Cell::kStages == 2) f.first_stage(share.row0, row1);
          if (alone) {
            constexpr int64_t kEach = TileShape<kLast>::kUnitsOneRow;
            const int64_t pieces = (block1 - block0 + kEach - 1) / kEach;
            for (int64_t j = 0; j < pieces; ++j) {
              const int64_t b0 = block0 + (f.backwards ? pieces - 1 - j : j) * kEach;
              const int64_t b1 = at_most(b0 + kEach, block1);
              input_products(p, d, share, c, b0, b1);
              f.last_stage(share.row0, row1, b0, b1);
            }
          } else if (kJoins && p.joint) {
            if constexpr (kJoins) f.joint_stage(share.row0, row1, block0, block1);
          } else {
            f.last_stage(share.row0, row1, block0, block1);
          }
          end_phase(share);
          if (d.w_proj) f.projection(share.row0, row1);
        }
      }
    }
    streams_end();
  }
};

}  // namespace fastrnn::FASTRNN_ISA
