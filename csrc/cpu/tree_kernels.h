// Recursive cells, one level at a time: the states of the children are gathered, multiplied at once, and the
// gates computed while the products are in registers; on the way back the gradients of the gates are gathered
// from where a node's state went. Nodes whose edges have the same slots share a product.
#pragma once

#include <cstring>

#include "../cells/tree_lstm.h"
#include "../cells/vanilla.h"
#include "step.h"
#include "tree_params.h"

namespace fastrnn::FASTRNN_ISA {

using cpu::Tree;
using cpu::TreePart;
using cpu::TreeScratch;

template <class E>
void add_to(E* to, const E* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Calls run(begin, end, lo, hi) for stretches of rows with the same slots, at most `at_once` long.
template <class Run>
FASTRNN_HD void each_run(int64_t begin, int64_t end, const int64_t* lo, const int64_t* hi, int64_t at_once,
                         Run&& run) {
  while (begin < end) {
    int64_t i = begin + 1;
    while (i < end && i - begin < at_once && lo[i] == lo[begin] && hi[i] == hi[begin]) ++i;
    run(begin, i, lo[begin], hi[begin]);
    begin = i;
  }
}

// The part of a packed weight of G gates from k on.
template <int G, class E>
FASTRNN_HD cpu::Weight<E> from_k(const cpu::Weight<E>& w, int64_t k) {
  cpu::Weight<E> part = w;
  part.data += k * G * Simd<E>::W;
  return part;
}

template <int G, class E>
void tree_input(const Tree<E>& p, const TreeScratch<E>& scratch, const TreePart& part) {
  using S = Simd<E>;
  const int64_t H = p.H;
  for (int64_t r0 = part.begin; r0 < part.end; r0 += p.at_once) {
    const int64_t n = at_most(p.at_once, part.end - r0);
    for (int64_t i = 0; i < n && p.x; ++i) {
      std::memcpy(scratch.rows + i * scratch.ld_rows, p.x + p.order[r0 + i] * p.I, p.I * sizeof(E));
    }
    E* to = p.gates + (r0 - p.gates_first) * G * H;
    product<G>(0, n, part.block0, part.block1, H, InRows<E>{scratch.rows, scratch.ld_rows}, p.w_x,
               p.x ? p.I : 0, p.bias, p.ld, false, Reads<E>{},
               [=](int64_t i, int64_t unit, int lanes, const Vec<S, G>& gx) {
                 for (int g = 0; g < G; ++g) gx[g].store(to + (i * G + g) * H + unit, lanes);
               });
  }
}

template <class E>
struct TreeForward {
  using S = Simd<E>;
  const Tree<E>& p;
  const TreeScratch<E>& s;
  const TreePart& part;

  FASTRNN_HD E* gates(int64_t position, int count) const {
    return p.gates + (position - p.gates_first) * count * p.H;
  }

  // One row for each node: the children's h side by side in their slots, zeros where one is missing.
  FASTRNN_HD void gather_slots(int64_t r0, int64_t r1, int64_t lo, int64_t hi) const {
    const int64_t H = p.H, slots = hi - lo;
    for (int64_t r = r0; r < r1; ++r) {
      E* row = s.rows + (r - r0) * s.ld_rows;
      int64_t* edges = s.edges + (r - r0) * slots;
      if (p.first[r + 1] - p.first[r] < slots) {
        std::memset(row, 0, slots * H * sizeof(E));
        std::fill_n(edges, slots, int64_t{-1});
      }
      for (int64_t e = p.first[r]; e < p.first[r + 1]; ++e) {
        std::memcpy(row + (p.slot[e] - lo) * H, p.h + p.source[e] * H, H * sizeof(E));
        edges[p.slot[e] - lo] = e;
      }
    }
  }

  // f * c of one edge's vector of units, added to its target's row of fc.
  FASTRNN_HD void forget(int64_t e, int64_t row, int64_t position, int64_t unit, int lanes,
                         const S& gh) const {
    const S f = TreeLstm::forget(S::load(gates(position, TreeLstm::kGates) + p.H + unit, lanes), gh);
    if (p.forget) f.store(p.forget + e * p.H + unit, lanes);
    E* fc = s.fc + row * p.ld + unit;
    (S::load(fc) + f * S::load(p.c + p.source[e] * p.H + unit, lanes)).store(fc);
  }

  FASTRNN_HD void clear(E* rows, int64_t count) const {
    const int64_t unit0 = part.block0 * S::W, units = (part.block1 - part.block0) * S::W;
    for (int64_t i = 0; i < count; ++i) std::memset(rows + i * p.ld + unit0, 0, units * sizeof(E));
  }

  void forget_summed(int64_t r0, int64_t r1) const {
    const int64_t H = p.H;
    for (int64_t i = 0; i < r1 - r0; ++i) std::memset(s.sums + i * p.ld, 0, H * sizeof(E));
    for (int64_t e0 = p.first[r0]; e0 < p.first[r1]; e0 += p.at_once) {
      const int64_t n = at_most(p.at_once, p.first[r1] - e0);
      for (int64_t i = 0; i < n; ++i) {
        E* row = s.rows + i * s.ld_rows;
        std::memcpy(row, p.h + p.source[e0 + i] * H, H * sizeof(E));
        add_to(s.sums + (p.target[e0 + i] - r0) * p.ld, row, H);
      }
      product<1>(0, n, part.block0, part.block1, H, InRows<E>{s.rows, s.ld_rows}, p.w_f, H,
                 static_cast<const E*>(nullptr), 0, part.backwards, Reads<E>{},
                 [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& gh) {
                   const int64_t position = p.target[e0 + i];
                   forget(e0 + i, position - r0, position, unit, lanes, gh[0]);
                 });
    }
  }

  void forget_slots(int64_t r0, int64_t r1, int64_t lo, int64_t hi) const {
    gather_slots(r0, r1, lo, hi);
    for (int64_t k = lo; k < hi; ++k) {
      cpu::Weight<E> w = from_k<1>(p.w_f, lo * p.H);
      w.data += k * p.f_step;
      product<1>(0, r1 - r0, part.block0, part.block1, p.H, InRows<E>{s.rows, s.ld_rows}, w, (hi - lo) * p.H,
                 static_cast<const E*>(nullptr), 0, part.backwards, Reads<E>{},
                 [=, *this](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& gh) {
                   const int64_t e = s.edges[i * (hi - lo) + k - lo];
                   if (e >= 0) forget(e, i, r0 + i, unit, lanes, gh[0]);
                 });
    }
  }

  static void lstm(const Tree<E>& p, const TreeScratch<E>& s, const TreePart& part) {
    const TreeForward f{p, s, part};
    each_run(
        part.begin, part.end, p.lo, p.hi, p.at_once, [&](int64_t r0, int64_t r1, int64_t lo, int64_t hi) {
          f.clear(s.fc, r1 - r0);
          if (hi > 0) p.summed ? f.forget_summed(r0, r1) : f.forget_slots(r0, r1, lo, hi);
          const int64_t K = (hi - lo) * p.H;
          const InRows<E> rows{p.summed ? s.sums : s.rows, p.summed ? p.ld : s.ld_rows};
          product<3>(0, r1 - r0, part.block0, part.block1, p.H, rows, from_k<3>(p.w, lo * p.H), K,
                     static_cast<const E*>(nullptr), 0, part.backwards, Reads<E>{},
                     [=, &p, &s](int64_t i, int64_t unit, int lanes, const Vec<S, 3>& gh) {
                       E* g = f.gates(r0 + i, TreeLstm::kGates) + unit;
                       const Vec<S, 3> gx{
                           {S::load(g, lanes), S::load(g + 2 * p.H, lanes), S::load(g + 3 * p.H, lanes)}};
                       Vec<S, 3> saved;
                       S h, c;
                       TreeLstm::forward(gx, gh, S::load(s.fc + i * p.ld + unit), h, c, saved);
                       const int64_t to = p.order[r0 + i] * p.H + unit;
                       h.store(p.h + to, lanes);
                       c.store(p.c + to, lanes);
                       if (!p.forget) return;
                       saved[0].store(g, lanes);
                       saved[1].store(g + 2 * p.H, lanes);
                       saved[2].store(g + 3 * p.H, lanes);
                     });
        });
  }

  template <class Cell>
  static void rnn(const Tree<E>& p, const TreeScratch<E>& s, const TreePart& part) {
    const TreeForward f{p, s, part};
    each_run(part.begin, part.end, p.lo, p.hi, p.at_once,
             [&](int64_t r0, int64_t r1, int64_t lo, int64_t hi) {
               if (hi > 0) f.gather_slots(r0, r1, lo, hi);
               product<1>(0, r1 - r0, part.block0, part.block1, p.H, InRows<E>{s.rows, s.ld_rows},
                          from_k<1>(p.w, lo * p.H), (hi - lo) * p.H, static_cast<const E*>(nullptr), 0,
                          part.backwards, Reads<E>{},
                          [=, &p](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& gh) {
                            Vec<S, 1> h, saved;
                            const Vec<S, 1> gx{{S::load(f.gates(r0 + i, 1) + unit, lanes)}};
                            Cell::forward(gx, gh, Vec<S, 1>{}, h, saved);
                            h[0].store(p.h + p.order[r0 + i] * p.H + unit, lanes);
                          });
             });
  }
};

template <class E>
struct TreeBackward {
  using S = Simd<E>;
  const Tree<E>& p;
  const TreeScratch<E>& s;

  // What the weights of slots lo .. hi - 1 multiply for each node: of every edge that leaves it the gradients
  // of its target's gates, added up where children are summed. Returns how much of the rows there is.
  template <int G>
  FASTRNN_HD int64_t gather(int64_t r0, int64_t r1, int64_t lo, int64_t hi) const {
    const int64_t H = p.H, Q = p.Q;
    int64_t K = (hi - lo) * Q;
    if (G > 1 && !p.summed && hi - lo == 1) {
      // Forget gates that no target of these edges has are left out.
      int64_t slots = 0;
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t node = p.order[p.list[r]];
        for (int64_t i = p.out_first[node]; i < p.out_first[node + 1]; ++i) {
          slots = p.hi[p.target[p.out_edge[i]]] > slots ? p.hi[p.target[p.out_edge[i]]] : slots;
        }
      }
      K = (3 + slots) * H;
    }
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t node = p.order[p.list[r]];
      E* row = s.rows + (r - r0) * s.ld_rows;
      std::memset(row, 0, K * sizeof(E));
      for (int64_t i = p.out_first[node]; i < p.out_first[node + 1]; ++i) {
        const int64_t e = p.out_edge[i], to = p.target[e];
        const E* dg = p.dg + to * G * H;
        E* block = row + (p.summed ? 0 : (p.slot[e] - lo) * Q);
        add_to(block, dg, H);
        if constexpr (G > 1) {
          add_to(block + H, dg + 2 * H, 2 * H);
          if (p.summed) {
            add_to(block + 3 * H, p.df + e * H, H);
          } else {
            for (int64_t k = p.first[to]; k < p.first[to + 1]; ++k) {
              add_to(block + (3 + p.slot[k]) * H, p.df + k * H, H);
            }
          }
        }
      }
    }
    return K;
  }

  FASTRNN_HD S arriving(const E* d, int64_t node, int64_t unit, int lanes) const {
    return d ? S::load(d + node * p.H + unit, lanes) : S(0);
  }

  // Calls cell(position, node, unit, lanes, dh) with all of dL/dh.
  template <int G, class Cell>
  static FASTRNN_HD void level(const Tree<E>& p, const TreeScratch<E>& s, const TreePart& part,
                               const Cell& cell) {
    const TreeBackward b{p, s};
    each_run(part.begin, part.end, p.out_lo, p.out_hi, p.at_once,
             [&](int64_t r0, int64_t r1, int64_t lo, int64_t hi) {
               const int64_t K = hi > 0 ? b.template gather<G>(r0, r1, lo, hi) : 0;
               product<1>(0, r1 - r0, part.block0, part.block1, p.H, InRows<E>{s.rows, s.ld_rows},
                          from_k<1>(p.w_back, lo * p.Q), K, static_cast<const E*>(nullptr), 0, part.backwards,
                          Reads<E>{}, [=, &p, &cell](int64_t i, int64_t unit, int lanes, const Vec<S, 1>& v) {
                            const int64_t position = p.list[r0 + i], node = p.order[position];
                            cell(position, node, unit, lanes, v[0] + b.arriving(p.dh, node, unit, lanes));
                          });
             });
  }

  static void lstm(const Tree<E>& p, const TreeScratch<E>& s, const TreePart& part) {
    const TreeBackward b{p, s};
    const int64_t H = p.H;
    level<TreeLstm::kGates>(
        p, s, part, [=, &p](int64_t position, int64_t node, int64_t unit, int lanes, const S& dh) {
          S dc = b.arriving(p.dc, node, unit, lanes);
          for (int64_t i = p.out_first[node]; i < p.out_first[node + 1]; ++i) {
            const int64_t e = p.out_edge[i];
            dc = dc +
                 S::load(p.forget + e * H + unit, lanes) * S::load(p.dc_all + p.target[e] * H + unit, lanes);
          }
          const E* saved = p.gates + position * 4 * H + unit;
          const Vec<S, 3> igo{
              {S::load(saved, lanes), S::load(saved + 2 * H, lanes), S::load(saved + 3 * H, lanes)}};
          Vec<S, 3> dg;
          TreeLstm::backward(igo, S::load(p.c + node * H + unit, lanes), dh, dc, dg);
          dc.store(p.dc_all + position * H + unit, lanes);
          S sum(0);
          for (int64_t e = p.first[position]; e < p.first[position + 1]; ++e) {
            const S df = TreeLstm::backward_forget(S::load(p.forget + e * H + unit, lanes),
                                                   S::load(p.c + p.source[e] * H + unit, lanes), dc);
            df.store(p.df + e * H + unit, lanes);
            sum = sum + df;
          }
          E* to = p.dg + position * 4 * H + unit;
          dg[0].store(to, lanes);
          sum.store(to + H, lanes);
          dg[1].store(to + 2 * H, lanes);
          dg[2].store(to + 3 * H, lanes);
        });
  }

  template <class Cell>
  static void rnn(const Tree<E>& p, const TreeScratch<E>& s, const TreePart& part) {
    level<1>(p, s, part, [&p](int64_t position, int64_t node, int64_t unit, int lanes, const S& dh) {
      const Vec<S, 1> h{{S::load(p.h + node * p.H + unit, lanes)}};
      Vec<S, 1> dg, ds;
      Cell::backward(h, h, h, Vec<S, 1>{{dh}}, dg, ds);
      dg[0].store(p.dg + position * p.H + unit, lanes);
    });
  }
};

template <int G, class E>
void tree_input_gradient(const Tree<E>& p, const TreePart& part) {
  using S = Simd<E>;
  const int64_t K = G * p.H;
  product<1>(part.begin, part.end, part.block0, part.block1, p.I, InRows<E>{p.dg, K}, p.w_x_back, K,
             static_cast<const E*>(nullptr), 0, false, Reads<E>{},
             [&p](int64_t position, int64_t unit, int lanes, const Vec<S, 1>& v) {
               v[0].store(p.dx + p.order[position] * p.I + unit, lanes);
             });
}

template <class E>
const cpu::TreeKernels<E>* tree_kernels() {
  using F = TreeForward<E>;
  using B = TreeBackward<E>;
  static constexpr cpu::TreeKernels<E> all[] = {
      {"child_sum_lstm", 4, 2, true, &tree_input<4, E>, &F::lstm, &B::lstm, &tree_input_gradient<4, E>},
      {"nary_lstm", 4, 2, false, &tree_input<4, E>, &F::lstm, &B::lstm, &tree_input_gradient<4, E>},
      {"tree_rnn_tanh", 1, 1, false, &tree_input<1, E>, &F::template rnn<RnnTanh>, &B::template rnn<RnnTanh>,
       &tree_input_gradient<1, E>},
      {"tree_rnn_relu", 1, 1, false, &tree_input<1, E>, &F::template rnn<RnnRelu>, &B::template rnn<RnnRelu>,
       &tree_input_gradient<1, E>},
      {nullptr, 0, 0, false, nullptr, nullptr, nullptr, nullptr}};
  return all;
}

}  // namespace fastrnn::FASTRNN_ISA
