// fastrnn::tree_backward on the CPU: the gradients of the gates level by level, from where states went to
// where they came from; then those of the weights, each the sum of outer products over all nodes.
#include <map>
#include <numeric>

#include "tree_call.h"

namespace fastrnn::cpu {
namespace {

template <class E>
class TreeBackwardPass : TreeCall<E> {
  using Base = TreeCall<E>;
  using Base::arena_, Base::cell_, Base::kernels_, Base::params_, Base::s_, Base::t_, Base::x_;

 public:
  using Base::Base;

  std::tuple<Tensor, TensorList> run(const OptionalTensor& dh, const TensorList& dstates, const Tensor& h,
                                     const TensorList& states, const TensorList& saved, bool need_x,
                                     bool need_params) {
    const int64_t N = t_.N, H = t_.H, G = cell_.gates;
    const size_t others = static_cast<size_t>(cell_.states - 1);
    STD_TORCH_CHECK(states.size() == others && saved.size() == 2 * others &&
                        (dstates.empty() || dstates.size() == others),
                    "tree_backward needs what tree gave and saved");
    const bool lstm = others > 0;
    keep(t_.h, Base::expect("h", h, {N, H}));
    if (dh) keep(t_.dh, Base::expect("dh", *dh, {N, H}));
    if (!dstates.empty()) keep(t_.dc, Base::expect("dc", dstates[0], {N, H}));
    if (lstm) {
      keep(t_.c, Base::expect("c", states[0], {N, H}));
      keep(t_.gates, Base::expect("saved gates", saved[0], {N, G * H}));
      keep(t_.forget, Base::expect("saved forget gates", saved[1], {N, H}));
      t_.df = arena_.template get<E>(s_.E * H);
      t_.dc_all = arena_.template get<E>(N * H);
    }
    if (x_) keep(t_.x, *x_);
    t_.dg = arena_.template get<E>(N * G * H);
    need_x = need_x && x_;
    prepare_edges();
    prepare_weights(need_x);
    scan();

    Tensor dx = empty({need_x ? N : 0, need_x ? t_.I : 0}, kScalar<E>);
    if (need_x) {
      t_.dx = Base::data(dx);
      const int64_t blocks = ceil_div(t_.I, kernels_.width);
      for_rows(N, G * H * t_.I,
               [&](int64_t begin, int64_t end) { cell_.input_gradient(t_, {begin, end, 0, blocks, false}); });
    } else {
      dx = empty({0}, kScalar<E>);
    }
    return {std::move(dx), need_params ? param_gradients() : TensorList{}};
  }

 private:
  template <class P>
  void keep(P*& to, Tensor t) {
    to = Base::data(t);
    kept_.push_back(std::move(t));
  }

  // The edges from each node, and the positions of each level by the slots of these.
  void prepare_edges() {
    const int64_t N = t_.N;
    int64_t* first = arena_.template zeros<int64_t>(N + 1);
    int64_t* edge = arena_.template get<int64_t>(s_.E);
    for (int64_t e = 0; e < s_.E; ++e) ++first[t_.source[e] + 1];
    std::partial_sum(first, first + N + 1, first);
    std::vector<int64_t> at(first, first + N), lo(N), hi(N);
    for (int64_t e = 0; e < s_.E; ++e) edge[at[t_.source[e]]++] = e;
    int64_t* list = arena_.template get<int64_t>(N);
    std::iota(list, list + N, 0);
    for (int64_t p = 0; p < N; ++p) {
      const int64_t node = t_.order[p];
      for (int64_t i = first[node]; i < first[node + 1]; ++i) {
        const int64_t slot = t_.summed ? 0 : t_.slot[edge[i]];
        lo[p] = hi[p] ? std::min(lo[p], slot) : slot;
        hi[p] = std::max(hi[p], slot + 1);
      }
    }
    for (int64_t l = 0; l < s_.L && !t_.summed; ++l) sort_level(list, s_.levels[l], s_.levels[l + 1], hi);
    int64_t* out_lo = arena_.template get<int64_t>(N);
    int64_t* out_hi = arena_.template get<int64_t>(N);
    edges_.assign(N + 1, 0);
    for (int64_t i = 0; i < N; ++i) {
      const int64_t node = t_.order[list[i]];
      out_lo[i] = lo[list[i]];
      out_hi[i] = hi[list[i]];
      widest_ = std::max(widest_, out_hi[i] - out_lo[i]);
      edges_[i + 1] = edges_[i] + first[node + 1] - first[node];
    }
    t_.list = list;
    t_.out_lo = out_lo;
    t_.out_hi = out_hi;
    t_.out_first = first;
    t_.out_edge = edge;
  }

  // Positions begin .. end by key, stably.
  void sort_level(int64_t* list, int64_t begin, int64_t end, const std::vector<int64_t>& key) const {
    std::vector<int64_t> at(std::min(t_.A, end - begin) > 1 ? t_.A + 2 : 0);
    if (at.empty()) return;
    for (int64_t i = begin; i < end; ++i) ++at[key[i] + 1];
    std::partial_sum(at.begin(), at.end(), at.begin());
    for (int64_t i = begin; i < end; ++i) list[begin + at[key[i]]++] = i;
  }

  void prepare_weights(bool need_x) {
    const int64_t H = t_.H, A = t_.A, Q = t_.Q, G = cell_.gates, ld = A * H, width = kernels_.width;
    E* w = Base::weight(1, H, A * Q);
    for (int64_t slot = 0; slot < A; ++slot) {
      int64_t k = slot * Q;
      // Rows row0 .. row1 of w_hh, of this slot's columns, become the next terms.
      const auto add = [&](int64_t row0, int64_t row1) {
        const Pack rows = by_columns(1, H, row1 - row0, ld, A * Q);
        Base::pack(params_[1], row0 * ld + slot * H, rows, w + k * width);
        k += row1 - row0;
      };
      if (cell_.states == 1) {
        add(0, H);
      } else {
        add(0, H);                      // i
        add((1 + A) * H, (3 + A) * H);  // g, o
        add(H, (1 + A) * H);            // f of each slot
      }
    }
    t_.w_back = {w, Weight<E>::kPacked, A * Q};
    if (!need_x) return;
    E* w_x = Base::weight(1, t_.I, G * H);
    Base::pack(params_[0], 0, by_columns(1, t_.I, G * H, t_.I), w_x);
    t_.w_x_back = {w_x, Weight<E>::kPacked};
  }

  void scan() {
    const int threads = Base::threads();
    const auto scratch = Base::scratch(threads, std::max<int64_t>(widest_, 1) * t_.Q);
    run_team(threads, [&](const Team& team) {
      Base::pack(team);
      Levels levels = Base::levels(team);
      for (int64_t l = s_.L - 1; l >= 0; --l) {
        const int64_t begin = s_.levels[l], end = s_.levels[l + 1];
        levels.run(begin, end, t_.H, Base::work(end - begin, edges_[end] - edges_[begin]),
                   [&](int64_t r0, int64_t r1, int64_t b0, int64_t b1) {
                     cell_.backward(t_, scratch[team.member], {r0, r1, b0, b1, (l & 1) != 0});
                   });
      }
    });
  }

  static constexpr int64_t kRows = 256, kPanelRows = kRows | 1;

  // A member's elements of scratch for an outer product of so many gates and columns: both factors' panels,
  // and a row of the right one.
  int64_t room(int64_t gates, int64_t columns) const {
    const int64_t W = kernels_.width;
    return (gates * ceil_div(t_.H, W) + ceil_div(columns, W)) * kPanelRows * W + columns;
  }

  // out(gate) [H][columns], rows of ld, += the sum over `rows` of left(row, gate)^T right(row, buffer);
  // left gives H values, or null for zeros, right `columns` of them, with a buffer to make them in. bias:
  // [gates][H, whole vectors], += the sums of left; or null. The panels of left and of right are shared out,
  // never the rows: nobody waits, and the bits do not depend on the threads.
  template <class Left, class Right, class Out>
  void outer(int64_t rows, int64_t gates, int64_t columns, int64_t ld, Left&& left, Right&& right, Out&& out,
             double* bias = nullptr) {
    constexpr int64_t kPiece = 128;
    const int64_t W = kernels_.width, H = t_.H, blocks = ceil_div(H, W), panel = kPanelRows * W;
    const int64_t all_left = gates * blocks, all_right = ceil_div(columns, W);
    const int64_t work = rows * gates * H * std::max<int64_t>(columns, 1);
    const int threads =
        static_cast<int>(std::clamp<int64_t>(work / 200000, 1, std::min<int64_t>(team_threads(), all_left)));
    while (memory_.size() < static_cast<size_t>(threads)) memory_.push_back(arena_.template get<E>(room_));
    run_team(threads, [&](const Team& team) {
      const int parts = left_parts(team.size, all_left, all_right);
      const int i = team.member % parts, j = team.member / parts, others = team.size / parts;
      const int64_t left0 = all_left * i / parts, left1 = all_left * (i + 1) / parts;
      const int64_t column0 = all_right * j / others * W;
      const int64_t mine = std::min(columns, all_right * (j + 1) / others * W) - column0;
      E *lefts = memory_[team.member], *rights = lefts + all_left * panel,
        *buffer = rights + all_right * panel;
      for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
        const int64_t n = std::min(kRows, rows - r0);
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t k = left0, k1; k < left1; k = k1) {  // a gate at a time
            k1 = std::min(left1, (k / blocks + 1) * blocks);
            const int64_t unit = k % blocks * W, units = std::min(H - unit, (k1 - k) * W);
            const E* from = left(r0 + r, k / blocks);
            kernels_.to_panels({const_cast<E*>(from ? from + unit : from), 0, false}, units,
                               lefts + k * panel + r * W, panel);
          }
          if (mine <= 0) continue;
          kernels_.to_panels({const_cast<E*>(right(r0 + r, buffer) + column0), 0, false}, mine,
                             rights + r * W, panel);
        }
        for (int64_t k = left0; k < left1; ++k) {
          const int64_t block = k % blocks;
          const int lanes = static_cast<int>(std::min<int64_t>(H - block * W, W));
          if (mine > 0) {
            kernels_.outer_product({lefts + k * panel, rights, panel, n, kPiece, lanes, mine,
                                    out(k / blocks) + block * W * ld + column0, ld, true});
          }
          if (bias && j == 0) kernels_.add_rows(lefts + k * panel, n, bias + k * W);
        }
      }
    });
  }

  // Into how many parts left falls, and right into as many as are then left: so that the least is copied.
  static int left_parts(int members, int64_t left, int64_t right) {
    int best = members;
    const auto copied = [&](int parts) { return left / parts + right / (members / parts); };
    for (int parts = 1; parts < members; ++parts) {
      if (members % parts == 0 && right >= members / parts && copied(parts) < copied(best)) best = parts;
    }
    return best;
  }

  TensorList param_gradients() {
    const int64_t H = t_.H, I = t_.I, G = cell_.gates, blocks = ceil_div(H, kernels_.width);
    TensorList grads;
    for (const Tensor& p : params_) {
      const auto sizes = p.sizes();
      grads.push_back(p.dim() == 2 ? zeros(p, {sizes[0], sizes[1]}, kScalar<E>)
                                   : empty({sizes[0]}, kScalar<E>));
    }
    double* bias = arena_.template zeros<double>(G * blocks * kernels_.width);
    int64_t slots = 1;  // the most that a node's edges reach over
    for (int64_t p = 0; p < t_.N && !cell_.summed; ++p) slots = std::max(slots, t_.hi[p] - t_.lo[p]);
    room_ = std::max(room(G, t_.x ? I : 0), room(G == 1 ? 1 : cell_.summed ? 3 : 3 + slots, slots * H));
    E* dw = Base::data(grads[0]);
    outer(
        t_.N, G, t_.x ? I : 0, I, [&](int64_t p, int64_t g) { return t_.dg + (p * G + g) * H; },
        [&](int64_t p, E*) { return t_.x + t_.order[p] * I; }, [&](int64_t g) { return dw + g * H * I; },
        bias);
    cell_.summed ? recurrent_summed(Base::data(grads[1])) : recurrent_slots(Base::data(grads[1]));
    for (size_t i = 2; i < grads.size(); ++i) {
      for (int64_t g = 0; g < G; ++g) {
        const double* from = bias + g * blocks * kernels_.width;
        std::transform(from, from + H, Base::data(grads[i]) + g * H,
                       [](double sum) { return static_cast<E>(sum); });
      }
    }
    return grads;
  }

  // Where i, g and o stand among the input's gates.
  static constexpr int64_t kIgo[3] = {0, 2, 3};

  void recurrent_summed(E* dw) {
    const int64_t H = t_.H;
    std::vector<int64_t> rows;  // positions that edges lead to
    for (int64_t p = 0; p < t_.N; ++p) {
      if (t_.hi[p]) rows.push_back(p);
    }
    outer(
        static_cast<int64_t>(rows.size()), 3, H, H,
        [&](int64_t r, int64_t g) { return t_.dg + (rows[r] * 4 + kIgo[g]) * H; },
        [&](int64_t r, E* sum) -> const E* {
          const int64_t e0 = t_.first[rows[r]], e1 = t_.first[rows[r] + 1];
          if (e1 - e0 == 1) return t_.h + t_.source[e0] * H;
          std::fill_n(sum, H, E(0));
          for (int64_t e = e0; e < e1; ++e) {
            const E* h = t_.h + t_.source[e] * H;
            for (int64_t u = 0; u < H; ++u) sum[u] += h[u];
          }
          return sum;
        },
        [&](int64_t g) { return dw + kIgo[g] * H * H; });
    outer(
        s_.E, 1, H, H, [&](int64_t e, int64_t) { return t_.df + e * H; },
        [&](int64_t e, E*) { return t_.h + t_.source[e] * H; }, [&](int64_t) { return dw + H * H; });
  }

  void recurrent_slots(E* dw) {
    const int64_t H = t_.H, A = t_.A, G = cell_.gates;
    std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> alike;  // positions by their edges' slots
    for (int64_t p = 0; p < t_.N; ++p) {
      if (t_.hi[p]) alike[{t_.lo[p], t_.hi[p]}].push_back(p);
    }
    for (const auto& entry : alike) {  // by name: clang before 16 captures no structured binding
      const std::vector<int64_t>& rows = entry.second;
      const int64_t lo = entry.first.first, hi = entry.first.second;
      const auto edge = [&](int64_t r, int64_t k) {
        for (int64_t e = t_.first[rows[r]]; e < t_.first[rows[r] + 1]; ++e) {
          if (t_.slot[e] - lo == k) return e;
        }
        return int64_t{-1};
      };
      outer(
          static_cast<int64_t>(rows.size()), G == 1 ? 1 : 3 + hi - lo, (hi - lo) * H, A * H,
          [&](int64_t r, int64_t g) -> const E* {
            if (G == 1) return t_.dg + rows[r] * H;
            if (g < 3) return t_.dg + (rows[r] * 4 + kIgo[g]) * H;
            const int64_t e = edge(r, g - 3);
            return e < 0 ? nullptr : t_.df + e * H;
          },
          [&](int64_t r, E* row) -> const E* {
            if (hi - lo == 1) return t_.h + t_.source[t_.first[rows[r]]] * H;
            std::fill_n(row, (hi - lo) * H, E(0));
            for (int64_t e = t_.first[rows[r]]; e < t_.first[rows[r] + 1]; ++e) {
              std::copy_n(t_.h + t_.source[e] * H, H, row + (t_.slot[e] - lo) * H);
            }
            return row;
          },
          [&](int64_t g) {
            const int64_t row = g == 0 ? 0 : g < 3 ? A + g : 1 + lo + g - 3;  // of w_hh: i, f_0 .., g, o
            return dw + row * H * A * H + lo * H;
          });
    }
  }

  std::vector<Tensor> kept_;
  std::vector<int64_t> edges_;  // [N + 1] that leave the places of list before this one
  int64_t widest_ = 0;
  std::vector<E*> memory_;  // of each member, for one outer product after another
  int64_t room_ = 0;
};

std::tuple<Tensor, TensorList> tree_backward(StringHandle cell, OptionalTensor dh, TensorList dstates,
                                             OptionalTensor x, TensorList params, Tensor schedule, Tensor h,
                                             TensorList states, TensorList saved, bool need_x,
                                             bool need_params) {
  const std::string name = take_string(cell);
  STD_TORCH_CHECK(!params.empty(), "params must be (w_ih, w_hh[, b_ih, b_hh])");
  check_tree_dtype(params[0]);
  const auto run = [&]<class E>(E) {
    return TreeBackwardPass<E>(name, x, params, schedule)
        .run(dh, dstates, h, states, saved, need_x, need_params);
  };
  return dtype_of(params[0]) == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("tree_backward", TORCH_BOX(&fastrnn::cpu::tree_backward));
}
