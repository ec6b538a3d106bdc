// fastrnn::layer_backward on the CPU.
#include "outer.h"

namespace fastrnn::cpu {
namespace {

struct Gradients {
  Tensor dx;
  TensorList dstates, dparams;
};

// One direction's weight gradients, in E until the end of the call.
template <class E>
struct WeightGradients {
  E *w_ih, *w_hh, *w_hr;  // [G*H, I], [G*H, P], [P, H]
  double* bias;           // [kGrads][H, whole vectors]
  bool begun;             // something has been written to them
};

template <class E, class A = E>
class BackwardPass {
 public:
  BackwardPass(const std::string& name, const OptionalTensor& dy, const TensorList& dlast,
               const TensorList& dseq, const Tensor& x, const TensorList& states, const TensorList& params,
               const OptionalTensor& lengths, const OptionalTensor& batch_sizes, const OptionalTensor& reset,
               const Tensor& y, const TensorList& seq, const TensorList& saved, bool need_x, bool need_params)
      : cell_(cell_kernels<E, A>(name)),
        a_(check_layer({cell_.gates, cell_.states, cell_.saved}, x, states, params, lengths, batch_sizes,
                       reset)),
        table_(a_),
        need_x_(need_x),
        need_params_(need_params),
        H_(a_.H),
        P_(a_.P),
        projected_(a_.params[0].w_hr.has_value()),
        W_(kernels_.panel),
        steps_(chunk_steps(a_, cell_.grads * a_.H * sizeof(A))) {
    const int64_t D = a_.D, N = a_.N;
    const size_t others = static_cast<size_t>(cell_.states - 1);
    const size_t kept = !cell_.saved ? 0 : projected_ ? 2 : 1;
    STD_TORCH_CHECK(seq.size() == others && saved.size() == kept,
                    "layer_backward needs what layer saved: expected ", others, " sequences of states and ",
                    kept, " saved tensors, got ", seq.size(), " and ", saved.size());
    STD_TORCH_CHECK(dlast.empty() || dlast.size() == others + 1, "dlast must be empty or one for each state");
    STD_TORCH_CHECK(dseq.empty() || dseq.size() == others,
                    "dseq must be empty or one for each state after h");
    const Shape y_shape = a_.row_shape(D * P_), seq_shape = a_.seq_shape();
    y_ = expect("y", y, y_shape, a_.dtype);
    if (dy) dy_ = (steps_ < a_.T ? checked : expect)("dy", *dy, y_shape, a_.dtype);
    if (cell_.saved) saved_.push_back(expect("saved", saved[0], {D, N, cell_.saved * H_}, kScalar<E>));
    if (projected_) saved_.push_back(expect("saved", saved[1], {D, N, H_}, kScalar<E>));
    for (const Tensor& t : seq) seq_.push_back(expect("seq", t, seq_shape, kScalar<E>));
    for (size_t j = 0; j < dlast.size(); ++j)
      dlast_.push_back(expect("dlast", dlast[j], {D, a_.B, j ? H_ : P_}, a_.dtype));
    for (const Tensor& t : dseq) dseq_.push_back(expect("dseq", t, seq_shape, kScalar<E>));
  }

  Gradients run() {
    prepare();
    const Plan plan = backward_plan<E, A>(a_, cell_.gates);
    for (scan_.k0 = 0; scan_.k0 < a_.T; scan_.k0 = scan_.k1) {
      scan_.k1 = std::min(scan_.k0 + steps_, a_.T);
      for (int64_t d = 0; d < a_.D; ++d) {
        chunk(d);
        if (dy_.defined()) chunk_dy(d);
        gather_h_prev(d);
      }
      run_team(plan.threads(), [&](const Team& team) {
        if (scan_.k0 == 0) w_.pack(team);
        cell_.backward(scan_, plan.share(team));
      });
      for (int64_t d = 0; d < a_.D; ++d) {
        if (need_params_) weight_gradients(d);
        if (need_x_) input_gradient(d);
      }
    }
    run_team(plan.threads(), [&](const Team& team) { cell_.finish(scan_, plan.share(team)); });
    return results();
  }

 private:
  static Tensor checked(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
    STD_TORCH_CHECK(has_shape(t, shape) && t.is_cpu() && dtype_of(t) == dtype, name,
                    " must be as the forward pass gave it, in shape, dtype and device");
    return t;
  }
  static Tensor expect(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
    return dense(checked(name, t, shape, dtype));
  }

  void prepare() {
    const int64_t D = a_.D, N = a_.N, B = a_.B, G = cell_.gates;
    const bool bf16 = a_.dtype == ScalarType::BFloat16;
    scan_.rows = {a_.T, B, table_.active, table_.offset,
                  table_.outside.empty() ? nullptr : table_.outside.data()};
    scan_.x = input_of<E>(a_);
    scan_.directions = static_cast<int>(D);
    scan_.H = H_;
    scan_.P = P_;
    const int64_t ld = padded<E>(std::max(H_, P_)), ld_mid = padded<A>(std::max(H_, P_)),
                  ld_ring = padded<A>(G * H_), most = ceil_div(steps_ * B, kDepth<A>) * kDepth<A> | 1;
    const int64_t wide = ceil_div(H_, W_) * W_, wide_p = ceil_div(P_, W_) * W_;
    scan_.panel_rows = most;  // odd: an even one would send many panels to the same sets of a cache
    for (int64_t d = 0; d < D; ++d) {
      const LayerArgs::Direction& p = a_.params[d];
      Direction<E, A>& s = scan_.dir[d];
      s.reverse = d == 1;
      if constexpr (kDepth<A> > 1) {
        // Each gate's part begins a panel of dg, and is padded like it.
        w_ih_[d] =
            need_x_ ? w_.get(p.w_ih, 0, {nullptr, false, G, H_ * a_.I, a_.I, 1, H_, a_.I}, 0) : Weight<A>{};
      } else if (need_x_) {  // by whole columns, since panels are not read by the dot product
        const int64_t few = a_.I > 1 ? Weights<E, A>::kFewRows : 0;
        w_ih_[d] = w_.get(p.w_ih, 0, {nullptr, false, 1, 0, a_.I, 1, G * H_, a_.I}, few);
      }
      for (int64_t stage = 0, gate0 = 0; stage < cell_.stages; gate0 += cell_.stage_gates[stage++]) {
        const int64_t rows = cell_.stage_gates[stage] * H_;
        s.w[stage] = w_.get(p.w_hh, gate0 * H_ * P_, {nullptr, false, 1, 0, P_, 1, rows, P_});
      }
      if (projected_) s.w_proj = w_.get(*p.w_hr, 0, {nullptr, false, 1, 0, H_, 1, P_, H_});
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
      s.y = {static_cast<char*>(y_.mutable_data_ptr()) + d * P_ * y_.element_size(), D * P_, bf16};
      if (cell_.saved) s.saved = static_cast<const E*>(saved_[0].const_data_ptr()) + d * N * cell_.saved * H_;
      s.h_prev = h_prev_[d] = arena_.get<A>(most * wide_p);
      // What pads a gate's columns is multiplied by zeros.
      const bool padded_columns = kDepth<A> > 1 && wide != H_;
      s.dg = padded_columns ? arena_.zeros<A>(most * cell_.grads * wide)
                            : arena_.get<A>(most * cell_.grads * wide);
      if (cell_.stages == 2) s.mid_out = mid_out_[d] = arena_.get<A>(most * wide);
      if (projected_) s.dh_out = arena_.get<A>(most * wide_p);
      s.ld_state = ld;
      s.ld_mid = ld_mid;
      s.ld_ring = ld_ring;
      for (int j = 0; j < 2; ++j) s.ring[j] = arena_.zeros<A>(B * ld_ring);
      s.last_ring = arena_.zeros<A>(B * ld_ring);
      s.mid = arena_.zeros<A>(B * ld_mid);
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
        const auto of = [&](const Tensor& w) { return gradient(w, d); };
        weights_[d] = {of(p.w_ih), of(p.w_hh), projected_ ? of(*p.w_hr) : nullptr,
                       arena_.zeros<double>(cell_.grads * wide), false};
      }
    }
    if (need_params_) x_panels_ = arena_.get<A>(most * ceil_div(a_.I, W_) * W_);
    if (need_params_ && projected_) raw_panels_ = arena_.get<A>(most * wide);
    direct_x_ = (!bf16 || D == 1) && table_.outside.empty();
    if (need_x_) {
      const Shape shape = a_.row_shape(a_.I);
      dx_ = a_.lengths ? zeros(a_.x, shape, a_.dtype) : empty(shape, a_.dtype);
      E* rows = direct_x_ ? nullptr : arena_.get<E>(table_.rows() * a_.I);
      dx_rows_ = direct_x_ ? Border<E>{dx_.mutable_data_ptr(), a_.I, bf16} : Border<E>{rows, a_.I, false};
      if (D > 1) std::fill_n(static_cast<E*>(dx_rows_.data), table_.rows() * a_.I, E(0));
    }
  }

  // Where a weight's gradient is summed: in the result, where that is of E.
  E* gradient(const Tensor& w, int64_t d) {
    Tensor& out = dparams_[d].emplace_back(torch::stable::empty_like(w));
    return dtype_of(w) == kScalar<E> ? static_cast<E*>(out.mutable_data_ptr()) : arena_.get<E>(w.numel());
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

  // A dy that is not contiguous, as an expanded or a transposed one, is made so a chunk at a time.
  void chunk_dy(int64_t d) {
    const bool whole = dy_.is_contiguous();
    if (whole && scan_.k0 > 0) return;
    const int64_t begin = a_.packed() ? first_[d] : t0_[d];
    const int64_t count = a_.packed() ? rows_[d] : t1_[d] - t0_[d];
    dy_chunk_[d] = whole ? dy_ : dense(torch::stable::narrow(dy_, 0, begin, count));
    Direction<E, A>& s = scan_.dir[d];
    s.dy = at(dy_chunk_[d], d * P_);
    s.dy.ld = a_.D * P_;
    s.dy_first = whole ? 0 : begin * (a_.packed() ? 1 : a_.B);
  }

  // The h that entered each step of the chunk: what left the step before, the first state, or 0 after a
  // reset.
  void gather_h_prev(int64_t d) {
    const Direction<E, A>& s = scan_.dir[d];
    for_rows(t1_[d] - t0_[d], std::max<int64_t>(a_.B, 1) * P_, [&](int64_t begin, int64_t end) {
      for (int64_t t = t0_[d] + begin; t < t0_[d] + end; ++t) {
        const int64_t before = s.reverse ? t + 1 : t - 1;
        const int64_t known = before >= 0 && before < a_.T ? table_.active[before] : 0;
        for (int64_t i = 0; i < table_.active[t]; ++i) {
          const int64_t row = table_.offset[t] + i;
          Border<E> h{};
          if (s.keep && !s.keep[row]) {
            // stays null: zeros
          } else if (i < known) {
            h = at(y_, scan_.rows.at(table_.offset[before] + i) * a_.D * P_ + d * P_);
          } else {
            h = at(a_.states[0], (d * a_.B + table_.caller(i)) * P_);
          }
          kernels_.to_panels(h, P_, h_prev_[d] + (row - first_[d]) * W_, panel());
        }
      }
    });
  }

  int64_t panel() const { return scan_.panel_rows * W_; }

  static Border<E> at(const Tensor& t, int64_t element) {
    return {static_cast<char*>(t.mutable_data_ptr()) + element * t.element_size(), 0,
            dtype_of(t) == ScalarType::BFloat16};
  }

  // The chunk's rows of a matrix, into panels.
  template <class Row>
  void gather(int64_t d, int64_t columns, A* to, Row&& row) {
    for_rows(rows_[d], columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        kernels_.to_panels(row(first_[d] + r), columns, to + r * W_, panel());
    });
  }

  // Panels that an outer product is to read as its second factor.
  void pair_rows(int64_t d, int64_t columns, A* panels) {
    if (!kernels_.pair_rows) return;
    for_rows(ceil_div(columns, W_), rows_[d] * W_, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) kernels_.pair_rows(panels + j * panel(), rows_[d]);
    });
  }

  // Panels [j0, j1) of gradients by all that their gates were multiplied with.
  void weight_gradients(int64_t d, int64_t j0, int64_t j1) {
    const Direction<E, A>& s = scan_.dir[d];
    WeightGradients<E>& w = weights_[d];
    const int64_t G = cell_.gates, blocks = ceil_div(H_, W_), first_stage = cell_.stage_gates[0];
    const auto sweep = [&](const A* b, int64_t columns, E* out, int64_t g0, int64_t g1, bool recurrent) {
      const int64_t share = Outer<E, A>{kernels_, scan_.panel_rows, rows_[d], G}.columns_at_once(columns);
      for (int64_t c = 0; c < columns; c += share) {
        for (int64_t j = j0; j < j1; ++j) {
          const int64_t column = j / blocks, block = j % blocks;
          for (int64_t g = g0; g < g1; ++g) {
            if ((recurrent ? cell_.hidden_grad[g] : g) != column) continue;
            outer(d, s.dg + j * panel(), block, H_, b + c * scan_.panel_rows, std::min(share, columns - c),
                  out + g * H_ * columns + c, columns);
          }
        }
      }
    };
    sweep(x_panels_, a_.I, w.w_ih, 0, G, false);
    sweep(h_prev_[d], P_, w.w_hh, 0, first_stage, true);
    if (cell_.stages == 2) sweep(mid_out_[d], P_, w.w_hh, first_stage, G, true);
    for (int64_t j = j0; j < j1; ++j) kernels_.add_rows(s.dg + j * panel(), rows_[d], w.bias + j * W_);
  }

  void outer(int64_t d, const A* a, int64_t block, int64_t units, const A* b, int64_t columns, E* out,
             int64_t ld_out) {
    const Outer<E, A> product{kernels_, scan_.panel_rows, rows_[d], cell_.gates};
    product(a, block, units, b, columns, out, ld_out, weights_[d].begun);
  }

  void weight_gradients(int64_t d) {
    const int64_t rows = rows_[d], I = a_.I;
    if (rows == 0) return;
    gather(d, I, x_panels_, [&](int64_t row) { return scan_.x.row(scan_.rows.at(row)); });
    pair_rows(d, I, x_panels_);
    pair_rows(d, P_, h_prev_[d]);
    if (cell_.stages == 2) pair_rows(d, H_, mid_out_[d]);
    for_rows(cell_.grads * ceil_div(H_, W_), rows * W_ * (I + P_),
             [&](int64_t begin, int64_t end) { weight_gradients(d, begin, end); });
    if (projected_) {
      const int64_t from = d * a_.N;
      gather(d, H_, raw_panels_, [&](int64_t row) { return at(saved_[1], (from + row) * H_); });
      pair_rows(d, H_, raw_panels_);
      for_rows(ceil_div(P_, W_), rows * W_ * H_, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          outer(d, scan_.dir[d].dh_out + j * panel(), j, P_, raw_panels_, H_, weights_[d].w_hr, H_);
      });
    }
    weights_[d].begun = true;
  }

  void input_gradient(int64_t d) {
    Border<E> out = dx_rows_;
    const int64_t before = first_[d] * a_.I * (out.bf16 ? sizeof(Bf16) : sizeof(E));
    out.data = static_cast<char*>(out.data) + before;
    const InputGradient<E, A> p{scan_.dir[d].dg, panel(), cell_.gates, H_, w_ih_[d], a_.I, out, a_.D > 1};
    for_rows(rows_[d], cell_.gates * H_ * a_.I,
             [&](int64_t begin, int64_t end) { kernels_.input_gradient(p, begin, end); });
  }

  Gradients results() {
    Gradients out;
    if (need_x_ && !direct_x_) {
      const E* rows = static_cast<const E*>(dx_rows_.data);
      for_rows(table_.rows(), a_.I, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) write(rows + r * a_.I, a_.I, dx_, scan_.rows.at(r) * a_.I);
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
      finish_gradient(dparams_[d][0], w.w_ih, w.begun);
      finish_gradient(dparams_[d][1], w.w_hh, w.begun);
      if (p.w_hr) finish_gradient(dparams_[d][2], w.w_hr, w.begun);
      out.dparams.insert(out.dparams.end(), dparams_[d].begin(), dparams_[d].begin() + 2);
      if (p.b_ih) {
        out.dparams.push_back(bias_gradient(*p.b_ih, w.bias, [](int64_t g) { return g; }));
        out.dparams.push_back(
            bias_gradient(*p.b_hh, w.bias, [&](int64_t g) { return cell_.hidden_grad[g]; }));
      }
      if (p.w_hr) out.dparams.push_back(dparams_[d][2]);
    }
    return out;
  }

  void finish_gradient(const Tensor& out, E* sums, bool begun) {
    const int64_t n = out.numel();
    if (!begun) std::fill_n(sums, n, E(0));
    if (sums != out.const_data_ptr()) {
      for_rows(n, 1, [&](int64_t begin, int64_t end) { write(sums + begin, end - begin, out, begin); });
    }
  }

  template <class Column>
  Tensor bias_gradient(const Tensor& bias, const double* sums, Column&& column) {
    Tensor out = torch::stable::empty_like(bias);
    std::vector<E> row(H_);
    for (int64_t g = 0; g < cell_.gates; ++g) {
      const double* from = sums + column(g) * ceil_div(H_, W_) * W_;
      std::transform(from, from + H_, row.begin(), [](double sum) { return static_cast<E>(sum); });
      write(row.data(), H_, out, g * H_);
    }
    return out;
  }

  const Kernels<E, A>& kernels_ = kernels<E, A>();
  const CellKernels<E, A>& cell_;
  const LayerArgs a_;
  const RowTable table_;
  const bool need_x_, need_params_;
  const int64_t H_, P_;
  const bool projected_;
  const int64_t W_, steps_;  // W_: columns in a panel
  Arena arena_;
  Weights<E, A> w_{arena_, a_};
  Scan<E, A> scan_{};
  Tensor y_, dy_, dy_chunk_[2], dx_;
  TensorList dlast_, dseq_, seq_, saved_, dparams_[2];
  Weight<A> w_ih_[2];
  A *h_prev_[2], *mid_out_[2];
  WeightGradients<E> weights_[2]{};
  int64_t t0_[2], t1_[2], first_[2], rows_[2];
  bool direct_x_ = false;
  A *x_panels_ = nullptr, *raw_panels_ = nullptr;
  Border<E> dx_rows_{};
};

std::tuple<Tensor, TensorList, TensorList> layer_backward(StringHandle cell, OptionalTensor dy,
                                                          TensorList dlast, TensorList dseq, Tensor x,
                                                          TensorList states, TensorList params,
                                                          OptionalTensor lengths, OptionalTensor batch_sizes,
                                                          OptionalTensor reset, Tensor y, TensorList seq,
                                                          TensorList saved, bool need_x, bool need_params) {
  const std::string name = take_string(cell);
  check_dtype(x);
  const auto run = [&]<class E, class A>(E, A) {
    return BackwardPass<E, A>(name, dy, dlast, dseq, x, states, params, lengths, batch_sizes, reset, y, seq,
                              saved, need_x, need_params)
        .run();
  };
  Gradients g = dtype_of(x) == ScalarType::Double ? run(double{}, double{})
                : multiplies_bf16(x)              ? run(float{}, Bf16{})
                                                  : run(float{}, float{});
  return {std::move(g.dx), std::move(g.dstates), std::move(g.dparams)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer_backward", TORCH_BOX(&fastrnn::cpu::layer_backward));
}
