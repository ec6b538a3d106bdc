// Attention of many queries over one sequence's memory, block by block of its positions with a running
// maximum (online softmax: Milakov and Gimelshein, arXiv:1805.02867), and back by scores computed anew.
#pragma once

#include <cmath>

#include "attend.h"
#include "gradients.h"
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

using cpu::Attend;

template <class E>
FASTRNN_HD int64_t whole(int64_t n) {
  return vectors<E>(n) * Simd<E>::W;
}

// Takes pieces off a call's scratch, each whole vectors and one more apart; of none, to count them.
template <class E>
struct Scratch {
  E* at;
  int64_t taken = 0;
  E* take(int64_t count) {
    E* p = at ? at + taken : nullptr;
    taken += whole<E>(count) + Simd<E>::W;
    return p;
  }
};

// Rows [S][whole vectors], of zeros where no query may attend: a NaN there would outlive a weight of 0.
template <class E>
FASTRNN_HD void copy_rows(const E* from, int64_t ld, int64_t S, int64_t width, const bool* any, E* to) {
  const int64_t ld_to = whole<E>(width);
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t u = 0; u < width; u += Simd<E>::W) {
      const int lanes = any && !any[s] ? 0 : static_cast<int>(at_most(width - u, Simd<E>::W));
      Simd<E>::load(from + s * ld + u, lanes).store(to + s * ld_to + u);
    }
  }
}

// Positions as the units of a product: [S/W][width][W].
template <class E>
FASTRNN_HD cpu::Weight<E> pack_rows(const E* from, int64_t ld, int64_t S, int64_t width, E* to) {
  pack<E>({from, false, 1, 0, S, ld, width, 1}, to, 0, vectors<E>(S));
  return {to, cpu::Weight<E>::kPacked, 0, nullptr};
}

template <class A, class E, class Store>
FASTRNN_HD void rows_by(int64_t rows, int64_t units, const A& a, const cpu::Weight<E>& w, int64_t K,
                        const Store& store) {
  product<1>(0, rows, 0, vectors<E>(units), units, a, w, K, static_cast<const E*>(nullptr), 0, false,
             Reads<E>{}, store);
}

template <class E>
struct AttendForward {
  using S = Simd<E>;
  using Weight = cpu::Weight<E>;
  static constexpr int64_t kBlock = 256;  // positions at a time
  static constexpr int64_t kFew = 4;      // queries for which packing costs more than it gains
  static constexpr E kNone = -std::numeric_limits<E>::infinity();

  static int64_t scratch(const Attend<E>& p, int64_t rows) {
    return AttendForward(p, 0, rows, nullptr).scratch_.taken;
  }

  const Attend<E>& p;
  int64_t q0, rows;
  E *memory, *values, *score, *sums, *query, *top, *total, *shrink;
  Scratch<E> scratch_;

  AttendForward(const Attend<E>& args, int64_t first, int64_t after, E* at)
      : p(args), q0(first), rows(after - first), scratch_{at} {
    memory = scratch_.take(kBlock * whole<E>(p.K));
    values = scratch_.take(kBlock * whole<E>(p.V));
    score = scratch_.take(rows * kBlock);
    sums = scratch_.take(rows * whole<E>(p.V));
    query = scratch_.take(p.K);
    for (E** each : {&top, &total, &shrink}) *each = scratch_.take(rows);
  }

  // score [rows][kBlock] of positions [s0, s0 + count).
  void scores(int64_t s0, int64_t count) const {
    const E *keys = p.keys + s0 * p.ld_keys, *queries = p.query + q0 * p.ld_query;
    if (p.v) {
      copy_rows(keys, p.ld_keys, count, p.K, p.any ? p.any + s0 : nullptr, memory);
      const Memory<E> m{memory, nullptr, whole<E>(p.K), 0, count, p.K, 0, nullptr, p.v, p.scale};
      for (int64_t i = 0; i < rows; ++i) {
        copy_rows(queries + i * p.ld_query, 0, 1, p.K, nullptr, query);
        additive_scores(m, query, score + i * kBlock);
      }
      return;
    }
    const Weight w = p.Tq <= kFew ? Weight{keys, Weight::kRows, p.ld_keys, nullptr}
                                  : pack_rows(keys, p.ld_keys, count, p.K, memory);
    const S scale(p.scale);
    rows_by(rows, count, InRows<E>{queries, p.ld_query}, w, p.K,
            [scale, score = score](int64_t i, int64_t s, int, const Vec<S, 1>& v) {
              (v[0] * scale).store(score + i * kBlock + s);
            });
  }

  // A row's scores to e^(score - top), for the top so far; shrink: what sums with the top before it are
  // worth.
  void exponentials(int64_t i, int64_t s0, int64_t count) const {
    E* row = score + i * kBlock;
    const bool* mask = p.mask ? p.mask + (q0 + i) * p.ld_mask + s0 : nullptr;
    for (int64_t s = 0; s < count && mask; ++s) row[s] = mask[s] ? row[s] : kNone;
    if (p.weights) std::memcpy(p.weights + (q0 + i) * p.ld_weights + s0, row, count * sizeof(E));
    for (int64_t s = count; s < whole<E>(count); ++s) row[s] = kNone;
    const E high = highest(row, whole<E>(count), s0 ? top[i] : kNone);
    const S none(kNone), zero(0), most(high == kNone ? E(0) : high);
    S sum(0);
    for (int64_t s = 0; s < count; s += S::W) {
      const S e = S::load(row + s), x = select<E>(e.v == none.v, zero, exp_(e - most));
      x.store(row + s);
      sum = sum + x;
    }
    shrink[i] = s0 == 0 || top[i] == kNone ? E(0) : top[i] == high ? E(1) : exp_(S(top[i] - high)).v[0];
    total[i] = (s0 ? total[i] * shrink[i] : E(0)) + sum_of(sum);
    top[i] = high;
  }

  void add_values(int64_t s0, int64_t count) const {
    const E* from = p.values + s0 * p.ld_values;
    Weight w{from, Weight::kColumns, p.ld_values, nullptr};
    if (p.Tq > kFew || p.any || p.V % S::W != 0) {
      copy_rows(from, p.ld_values, count, p.V, p.any ? p.any + s0 : nullptr, values);
      w = {values, Weight::kColumns, whole<E>(p.V), nullptr};
    }
    rows_by(rows, p.V, InRows<E>{score, kBlock}, w, count,
            [s0, sums = sums, shrink = shrink, ld = whole<E>(p.V)](int64_t i, int64_t unit, int,
                                                                   const Vec<S, 1>& v) {
              E* to = sums + i * ld + unit;
              (s0 ? S::load(to) * S(shrink[i]) + v[0] : v[0]).store(to);
            });
  }

  static void run(const Attend<E>& p, int64_t q0, int64_t q1, E* scratch) {
    const AttendForward f(p, q0, q1, scratch);
    for (int64_t s0 = 0; s0 < p.S; s0 += kBlock) {
      const int64_t count = at_most(p.S - s0, kBlock);
      f.scores(s0, count);
      for (int64_t i = 0; i < f.rows; ++i) f.exponentials(i, s0, count);
      f.add_values(s0, count);
    }
    for (int64_t i = 0; i < f.rows; ++i) {
      // Without a mask scores of -inf alone have no softmax: NaN.
      const bool none = p.S == 0 || (p.masked && f.total[i] == E(0));
      const S share(none ? E(0) : E(1) / f.total[i]);
      const E* sum = f.sums + i * whole<E>(p.V);
      E* to = p.context + (q0 + i) * p.ld_context;
      for (int64_t u = 0; u < p.V; u += S::W) {
        (none ? S(0) : S::load(sum + u) * share).store(to + u, static_cast<int>(at_most(p.V - u, S::W)));
      }
      p.lse[q0 + i] = none ? E(0) : f.top[i] + std::log(f.total[i]);
      if (p.weights) f.finish_weights(i, none);
    }
  }

  // Scores to weights, and zeros for what lies behind the last position.
  void finish_weights(int64_t i, bool nothing) const {
    E* row = p.weights + (q0 + i) * p.ld_weights;
    const S none(kNone), most(nothing ? E(0) : top[i]), share(nothing ? E(0) : E(1) / total[i]);
    const S left_out(nothing || total[i] != E(0) ? E(0) : std::numeric_limits<E>::quiet_NaN());
    for (int64_t s = 0; s < p.S; s += S::W) {
      const int lanes = static_cast<int>(at_most(p.S - s, S::W));
      const S e = S::load(row + s, lanes);
      select<E>(e.v == none.v, left_out, exp_(e - most) * share).store(row + s, lanes);
    }
    std::fill(row + p.S, row + p.ld_weights, E(0));
  }
};

// The backward pass's scratch: as much as what is needed takes.
template <class E>
struct AttendPieces {
  static constexpr int64_t kFew = 16;  // queries for which packing costs more than it gains
  static constexpr int64_t kPanels = 1 << 19;

  const Attend<E>& p;
  Scratch<E> scratch;
  int64_t most;  // queries at a time
  bool of_scores, few, in_place;
  E *keys, *packed, *dkeys, *values, *weights, *ds, *queries, *dc_panels, *delta, *row, *dquery;

  AttendPieces(const Attend<E>& args, E* at) : p(args), scratch{at} {
    const int64_t wide = whole<E>(p.S), k = whole<E>(p.K), v = whole<E>(p.V);
    // What they have of every position is some kPanels bytes, so that it stays in most second-level caches;
    // no machine's own, as sums are cut here.
    constexpr int64_t kLeast = cpu::kLeastAttendRows, kMost = cpu::kMostAttendRows;
    const int64_t each = 2 * static_cast<int64_t>(sizeof(E)) * (wide > 0 ? wide : 1);
    const int64_t fit = kPanels / each / kLeast * kLeast;
    most = at_most(at_most(fit > kLeast ? fit : kLeast, kMost), p.Tq);
    of_scores = p.needs_scores();
    few = p.Tq <= kFew;
    // Rows of keys are for the additive score and the gradient of queries.
    in_place = !p.v && (!p.dquery || (few && !p.any && p.K % Simd<E>::W == 0));
    keys = take(!in_place, p.S * k);
    packed = take(!p.v && !few, wide * k);
    dkeys = take(p.v && p.dkeys, p.S * k);
    values = take(of_scores && !few, wide * v);
    weights = take(true, wide * most);
    ds = take(of_scores, wide * most);
    queries = take(p.v || p.dkeys, most * k);
    dc_panels = take(p.dvalues, most * v);
    delta = take(of_scores, most);
    row = take(p.v, wide);
    dquery = take(p.v && p.dquery, k);
  }

 private:
  E* take(bool needed, int64_t count) { return needed ? scratch.take(count) : nullptr; }
};

// Members share out the positions, or what is the same for all positions by queries or units; they meet
// wherever one reads what others have made. Nothing is added up across members: the bits do not depend on
// them.
template <class E>
struct AttendBackward : AttendPieces<E> {
  using S = Simd<E>;
  using Weight = cpu::Weight<E>;
  using Pieces = AttendPieces<E>;
  using Pieces::dc_panels, Pieces::delta, Pieces::dkeys, Pieces::dquery, Pieces::ds, Pieces::few,
      Pieces::in_place, Pieces::keys, Pieces::most, Pieces::of_scores, Pieces::p, Pieces::packed,
      Pieces::queries, Pieces::row, Pieces::values, Pieces::weights;

  static int64_t scratch(const Attend<E>& p) { return Pieces(p, nullptr).scratch.taken; }

  const Share& share;
  int64_t block0, block1, s0, s1;  // own vectors of positions, and positions
  Weight by_keys, by_values, by_positions;

  AttendBackward(const Attend<E>& args, const Share& part, E* at) : Pieces(args, at), share(part) {
    const int64_t k = whole<E>(p.K);
    my_blocks<E>(share, p.S, block0, block1);
    s0 = block0 * S::W;
    s1 = at_most(block1 * S::W, p.S);
    if (!in_place) {
      copy_rows(p.keys + s0 * p.ld_keys, p.ld_keys, s1 - s0, p.K, p.any ? p.any + s0 : nullptr,
                keys + s0 * k);
    }
    by_positions = {in_place ? p.keys : keys, Weight::kColumns, in_place ? p.ld_keys : k, nullptr};
    if (of_scores) {
      by_values = few ? Weight{p.values, Weight::kRows, p.ld_values, nullptr}
                      : pack_own(p.values, p.ld_values, p.V, values);
    }
    if (dkeys) std::fill_n(dkeys + s0 * k, (s1 - s0) * k, E(0));
    if (!p.v) {
      by_keys =
          few ? Weight{p.keys, Weight::kRows, p.ld_keys, nullptr} : pack_own(p.keys, p.ld_keys, p.K, packed);
    }
  }

  Weight pack_own(const E* from, int64_t ld, int64_t width, E* to) const {
    pack<E>({from, false, 1, 0, p.S, ld, width, 1}, to, block0, block1);
    return {to, Weight::kPacked, 0, nullptr};
  }

  Memory<E> memory(int64_t from, int64_t after) const {
    const int64_t k = whole<E>(p.K);
    return {keys + from * k, nullptr, k, 0, after - from, p.K, 0, nullptr, p.v, p.scale};
  }

  // Own vectors of `units`, f(row, unit, lanes, sum).
  template <class A, class F>
  void own_units(int64_t rows, int64_t units, const A& a, const Weight& w, int64_t K, const F& f) const {
    int64_t b0, b1;
    my_blocks<E>(share, units, b0, b1);
    product<1>(0, rows, b0, b1, units, a, w, K, static_cast<const E*>(nullptr), 0, false, Reads<E>{}, f);
  }

  // f(row) for own rows.
  template <class F>
  void own_rows(int64_t rows, F&& f) const {
    for (int64_t i = rows * share.part / share.parts; i < rows * (share.part + 1) / share.parts; ++i) f(i);
  }

  // Panels [S/W][most][W].
  FASTRNN_HD E* in_panels(E* panels, int64_t i, int64_t s) const { return panels + s * most + i * S::W; }

  // The rows as the products read them: panels [columns/W][most][W], of the additive score rows of queries.
  void prepare(int64_t q0, int64_t rows) const {
    const E* query = p.query + q0 * p.ld_query;
    own_rows(rows, [&](int64_t i) {
      if (p.dvalues) panel(p.dcontext + (q0 + i) * p.ld_context, p.V, dc_panels + i * S::W);
      if (p.v) {
        copy_rows(query + i * p.ld_query, 0, 1, p.K, nullptr, queries + i * whole<E>(p.K));
      } else if (p.dkeys) {
        panel(query + i * p.ld_query, p.K, queries + i * S::W);
      }
    });
  }

  void panel(const E* from, int64_t columns, E* to) const {
    to_panels<E>({const_cast<E*>(from), 0, false}, columns, to, most * S::W);
  }

  // The weights of queries [q0, q0 + rows), again.
  void softmax(int64_t q0, int64_t rows) const {
    const S scale(p.scale);
    const auto keep = [lse = p.lse + q0, weights = weights, most = most](int64_t i, int64_t s, const S& e) {
      exp_(e - S(lse[i])).store(weights + s * most + i * S::W);
    };
    if (p.v) {
      for (int64_t i = 0; i < rows; ++i) {
        additive_scores(memory(s0, s1), queries + i * whole<E>(p.K), row + s0);
        for (int64_t s = s0; s < s1; s += S::W) keep(i, s, S::load(row + s));
      }
    } else {
      own_units(rows, p.S, InRows<E>{p.query + q0 * p.ld_query, p.ld_query}, by_keys, p.K,
                [keep, scale](int64_t i, int64_t s, int, const Vec<S, 1>& v) { keep(i, s, v[0] * scale); });
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool* mask = p.mask ? p.mask + (q0 + i) * p.ld_mask : nullptr;
      for (int64_t s = mask ? s0 : s1; s < block1 * S::W; ++s) {
        if (s >= p.S || !mask[s]) in_panels(weights, i, s / S::W * S::W)[s % S::W] = E(0);
      }
    }
  }

  // delta = sum of weights * their gradient, by way of the context where nothing came for the weights
  // themselves.
  void sums(int64_t q0, int64_t rows) const {
    own_rows(rows, [&](int64_t i) {
      const int64_t at = (q0 + i) * p.ld_context, to = (q0 + i) * p.ld_weights;
      S sum(0);
      for (int64_t u = 0; u < p.V; u += S::W) {
        const int lanes = static_cast<int>(at_most(p.V - u, S::W));
        sum = sum + S::load(p.context + at + u, lanes) * S::load(p.dcontext + at + u, lanes);
      }
      for (int64_t s = 0; s < p.S && p.dweights; s += S::W) {
        const int lanes = static_cast<int>(at_most(p.S - s, S::W));
        const S w = S::load(in_panels(weights, i, s));
        sum = sum + select<E>(w.v == S(0).v, S(0), w * S::load(p.dweights + to + s, lanes));
      }
      delta[i] = sum_of(sum);
    });
  }

  // ds, of the scores before their scale: in panels, of the additive score in rows.
  void scores(int64_t q0, int64_t rows) const {
    const S scale(p.scale), zero(0);
    own_units(rows, p.S, InRows<E>{p.dcontext + q0 * p.ld_context, p.ld_context}, by_values, p.V,
              [=, *this](int64_t i, int64_t s, int lanes, const Vec<S, 1>& v) {
                const S w = S::load(in_panels(weights, i, s));
                const S dw =
                    p.dweights ? v[0] + S::load(p.dweights + (q0 + i) * p.ld_weights + s, lanes) : v[0];
                select<E>(w.v == zero.v, zero, scale * w * (dw - S(delta[i])))
                    .store(p.v ? ds + i * whole<E>(p.S) + s : in_panels(ds, i, s));
              });
  }

  // out [own positions][columns] (+)= the sum over rows of a by b.
  void outer(const E* a, const E* b, int64_t rows, int64_t columns, E* out, int64_t ld, bool add) const {
    for (int64_t s = s0; s < s1; s += S::W) {
      const int lanes = static_cast<int>(at_most(p.S - s, S::W));
      outer_product<E>({a + s * most, b, most * S::W, rows, most, lanes, columns, out + s * ld, ld, add});
    }
  }

  // Of the additive score those of keys and v with it.
  void query_gradient(int64_t q0, int64_t rows) const {
    E* to = p.dquery ? p.dquery + q0 * p.ld_query : nullptr;
    if (!p.v) {
      return own_units(rows, p.K, InPanels<E>{ds, most * S::W, p.S}, by_positions, p.S,
                       [to, ld = p.ld_query](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v) {
                         v[0].store(to + i * ld + unit, lanes);
                       });
    }
    int64_t b0, b1;
    my_blocks<E>(share, p.K, b0, b1);
    const int64_t u0 = b0 * S::W, u1 = b1 * S::W, own = at_most(u1, p.K) - u0;
    for (int64_t i = 0; i < rows && own > 0; ++i) {
      additive_backward(memory(0, p.S), u0, u1, queries + i * whole<E>(p.K), ds + i * whole<E>(p.S), dquery,
                        dkeys, p.dv);
      if (to) std::memcpy(to + i * p.ld_query + u0, dquery + u0, own * sizeof(E));
    }
  }

  static void run(const Attend<E>& p, const Share& share, E* scratch) {
    const AttendBackward b(p, share, scratch);
    for (int64_t q0 = 0; q0 < p.Tq; q0 += b.most) {
      const int64_t rows = at_most(p.Tq - q0, b.most);
      b.prepare(q0, rows);
      if (p.v) end_phase(share);
      b.softmax(q0, rows);
      if (b.of_scores) {
        if (p.dweights) end_phase(share);
        b.sums(q0, rows);
        end_phase(share);
        b.scores(q0, rows);
      }
      end_phase(share);
      if (p.v ? b.of_scores : p.dquery != nullptr) b.query_gradient(q0, rows);
      if (p.dvalues) b.outer(b.weights, b.dc_panels, rows, p.V, p.dvalues, p.ld_values, q0 > 0);
      if (!p.v && p.dkeys) b.outer(b.ds, b.queries, rows, p.K, p.dkeys, p.ld_keys, q0 > 0);
      end_phase(share);
    }
    // What no query may attend to has the gradient 0, whatever came for the context: 0 times infinity is NaN.
    const int64_t ld = b.dkeys ? whole<E>(p.K) : p.ld_keys;
    E* const dkeys = b.dkeys ? b.dkeys : p.dkeys;
    for (int64_t s = b.s0; s < b.s1 && p.any; ++s) {
      if (p.any[s]) continue;
      if (p.dvalues) std::fill_n(p.dvalues + s * p.ld_values, p.V, E(0));
      if (dkeys) std::fill_n(dkeys + s * ld, p.K, E(0));
    }
    for (int64_t s = b.s0; s < b.s1 && b.dkeys; ++s) {
      std::memcpy(p.dkeys + s * p.ld_keys, b.dkeys + s * whole<E>(p.K), p.K * sizeof(E));
    }
  }
};

}  // namespace fastrnn::FASTRNN_ISA
