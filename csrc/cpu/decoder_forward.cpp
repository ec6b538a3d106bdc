// fastrnn::decoder on the CPU.
#include "decoder.h"

namespace fastrnn::cpu {

DecoderInputs check_decoder(const CellShape& cell, const Tensor& x, const TensorList& states,
                            const Tensor& feed, const TensorList& params, const Tensor& w_h,
                            const Tensor& keys, const Tensor& values, const OptionalTensor& w_q,
                            const OptionalTensor& v, const OptionalTensor& mask, const TensorList& drops,
                            double scale) {
  DecoderInputs a;
  a.dtype = dtype_of(x);
  STD_TORCH_CHECK(a.dtype == ScalarType::Float || a.dtype == ScalarType::Double,
                  "the decoder takes float32 and float64");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) > 0, "x must be [T, B, I] of at least one step");
  STD_TORCH_CHECK(feed.dim() == 2 && keys.dim() == 3, "feed must be [B, H], keys [S, B, K]");
  STD_TORCH_CHECK(!params.empty() && params.size() % 4 == 0,
                  "params must be (w_ih, w_hh, b_ih, b_hh) of each layer, got ", params.size(), " tensors");
  STD_TORCH_CHECK(static_cast<int>(states.size()) == cell.states, "expected ", cell.states, " states, got ",
                  states.size());
  a.T = x.size(0);
  a.B = x.size(1);
  a.N = a.T * a.B;
  a.I = x.size(2);
  a.H = feed.size(1);
  a.S = keys.size(0);
  a.K = keys.size(2);
  a.L = static_cast<int64_t>(params.size() / 4);
  a.scale = scale;
  check_sizes("T, S and B", {a.T, a.S, a.B});
  check_sizes("the longer of T and S, B and the widest of I, H and K",
              {std::max(a.T, a.S), a.B, std::max({a.I, a.H, a.K})});
  check_sizes("H and the widest of I, H and K", {a.H, std::max({a.I, a.H, a.K})});
  const auto get = [&](const char* name, const Tensor& t, const Shape& shape) {
    return expect(name, t, shape, a.dtype, true);
  };
  const auto maybe = [&](const char* name, const OptionalTensor& t, const Shape& shape) {
    return t ? OptionalTensor(get(name, *t, shape)) : OptionalTensor();
  };
  a.x = get("x", x, {a.T, a.B, a.I});
  a.feed = get("feed", feed, {a.B, a.H});
  for (const Tensor& s : states) a.states.push_back(get("states", s, {a.L, a.B, a.H}));
  const int64_t rows = cell.gates * a.H;
  for (int64_t k = 0; k < a.L; ++k) {
    const Tensor* p = params.data() + 4 * k;
    LayerArgs::Direction layer;
    layer.w_ih = get("weight_ih", p[0], {rows, k ? a.H : a.I + a.H});
    layer.w_hh = get("weight_hh", p[1], {rows, a.H});
    layer.b_ih = get("bias_ih", p[2], {rows});
    layer.b_hh = get("bias_hh", p[3], {rows});
    a.params.push_back(std::move(layer));
  }
  a.w_h = get("w_h", w_h, {a.H, a.H});
  a.keys = get("keys", keys, {a.S, a.B, a.K});
  a.values = get("values", values, {a.S, a.B, a.H});
  a.w_q = maybe("w_q", w_q, {a.K, a.H});
  a.v = maybe("v", v, {a.K});
  STD_TORCH_CHECK(a.w_q || a.K == a.H, "without w_q keys must be as wide as h, ", a.H, ", got ", a.K);
  STD_TORCH_CHECK(a.w_q.has_value() == a.v.has_value(), "the additive score needs both w_q and v");
  if (mask) a.mask = expect("mask", *mask, {a.B, a.S}, ScalarType::Bool, true);
  STD_TORCH_CHECK(drops.empty() || static_cast<int64_t>(drops.size()) == a.L - 1,
                  "drops must be of each layer but the last, got ", drops.size());
  for (const Tensor& t : drops) a.drops.push_back(get("drops", t, {a.T, a.B, a.H}));
  return a;
}

namespace {

struct DecoderOutputs {
  Tensor out, weights;
  TensorList last, saved;
};

template <class E>
class DecoderForward : DecoderCall<E> {
  using Base = DecoderCall<E>;
  using Base::arena_, Base::cell_, Base::cells_, Base::data, Base::in_, Base::kernels_, Base::p_,
      Base::scans_, Base::weights_;

 public:
  using Base::Base;

  DecoderOutputs run(bool save) {
    const int64_t T = in_.T, B = in_.B, N = in_.N, H = in_.H, L = in_.L, K = in_.K;
    out_.out = empty({T, B, H}, in_.dtype);
    out_.weights = empty({B, T, in_.S}, in_.dtype);
    // saved: each layer's h, its other states, what else its cell saves; then the queries of the additive
    // score.
    for (int64_t k = 0; k < L; ++k) layer(k, save);
    p_.out = data(out_.out);
    p_.weights = data(out_.weights);
    if (in_.w_q) {
      p_.query = arena_.template zeros<E>(B * p_.ld_query);
      if (save) p_.queries = data(out_.saved.emplace_back(pooled<E>({N, K})));
    }
    if (p_.drops) {
      E** dropped = arena_.template get<E*>(L);
      for (int64_t k = 0; k + 1 < L; ++k) {
        dropped[k] = arena_.template get<E>(N * H);
        scans_[k + 1].x.data = dropped[k];
      }
      p_.dropped = dropped;
    }
    p_.ld_row = padded<E>(in_.S);
    p_.row = arena_.template get<E>(B * p_.ld_row);
    p_.mixed = arena_.template zeros<E>(B * p_.ld_feed);
    for (E*& feed : p_.feed) feed = arena_.template zeros<E>(B * p_.ld_feed);
    for (int64_t b = 0; b < B; ++b) read(in_.feed, b * H, H, p_.feed[0] + b * p_.ld_feed);
    p_.w_h = weights_.get(in_.w_h, 0, by_rows(1, H, H, H));
    if (in_.w_q) p_.w_query = weights_.get(*in_.w_q, 0, by_rows(1, K, H, H));

    const Plan plan = this->plan(this->step_weights());
    run_team(plan.threads(), [&](const Team& team) {
      weights_.pack(team);
      kernels_.decode(p_, plan.share(team));
    });

    for (int j = 0; j < cell_.states; ++j) out_.last.push_back(empty({L, B, H}, in_.dtype));
    for (int64_t k = 0; k < L; ++k) {
      const Direction<E>& s = scans_[k].dir[0];
      for (int64_t b = 0; b < B; ++b) {
        write(static_cast<const E*>(s.y.data) + ((T - 1) * B + b) * H, H, out_.last[0], (k * B + b) * H);
        for (int j = 1; j < cell_.states; ++j)
          write(s.state[j] + b * s.ld_state, H, out_.last[j], (k * B + b) * H);
      }
    }
    return std::move(out_);
  }

 private:
  void layer(int64_t k, bool save) {
    const LayerArgs a = in_.sizes(k);
    const LayerArgs::Direction& p = in_.params[k];
    const int64_t B = in_.B, N = in_.N, H = in_.H, G = cell_.gates, width = p.w_ih.size(1);
    Scan<E>& scan = scans_[k];
    Direction<E>& s = scan.dir[0];
    const auto rows = [&](int64_t columns) {
      return save ? data(out_.saved.emplace_back(pooled<E>({N, columns})))
                  : arena_.template get<E>(N * columns);
    };
    scan.I = a.I;
    scan.x = {{k ? scans_[k - 1].dir[0].y.data : in_.x.mutable_data_ptr(), a.I, false}, 0, 0};
    scan.steps = k ? 1 : input_steps<E, E>(a, G * H);
    for (int64_t stage = 0, gate0 = 0; stage < cell_.stages; gate0 += cell_.stage_gates[stage++]) {
      const int64_t gates = cell_.stage_gates[stage], from = gate0 * H * width;
      s.w_x[stage] = weights_.get(p.w_ih, from, by_rows(gates, H, a.I, width));
      s.w[stage] = weights_.get(p.w_hh, gate0 * H * H, by_rows(gates, H, H, H));
      if (k == 0) {
        p_.w_feed[stage] = weights_.get(p.w_ih, from + a.I, by_rows(gates, H, H, width));
      }
    }
    s.ld_state = s.ld_b = padded<E>(H);
    s.ld_ring = s.ld_mid = padded<E>(H);
    E* bx = arena_.template zeros<E>(G * s.ld_state);
    E* bh = arena_.template zeros<E>(G * s.ld_state);
    read_biases(p, G, H, bx, bh);
    s.bx = bx;
    s.bh = bh;
    s.y = {rows(H), H, false};
    for (int j = 1; j < cell_.states; ++j) s.seq[j - 1] = save ? rows(H) : nullptr;
    s.save = save && cell_.saved ? rows(cell_.saved * H) : nullptr;
    s.gx = arena_.template get<E>(scan.steps * B * G * s.ld_state);
    for (E*& ring : s.ring) ring = arena_.template zeros<E>(B * s.ld_ring);
    for (int j = 1; j < cell_.states; ++j) s.state[j] = arena_.template zeros<E>(B * s.ld_state);
    if (cell_.stages == 2) s.mid = arena_.template zeros<E>(B * s.ld_mid);
    for (int64_t b = 0; b < B; ++b) {
      read(in_.states[0], (k * B + b) * H, H, s.ring[0] + b * s.ld_ring);
      for (int j = 1; j < cell_.states; ++j)
        read(in_.states[j], (k * B + b) * H, H, s.state[j] + b * s.ld_state);
    }
  }

  DecoderOutputs out_;
};

std::tuple<Tensor, TensorList, Tensor, TensorList> decoder(StringHandle cell, Tensor x, TensorList states,
                                                           Tensor feed, TensorList params, Tensor w_h,
                                                           Tensor keys, Tensor values, OptionalTensor w_q,
                                                           OptionalTensor v, OptionalTensor mask,
                                                           TensorList drops, double scale, bool save) {
  const std::string name = take_string(cell);
  const auto run = [&]<class E>(E) {
    const CellKernels<E>& k = cell_kernels<E>(name);
    const DecoderInputs in = check_decoder({k.gates, k.states}, x, states, feed, params, w_h, keys, values,
                                           w_q, v, mask, drops, scale);
    return DecoderForward<E>(k, in).run(save);
  };
  DecoderOutputs out = dtype_of(x) == ScalarType::Double ? run(double{}) : run(float{});
  return {std::move(out.out), std::move(out.last), std::move(out.weights), std::move(out.saved)};
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("decoder", TORCH_BOX(&fastrnn::cpu::decoder)); }
