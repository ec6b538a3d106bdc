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
    LayerArgs first = args(0, x, masks_);
    const bool int8 = packed_ && packed_->int8();
    const Plan plan = forward_plan<E, A>(first, cell_.gates, int8);
    const int64_t gx = input_steps(first, cell_.gates * first.H, sizeof(E));
    Plan::Wave wave = plan.wave(layers_, gx);
    const bool waves = wave.groups > 1;
    if (!waves) wave.steps = steps_in_turn(first.T, gx);
    const int64_t chunks = ceil_div(first.T, wave.steps);
    make_passes(std::move(first), wave.steps, waves);

    int threads = waves ? wave.groups * wave.units : 1;
    int64_t quantized = 0;
    for (const auto& pass : passes_) {
      plans_.push_back(forward_plan<E, A>(pass->args(), cell_.gates, pass->int8()));
      if (!waves) threads = std::max(threads, plans_.back().threads());
      quantized = std::max(quantized, pass->quantized());
    }
    float* scratch = arena_.template get<float>(threads * quantized);
    // Of each member, which moves them from chunk to chunk; made here, as a team's body must not throw.
    std::vector<Scan<E, A>> scans;
    scans.reserve(threads * layers_);
    for (int member = 0; member < threads; ++member) {
      for (const auto& pass : passes_) scans.push_back(pass->scan());
    }
    run_team(threads, [&](const Team& team) {
      for (auto& pass : passes_) pass->pack(team);
      Scan<E, A>* own = scans.data() + team.member * layers_;
      float* rows = scratch + team.member * quantized;
      if (waves) {
        side_by_side(team, wave, chunks, own, rows);
      } else {
        one_by_one(team, wave.steps, chunks, own, rows);
      }
    });
    Outputs out;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      out = passes_[layer]->results();
      keep(layer, out);
    }
    return {std::move(out.y), std::move(last_)};
  }

 private:
  // Where layers go one after another, each takes so many steps before the next one does, in chunks of `gx`
  // of them: what lies between two layers does not grow with T, and their weights seldom take turns in the
  // cache.
  static int64_t steps_in_turn(int64_t T, int64_t gx) {
    constexpr int64_t kSteps = 128;
    const int64_t even = ceil_div(T, std::max<int64_t>(ceil_div(T, kSteps), 1));
    return std::max(ceil_div(even, gx) * gx, gx);
  }

  // Of a layer whose input is x; packed_ is then that layer's.
  LayerArgs args(int64_t layer, const Tensor& x, const Masks& masks) {
    const CellShape shape{cell_.gates, cell_.states, cell_.saved};
    const size_t each = params_.size() / layers_;
    TensorList own;
    for (Tensor& s : states_) own.push_back(torch::stable::narrow(s, 0, layer, 1));
    if (each == 1) {
      Tensor& weights = params_[layer];
      STD_TORCH_CHECK(dtype_of(weights) == dtype_of(x), "the weights were packed for another dtype of input");
      weights = dense(weights);  // a copy, if it is one, lives as long as the scans that read it
      packed_.emplace(cell_, weights);
      return check_input(shape, packed_->sizes(), x, own, masks.lengths, masks.batch_sizes, masks.reset);
    }
    const auto begin = params_.begin() + layer * each;
    return check_layer(shape, x, own, {begin, begin + each}, masks.lengths, masks.batch_sizes, masks.reset);
  }
  const PackedLayer<E, A>* packed() const { return packed_ ? &*packed_ : nullptr; }

  // The arguments of a layer that the first is not: of the same rows, read out of a chunk of them.
  LayerArgs above(int64_t layer, const LayerArgs& first, const Tensor& chunk) {
    LayerArgs a = args(layer, chunk, {});
    a.T = first.T;
    a.N = first.N;
    a.lengths = first.lengths;
    a.batch_sizes = first.batch_sizes;
    a.reset = first.reset;
    return a;
  }

  // chunk: the steps of one. Those of a wave hold gx too.
  void make_passes(LayerArgs first, int64_t chunk, bool waves) {
    const int64_t T = first.T, B = first.B;
    const ScalarType dtype = first.dtype;
    chunks_ = waves ? 2 : 1;  // one is read while the group below writes the next
    for (int64_t layer = 0; layer < layers_; ++layer) {
      LayerArgs a = layer ? above(layer, passes_[0]->args(), between_.back()) : std::move(first);
      Tensor y;
      if (layer + 1 < layers_) {
        between_.push_back(empty({chunks_ * std::min(chunk, T), B, a.P}, dtype));
        y = between_.back();
      }
      passes_.push_back(std::make_unique<ForwardPass<E, A>>(arena_, cell_, std::move(a), packed(), false,
                                                            false, waves ? chunk : 0, y));
    }
  }

  // A layer's steps of one chunk, by this member.
  void run_chunk(Scan<E, A>* own, int64_t layer, int64_t chunk, int64_t steps, const Share& share) const {
    const LayerArgs& a = passes_[0]->args();
    Scan<E, A>& scan = own[layer];
    scan.k0 = chunk * steps;
    scan.k1 = std::min(scan.k0 + steps, a.T);
    const int64_t row0 = a.packed() ? scan.rows.offset[scan.k0] : scan.k0 * a.B;
    // Where row 0 would be.
    const auto moved = [&](int64_t lower) {
      const Tensor& rows = between_[lower];
      const int64_t first = chunk % chunks_ * (rows.size(0) / chunks_) * a.B - row0;
      return static_cast<char*>(rows.mutable_data_ptr()) +
             first * rows.size(2) * static_cast<int64_t>(rows.element_size());
    };
    if (layer > 0) scan.x.data = moved(layer - 1);
    if (layer + 1 < layers_) scan.dir[0].y.data = moved(layer);
    cell_.forward(scan, share);
  }

  void one_by_one(const Team& team, int64_t steps, int64_t chunks, Scan<E, A>* own, float* rows) const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t layer = 0; layer < layers_; ++layer) {
        Share share = plans_[layer].share(team);
        share.quantized = rows;
        run_chunk(own, layer, chunk, steps, share);
        team.meet();
      }
    }
  }

  void side_by_side(const Team& team, const Plan::Wave& wave, int64_t chunks, Scan<E, A>* own,
                    float* rows) const {
    // Of the threads that came, perhaps fewer than were asked for.
    const int groups = std::min(wave.groups, team.size), units = team.size / groups;
    const int group = std::min(team.member / units, groups - 1), part = team.member - group * units;
    // Where they do not divide, the last ones only meet.
    const int64_t begin = layers_ * group / groups;
    const int64_t end = part < units ? layers_ * (group + 1) / groups : begin;
    const Share share{0, 1, 0, passes_[0]->args().B, part, units, team.group(team.member - part), rows};
    for (int64_t turn = 0; turn < chunks + groups - 1; ++turn) {
      const int64_t chunk = turn - group;
      for (int64_t layer = begin; layer < end && chunk >= 0 && chunk < chunks; ++layer)
        run_chunk(own, layer, chunk, wave.steps, share);
      team.meet();
    }
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
  std::optional<PackedLayer<E, A>> packed_;  // of the layer whose args() came last
  Arena arena_;
  std::vector<std::unique_ptr<ForwardPass<E, A>>> passes_;
  std::vector<Plan> plans_;      // of each, where it is alone
  std::vector<Tensor> between_;  // of a layer's y the rows of chunks_ chunks, the next one's x
  int64_t chunks_ = 1;
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
