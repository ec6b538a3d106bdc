#include "scan.h"

#include <algorithm>
#include <numeric>

namespace fastrnn {
namespace {

template <class Sizes>
std::string text(const Sizes& sizes) {
  std::string s;
  for (const int64_t n : sizes) s += (s.empty() ? "[" : ", ") + std::to_string(n);
  return s.empty() ? "[]" : s + "]";
}

const int64_t* check_indices(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count && dtype_of(t) == ScalarType::Long && t.is_cpu(), name,
                  " must be a LongTensor [", count, "] on the CPU");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

}  // namespace

Tensor checked(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, bool on_cpu) {
  STD_TORCH_CHECK(has_shape(t, shape), name, " must be ", text(shape), ", got ", text(t.sizes()));
  STD_TORCH_CHECK(dtype_of(t) == dtype, name, " must be of dtype ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(dtype_of(t)));
  STD_TORCH_CHECK(t.is_cpu() == on_cpu, name, " must be on the input's device");
  return t;
}

Tensor expect(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, bool on_cpu) {
  return dense(checked(name, t, shape, dtype, on_cpu));
}

bool has_shape(const Tensor& t, const Shape& shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

void check_sizes(const char* names, std::initializer_list<int64_t> sizes) {
  int64_t most = int64_t{1} << 48;  // elements: more than the addresses of a process
  for (const int64_t n : sizes) most /= std::max<int64_t>(n, 1);
  STD_TORCH_CHECK(most > 0, names, " must be the sizes of what fits into memory, got ", text(sizes));
}

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

int64_t directions(const TensorList& states) {
  STD_TORCH_CHECK(!states.empty() && states[0].dim() == 3, "h must have 3 dimensions [D, B, P], got ",
                  states.empty() ? "none" : text(states[0].sizes()));
  const int64_t D = states[0].size(0);
  STD_TORCH_CHECK(D == 1 || D == 2, "h must be of 1 or 2 directions, got ", D);
  return D;
}

LayerSizes param_sizes(const CellShape& cell, const TensorList& params, int64_t D) {
  STD_TORCH_CHECK(!params.empty() && params.size() % D == 0, "params must be a multiple of ", D,
                  " directions, got ", params.size());
  const size_t per = params.size() / D;
  STD_TORCH_CHECK(per >= 2 && per <= 5,
                  "params must be (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each direction, got ", per,
                  " tensors");
  STD_TORCH_CHECK(params[0].dim() == 2 && params[1].dim() == 2, "weights must have 2 dimensions");
  const bool projected = per == 3 || per == 5;
  STD_TORCH_CHECK(!projected || cell.states == 2, "only the LSTM can be projected");
  STD_TORCH_CHECK(!projected || (params[per - 1].dim() == 2 && params[per - 1].size(0) > 0),
                  "weight_hr must be [P, H] with P of at least 1, got ", text(params[per - 1].sizes()));
  const int64_t H = params[0].size(0) / cell.gates;
  check_sizes("H and the widest of I and P", {H, std::max(params[0].size(1), params[1].size(1))});
  return {params[0].size(1), H, projected ? params[per - 1].size(0) : H, D, projected};
}

std::vector<LayerArgs::Direction> check_params(const CellShape& cell, const LayerSizes& n,
                                               const TensorList& params, ScalarType weights,
                                               ScalarType biases, bool on_cpu) {
  const size_t per = params.size() / n.D;
  const int64_t rows = cell.gates * n.H;
  std::vector<LayerArgs::Direction> all;
  for (int64_t d = 0; d < n.D; ++d) {
    const Tensor* p = params.data() + d * per;
    LayerArgs::Direction dir;
    dir.w_ih = expect("weight_ih", p[0], {rows, n.I}, weights, on_cpu);
    dir.w_hh = expect("weight_hh", p[1], {rows, n.P}, weights, on_cpu);
    if (per >= 4) {
      dir.b_ih = expect("bias_ih", p[2], {rows}, biases, on_cpu);
      dir.b_hh = expect("bias_hh", p[3], {rows}, biases, on_cpu);
    }
    if (n.projected) dir.w_hr = expect("weight_hr", p[per - 1], {n.P, n.H}, weights, on_cpu);
    all.push_back(std::move(dir));
  }
  return all;
}

LayerArgs check_input(const CellShape& cell, const LayerSizes& sizes, const Tensor& x,
                      const TensorList& states, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset) {
  LayerArgs a;
  STD_TORCH_CHECK(static_cast<int>(states.size()) == cell.states, "expected ", cell.states, " states, got ",
                  states.size());
  STD_TORCH_CHECK(directions(states) == sizes.D, "h must be of ", sizes.D, " directions, got ",
                  states[0].size(0));
  a.dtype = dtype_of(x);
  a.D = sizes.D;
  a.B = states[0].size(1);
  a.I = sizes.I;
  a.H = sizes.H;
  a.P = sizes.P;
  a.projected = sizes.projected;

  if (batch_sizes) {
    STD_TORCH_CHECK(x.dim() == 2, "a packed input must be [N, I], got ", text(x.sizes()));
    STD_TORCH_CHECK(!lengths && !reset, "a packed input takes neither lengths nor reset");
    a.batch_sizes = dense(*batch_sizes);
    a.T = a.batch_sizes->size(0);
    a.N = x.size(0);
    check_sizes("T and B", {a.T, a.B});
    check_sizes("the more of rows and sequences and the widest of I, H and P",
                {std::max(a.N, a.B), std::max({a.I, a.H, a.P})});
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
    STD_TORCH_CHECK(x.dim() == 3, "the input must be [T, B, I], got ", text(x.sizes()));
    a.T = x.size(0);
    check_sizes("T, B and the widest of I, H and P", {a.T, a.B, std::max({a.I, a.H, a.P})});
    a.N = a.T * a.B;
  }
  STD_TORCH_CHECK(a.T > 0, "Expected sequence length to be larger than 0");
  const bool on_cpu = x.is_cpu();
  a.x = checked("input", x, a.row_shape(a.I), a.dtype, on_cpu);
  if (a.I > 1 && a.x.stride(-1) != 1) a.x = dense(a.x);
  if (lengths) {
    a.lengths = dense(*lengths);
    check_indices("lengths", *a.lengths, a.B);
  }
  if (reset) {
    STD_TORCH_CHECK(has_shape(*reset, {a.T, a.B}) && dtype_of(*reset) == ScalarType::Bool,
                    "reset must be a BoolTensor [", a.T, ", ", a.B, "]");
    STD_TORCH_CHECK(reset->is_cpu() == x.is_cpu(), "reset must be on the input's device");
    a.reset = dense(*reset);
  }
  for (int j = 0; j < cell.states; ++j) {
    a.states.push_back(expect(j ? "c" : "h", states[j], {a.D, a.B, j ? a.H : a.P}, a.dtype, on_cpu));
  }
  return a;
}

LayerArgs check_layer(const CellShape& cell, const Tensor& x, const TensorList& states,
                      const TensorList& params, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset) {
  const LayerSizes sizes = param_sizes(cell, params, directions(states));
  LayerArgs a = check_input(cell, sizes, x, states, lengths, batch_sizes, reset);
  a.params = check_params(cell, sizes, params, a.dtype, a.dtype, x.is_cpu());
  return a;
}

RowTable::RowTable(const LayerArgs& a) : T_(a.T), all_(new int64_t[2 * a.T + 1 + a.B]) {
  active = all_.get();
  offset = active + a.T;
  lengths_ = offset + a.T + 1;
  std::fill_n(active, a.T, a.B);
  if (a.packed()) {
    const int64_t* sizes = static_cast<const int64_t*>(a.batch_sizes->const_data_ptr());
    std::copy(sizes, sizes + a.T, active);
  } else if (a.lengths) {
    const int64_t* given = static_cast<const int64_t*>(a.lengths->const_data_ptr());
    std::vector<int64_t> length(a.B);
    // Clamped: what a caller without the Python checks (a compiled program) passes must not lead out of
    // bounds.
    for (int64_t b = 0; b < a.B; ++b) length[b] = std::clamp<int64_t>(given[b], 0, a.T);
    // All of them whole, as a batch of one often is: without lengths.
    if (std::any_of(length.begin(), length.end(), [&](int64_t n) { return n < a.T; })) sort(length);
  }
  int64_t known = 0;
  for (int64_t t = a.T; t > 0; --t) {  // from the end: the sequences that are new in step t end there
    while (known < active[t - 1]) lengths_[known++] = t;
  }
  std::fill(lengths_ + known, lengths_ + a.B, 0);
  offset[0] = 0;
  std::partial_sum(active, active + a.T, offset + 1);
}

void RowTable::sort(const std::vector<int64_t>& length) {
  const int64_t B = static_cast<int64_t>(length.size());
  order_.resize(B);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t p, int64_t q) { return length[p] > length[q]; });
  outside.reserve(std::accumulate(length.begin(), length.end(), int64_t{0}));
  int64_t count = B;
  for (int64_t t = 0; t < T_; ++t) {
    while (count > 0 && length[order_[count - 1]] <= t) --count;
    active[t] = count;
    for (int64_t i = 0; i < count; ++i) outside.push_back(t * B + order_[i]);
  }
}

}  // namespace fastrnn
