// fastrnn::pack on the CPU.
#include "packed.h"

namespace fastrnn::cpu {
namespace {

// What of a weight one stage of a cell reads: rows [gate0 * units, (gate0 + gates) * units).
struct Part {
  int64_t gate0, gates, units, K;
};

template <class E, class A>
void pack_weight(const Tensor& w, const Part& p, Weight<A> to) {
  const Kernels<E, A>& k = kernels<E, A>();
  k.pack(pack_of(w, p.gate0 * p.units, p.gates, p.units, to.ld), const_cast<A*>(to.data), 0,
         ceil_div(p.units, k.width));
}

// As int8.h lays it out. scale: of the weight's rows.
void pack_int8(const Tensor& w, const Tensor& scale, const Part& p, Weight<float> to) {
  const int8_t* rows = static_cast<const int8_t*>(w.const_data_ptr()) + p.gate0 * p.units * p.K;
  const float* scales = static_cast<const float*>(scale.const_data_ptr()) + p.gate0 * p.units;
  const int64_t width = kernels<float>().width;
  for (int64_t unit = 0; unit < p.units; ++unit) {
    float* block = const_cast<float*>(to.data) +
                   unit / width * int8_block(p.K, static_cast<int>(p.gates), static_cast<int>(width));
    const int64_t lane = unit % width;
    for (int64_t g = 0; g < p.gates; ++g) {
      const int8_t* row = rows + (g * p.units + unit) * p.K;
      int32_t sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        float* four = block + (2 + k / 4) * p.gates * width + g * width + lane;
        reinterpret_cast<int8_t*>(four)[k % 4] = row[k];
        sum += row[k];
      }
      block[g * width + lane] = scales[g * p.units + unit];
      std::memcpy(block + (p.gates + g) * width + lane, &sum, sizeof sum);
    }
  }
}

template <class E, class A = E>
Tensor pack_layer(const std::string& name, const TensorList& params, const TensorList& scales,
                  int64_t directions, ScalarType dtype) {
  const CellKernels<E, A>& cell = cell_kernels<E, A>(name);
  const CellShape shape{cell.gates, cell.states};
  const LayerSizes n = param_sizes(shape, params, directions);
  const bool int8 = !scales.empty();
  const auto all = check_params(shape, n, params, int8 ? ScalarType::Char : dtype, dtype, true);
  const int64_t each = n.projected ? 3 : 2;
  STD_TORCH_CHECK(!int8 || static_cast<int64_t>(scales.size()) == each * n.D, "expected ", each * n.D,
                  " scales, got ", scales.size());
  STD_TORCH_CHECK(!int8 || std::max({n.I, n.P, n.H}) <= kInt8MostK, "int8 weights take rows of at most ",
                  kInt8MostK);
  PackedLayer<E, A> packed(cell, n, int8, dtype);
  for (int64_t d = 0; d < n.D; ++d) {
    const LayerArgs::Direction& p = all[d];
    Direction<E, A> s{};
    packed.direction(d, s);
    const auto fill = [&](const Tensor& w, int which, const Part& part, const Weight<A>& to) {
      if constexpr (sizeof(A) == sizeof(float)) {
        if (int8) {
          const Tensor& scale = scales[d * each + which];
          STD_TORCH_CHECK(scale.is_cpu() && scale.is_contiguous() && scale.numel() == w.size(0) &&
                              dtype_of(scale) == ScalarType::Float,
                          "the scales of a weight must be float32 [", w.size(0), "]");
          return pack_int8(w, scale, part, to);
        }
      }
      pack_weight<E>(w, part, to);
    };
    for (int64_t stage = 0, gate0 = 0; stage < cell.stages; gate0 += cell.stage_gates[stage++]) {
      const int64_t gates = cell.stage_gates[stage];
      fill(p.w_ih, 0, {gate0, gates, n.H, n.I}, s.w_x[stage]);
      fill(p.w_hh, 1, {gate0, gates, n.H, n.P}, s.w[stage]);
    }
    if (p.w_hr) fill(*p.w_hr, 2, {0, 1, n.P, n.H}, s.w_proj);
    read_biases(p, cell.gates, n.H, const_cast<E*>(s.bx), const_cast<E*>(s.bh));
  }
  return packed.data();
}

Tensor pack(StringHandle cell, TensorList params, TensorList scales, int64_t directions) {
  const std::string name = take_string(cell);
  STD_TORCH_CHECK(!params.empty() && (directions == 1 || directions == 2),
                  "expected the parameters of 1 or 2 directions");
  if (!scales.empty()) return pack_layer<float>(name, params, scales, directions, ScalarType::Float);
  const ScalarType dtype = dtype_of(params[0]);
  return by_type(dtype, [&]<class E, class A>(E, A) {
    return pack_layer<E, A>(name, params, scales, directions, dtype);
  });
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("pack", TORCH_BOX(&fastrnn::cpu::pack)); }
