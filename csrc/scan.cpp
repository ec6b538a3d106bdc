#include "scan.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <numeric>

namespace fastrnn {
namespace {

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

Tensor expect(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
              const LayerArgs& args) {
  STD_TORCH_CHECK(has_shape(t, shape), name, " must be ", text(shape), ", got ", text(shape_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == args.dtype, name, " must have the input's dtype");
  STD_TORCH_CHECK(t.is_cpu() == args.x.is_cpu(), name, " must be on the input's device");
  return dense(t);
}

const int64_t* check_indices(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count && t.scalar_type() == ScalarType::Long && t.is_cpu(),
                  name, " must be a LongTensor [", count, "] on the CPU");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

}  // namespace

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::string take_string(StringHandle handle) {
  const std::unique_ptr<StringOpaque, decltype(&torch_delete_string)> owner(handle, &torch_delete_string);
  const char* data = nullptr;
  size_t length = 0;
  STD_TORCH_CHECK(torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS &&
                      torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS,
                  "not a string");
  return {data, length};
}

LayerArgs check_layer(const CellShape& cell, const Tensor& x, const TensorList& states,
                      const TensorList& params, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset) {
  LayerArgs a;
  STD_TORCH_CHECK(static_cast<int>(states.size()) == cell.states, "expected ", cell.states, " states, got ",
                  states.size());
  STD_TORCH_CHECK(states[0].dim() == 3, "h must have 3 dimensions [D, B, P], got ",
                  text(shape_of(states[0])));
  a.dtype = x.scalar_type();
  a.D = states[0].size(0);
  a.B = states[0].size(1);
  STD_TORCH_CHECK(a.D == 1 || a.D == 2, "h must be of 1 or 2 directions, got ", a.D);
  STD_TORCH_CHECK(!params.empty() && params.size() % a.D == 0, "params must be a multiple of ", a.D,
                  " directions, got ", params.size());
  const size_t per = params.size() / a.D;
  STD_TORCH_CHECK(per >= 2 && per <= 5,
                  "params must be (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each direction, got ", per,
                  " tensors");
  STD_TORCH_CHECK(params[0].dim() == 2 && params[1].dim() == 2, "weights must have 2 dimensions");
  a.I = params[0].size(1);
  a.H = params[0].size(0) / cell.gates;
  const bool projected = per == 3 || per == 5;
  a.P = projected ? params[per - 1].size(0) : a.H;
  STD_TORCH_CHECK(!projected || cell.states == 2, "only the LSTM can be projected");

  if (batch_sizes) {
    STD_TORCH_CHECK(x.dim() == 2, "a packed input must be [N, I], got ", text(shape_of(x)));
    STD_TORCH_CHECK(!lengths && !reset, "a packed input takes neither lengths nor reset");
    a.batch_sizes = dense(*batch_sizes);
    a.T = a.batch_sizes->size(0);
    a.N = x.size(0);
    const int64_t* sizes = check_indices("batch_sizes", *a.batch_sizes, a.T);
    int64_t sum = 0;
    for (int64_t t = 0; t < a.T; ++t) {
      STD_TORCH_CHECK(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : a.B),
                      "batch_sizes must be positive, not above the batch of ", a.B,
                      " and not increasing, got ", sizes[t], " at ", t);
      sum += sizes[t];
    }
    STD_TORCH_CHECK(sum == a.N, "the sum of batch_sizes must be the input's ", a.N, " rows, got ", sum);
  } else {
    STD_TORCH_CHECK(x.dim() == 3, "the input must be [T, B, I], got ", text(shape_of(x)));
    a.T = x.size(0);
    a.N = a.T * a.B;
  }
  STD_TORCH_CHECK(a.T > 0, "Expected sequence length to be larger than 0");
  a.x = x;
  a.x = a.packed() ? expect("input", x, {a.N, a.I}, a) : expect("input", x, {a.T, a.B, a.I}, a);
  if (lengths) {
    a.lengths = dense(*lengths);
    check_indices("lengths", *a.lengths, a.B);
  }
  if (reset) {
    STD_TORCH_CHECK(has_shape(*reset, {a.T, a.B}) && reset->scalar_type() == ScalarType::Bool,
                    "reset must be a BoolTensor [", a.T, ", ", a.B, "]");
    STD_TORCH_CHECK(reset->is_cpu() == x.is_cpu(), "reset must be on the input's device");
    a.reset = dense(*reset);
  }
  for (int j = 0; j < cell.states; ++j) {
    a.states.push_back(expect(j ? "c" : "h", states[j], {a.D, a.B, j ? a.H : a.P}, a));
  }
  for (int64_t d = 0; d < a.D; ++d) {
    const Tensor* p = params.data() + d * per;
    LayerArgs::Direction dir;
    dir.w_ih = expect("weight_ih", p[0], {cell.gates * a.H, a.I}, a);
    dir.w_hh = expect("weight_hh", p[1], {cell.gates * a.H, a.P}, a);
    if (per >= 4) {
      dir.b_ih = expect("bias_ih", p[2], {cell.gates * a.H}, a);
      dir.b_hh = expect("bias_hh", p[3], {cell.gates * a.H}, a);
    }
    if (projected) dir.w_hr = expect("weight_hr", p[per - 1], {a.P, a.H}, a);
    a.params.push_back(std::move(dir));
  }
  return a;
}

RowTable row_table(const LayerArgs& a) {
  RowTable table;
  table.active.assign(a.T, a.B);
  table.offset.assign(a.T + 1, 0);
  if (a.packed()) {
    const int64_t* sizes = static_cast<const int64_t*>(a.batch_sizes->const_data_ptr());
    std::copy(sizes, sizes + a.T, table.active.begin());
  } else if (a.lengths) {
    const int64_t* given = static_cast<const int64_t*>(a.lengths->const_data_ptr());
    std::vector<int64_t> length(a.B);
    // Clamped: what a caller without the Python checks (a compiled program) passes must not lead out of
    // bounds.
    for (int64_t b = 0; b < a.B; ++b) length[b] = std::clamp<int64_t>(given[b], 0, a.T);
    table.order.resize(a.B);
    std::iota(table.order.begin(), table.order.end(), 0);
    std::stable_sort(table.order.begin(), table.order.end(),
                     [&](int64_t p, int64_t q) { return length[p] > length[q]; });
    int64_t active = a.B;
    for (int64_t t = 0; t < a.T; ++t) {
      while (active > 0 && length[table.order[active - 1]] <= t) --active;
      table.active[t] = active;
      for (int64_t i = 0; i < active; ++i) table.outside.push_back(t * a.B + table.order[i]);
    }
  }
  table.lengths.assign(a.B, 0);
  int64_t known = 0;
  for (int64_t t = a.T; t > 0; --t) {  // from the end: the sequences that are new in step t end there
    while (known < table.active[t - 1]) table.lengths[known++] = t;
  }
  for (int64_t t = 0; t < a.T; ++t) table.offset[t + 1] = table.offset[t] + table.active[t];
  return table;
}

}  // namespace fastrnn
