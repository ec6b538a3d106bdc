// fastrnn::layer on the CPU.
#include <atomic>

#include "packed.h"

namespace fastrnn::cpu {
namespace {

struct Outputs {
  Tensor y;
  TensorList last, seq, saved;
};

template <class E, class A>
Plan forward_plan(const LayerArgs& a, int64_t G, bool int8) {
  // A product of int8 weights takes a quarter of the time.
  const int64_t row_work = G * a.H / (int8 ? 4 : 1);
  const int64_t weight_bytes = (G + a.projected) * a.H * a.P * (int8 ? 1 : sizeof(A));
  return Plan(a, a.B * row_work * a.P, a.D * a.N * row_work * (a.I + a.P), weight_bytes,
              ceil_div(a.H, kernels<E, A>().width));
}

// packed: null where the weights are `a.params`.
template <class E, class A = E>
Outputs forward(const CellKernels<E, A>& cell, const LayerArgs& a, const PackedLayer<E, A>* packed, bool save,
                bool return_states) {
  const RowTable table(a);
  const int64_t H = a.H, P = a.P, D = a.D, N = a.N, G = cell.gates;
  const bool projected = a.projected, bf16 = a.dtype == ScalarType::BFloat16;
  const bool int8 = packed && packed->int8();
  Arena arena;

  Outputs out;
  const auto fresh = [&](const Shape& shape, ScalarType dtype) {
    return a.lengths ? zeros(a.x, shape, dtype) : empty(shape, dtype);
  };
  out.y = fresh(a.row_shape(D * P), a.dtype);
  out.last.reserve(cell.states);
  for (int j = 0; j < cell.states; ++j) out.last.push_back(empty({D, a.B, j ? H : P}, a.dtype));
  if (save || return_states) {
    for (int j = 1; j < cell.states; ++j) out.seq.push_back(fresh(a.seq_shape(), kScalar<E>));
  }
  const bool save_gates = save && cell.saved;
  if (save_gates) {
    out.saved.push_back(empty({D, N, cell.saved * H}, kScalar<E>));
    if (projected) out.saved.push_back(empty({D, N, H}, kScalar<E>));
  }

  Scan<E, A> scan{};
  scan.rows = {a.T, a.B, table.active, table.offset, table.outside.empty() ? nullptr : table.outside.data()};
  scan.directions = static_cast<int>(D);
  scan.H = H;
  scan.P = P;
  const int64_t ld = padded<E>(H), ld_h = padded<A>(P), ld_mid = padded<A>(H), columns = G * H;
  const int64_t ld_gx = padded<E>(columns);
  Weights<E, A> weights(arena, a);
  using Packing = Weights<E, A>;
  const int64_t few = a.B <= Packing::kFewSequences ? Packing::kFewRowsOfFew : Packing::kFewRows;
  const bool direct = bf16 == (sizeof(A) == 2) && a.I % kDepth<A> == 0 && table.outside.empty();
  // The cache may still hold where the call before left off.
  static std::atomic<unsigned> sweeps{0};
  scan.sweeps = sweeps.fetch_add(static_cast<unsigned>(a.T), std::memory_order_relaxed);
  scan.I = a.I;
  scan.x = {a.x.mutable_data_ptr(), a.I, bf16};
  scan.steps = input_steps(a, columns, sizeof(E));
  const int64_t most_rows = scan.steps * a.B;
  for (int64_t d = 0; d < D; ++d) {
    Direction<E, A>& s = scan.dir[d];
    s.reverse = d == 1;
    if (packed) packed->direction(d, s);
    for (int64_t stage = 0, gate0 = 0; stage < cell.stages && !packed; gate0 += cell.stage_gates[stage++]) {
      const LayerArgs::Direction& p = a.params[d];
      const int64_t gates = cell.stage_gates[stage];
      s.w_x[stage] = weights.get(p.w_ih, gate0 * H * a.I, {nullptr, false, gates, H * a.I, H, a.I, a.I, 1});
      s.w[stage] = weights.get(p.w_hh, gate0 * H * P, {nullptr, false, gates, H * P, H, P, P, 1}, few);
    }
    s.ld_x = padded<A>(a.I);
    s.x_rows = direct ? nullptr : arena.get<A>(most_rows * s.ld_x);
    if (!packed) {
      if (projected) s.w_proj = weights.get(*a.params[d].w_hr, 0, {nullptr, false, 1, 0, P, H, H, 1});
      E* bx = arena.zeros<E>(G * ld);
      E* bh = arena.zeros<E>(G * ld);
      read_biases(a.params[d], G, H, bx, bh);
      s.bx = bx;
      s.bh = bh;
    }
    s.save = save_gates;
    s.ld_gates = save_gates ? cell.saved * H : ld_gx;
    s.gates = save_gates ? static_cast<E*>(out.saved[0].mutable_data_ptr()) + d * N * s.ld_gates
                         : arena.get<E>(most_rows * ld_gx);
    for (int j = 1; j < cell.states; ++j) {
      s.seq[j - 1] =
          out.seq.empty() ? nullptr : static_cast<E*>(out.seq[j - 1].mutable_data_ptr()) + d * N * H;
    }
    s.raw = save_gates && projected ? static_cast<E*>(out.saved[1].mutable_data_ptr()) + d * N * H : nullptr;
    s.y = {static_cast<char*>(out.y.mutable_data_ptr()) + d * P * out.y.element_size(), D * P, bf16};
    if (a.reset) {
      uint8_t* keep = arena.get<uint8_t>(N);
      const bool* cut = static_cast<const bool*>(a.reset->const_data_ptr());
      fill_keep(table, a, s.reverse, cut, keep);
      s.keep = keep;
    }
    s.ld_state = ld;
    s.ld_ring = ld_h;
    for (int j = 0; j < 2; ++j) s.ring[j] = arena.zeros<A>(a.B * ld_h);
    for (int j = 1; j < cell.states; ++j) s.state[j] = arena.zeros<E>(a.B * ld);
    if (projected || cell.stages == 2) s.mid = arena.zeros<A>(a.B * ld_mid);
    s.ld_mid = ld_mid;
    for (int64_t i = 0; i < a.B; ++i) {
      // In reverse no reset cuts a first state: the boundary lies past the sequence's end.
      if (!s.reverse && s.keep && i < table.active[0] && !s.keep[i]) continue;
      read(a.states[0], (d * a.B + table.caller(i)) * P, P, s.ring[0] + i * ld_h);
      std::memcpy(s.ring[1] + i * ld_h, s.ring[0] + i * ld_h, P * sizeof(A));
      for (int j = 1; j < cell.states; ++j) {
        read(a.states[j], (d * a.B + table.caller(i)) * H, H, s.state[j] + i * ld);
      }
    }
  }

  const Plan plan = forward_plan<E, A>(a, G, int8);
  const int64_t quantized = int8 ? most_rows * int8_row(std::max({a.I, P, H})) : 0;
  float* scratch = int8 ? arena.get<float>(plan.threads() * quantized) : nullptr;
  run_team(plan.threads(), [&](const Team& team) {
    weights.pack(team);
    Share share = plan.share(team);
    share.quantized = scratch + team.member * quantized;
    cell.forward(scan, share);
  });

  // h_n is y at each sequence's own end; the other states are where the scan left them.
  const size_t element = out.y.element_size();
  for (int64_t d = 0; d < D; ++d) {
    const Direction<E, A>& s = scan.dir[d];
    for (int64_t i = 0; i < a.B; ++i) {
      const int64_t to = d * a.B + table.caller(i), length = table.length(i);
      char* h = static_cast<char*>(out.last[0].mutable_data_ptr()) + to * P * element;
      const int64_t end = length == 0 ? 0 : table.offset[s.reverse ? 0 : length - 1] + i;
      const char* from = length == 0
                             ? static_cast<const char*>(a.states[0].const_data_ptr()) + to * P * element
                             : static_cast<const char*>(s.y.data) + scan.rows.at(end) * s.y.ld * element;
      if (P > 0) std::memcpy(h, from, P * element);
      for (int j = 1; j < cell.states; ++j) write(s.state[j] + i * ld, H, out.last[j], to * H);
    }
  }
  return out;
}

// The masks of a call; none: all absent.
struct Masks {
  OptionalTensor lengths, batch_sizes, reset;
};

Outputs run_layer(const std::string& name, const Tensor& x, const TensorList& states,
                  const TensorList& params, const Masks& masks, bool save, bool return_states) {
  check_dtype(x);
  const auto run = [&]<class E, class A>(E, A) {
    const CellKernels<E, A>& kernels = cell_kernels<E, A>(name);
    const LayerArgs a = check_layer({kernels.gates, kernels.states, kernels.saved}, x, states, params,
                                    masks.lengths, masks.batch_sizes, masks.reset);
    return forward<E, A>(kernels, a, nullptr, save, return_states);
  };
  return dtype_of(x) == ScalarType::Double ? run(double{}, double{})
         : multiplies_bf16(x)              ? run(float{}, Bf16{})
                                           : run(float{}, float{});
}

Outputs run_packed(const std::string& name, const Tensor& x, const TensorList& states, const Tensor& weights,
                   const Masks& masks, bool return_states) {
  check_dtype(x);
  STD_TORCH_CHECK(dtype_of(weights) == dtype_of(x), "the weights were packed for another dtype of input");
  const auto run = [&]<class E, class A>(E, A) {
    const CellKernels<E, A>& kernels = cell_kernels<E, A>(name);
    const PackedLayer<E, A> packed(kernels, weights);
    const LayerArgs a = check_input({kernels.gates, kernels.states, kernels.saved}, packed.sizes(), x, states,
                                    masks.lengths, masks.batch_sizes, masks.reset);
    return forward<E, A>(kernels, a, &packed, false, return_states);
  };
  return dtype_of(x) == ScalarType::Double ? run(double{}, double{})
         : multiplies_bf16(x)              ? run(float{}, Bf16{})
                                           : run(float{}, float{});
}

// The operators, as ops.cpp has them.

std::tuple<Tensor, TensorList, TensorList, TensorList> layer(StringHandle cell, Tensor x, TensorList states,
                                                             TensorList params, OptionalTensor lengths,
                                                             OptionalTensor batch_sizes, OptionalTensor reset,
                                                             bool save, bool return_states) {
  Outputs out =
      run_layer(take_string(cell), x, states, params, {lengths, batch_sizes, reset}, save, return_states);
  return {std::move(out.y), std::move(out.last), std::move(out.seq), std::move(out.saved)};
}

std::tuple<Tensor, TensorList, TensorList> layer_packed(StringHandle cell, Tensor x, TensorList states,
                                                        Tensor weights, OptionalTensor lengths,
                                                        OptionalTensor batch_sizes, OptionalTensor reset,
                                                        bool return_states) {
  Outputs out =
      run_packed(take_string(cell), x, states, weights, {lengths, batch_sizes, reset}, return_states);
  return {std::move(out.y), std::move(out.last), std::move(out.seq)};
}

std::tuple<Tensor, Tensor, OptionalTensor> stream(StringHandle cell, Tensor x, Tensor h, OptionalTensor c,
                                                  Tensor p0, OptionalTensor p1, OptionalTensor p2,
                                                  OptionalTensor p3, OptionalTensor p4) {
  const std::string name = take_string(cell);
  TensorList states, params;
  bool ended = false;
  states.reserve(2);
  params.reserve(5);
  states.push_back(std::move(h));
  params.push_back(std::move(p0));
  if (c) states.push_back(std::move(*c));
  for (OptionalTensor* p : {&p1, &p2, &p3, &p4}) {
    // A hole would turn a layer into another: one without its biases, say.
    STD_TORCH_CHECK(!*p || !ended, "stream takes params without holes");
    if (*p) params.push_back(std::move(**p));
    ended = !*p;
  }
  Outputs out = params.size() > 1 ? run_layer(name, x, states, params, {}, false, false)
                                  : run_packed(name, x, states, params[0], {}, false);
  OptionalTensor c_n;
  if (out.last.size() > 1) c_n = std::move(out.last[1]);
  return {std::move(out.y), std::move(out.last[0]), std::move(c_n)};
}

std::vector<int64_t> plan(StringHandle cell, Tensor x, int64_t T, int64_t B, int64_t N, int64_t H, int64_t P,
                          int64_t D, bool int8) {
  const std::string name = take_string(cell);
  LayerArgs a{};
  a.T = T;
  a.B = B;
  a.N = N;
  a.I = x.size(-1);
  a.H = H;
  a.P = P;
  a.D = D;
  a.projected = P != H;
  const auto of = [&]<class E, class A>(E, A) {
    return forward_plan<E, A>(a, cell_kernels<E, A>(name).gates, int8);
  };
  const Plan plan = dtype_of(x) == ScalarType::Double ? of(double{}, double{})
                    : multiplies_bf16(x)              ? of(float{}, Bf16{})
                                                      : of(float{}, float{});
  const Plan::Split split = plan.split(plan.threads());
  return {plan.threads(), split.directions, split.rows, split.units, second_level_cache()};
}

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const auto& s : instruction_sets()) names.emplace_back(s.name);
  return names;
}
std::string instruction_set_name() { return instruction_set().name; }

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("layer", TORCH_BOX(&fastrnn::cpu::layer));
  m.impl("layer_packed", TORCH_BOX(&fastrnn::cpu::layer_packed));
  m.impl("stream", TORCH_BOX(&fastrnn::cpu::stream));
}
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&fastrnn::cpu::plan));
  m.impl("instruction_sets", TORCH_BOX(&fastrnn::cpu::instruction_set_names));
  m.impl("instruction_set", TORCH_BOX(&fastrnn::cpu::instruction_set_name));
}
