// fastrnn::layer_backward on the CPU.
#include "outer.h"
#include "vanished.h"

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
};

// n elements, `stride` apart.
template <class T>
void copy_strided(const char* from, int64_t n, int64_t stride, char* to) {
  if (stride == 1) return static_cast<void>(std::memcpy(to, from, n * sizeof(T)));
  for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * sizeof(T), from + i * stride * sizeof(T), sizeof(T));
}

template <class E, class A = E>
class BackwardPass {
 public:
  BackwardPass(const std::string& name, const OptionalTensor& dy, const TensorList& dlast,
               const TensorList& dseq, const Tensor& x, const TensorList& states, const TensorList& params,
               const OptionalTensor& lengths, const OptionalTensor& batch_sizes, const OptionalTensor& reset,
               const Tensor& y, const TensorList& seq, const TensorList& saved, bool need_x, bool need_params)
      : cell_(cell_kernels<E, A>(name)),
        a_(check_layer({cell_.gates, cell_.states}, x, states, params, lengths, batch_sizes, reset)),
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
    y_ = expect("y", y, y_shape, a_.dtype, true);
    if (dy) dy_ = checked("dy", *dy, y_shape, a_.dtype, true);
    if (cell_.saved) saved_.push_back(expect("saved", saved[0], {D, N, cell_.saved * H_}, kScalar<E>, true));
    if (projected_) saved_.push_back(expect("saved", saved[1], {D, N, H_}, kScalar<E>, true));
    for (const Tensor& t : seq) seq_.push_back(expect("seq", t, seq_shape, kScalar<E>, true));
    for (size_t j = 0; j < dlast.size(); ++j)
      dlast_.push_back(expect("dlast", dlast[j], {D, a_.B, j ? H_ : P_}, a_.dtype, true));
    for (const Tensor& t : dseq) dseq_.push_back(expect("dseq", t, seq_shape, kScalar<E>, true));
  }

  // One team from the first chunk to the last: where other processes take the cores in turns, each region of
  // its own may wait for a thread that has lost its core.
  Gradients run() {
    prepare();
    const Plan plan = backward_plan<E, A>(a_, cell_.gates);
    const int64_t of_weights = need_params_ ? cell_.grads * H_ * (a_.I + P_) : 0;
    const int64_t of_input = need_x_ ? cell_.gates * H_ * a_.I : 0;
    const int threads = std::max(plan.threads(), product_threads(a_.D * a_.N * (of_weights + of_input)));
    run_team(threads, [&](const Team& team) {
      w_.pack(team);
      const Share share = plan.share(team);
      Scan<E, A> scan = scan_;
      bool begun[2]{};  // the direction's weight gradients have sums to add to
      std::optional<bool> constants;
      for (scan.k0 = 0; scan.k0 < a_.T; scan.k0 = scan.k1) {
        scan.k1 = std::min(scan.k0 + steps_, a_.T);
        Share mine = share;
        bool live[2];
        for (int64_t d = 0; d < a_.D; ++d) {
          const Chunk c(scan, d);
          if (dy_.defined()) place_dy(team, c, scan.dir[d]);
          live[d] = !vanished_(team, scan, c, dy_rows_[d] != nullptr, constants);
          if (live[d])
            gather_h_prev(team, c);
          else if (d == 0)
            mine.dir0 = std::max(mine.dir0, 1);
          else
            mine.dir1 = std::min(mine.dir1, 1);
        }
        team.meet();
        cell_.backward(scan, mine);
        for (int64_t d = 0; d < a_.D; ++d) {
          const Chunk c(scan, d);
          // Both directions' factors have one buffer: the first's products are over before the second's are
          // gathered.
          if (d > 0) team.meet();
          if (need_params_ && live[d]) gather_factors(team, c);
          team.meet();
          if (need_params_ && live[d]) weight_gradients(team, c, begun[d]);
          if (need_x_) input_gradient(team, c, live[d]);
        }
        team.meet();
      }
      cell_.finish(scan, share);
      finish(team, begun);
    });
    return results();
  }

 private:
  void prepare() {
    const int64_t D = a_.D, N = a_.N, B = a_.B, G = cell_.gates;
    const bool bf16 = a_.dtype == ScalarType::BFloat16;
    scan_.rows = {a_.T, B, table_.active, table_.offset,
                  table_.outside.empty() ? nullptr : table_.outside.data()};
    scan_.x = input_of<E>(a_);
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
        w_ih_[d] = need_x_ ? w_.get(p.w_ih, 0, by_columns(G, a_.I, H_, a_.I), 0) : Weight<A>{};
      } else if (need_x_) {  // by whole columns, since panels are not read by the dot product
        const int64_t few = a_.I > 1 ? Weights<E, A>::kFewRows : 0;
        w_ih_[d] = w_.get(p.w_ih, 0, by_columns(1, a_.I, G * H_, a_.I), few);
      }
      for (int64_t stage = 0, gate0 = 0; stage < cell_.stages; gate0 += cell_.stage_gates[stage++]) {
        const int64_t rows = cell_.stage_gates[stage] * H_;
        s.w[stage] = w_.get(p.w_hh, gate0 * H_ * P_, by_columns(1, P_, rows, P_));
      }
      if (projected_) s.w_proj = w_.get(*p.w_hr, 0, by_columns(1, H_, P_, H_));
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
      if (dy_.defined() && dy_.is_contiguous()) {
        s.dy = {static_cast<char*>(dy_.mutable_data_ptr()) + d * P_ * dy_.element_size(), D * P_, bf16};
      } else if (dy_.defined()) {
        dy_rows_[d] = arena_.get<char>(steps_ * B * P_ * dy_.element_size());
        s.dy = {dy_rows_[d], P_, bf16};
      }
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
      s.dh = arena_.zeros<E>(B * ld);
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
                       arena_.zeros<double>(cell_.grads * wide)};
      }
    }
    if (need_params_) x_panels_ = arena_.get<A>(most * ceil_div(a_.I, W_) * W_);
    if (need_params_ && projected_) raw_panels_ = arena_.get<A>(most * wide);
    direct_x_ = (!bf16 || D == 1) && table_.outside.empty();
    if (need_x_) {
      const Shape shape = a_.row_shape(a_.I);
      dx_ = table_.ragged() ? zeros(a_.x, shape, a_.dtype) : empty(shape, a_.dtype);
      E* rows = direct_x_ ? nullptr : arena_.get<E>(table_.rows() * a_.I);
      dx_rows_ = direct_x_ ? Border<E>{dx_.mutable_data_ptr(), a_.I, bf16} : Border<E>{rows, a_.I, false};
    }
  }

  // Where a weight's gradient is summed: in the result, where that is of E.
  E* gradient(const Tensor& w, int64_t d) {
    Tensor& out = dparams_[d].emplace_back(empty({w.size(0), w.size(1)}, a_.dtype));
    return dtype_of(w) == kScalar<E> ? static_cast<E*>(out.mutable_data_ptr()) : arena_.get<E>(w.numel());
  }

  // A dy that is not contiguous, as an expanded or a transposed one, is copied a chunk at a time.
  void place_dy(const Team& team, const Chunk& c, Direction<E, A>& s) const {
    char* const to = dy_rows_[c.d];
    if (!to) return;
    const int64_t each = a_.packed() ? 1 : a_.B;  // rows of a step, or of a packed row
    const int64_t size = dy_.element_size(), last = dy_.stride(dy_.dim() - 1);
    const int64_t of_step = dy_.stride(0) * size, of_row = a_.packed() ? 0 : dy_.stride(1) * size;
    const auto copy = size == 2   ? copy_strided<uint16_t>
                      : size == 4 ? copy_strided<uint32_t>
                                  : copy_strided<uint64_t>;
    s.dy_first = a_.packed() ? c.first : c.t0 * each;
    const char* const from = static_cast<const char*>(dy_.const_data_ptr()) + c.d * P_ * last * size;
    const Part rows(team, a_.packed() ? c.rows : (c.t1 - c.t0) * each);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t row = s.dy_first + r;
      copy(from + row / each * of_step + row % each * of_row, P_, last, to + r * P_ * size);
    }
  }

  // The h that entered each step of the chunk: what left the step before, the first state, or 0 after a
  // reset.
  void gather_h_prev(const Team& team, const Chunk& c) const {
    const int64_t d = c.d;
    const Direction<E, A>& s = scan_.dir[d];
    const Border<E> first = rows_of(a_.states[0], d * a_.B, P_);
    const Part steps(team, c.t1 - c.t0);
    for (int64_t t = c.t0 + steps.begin; t < c.t0 + steps.end; ++t) {
      const int64_t before = s.reverse ? t + 1 : t - 1;
      const int64_t known = before >= 0 && before < a_.T ? table_.active[before] : 0;
      for (int64_t i = 0; i < table_.active[t]; ++i) {
        const int64_t row = table_.offset[t] + i;
        Border<E> h{};
        if (s.keep && !s.keep[row]) {
          // stays null: zeros
        } else if (i < known) {
          h = s.y.row(scan_.rows.at(table_.offset[before] + i));
        } else {
          h = first.row(table_.caller(i));
        }
        kernels_.to_panels(h, P_, h_prev_[d] + (row - c.first) * W_, panel());
      }
    }
  }

  int64_t panel() const { return scan_.panel_rows * W_; }

  // Of a matrix, from row `first` on.
  static Border<E> rows_of(const Tensor& t, int64_t first, int64_t width) {
    return {static_cast<char*>(t.mutable_data_ptr()) + first * width * t.element_size(), width,
            dtype_of(t) == ScalarType::BFloat16};
  }

  // The chunk's rows of a matrix, into panels.
  template <class Row>
  void gather(const Team& team, const Chunk& c, int64_t columns, A* to, Row&& row) const {
    const Part part(team, c.rows);
    for (int64_t r = part.begin; r < part.end; ++r)
      kernels_.to_panels(row(c.first + r), columns, to + r * W_, panel());
  }

  // Panels that an outer product is to read as its second factor.
  void pair_rows(const Team& team, const Chunk& c, int64_t columns, A* panels) const {
    const Part part(team, ceil_div(columns, W_));
    for (int64_t j = part.begin; j < part.end; ++j) kernels_.pair_rows(panels + j * panel(), c.rows);
  }

  // What the gradients of the gates will be multiplied with.
  void gather_factors(const Team& team, const Chunk& c) const {
    const int64_t from = c.d * a_.N;
    gather(team, c, a_.I, x_panels_, [&](int64_t row) { return scan_.x.row(scan_.rows.at(row)); });
    if (projected_) {
      const Border<E> raw = rows_of(saved_[1], from, H_);
      gather(team, c, H_, raw_panels_, [&](int64_t row) { return raw.row(row); });
    }
    if (!kernels_.pair_rows || c.rows == 0) return;
    team.meet();
    pair_rows(team, c, a_.I, x_panels_);
    pair_rows(team, c, P_, h_prev_[c.d]);
    if (cell_.stages == 2) pair_rows(team, c, H_, mid_out_[c.d]);
    if (projected_) pair_rows(team, c, H_, raw_panels_);
  }

  // Of all that the gates were multiplied with.
  void weight_gradients(const Team& team, const Chunk& c, bool& begun) const {
    if (c.rows == 0) return;
    const Direction<E, A>& s = scan_.dir[c.d];
    const WeightGradients<E>& w = weights_[c.d];
    const int64_t G = cell_.gates, blocks = ceil_div(H_, W_), first_stage = cell_.stage_gates[0];
    const Outer<E, A> outer{kernels_, scan_.panel_rows, c.rows, G};
    // Each sweep is shared out by its own products: a GRU's columns of gradients have two, or one.
    const auto sweep = [&](const A* b, int64_t columns, E* out, int64_t g0, int64_t g1, bool recurrent) {
      const Part part(team, blocks * (g1 - g0));
      const int64_t share = outer.columns_at_once(columns);
      for (int64_t k = 0; k < columns; k += share) {
        for (int64_t i = part.begin; i < part.end; ++i) {
          const int64_t g = g0 + i / blocks, block = i % blocks;
          const int64_t column = recurrent ? cell_.hidden_grad[g] : g;
          outer(s.dg + (column * blocks + block) * panel(), block, H_, b + k * scan_.panel_rows,
                std::min(share, columns - k), out + g * H_ * columns + k, columns, begun);
        }
      }
    };
    sweep(x_panels_, a_.I, w.w_ih, 0, G, false);
    sweep(h_prev_[c.d], P_, w.w_hh, 0, first_stage, true);
    if (cell_.stages == 2) sweep(mid_out_[c.d], P_, w.w_hh, first_stage, G, true);
    const Part panels(team, cell_.grads * blocks);
    for (int64_t j = panels.begin; j < panels.end; ++j)
      kernels_.add_rows(s.dg + j * panel(), c.rows, w.bias + j * W_);
    if (projected_) {
      const Part own(team, ceil_div(P_, W_));
      for (int64_t j = own.begin; j < own.end; ++j)
        outer(s.dh_out + j * panel(), j, P_, raw_panels_, H_, w.w_hr, H_, begun);
    }
    begun = true;
  }

  // The rows that the other direction has been to are added to. Not live: zeros where nobody has been.
  void input_gradient(const Team& team, const Chunk& c, bool live) const {
    Border<E> out = dx_rows_;
    const int64_t size = a_.I * (out.bf16 ? sizeof(Bf16) : sizeof(E));  // of a row
    out.data = static_cast<char*>(out.data) + c.first * size;
    InputGradient<E, A> p{scan_.dir[c.d].dg, panel(), cell_.gates, H_, w_ih_[c.d], a_.I, out, false};
    const Part part(team, c.rows);
    const auto rows = [&](int64_t begin, int64_t end, bool add) {
      p.add = add;
      begin = std::max(begin, part.begin), end = std::min(end, part.end);
      if (live) return kernels_.input_gradient(p, begin, end);
      if (begin < end && size > 0 && !add)
        std::memset(static_cast<char*>(out.data) + begin * size, 0, (end - begin) * size);
    };
    if (a_.D == 1) return rows(0, c.rows, false);
    // The first direction does [T - k1, T - k0), after which the second does [k0, k1): that has been to [0,
    // k0) by then, and the first to [T - k1, T). Both are cut where T - t1 is.
    const int64_t edge = table_.offset[std::clamp(a_.T - c.t1, c.t0, c.t1)] - c.first;
    rows(0, edge, c.d == 0);
    rows(edge, c.rows, c.d == 1);
  }

  // What is not summed where it is wanted.
  void finish(const Team& team, const bool* begun) const {
    if (need_x_ && !direct_x_) {
      const E* rows = static_cast<const E*>(dx_rows_.data);
      const Part part(team, table_.rows());
      for (int64_t r = part.begin; r < part.end; ++r)
        write(rows + r * a_.I, a_.I, dx_, scan_.rows.at(r) * a_.I);
    }
    for (int64_t d = 0; d < a_.D && need_params_; ++d) {
      const WeightGradients<E>& w = weights_[d];
      E* const sums[] = {w.w_ih, w.w_hh, w.w_hr};
      for (size_t j = 0; j < dparams_[d].size(); ++j) {
        const Tensor& out = dparams_[d][j];
        const Part part(team, out.numel());
        if (!begun[d]) std::fill(sums[j] + part.begin, sums[j] + part.end, E(0));
        if (sums[j] != out.const_data_ptr())
          write(sums[j] + part.begin, part.end - part.begin, out, part.begin);
      }
    }
  }

  Gradients results() {
    Gradients out;
    out.dx = need_x_ ? dx_ : empty({0}, a_.dtype);
    for (int j = 0; j < cell_.states; ++j) {
      const int64_t width = j ? H_ : P_;
      Tensor ds = empty({a_.D, a_.B, width}, a_.dtype);
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

  template <class Column>
  Tensor bias_gradient(const Tensor& bias, const double* sums, Column&& column) {
    Tensor out = empty({bias.size(0)}, a_.dtype);
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
  Tensor y_, dy_, dx_;
  TensorList dlast_, dseq_, seq_, saved_, dparams_[2];
  Weight<A> w_ih_[2];
  A *h_prev_[2], *mid_out_[2];
  WeightGradients<E> weights_[2]{};
  char* dy_rows_[2]{};  // the chunk's, where dy is not contiguous
  Vanished<E, A> vanished_{a_, cell_.states, saved_};
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
  Gradients g = by_type(dtype_of(x), [&]<class E, class A>(E, A) {
    return BackwardPass<E, A>(name, dy, dlast, dseq, x, states, params, lengths, batch_sizes, reset, y, seq,
                              saved, need_x, need_params)
        .run();
  });
  return {std::move(g.dx), std::move(g.dstates), std::move(g.dparams)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer_backward", TORCH_BOX(&fastrnn::cpu::layer_backward));
}
