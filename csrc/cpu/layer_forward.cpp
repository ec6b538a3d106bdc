// fastrnn::layer on the CPU.
#include "forward_pass.h"

namespace fastrnn::cpu {
namespace {

Outputs run_layer(const std::string& name, const Tensor& x, const TensorList& states,
                  const TensorList& params, const Masks& masks, bool save, bool return_states) {
  return by_type(dtype_of(x), [&]<class E, class A>(E, A) {
    const CellKernels<E, A>& kernels = cell_kernels<E, A>(name);
    LayerArgs a = check_layer({kernels.gates, kernels.states}, x, states, params, masks.lengths,
                              masks.batch_sizes, masks.reset);
    return forward<E, A>(kernels, std::move(a), nullptr, save, return_states);
  });
}

Outputs run_packed(const std::string& name, const Tensor& x, const TensorList& states, const Tensor& weights,
                   const Masks& masks, bool return_states) {
  STD_TORCH_CHECK(dtype_of(weights) == dtype_of(x), "the weights were packed for another dtype of input");
  return by_type(dtype_of(x), [&]<class E, class A>(E, A) {
    const CellKernels<E, A>& kernels = cell_kernels<E, A>(name);
    const PackedLayer<E, A> packed(kernels, weights);
    LayerArgs a = check_input({kernels.gates, kernels.states}, packed.sizes(), x, states, masks.lengths,
                              masks.batch_sizes, masks.reset);
    return forward<E, A>(kernels, std::move(a), &packed, false, return_states);
  });
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
                          int64_t D, bool int8, int64_t layers) {
  const std::string name = take_string(cell);
  STD_TORCH_CHECK(x.dim() > 0 && std::min({T, B, N, H, P}) >= 0 && D > 0 && layers > 0,
                  "plan takes sizes that are not negative, and a direction and a layer or more");
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
    const CellKernels<E, A>& cell = cell_kernels<E, A>(name);
    return std::tuple(forward_plan<E, A>(a, cell.gates, int8), backward_plan<E, A>(a, cell.gates),
                      input_steps<E, A>(a, cell.gates * H), joint_of(a, cell, int8));
  };
  const auto [plan, back, cached, joint] =
      by_type(dtype_of(x) == ScalarType::Half ? ScalarType::Float : dtype_of(x), of);
  const Plan::Split split = plan.split(plan.threads());
  const Plan::Split backward = back.split(back.threads());
  const Plan::Wave wave = plan.wave(layers, cached);
  return {plan.threads(),      split.directions, split.rows,    split.units, second_level_cache(),
          wave.groups,         wave.units,       wave.steps,    joint,       back.threads(),
          backward.directions, backward.rows,    backward.units};
}

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const auto& s : instruction_sets()) names.emplace_back(s.name);
  return names;
}
std::string instruction_set_name() { return instruction_set().name; }
std::string force_instruction_set(StringHandle name) { return use_instruction_set(take_string(name)); }

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
  m.impl("use_instruction_set", TORCH_BOX(&fastrnn::cpu::force_instruction_set));
}
