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
    const int64_t gx = input_steps<E, A>(first, cell_.gates * first.H);
    const Plan plan = forward_plan<E, A>(first, cell_.gates, packed_ && packed_->int8());
    const Plan::Wave wave = plan.wave(layers_, gx);
    const int64_t turn = steps_in_turn(first.T, gx);
    Tensor y = wave.groups > 1          ? side_by_side(std::move(first), wave)
               : turns_pay(first, turn) ? in_turns(std::move(first), plan, turn)
                                        : one_by_one(std::move(first));
    return {std::move(y), std::move(last_)};
  }

 private:
  // Some 128, so that the layers' weights seldom replace each other in the cache; whole chunks of gx.
  static int64_t steps_in_turn(int64_t T, int64_t gx) {
    constexpr int64_t kSteps = 128;
    const int64_t even = ceil_div(T, ceil_div(T, kSteps));
    return ceil_div(even, gx) * gx;
  }

  // Whether less of the y between layers, of which one or two are there at a time, spares more memory than
  // the layers' packed weights, all at once, take.
  bool turns_pay(const LayerArgs& first, int64_t turn) const {
    const int64_t element = static_cast<int64_t>(first.x.element_size());
    const int64_t spared = (first.N - turn * first.B) * first.P * element;
    const int64_t weights = packed_ ? 0 : cell_.gates * first.H * 2 * first.P * int64_t{sizeof(A)};
    return layers_ > 1 && first.T > turn &&
           std::min<int64_t>(layers_ - 1, 2) * spared > (layers_ - 1) * weights;
  }

  // Of a layer whose input is x; packed_ is then that layer's.
  LayerArgs args(int64_t layer, const Tensor& x, const Masks& masks) {
    const CellShape shape{cell_.gates, cell_.states};
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

  // steps: of a chunk, of which `between` two layers there are as many. waves: each layer has rows of its own
  // there; else every other one.
  void make_passes(LayerArgs first, int64_t steps, int64_t between, bool waves) {
    const int64_t rows = between * std::min(steps, first.T), B = first.B;
    const ScalarType dtype = first.dtype;
    chunks_ = between;
    arena_.emplace();
    for (int64_t layer = 0; layer < layers_; ++layer) {
      LayerArgs a = layer ? above(layer, passes_[0]->args(), between_.back()) : std::move(first);
      const bool last = layer + 1 == layers_;
      if (!last) between_.push_back(layer > 1 && !waves ? between_[layer - 2] : empty({rows, B, a.P}, dtype));
      passes_.push_back(std::make_unique<ForwardPass<E, A>>(*arena_, cell_, std::move(a), packed(), false,
                                                            false, waves ? steps : 0,
                                                            last ? nullptr : &between_.back()));
      quantized_ = std::max(quantized_, passes_.back()->quantized());
    }
  }

  // All layers by a team. body: of a member, its scans, one a layer, and its rows for int8 weights.
  template <class Body>
  Tensor run_all(int threads, Body&& body) {
    float* scratch = arena_->template get<float>(threads * quantized_);
    // Of each member, which moves them from chunk to chunk; made here, as a team's body must not throw.
    std::vector<Scan<E, A>> scans;
    scans.reserve(threads * layers_);
    for (int member = 0; member < threads; ++member) {
      for (const auto& pass : passes_) scans.push_back(pass->scan());
    }
    run_team(threads, [&](const Team& team) {
      for (auto& pass : passes_) pass->pack(team);
      body(team, scans.data() + team.member * layers_, scratch + team.member * quantized_);
    });
    Outputs out;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      out = passes_[layer]->results();
      keep(layer, out);
    }
    return out.y;
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

  Tensor one_by_one(LayerArgs first) {
    Outputs out = forward<E, A>(cell_, std::move(first), packed(), false, false);
    keep(0, out);
    for (int64_t layer = 1; layer < layers_; ++layer) {
      LayerArgs a = args(layer, out.y, masks_);  // before packed(), which is then this layer's
      out = forward<E, A>(cell_, std::move(a), packed(), false, false);
      keep(layer, out);
    }
    return out.y;
  }

  // One layer after another too, for some of the steps each. All by one plan, the first layer's: members who
  // had met less often than others would keep them waiting.
  Tensor in_turns(LayerArgs first, const Plan& plan, int64_t steps) {
    const int64_t chunks = ceil_div(first.T, steps);
    make_passes(std::move(first), steps, 1, false);
    return run_all(plan.threads(), [&](const Team& team, Scan<E, A>* own, float* rows) {
      Share share = plan.share(team);
      share.quantized = rows;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t layer = 0; layer < layers_; ++layer) {
          run_chunk(own, layer, chunk, steps, share);
          team.meet();
        }
      }
    });
  }

  Tensor side_by_side(LayerArgs first, const Plan::Wave& wave) {
    const int64_t B = first.B, chunks = ceil_div(first.T, wave.steps);
    make_passes(std::move(first), wave.steps, 2, true);  // one is read while the group below writes the next
    return run_all(wave.groups * wave.units, [&](const Team& team, Scan<E, A>* own, float* rows) {
      // Of the threads that came, perhaps fewer than were asked for.
      const int groups = std::min(wave.groups, team.size), units = team.size / groups;
      const int group = std::min(team.member / units, groups - 1), part = team.member - group * units;
      // Where they do not divide, the last ones only meet.
      const int64_t begin = layers_ * group / groups;
      const int64_t end = part < units ? layers_ * (group + 1) / groups : begin;
      const Share share{0, 1, 0, B, part, units, team.group(team.member - part), rows};
      for (int64_t turn = 0; turn < chunks + groups - 1; ++turn) {
        const int64_t chunk = turn - group;
        for (int64_t layer = begin; layer < end && chunk >= 0 && chunk < chunks; ++layer)
          run_chunk(own, layer, chunk, wave.steps, share);
        team.meet();
      }
    });
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
  std::optional<Arena> arena_;               // of all passes
  std::vector<std::unique_ptr<ForwardPass<E, A>>> passes_;
  // Of each layer but the last the y of `chunks_` chunks, [rows][B][P], which the next one reads as its x.
  std::vector<Tensor> between_;
  int64_t chunks_ = 1, quantized_ = 0;
};

std::tuple<Tensor, TensorList> stack(StringHandle cell, Tensor x, TensorList states, TensorList params,
                                     OptionalTensor lengths, OptionalTensor batch_sizes,
                                     OptionalTensor reset) {
  const std::string name = take_string(cell);
  const Masks masks{lengths, batch_sizes, reset};
  return by_type(dtype_of(x), [&]<class E, class A>(E, A) {
    return Stack<E, A>(name, std::move(states), std::move(params), masks).run(x);
  });
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("stack", TORCH_BOX(&fastrnn::cpu::stack)); }
