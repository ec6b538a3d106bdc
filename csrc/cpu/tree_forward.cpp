// fastrnn::tree on the CPU.
#include "tree_call.h"

namespace fastrnn::cpu {
namespace {

struct Outputs {
  Tensor h;
  TensorList states, saved;
};

template <class E>
class TreeForwardPass : TreeCall<E> {
  using Base = TreeCall<E>;
  using Base::arena_, Base::cell_, Base::params_, Base::s_, Base::t_, Base::x_;

 public:
  using Base::Base;

  Outputs run(bool save) {
    const int64_t N = t_.N, H = t_.H, G = cell_.gates;
    const bool lstm = cell_.states == 2;
    Outputs out;
    out.h = empty({N, H}, kScalar<E>);
    t_.h = Base::data(out.h);
    if (lstm) {
      out.states.push_back(empty({N, H}, kScalar<E>));
      t_.c = Base::data(out.states[0]);
    }
    t_.x = x_ ? Base::data(*x_) : nullptr;
    prepare_weights();
    // So many rows of gx stay in cache until the levels read them.
    const int64_t row_bytes = (t_.I + G * H) * static_cast<int64_t>(sizeof(E));
    const int64_t chunk = std::clamp<int64_t>(second_level_cache() / 8 * 3 / row_bytes, 32, 4096);
    save = save && lstm;
    if (save) {
      out.saved.push_back(pooled<E>({N, G * H}));
      out.saved.push_back(pooled<E>({N, H}));
      t_.gates = Base::data(out.saved[0]);
      t_.forget = Base::data(out.saved[1]);
      std::fill_n(t_.forget + s_.E * H, (N - s_.E) * H, E(0));  // as many rows as nodes, whatever the edges
    } else {
      t_.gates = arena_.template get<E>(std::min(chunk, N) * G * H);
    }
    const int threads = Base::threads();
    const auto scratch = Base::scratch(threads, std::max(t_.I, t_.A * H));
    run_team(threads, [&](const Team& team) {
      Base::pack(team);
      Tree<E> t = t_;  // gates_first is the member's own
      const TreeScratch<E>& mine = scratch[team.member];
      Levels levels = Base::levels(team);
      int64_t level = 0;
      for (int64_t q0 = 0; q0 < N; q0 += chunk) {
        const int64_t q1 = std::min(q0 + chunk, N);
        if (!save) t.gates_first = q0;
        levels.run(q0, q1, H, (q1 - q0) * G * H * (t.x ? t.I : 1),
                   [&](int64_t begin, int64_t end, int64_t b0, int64_t b1) {
                     cell_.input(t, mine, {begin, end, b0, b1, false});
                   });
        for (int64_t begin = q0; begin < q1;) {
          while (s_.levels[level + 1] <= begin) ++level;
          const int64_t end = std::min(q1, s_.levels[level + 1]);
          levels.run(begin, end, H, Base::work(end - begin, t.first[end] - t.first[begin]),
                     [&](int64_t r0, int64_t r1, int64_t b0, int64_t b1) {
                       cell_.forward(t, mine, {r0, r1, b0, b1, (level & 1) != 0});
                     });
          begin = end;
        }
      }
    });
    return out;
  }

 private:
  void prepare_weights() {
    const int64_t H = t_.H, A = t_.A, G = cell_.gates, K = A * H, width = this->kernels_.width;
    E* w_x = Base::weight(G, H, t_.I);
    Base::pack(params_[0], 0, by_rows(G, H, t_.I, t_.I), w_x);
    t_.w_x = {w_x, Weight<E>::kPacked};
    if (cell_.states == 2) {
      E* w = Base::weight(3, H, K);
      Base::pack(params_[1], 0, by_rows(1, H, K, K, 3), w);  // i
      Base::pack(params_[1], (1 + A) * H * K, by_rows(2, H, K, K, 3), w + width);
      t_.w = {w, Weight<E>::kPacked, K};
      t_.f_step = ceil_div(H, width) * width * K;
      E* w_f = arena_.template get<E>(A * t_.f_step);
      for (int64_t k = 0; k < A; ++k) {
        Base::pack(params_[1], (1 + k) * H * K, by_rows(1, H, K, K), w_f + k * t_.f_step);
      }
      t_.w_f = {w_f, Weight<E>::kPacked, K};
    } else {
      E* w = Base::weight(1, H, K);
      Base::pack(params_[1], 0, by_rows(1, H, K, K), w);
      t_.w = {w, Weight<E>::kPacked, K};
    }
    E* bias = arena_.template zeros<E>(G * t_.ld);
    for (size_t i = 2; i < params_.size(); ++i) {
      const E* b = Base::data(params_[i]);
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t u = 0; u < H; ++u) bias[g * t_.ld + u] += b[g * H + u];
      }
    }
    t_.bias = bias;
  }
};

std::tuple<Tensor, TensorList, TensorList> tree(StringHandle cell, OptionalTensor x, TensorList params,
                                                Tensor schedule, bool save) {
  const std::string name = take_string(cell);
  STD_TORCH_CHECK(!params.empty(), "params must be (w_ih, w_hh[, b_ih, b_hh])");
  check_tree_dtype(params[0]);
  Outputs out = dtype_of(params[0]) == ScalarType::Double
                    ? TreeForwardPass<double>(name, x, params, schedule).run(save)
                    : TreeForwardPass<float>(name, x, params, schedule).run(save);
  return {std::move(out.h), std::move(out.states), std::move(out.saved)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("tree", TORCH_BOX(&fastrnn::cpu::tree)); }
