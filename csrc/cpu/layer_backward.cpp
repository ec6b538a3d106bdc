// fastrnn::layer_backward on the CPU.
#include "workspace.h"

namespace fastrnn::cpu {
namespace {

struct Gradients {
  Tensor dx;
  TensorList dstates, dparams;
};

// dst[c] += the sums of the columns of rows [0, rows) of src. Few rows in E, those sums in double: thousands
// of terms in one float accumulator would lose two digits.
template <class E>
void add_column_sums(const E* src, int64_t rows, int64_t columns, int64_t ld, double* dst) {
  constexpr int64_t kRows = 8;
  for_rows(columns, rows, [&](int64_t begin, int64_t end) {
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t r1 = std::min(r0 + kRows, rows);
      for (int64_t c = begin; c < end; ++c) {
        E sum = 0;
        for (int64_t r = r0; r < r1; ++r) sum += src[r * ld + c];
        dst[c] += static_cast<double>(sum);
      }
    }
  });
}

// One direction's weight gradients, in E until the end of the call.
template <class E>
struct WeightGradients {
  E *w_ih, *w_hh, *w_hr;  // [G*H, I], [G*H, P], [P, H]
  double* bias;           // [kGrads*H]
};

template <class E>
class BackwardPass {
 public:
  BackwardPass(const std::string& name, const OptionalTensor& dy, const TensorList& dlast,
               const TensorList& dseq, const Tensor& x, const TensorList& states, const TensorList& params,
               const OptionalTensor& lengths, const OptionalTensor& batch_sizes, const OptionalTensor& reset,
               const Tensor& y, const TensorList& seq, const TensorList& saved, bool need_x, bool need_params)
      : cell_(cell_kernels<E>(name)),
        a_(check_layer({cell_.gates, cell_.states, cell_.saved}, x, states, params, lengths, batch_sizes,
                       reset)),
        table_(row_table(a_)),
        need_x_(need_x),
        need_params_(need_params),
        H_(a_.H),
        P_(a_.P),
        projected_(a_.params[0].w_hr.has_value()),
        steps_(chunk_steps(a_, cell_.grads * a_.H, sizeof(E))) {
    const int64_t D = a_.D, N = a_.N;
    const size_t others = static_cast<size_t>(cell_.states - 1);
    STD_TORCH_CHECK(seq.size() == others && saved.size() == (projected_ ? 2u : 1u),
                    "layer_backward needs what layer saved: expected ", others, " sequences of states, got ",
                    seq.size());
    STD_TORCH_CHECK(dlast.empty() || dlast.size() == others + 1, "dlast must be empty or one for each state");
    STD_TORCH_CHECK(dseq.empty() || dseq.size() == others,
                    "dseq must be empty or one for each state after h");
    const auto y_shape = a_.row_shape(D * P_);
    auto seq_shape = a_.row_shape(H_);
    seq_shape.insert(seq_shape.begin(), D);
    y_ = expect("y", y, y_shape, a_.dtype);
    if (dy) dy_ = expect("dy", *dy, y_shape, a_.dtype);
    saved_.push_back(expect("saved", saved[0], {D, N, cell_.saved * H_}, kScalar<E>));
    if (projected_) saved_.push_back(expect("saved", saved[1], {D, N, H_}, kScalar<E>));
    for (const Tensor& t : seq) seq_.push_back(expect("seq", t, seq_shape, kScalar<E>));
    for (size_t j = 0; j < dlast.size(); ++j)
      dlast_.push_back(expect("dlast", dlast[j], {D, a_.B, j ? H_ : P_}, a_.dtype));
    for (const Tensor& t : dseq) dseq_.push_back(expect("dseq", t, seq_shape, kScalar<E>));
  }

  Gradients run() {
    prepare();
    Plan plan(a_.D, a_.B, a_.B * cell_.gates * H_ * P_, weight_bytes_, ceil_div(H_, kernels<E>().width));
    for (scan_.k0 = 0; scan_.k0 < a_.T; scan_.k0 = scan_.k1) {
      scan_.k1 = std::min(scan_.k0 + steps_, a_.T);
      for (int64_t d = 0; d < a_.D; ++d) {
        chunk(d);
        gather_h_prev(d);
      }
      run_team(plan.threads(), [&](int member, int size) {
        if (scan_.k0 == 0) w_.pack(member, size);
        cell_.backward(scan_, plan.share(member, size));
      });
      for (int64_t d = 0; d < a_.D; ++d) products(d);
    }
    run_team(plan.threads(), [&](int member, int size) { cell_.finish(scan_, plan.share(member, size)); });
    return results();
  }

 private:
  static Tensor expect(const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                       ScalarType dtype) {
    const auto sizes = t.sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) && t.is_cpu() &&
                        t.scalar_type() == dtype,
                    name, " must be as the forward pass gave it, in shape, dtype and device");
    return dense(t);
  }

  void prepare() {
    const int64_t D = a_.D, N = a_.N, B = a_.B, G = cell_.gates;
    const bool bf16 = a_.dtype == ScalarType::BFloat16;
    scan_.rows = {a_.T, B, table_.active.data(), table_.offset.data(),
                  table_.outside.empty() ? nullptr : table_.outside.data()};
    scan_.directions = static_cast<int>(D);
    scan_.H = H_;
    scan_.P = P_;
    const int64_t ld = padded<E>(std::max(H_, P_)), ld_ring = padded<E>(G * H_), most = steps_ * B;
    for (int64_t d = 0; d < D; ++d) {
      const LayerArgs::Direction& p = a_.params[d];
      Direction<E>& s = scan_.dir[d];
      s.reverse = d == 1;
      w_ih_[d] = need_x_ ? as<E>(arena_, p.w_ih) : nullptr;
      for (int64_t stage = 0, gate0 = 0; stage < cell_.stages; gate0 += cell_.stage_gates[stage++]) {
        const int64_t rows = cell_.stage_gates[stage] * H_;
        s.w[stage] = w_.get(p.w_hh, gate0 * H_ * P_, {nullptr, false, 1, 0, P_, 1, rows, P_});
      }
      weight_bytes_ = G * H_ * P_ * sizeof(E);
      if (projected_) s.w_proj = w_.get(*p.w_hr, 0, {nullptr, false, 1, 0, H_, 1, P_, H_});
      if (dy_.defined())
        s.dy = {static_cast<char*>(dy_.mutable_data_ptr()) + d * P_ * dy_.element_size(), D * P_, bf16};
      for (int j = 1; j < cell_.states; ++j) {
        s.seq[j - 1] = static_cast<E*>(seq_[j - 1].mutable_data_ptr()) + d * N * H_;
        s.dseq[j - 1] =
            dseq_.empty() ? nullptr : static_cast<const E*>(dseq_[j - 1].const_data_ptr()) + d * N * H_;
      }
      if (a_.reset) {
        uint8_t* keep = arena_.get<uint8_t>(N);
        fill_keep(table_, a_, s.reverse, static_cast<const bool*>(a_.reset->const_data_ptr()), keep);
        s.keep = keep;
      }
      s.saved = static_cast<const E*>(saved_[0].const_data_ptr()) + d * N * cell_.saved * H_;
      h_prev_[d] = arena_.get<E>(most * P_);
      s.h_prev = h_prev_[d];
      s.ld_h_prev = P_;
      s.ld_dg = cell_.grads * H_;
      s.dg = arena_.get<E>(most * s.ld_dg);
      if (cell_.stages == 2) s.mid_out = arena_.get<E>(most * H_);
      if (projected_) s.dh_out = arena_.get<E>(most * P_);
      s.ld_state = ld;
      s.ld_ring = ld_ring;
      for (int j = 0; j < 2; ++j) s.ring[j] = arena_.zeros<E>(B * ld_ring);
      s.last_ring = arena_.zeros<E>(B * ld_ring);
      s.mid = arena_.zeros<E>(B * ld);
      s.dmid = arena_.zeros<E>(B * ld);
      for (int j = 0; j < cell_.states; ++j) {
        const int64_t width = j ? H_ : P_;
        s.state[j] = arena_.zeros<E>(B * ld);
        E* s0 = j ? arena_.zeros<E>(B * ld) : nullptr;
        for (int64_t i = 0; i < B; ++i) {
          const int64_t from = (d * B + table_.caller(i)) * width;
          if (!dlast_.empty()) read(dlast_[j], from, width, s.state[j] + i * ld);
          if (j) read(a_.states[j], from, width, s0 + i * ld);
        }
        if (j) s.s0[j - 1] = s0;
      }
      if (need_params_) {
        weights_[d] = {arena_.zeros<E>(G * H_ * a_.I), arena_.zeros<E>(G * H_ * P_),
                       projected_ ? arena_.zeros<E>(P_ * H_) : nullptr,
                       arena_.zeros<double>(cell_.grads * H_)};
      }
    }
    direct_x_ = !bf16 && table_.outside.empty();
    if (need_params_ && !direct_x_) x_rows_ = arena_.get<E>(most * a_.I);
    if (need_x_) {
      dx_ = a_.lengths ? torch::stable::new_zeros(a_.x, a_.row_shape(a_.I))
                       : empty(a_.row_shape(a_.I), a_.dtype);
      dx_rows_ = direct_x_ ? static_cast<E*>(dx_.mutable_data_ptr()) : arena_.get<E>(table_.rows() * a_.I);
      if (D > 1) std::fill_n(dx_rows_, table_.rows() * a_.I, E(0));
    }
  }

  // The rows of the chunk of steps k0 .. k1, which are counted from the end of the forward scan.
  void chunk(int64_t d) {
    const bool reverse = scan_.dir[d].reverse;
    const int64_t t0 = reverse ? scan_.k0 : a_.T - scan_.k1, t1 = reverse ? scan_.k1 : a_.T - scan_.k0;
    t0_[d] = t0;
    t1_[d] = t1;
    first_[d] = table_.offset[t0];
    rows_[d] = table_.offset[t1] - first_[d];
  }

  // The h that entered each step of the chunk: what left the step before, the first state, or 0 after a
  // reset.
  void gather_h_prev(int64_t d) {
    const Direction<E>& s = scan_.dir[d];
    E* to = h_prev_[d];
    for_rows(t1_[d] - t0_[d], std::max<int64_t>(a_.B, 1) * P_, [&](int64_t begin, int64_t end) {
      for (int64_t t = t0_[d] + begin; t < t0_[d] + end; ++t) {
        const int64_t before = s.reverse ? t + 1 : t - 1;
        const int64_t known = before >= 0 && before < a_.T ? table_.active[before] : 0;
        for (int64_t i = 0; i < table_.active[t]; ++i) {
          const int64_t row = table_.offset[t] + i;
          E* h = to + (row - first_[d]) * P_;
          if (s.keep && !s.keep[row]) {
            std::memset(h, 0, P_ * sizeof(E));
          } else if (i < known) {
            read(y_, scan_.rows.at(table_.offset[before] + i) * a_.D * P_ + d * P_, P_, h);
          } else {
            read(a_.states[0], (d * a_.B + table_.caller(i)) * P_, P_, h);
          }
        }
      }
    });
  }

  // out += a^T b over `rows` rows, or out = where `add` is false. In blocks: one float accumulator over
  // thousands of rows would lose a digit to torch.nn's sums of per-step products. A block costs a pass over
  // `out`, so that large ones take more rows.
  static void weight_gradient(const Matrix<E>& out, const Matrix<E>& a, const Matrix<E>& b, bool add) {
    const int64_t least = out.rows * out.columns <= kSmallWeight ? kSmallBlock : kLargeBlock;
    const int64_t blocks = std::max<int64_t>(1, a.rows / least);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r0 = a.rows * i / blocks, r1 = a.rows * (i + 1) / blocks;
      const Matrix<E> a_rows{a.data + r0 * a.row_stride, r1 - r0, a.columns, a.row_stride};
      const Matrix<E> b_rows{b.data + r0 * b.row_stride, r1 - r0, b.columns, b.row_stride};
      multiply<E>(out, a_rows.transposed(), b_rows, add || i > 0);
    }
  }

  // What is one big product: the weights' gradients, and the input's.
  void products(int64_t d) {
    const Direction<E>& s = scan_.dir[d];
    const int64_t rows = rows_[d], G = cell_.gates, ld = s.ld_dg;
    if (rows == 0) return;
    const Matrix<E> dgx{s.dg, rows, G * H_, ld};
    if (need_params_) {
      const bool add = scan_.k0 > 0;
      const E* x = input_rows<E>(a_, table_, first_[d], rows, x_rows_);
      weight_gradient({weights_[d].w_ih, G * H_, a_.I, a_.I}, dgx, {x, rows, a_.I, a_.I}, add);
      for (int g0 = 0, stage = 0, stage_end = cell_.stage_gates[0]; g0 < G;) {
        // A run of gates of one stage whose recurrent gradients lie side by side.
        int g1 = g0 + 1;
        while (g1 < stage_end && cell_.hidden_grad[g1] == cell_.hidden_grad[g1 - 1] + 1) ++g1;
        const Matrix<E> dgh{s.dg + cell_.hidden_grad[g0] * H_, rows, (g1 - g0) * H_, ld};
        const Matrix<E> source{stage ? s.mid_out : h_prev_[d], rows, P_, P_};
        weight_gradient({weights_[d].w_hh + g0 * H_ * P_, (g1 - g0) * H_, P_, P_}, dgh, source, add);
        g0 = g1;
        if (g0 == stage_end && g0 < G) stage_end += cell_.stage_gates[++stage];
      }
      if (a_.params[d].b_ih) add_column_sums(s.dg, rows, cell_.grads * H_, ld, weights_[d].bias);
      if (projected_) {
        const E* raw = static_cast<const E*>(saved_[1].const_data_ptr()) + (d * a_.N + first_[d]) * H_;
        weight_gradient({weights_[d].w_hr, P_, H_, H_}, {s.dh_out, rows, P_, P_}, {raw, rows, H_, H_}, add);
      }
    }
    if (need_x_) {
      multiply<E>({dx_rows_ + first_[d] * a_.I, rows, a_.I, a_.I}, dgx, {w_ih_[d], G * H_, a_.I, a_.I},
                  a_.D > 1);
    }
  }

  Tensor like(const Tensor& t, const E* from) {
    Tensor out = torch::stable::empty_like(t);
    write(from, t.numel(), out, 0);
    return out;
  }

  Gradients results() {
    Gradients out;
    if (need_x_ && !direct_x_) {
      for_rows(table_.rows(), a_.I, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) write(dx_rows_ + r * a_.I, a_.I, dx_, scan_.rows.at(r) * a_.I);
      });
    }
    out.dx = need_x_ ? dx_ : empty({0}, a_.dtype);
    for (int j = 0; j < cell_.states; ++j) {
      const int64_t width = j ? H_ : P_;
      Tensor ds = torch::stable::empty_like(a_.states[j]);
      for (int64_t d = 0; d < a_.D; ++d) {
        for (int64_t i = 0; i < a_.B; ++i) {
          write(scan_.dir[d].state[j] + i * scan_.dir[d].ld_state, width, ds,
                (d * a_.B + table_.caller(i)) * width);
        }
      }
      out.dstates.push_back(std::move(ds));
    }
    for (int64_t d = 0; d < a_.D && need_params_; ++d) {
      const LayerArgs::Direction& p = a_.params[d];
      const WeightGradients<E>& w = weights_[d];
      out.dparams.push_back(like(p.w_ih, w.w_ih));
      out.dparams.push_back(like(p.w_hh, w.w_hh));
      if (p.b_ih) {
        E* db = arena_.get<E>(2 * cell_.gates * H_);
        for (int64_t g = 0; g < cell_.gates; ++g) {
          for (int64_t u = 0; u < H_; ++u) {
            db[g * H_ + u] = static_cast<E>(w.bias[g * H_ + u]);
            db[(cell_.gates + g) * H_ + u] = static_cast<E>(w.bias[cell_.hidden_grad[g] * H_ + u]);
          }
        }
        out.dparams.push_back(like(*p.b_ih, db));
        out.dparams.push_back(like(*p.b_hh, db + cell_.gates * H_));
      }
      if (p.w_hr) out.dparams.push_back(like(*p.w_hr, w.w_hr));
    }
    return out;
  }

  static constexpr int64_t kSmallWeight = 1 << 16, kSmallBlock = 64, kLargeBlock = 256;

  const CellKernels<E>& cell_;
  const LayerArgs a_;
  const RowTable table_;
  const bool need_x_, need_params_;
  const int64_t H_, P_;
  const bool projected_;
  const int64_t steps_;
  Arena arena_;
  Weights<E> w_{arena_, a_};
  Scan<E> scan_{};
  Tensor y_, dy_, dx_;
  TensorList dlast_, dseq_, seq_, saved_;
  const E* w_ih_[2];
  E* h_prev_[2];
  WeightGradients<E> weights_[2]{};
  int64_t weight_bytes_ = 0, t0_[2], t1_[2], first_[2], rows_[2];
  bool direct_x_ = false;
  E *x_rows_ = nullptr, *dx_rows_ = nullptr;
};

std::tuple<Tensor, TensorList, TensorList> layer_backward(StringHandle cell, OptionalTensor dy,
                                                          TensorList dlast, TensorList dseq, Tensor x,
                                                          TensorList states, TensorList params,
                                                          OptionalTensor lengths, OptionalTensor batch_sizes,
                                                          OptionalTensor reset, Tensor y, TensorList seq,
                                                          TensorList saved, bool need_x, bool need_params) {
  const std::string name = take_string(cell);
  check_dtype(x);
  const auto run = [&]<class E>(E) {
    return BackwardPass<E>(name, dy, dlast, dseq, x, states, params, lengths, batch_sizes, reset, y, seq,
                           saved, need_x, need_params)
        .run();
  };
  Gradients g = x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {std::move(g.dx), std::move(g.dstates), std::move(g.dparams)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer_backward", TORCH_BOX(&fastrnn::cpu::layer_backward));
}
