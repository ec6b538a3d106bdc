// fastrnn::decoder_backward on the CPU.
#include "decoder.h"

namespace fastrnn::cpu {
namespace {

// Without elements where not needed; so dw_q and dv where there is no such input.
struct DecoderGradients {
  Tensor dx, dfeed, dw_h, dkeys, dvalues, dw_q, dv;
  TensorList dstates, dparams;
};

// The gradients that are asked for besides those of states and feed; params: of all weights.
struct DecoderNeeds {
  bool x, params, keys, values;
};

template <class E>
class DecoderBackward : DecoderCall<E> {
  using Base = DecoderCall<E>;
  using Base::arena_, Base::cell_, Base::cells_, Base::data, Base::in_, Base::kernels_, Base::p_,
      Base::scans_, Base::weights_;

 public:
  DecoderBackward(const CellKernels<E>& cell, const DecoderInputs& in, const OptionalTensor& dout,
                  const TensorList& dlast, const OptionalTensor& dweights, const Tensor& out,
                  const Tensor& weights, const TensorList& saved, const DecoderNeeds& need)
      : Base(cell, in), need_(need), W_(cells_.width), blocks_(ceil_div(in.H, W_)) {
    const int64_t T = in.T, B = in.B, N = in.N, H = in.H;
    const auto get = [&](const char* name, const Tensor& t, const Shape& shape) {
      return expect(name, t, shape, in.dtype, true);
    };
    const size_t states = static_cast<size_t>(cell.states), each = this->each();
    STD_TORCH_CHECK(saved.size() == each * in.L + in.w_q.has_value(),
                    "decoder_backward needs what decoder saved: expected ", each * in.L + in.w_q.has_value(),
                    " tensors, got ", saved.size());
    STD_TORCH_CHECK(dlast.empty() || dlast.size() == states, "dlast must be empty or one for each state");
    out_ = get("out", out, {T, B, H});
    w_ = get("weights", weights, {B, T, in.S});
    if (dout) dout_ = get("dout", *dout, {T, B, H});
    if (dweights) dweights_ = get("dweights", *dweights, {B, T, in.S});
    for (const Tensor& t : dlast) dlast_.push_back(get("dlast", t, {in.L, B, H}));
    for (size_t i = 0; i < saved.size(); ++i) {
      const bool gates = i < each * in.L && i % each == states;
      saved_.push_back(get("saved", saved[i], {N, i == each * in.L ? in.K : gates ? cell.saved * H : H}));
    }
  }

  DecoderGradients run() {
    const int64_t L = in_.L, G = cell_.gates, H = in_.H, I = in_.I;
    rows_ = in_.N | 1;  // odd: an even one would send many panels to the same sets of a cache
    sequence_rows_ = in_.T;
    for (int64_t k = 0; k < L; ++k) layer(k);
    decoder();
    const Plan plan = this->plan(this->step_weights());
    run_team(plan.threads(), [&](const Team& team) {
      weights_.pack(team);
      kernels_.decode_backward(p_, plan.share(team));
    });
    for (int64_t k = 0; k < L && need_.params; ++k) layer_gradients(k);
    g_.dx = fresh(need_.x, {in_.T, in_.B, I});
    if (need_.x) input_gradient(G, H, I);
    attention_gradients();
    g_.dfeed = rows_of(p_.dfeed, p_.ld_feed, {in_.B, H});
    for (int j = 0; j < cell_.states; ++j) {
      Tensor ds = empty({L, in_.B, H}, in_.dtype);
      for (int64_t k = 0; k < L; ++k) {
        const Direction<E>& s = scans_[k].dir[0];
        for (int64_t b = 0; b < in_.B; ++b) write(s.state[j] + b * s.ld_state, H, ds, (k * in_.B + b) * H);
      }
      g_.dstates.push_back(std::move(ds));
    }
    return std::move(g_);
  }

 private:
  // saved's tensors of a layer: h, the other states, what else the cell saves.
  size_t each() const { return static_cast<size_t>(cell_.states) + (cell_.saved ? 1 : 0); }
  E* saved(int64_t k, int j) const { return data(saved_[k * each() + j]); }

  Tensor fresh(bool needed, const Shape& shape) const {
    return needed ? empty(shape, in_.dtype) : empty({0}, in_.dtype);
  }

  E* panels(int64_t columns) { return arena_.template get<E>(rows_ * ceil_div(columns, W_) * W_); }

  void layer(int64_t k) {
    const LayerArgs::Direction& p = in_.params[k];
    const int64_t B = in_.B, N = in_.N, H = in_.H, G = cell_.gates;
    Scan<E>& scan = scans_[k];
    Direction<E>& s = scan.dir[0];
    scan.k0 = 0;
    scan.k1 = in_.T;
    scan.panel_rows = rows_;
    for (int64_t stage = 0, gate0 = 0; stage < cell_.stages; gate0 += cell_.stage_gates[stage++]) {
      const int64_t rows = cell_.stage_gates[stage] * H;
      s.w[stage] = weights_.get(p.w_hh, gate0 * H * H, by_columns(1, H, rows, H));
    }
    s.ld_state = s.ld_mid = padded<E>(H);
    s.ld_ring = padded<E>(G * H);
    s.dy = {arena_.template get<E>(N * s.ld_state), s.ld_state, false};
    for (int j = 1; j < cell_.states; ++j) s.seq[j - 1] = saved(k, j);
    s.y = {saved(k, 0), H, false};
    s.saved = cell_.saved ? saved(k, cell_.states) : nullptr;
    s.h_prev = h_prev_.emplace_back(panels(H));
    s.dg = panels(cell_.grads * blocks_ * W_);
    if (cell_.stages == 2) s.mid_out = panels(H);
    for (E*& ring : s.ring) ring = arena_.template zeros<E>(B * s.ld_ring);
    s.last_ring = arena_.template zeros<E>(B * s.ld_ring);
    s.mid = arena_.template zeros<E>(B * s.ld_mid);
    s.dh = arena_.template zeros<E>(B * s.ld_state);
    for (int j = 0; j < cell_.states; ++j) {
      s.state[j] = arena_.template zeros<E>(B * s.ld_state);
      E* s0 = j ? arena_.template zeros<E>(B * s.ld_state) : nullptr;
      for (int64_t b = 0; b < B; ++b) {
        if (!dlast_.empty()) read(dlast_[j], (k * B + b) * H, H, s.state[j] + b * s.ld_state);
        if (j) read(in_.states[j], (k * B + b) * H, H, s0 + b * s.ld_state);
      }
      if (j) s.s0[j - 1] = s0;
    }
    to_panels(H, h_prev_[k], false, [&](int64_t t, int64_t b) {
      return t ? saved(k, 0) + ((t - 1) * B + b) * H : data(in_.states[0]) + (k * B + b) * H;
    });
  }

  void decoder() {
    const int64_t B = in_.B, S = in_.S, H = in_.H, K = in_.K, G = cell_.gates, I = in_.I;
    const auto wide = [&](int64_t ld) { return arena_.template zeros<E>(B * ld); };
    p_.out = data(out_);
    p_.weights = data(w_);
    p_.dout = dout_.defined() ? data(dout_) : nullptr;
    p_.dweights = dweights_.defined() ? data(dweights_) : nullptr;
    p_.ld_row = 2 * padded<E>(S);
    p_.row = arena_.template get<E>(B * p_.ld_row);
    for (E*& dz : p_.dz) dz = wide(p_.ld_feed);
    p_.dfeed = wide(p_.ld_feed);
    p_.panel = rows_;
    p_.sequence_panel = sequence_rows_;
    if (need_.params || need_.values) p_.dz_panels = panels(H);
    // Short memories leave the rest of theirs as it is: it must be zero.
    if (need_.values) p_.weights_panels = arena_.template zeros<E>(B * sequence_block());
    const Tensor& w0 = in_.params[0].w_ih;
    const auto transposed = [&](const Tensor& w, int64_t offset, int64_t units, int64_t rows, int64_t few) {
      return weights_.get(w, offset, by_columns(1, units, rows, w.size(1)), few);
    };
    constexpr int64_t kFew = Weights<E>::kFewRows;
    // Panels are not read by the dot product: what meets them is packed.
    p_.w_feed_t = transposed(w0, I, H, G * H, 0);
    p_.w_h_t = transposed(in_.w_h, 0, H, H, kFew);
    Weight<E>* below = arena_.template get<Weight<E>>(in_.L);
    for (int64_t k = 0; k < in_.L; ++k)
      below[k] = k ? transposed(in_.params[k].w_ih, 0, H, G * H, 0) : Weight<E>{};
    p_.w_below_t = below;
    if (need_.x) w_x_t_ = transposed(w0, 0, I, G * H, 0);
    if (in_.w_q) {
      p_.w_query_t = transposed(*in_.w_q, 0, H, K, kFew);
      p_.queries = data(saved_.back());
      p_.query = wide(p_.ld_query);
      p_.dquery = wide(p_.ld_query);
      if (need_.params) {
        p_.dquery_panels = panels(K);
        p_.dv = wide(p_.ld_query);
      }
      if (need_.keys) p_.dkeys = arena_.template zeros<E>(B * S * p_.ld_query);
    } else if (need_.keys) {
      p_.ds_panels = arena_.template zeros<E>(B * sequence_block());
    }
    if (!need_.params && (in_.w_q || !need_.keys)) return;
    h_top_ = panels(H);
    to_panels(H, h_top_, true, [&](int64_t t, int64_t b) { return saved(in_.L - 1, 0) + (t * B + b) * H; });
  }

  int64_t sequence_block() const { return ceil_div(in_.S, W_) * W_ * sequence_rows_; }

  // Rows (t, b) of a matrix into panels, of rows b*T + t where by_sequence, else t*B + b.
  template <class Row>
  void to_panels(int64_t columns, E* to, bool by_sequence, Row&& row) {
    for_rows(in_.N, columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t t = r / in_.B, b = r % in_.B, at = by_sequence ? b * in_.T + t : r;
        const E* from = row(t, b);
        cells_.to_panels({const_cast<E*>(from), 0, false}, columns, to + at * W_, rows_ * W_);
      }
    });
  }

  // out [units][columns of rows of ld] = the sum over all rows of a by b, a of one gate.
  void outer(const E* a, int64_t units, const E* b, int64_t columns, E* out, int64_t ld, int64_t gates) {
    const Outer<E> product{cells_, rows_, in_.N, gates};
    const int64_t share = product.columns_at_once(columns), blocks = ceil_div(units, W_);
    for (int64_t i = 0; i < gates * units && in_.N == 0; ++i) std::fill_n(out + i * ld, columns, E(0));
    for_rows(gates * blocks, in_.N * W_ * columns, [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < columns; c += share) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t gate = j / blocks;
          product(a + j * product.panel(), j % blocks, units, b + c * rows_, std::min(share, columns - c),
                  out + gate * units * ld + c, ld, false);
        }
      }
    });
  }

  void layer_gradients(int64_t k) {
    const LayerArgs::Direction& p = in_.params[k];
    const Direction<E>& s = scans_[k].dir[0];
    const int64_t B = in_.B, H = in_.H, I = in_.I, G = cell_.gates, width = p.w_ih.size(1);
    Tensor dw_ih = torch::stable::empty_like(p.w_ih), dw_hh = torch::stable::empty_like(p.w_hh);
    E* input = panels(std::max(I, H));
    if (k == 0) {
      const E *x = data(in_.x), *a = data(out_), *feed = data(in_.feed);
      to_panels(I, input, false, [&](int64_t t, int64_t b) { return x + (t * B + b) * I; });
      outer(s.dg, H, input, I, data(dw_ih), width, G);
      to_panels(H, input, false,
                [&](int64_t t, int64_t b) { return t ? a + ((t - 1) * B + b) * H : feed + b * H; });
      outer(s.dg, H, input, H, data(dw_ih) + I, width, G);
    } else {
      const E *y = saved(k - 1, 0), *drop = p_.drops ? p_.drops[k - 1] : nullptr;
      E* dropped = drop ? arena_.template get<E>(in_.N * H) : nullptr;
      for_rows(dropped ? in_.N * H : 0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) dropped[i] = y[i] * drop[i];
      });
      to_panels(H, input, false,
                [&](int64_t t, int64_t b) { return (dropped ? dropped : y) + (t * B + b) * H; });
      outer(s.dg, H, input, H, data(dw_ih), width, G);
    }
    // Gates whose recurrent part has a gradient of its own take it; the last stage's read mid.
    for (int64_t g = 0; g < G; ++g) {
      const bool of_mid = g >= cell_.stage_gates[0];
      outer(s.dg + cell_.hidden_grad[g] * blocks_ * rows_ * W_, H, of_mid ? s.mid_out : h_prev_[k], H,
            data(dw_hh) + g * H * H, H, 1);
    }
    std::vector<double> sums(cell_.grads * blocks_ * W_);
    for_rows(cell_.grads * blocks_, in_.N * W_, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) cells_.add_rows(s.dg + j * rows_ * W_, in_.N, &sums[j * W_]);
    });
    Tensor db_ih = empty({G * H}, in_.dtype), db_hh = empty({G * H}, in_.dtype);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t u = 0; u < H; ++u) {
        data(db_ih)[g * H + u] = static_cast<E>(sums[g * blocks_ * W_ + u]);
        data(db_hh)[g * H + u] = static_cast<E>(sums[cell_.hidden_grad[g] * blocks_ * W_ + u]);
      }
    }
    for (Tensor* t : {&dw_ih, &dw_hh, &db_ih, &db_hh}) g_.dparams.push_back(std::move(*t));
  }

  void input_gradient(int64_t G, int64_t H, int64_t I) {
    const InputGradient<E> p{scans_[0].dir[0].dg,     rows_ * W_, G, H, w_x_t_, I,
                             {data(g_.dx), I, false}, false};
    for_rows(in_.N, G * H * I, [&](int64_t begin, int64_t end) { cells_.input_gradient(p, begin, end); });
  }

  Tensor rows_of(const E* from, int64_t ld, const Shape& shape) const {
    Tensor out = empty(shape, in_.dtype);
    const int64_t rows = shape.begin()[0], width = shape.begin()[1];
    for (int64_t r = 0; r < rows; ++r) write(from + r * ld, width, out, r * width);
    return out;
  }

  void attention_gradients() {
    const int64_t T = in_.T, B = in_.B, S = in_.S, H = in_.H, K = in_.K;
    const bool of_query = in_.w_q && need_.params;
    g_.dw_h = fresh(need_.params, {H, H});
    if (need_.params) outer(p_.dz_panels, H, h_top_, H, data(g_.dw_h), H, 1);
    g_.dvalues = fresh(need_.values, {S, B, H});
    g_.dkeys = fresh(need_.keys, {S, B, K});
    g_.dw_q = fresh(of_query, {K, H});
    g_.dv = fresh(of_query, {K});
    // Of each sequence alone: its steps by the positions of its memory.
    const int64_t blocks = ceil_div(S, W_);
    const auto of_memory = [&](const E* a, const E* b, int64_t columns, Tensor& to) {
      for_rows(B * blocks, T * W_ * columns, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t i = j / blocks, block = j % blocks;
          const int lanes = static_cast<int>(std::min<int64_t>(S - block * W_, W_));
          cells_.outer_product({a + i * sequence_block() + block * W_ * sequence_rows_, b + i * T * W_,
                                rows_ * W_, T, 128, lanes, columns, data(to) + (block * W_ * B + i) * columns,
                                B * columns, false});
        }
      });
    };
    if (need_.values) of_memory(p_.weights_panels, p_.dz_panels, H, g_.dvalues);
    if (need_.keys && !in_.w_q) of_memory(p_.ds_panels, h_top_, K, g_.dkeys);
    for_rows(need_.keys && in_.w_q ? B * S : 0, K, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t b = j / S, s = j % S;
        write(p_.dkeys + j * p_.ld_query, K, g_.dkeys, (s * B + b) * K);
      }
    });
    if (!of_query) return;
    outer(p_.dquery_panels, K, h_top_, H, data(g_.dw_q), H, 1);
    std::vector<double> sums(K);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t u = 0; u < K; ++u) sums[u] += static_cast<double>(p_.dv[b * p_.ld_query + u]);
    std::transform(sums.begin(), sums.end(), data(g_.dv), [](double sum) { return static_cast<E>(sum); });
  }

  const DecoderNeeds need_;
  const int64_t W_, blocks_;  // of a panel; of H
  int64_t rows_, sequence_rows_;
  Tensor out_, w_, dout_, dweights_;
  TensorList dlast_, saved_;
  std::vector<E*> h_prev_;
  E* h_top_;
  Weight<E> w_x_t_;
  DecoderGradients g_;
};

std::tuple<Tensor, TensorList, Tensor, TensorList, Tensor, Tensor, Tensor, Tensor, Tensor> decoder_backward(
    StringHandle cell, OptionalTensor dout, TensorList dlast, OptionalTensor dweights, Tensor x,
    TensorList states, Tensor feed, TensorList params, Tensor w_h, Tensor keys, Tensor values,
    OptionalTensor w_q, OptionalTensor v, OptionalTensor mask, TensorList drops, double scale, Tensor out,
    Tensor weights, TensorList saved, bool need_x, bool need_params, bool need_keys, bool need_values) {
  const std::string name = take_string(cell);
  const auto run = [&]<class E>(E) {
    const CellKernels<E>& k = cell_kernels<E>(name);
    const DecoderInputs in = check_decoder({k.gates, k.states}, x, states, feed, params, w_h, keys, values,
                                           w_q, v, mask, drops, scale);
    const DecoderNeeds need{need_x, need_params, need_keys, need_values};
    return DecoderBackward<E>(k, in, dout, dlast, dweights, out, weights, saved, need).run();
  };
  DecoderGradients g = dtype_of(x) == ScalarType::Double ? run(double{}) : run(float{});
  return {std::move(g.dx),      std::move(g.dstates), std::move(g.dfeed),
          std::move(g.dparams), std::move(g.dw_h),    std::move(g.dkeys),
          std::move(g.dvalues), std::move(g.dw_q),    std::move(g.dv)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("decoder_backward", TORCH_BOX(&fastrnn::cpu::decoder_backward));
}
