// fastrnn::stack on the CPU: all layers of one direction, without gradients.
#include <optional>

#include "forward_pass.h"

namespace fastrnn::cpu {
namespace {

template <class E, class A>
class Stack {
 public:
  Stack(const std::string& name, TensorList states, TensorList params, const Masks& masks)
      : cell_(cell_kernels<E, A>(name)),
        states_(std::move(states)),
        params_(std::move(params)),
        masks_(masks) {
    STD_TORCH_CHECK(!states_.empty(), "a stack needs states");
    for (Tensor& s : states_) {
      STD_TORCH_CHECK(s.dim() == 3, "states must have 3 dimensions [L, B, P]");
      s = dense(s);
    }
    layers_ = states_[0].size(0);
    STD_TORCH_CHECK(layers_ > 0 && !params_.empty() && params_.size() % layers_ == 0,
                    "params must be a multiple of ", layers_, " layers, got ", params_.size());
    for (const Tensor& s : states_) {
      STD_TORCH_CHECK(s.size(0) == layers_, "states must be of ", layers_, " layers, got ", s.size(0));
      last_.push_back(empty({layers_, s.size(1), s.size(2)}, dtype_of(s)));
    }
  }

  std::tuple<Tensor, TensorList> run(const Tensor& x) {
    LayerArgs first = args(0, x);
    const bool int8 = packed_ && packed_->int8();
    const Plan plan = forward_plan<E, A>(first, cell_.gates, int8);
    const Plan::Wave wave = plan.wave(layers_, input_steps(first, cell_.gates * first.H, sizeof(E)));
    Tensor y = wave.groups > 1 ? side_by_side(std::move(first), wave) : one_by_one(std::move(first));
    return {std::move(y), std::move(last_)};
  }

 private:
  // Of a layer whose input is x; packed_ is then that layer's.
  LayerArgs args(int64_t layer, const Tensor& x) {
    const CellShape shape{cell_.gates, cell_.states, cell_.saved};
    const size_t each = params_.size() / layers_;
    TensorList own;
    for (Tensor& s : states_) own.push_back(torch::stable::narrow(s, 0, layer, 1));
    if (each == 1) {
      Tensor& weights = params_[layer];
      STD_TORCH_CHECK(dtype_of(weights) == dtype_of(x), "the weights were packed for another dtype of input");
      weights = dense(weights);  // a copy, if it is one, lives as long as the scans that read it
      packed_.emplace(cell_, weights);
      return check_input(shape, packed_->sizes(), x, own, masks_.lengths, masks_.batch_sizes, masks_.reset);
    }
    const auto begin = params_.begin() + layer * each;
    return check_layer(shape, x, own, {begin, begin + each}, masks_.lengths, masks_.batch_sizes,
                       masks_.reset);
  }
  const PackedLayer<E, A>* packed() const { return packed_ ? &*packed_ : nullptr; }

  Tensor one_by_one(LayerArgs first) {
    Outputs out = forward<E, A>(cell_, std::move(first), packed(), false, false);
    keep(0, out);
    for (int64_t layer = 1; layer < layers_; ++layer) {
      LayerArgs a = args(layer, out.y);  // before packed(), which is then this layer's
      out = forward<E, A>(cell_, std::move(a), packed(), false, false);
      keep(layer, out);
    }
    return out.y;
  }

  Tensor side_by_side(LayerArgs first, const Plan::Wave& wave) {
    Arena arena;
    std::vector<std::unique_ptr<ForwardPass<E, A>>> passes;
    int64_t quantized = 0;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      LayerArgs a = layer ? args(layer, passes.back()->y()) : std::move(first);
      passes.push_back(std::make_unique<ForwardPass<E, A>>(arena, cell_, std::move(a), packed(), false, false,
                                                           wave.steps));
      quantized = std::max(quantized, passes.back()->quantized());
    }
    const int64_t T = passes[0]->args().T, B = passes[0]->args().B, chunks = ceil_div(T, wave.steps);
    const int threads = wave.groups * wave.units;
    float* scratch = arena.get<float>(threads * quantized);
    // Of each member, which moves them from chunk to chunk; made here, as a team's body must not throw.
    std::vector<Scan<E, A>> scans;
    scans.reserve(threads * layers_);
    for (int member = 0; member < threads; ++member) {
      for (const auto& pass : passes) scans.push_back(pass->scan());
    }
    run_team(threads, [&](const Team& team) {
      for (auto& pass : passes) pass->pack(team);
      // Of the threads that came, perhaps fewer than were asked for.
      const int groups = std::min(wave.groups, team.size), units = team.size / groups;
      const int group = std::min(team.member / units, groups - 1), part = team.member - group * units;
      // Where they do not divide, the last ones only meet.
      Scan<E, A>* own = scans.data() + team.member * layers_;
      const int64_t begin = layers_ * group / groups;
      const int64_t end = part < units ? layers_ * (group + 1) / groups : begin;
      const Share share{
          0, 1, 0, B, part, units, team.group(team.member - part), scratch + team.member * quantized};
      for (int64_t turn = 0; turn < chunks + groups - 1; ++turn) {
        const int64_t chunk = turn - group;
        for (int64_t k = begin; k < end && chunk >= 0 && chunk < chunks; ++k) {
          own[k].k0 = chunk * wave.steps;
          own[k].k1 = std::min(own[k].k0 + wave.steps, T);
          cell_.forward(own[k], share);
        }
        team.meet();
      }
    });
    Outputs out;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      out = passes[layer]->results();
      keep(layer, out);
    }
    return out.y;
  }

  void keep(int64_t layer, const Outputs& out) {
    for (size_t j = 0; j < last_.size(); ++j) {
      const size_t bytes = out.last[j].numel() * out.last[j].element_size();
      if (bytes > 0) {
        std::memcpy(static_cast<char*>(last_[j].mutable_data_ptr()) + layer * bytes,
                    out.last[j].const_data_ptr(), bytes);
      }
    }
  }

  const CellKernels<E, A>& cell_;
  TensorList states_, params_, last_;
  const Masks& masks_;
  int64_t layers_;
  std::optional<PackedLayer<E, A>> packed_;
};

std::tuple<Tensor, TensorList> stack(StringHandle cell, Tensor x, TensorList states, TensorList params,
                                     OptionalTensor lengths, OptionalTensor batch_sizes,
                                     OptionalTensor reset) {
  const std::string name = take_string(cell);
  const Masks masks{lengths, batch_sizes, reset};
  check_dtype(x);
  const auto run = [&]<class E, class A>(E, A) {
    return Stack<E, A>(name, std::move(states), std::move(params), masks).run(x);
  };
  return dtype_of(x) == ScalarType::Double ? run(double{}, double{})
         : multiplies_bf16(x)              ? run(float{}, Bf16{})
                                           : run(float{}, float{});
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("stack", TORCH_BOX(&fastrnn::cpu::stack)); }
