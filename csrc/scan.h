// One layer, all its directions: arguments, checks and row tables, the same for every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

// A string argument, which the operator is to free. As a std::string it would leak: unboxing to one, torch
// 2.13's headers allocate another that nobody frees, 48 bytes a call (pytorch/pytorch#191340).
std::string take_string(StringHandle handle);

// t itself where it can be: torch's own operator would go through the dispatcher to say so.
Tensor dense(const Tensor& t);

// The sizes of a tensor of at most four dimensions; on the stack, where a short call would notice the heap.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes) : dims_(sizes.size()) {
    std::copy(sizes.begin(), sizes.end(), sizes_.begin());
  }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return begin() + dims_; }
  size_t size() const { return dims_; }

 private:
  size_t dims_;
  std::array<int64_t, 4> sizes_;
};

bool has_shape(const Tensor& t, const Shape& shape);

// The tensor; raises where it is of another shape, type or device.
Tensor checked(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, bool on_cpu);
// The same, contiguous.
Tensor expect(const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, bool on_cpu);

// Raises where no memory could hold what is of these sizes. Tensors may have them all the same, if another of
// theirs is 0, or a stride; and the kernels' own products of sizes would overflow.
void check_sizes(const char* names, std::initializer_list<int64_t> sizes);

// t's type. Tensor::scalar_type() asks torch about one type after another, which a short call would notice.
inline ScalarType dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  STD_TORCH_CHECK(aoti_torch_get_dtype(t.get(), &dtype) == AOTI_TORCH_SUCCESS, "not a tensor");
  return static_cast<ScalarType>(dtype);
}

// What the checks need to know of a cell.
struct CellShape {
  int gates, states;
};

// The sizes that parameters, or what was packed of them, give a layer.
struct LayerSizes {
  int64_t I, H, P, D;
  bool projected;
};

// The arguments of a layer, checked and contiguous; of x its rows alone, since a batch-first one is the
// transposed of what its caller has, and as large as the call. Shapes: T time, B batch, N rows (T*B, or a
// PackedSequence's), I input, H hidden, P the width of h (H without projection), G gates, D directions.
struct LayerArgs {
  struct Direction {
    Tensor w_ih, w_hh;                // [G*H, I], [G*H, P]
    OptionalTensor b_ih, b_hh, w_hr;  // [G*H], [G*H], [P, H]
  };
  Tensor x;                       // [T, B, I] or packed [N, I]
  TensorList states;              // [D, B, P], then [D, B, H]
  std::vector<Direction> params;  // empty: they were packed
  OptionalTensor lengths;         // [B]
  OptionalTensor batch_sizes;     // [T]
  OptionalTensor reset;           // [T, B]
  int64_t T, B, N, I, H, P, D;
  bool projected;
  ScalarType dtype;

  bool packed() const { return batch_sizes.has_value(); }
  Shape row_shape(int64_t width) const { return packed() ? Shape{N, width} : Shape{T, B, width}; }
  // Of the sequences of a state after h.
  Shape seq_shape() const { return packed() ? Shape{D, N, H} : Shape{D, T, B, H}; }
};

// Raises a RuntimeError that says what was expected and what came.
LayerArgs check_layer(const CellShape& cell, const Tensor& x, const TensorList& states,
                      const TensorList& params, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset);
// Its two halves, and what they start from.
int64_t directions(const TensorList& states);
LayerSizes param_sizes(const CellShape& cell, const TensorList& params, int64_t directions);
std::vector<LayerArgs::Direction> check_params(const CellShape& cell, const LayerSizes& sizes,
                                               const TensorList& params, ScalarType weights,
                                               ScalarType biases, bool on_cpu);
LayerArgs check_input(const CellShape& cell, const LayerSizes& sizes, const Tensor& x,
                      const TensorList& states, const OptionalTensor& lengths,
                      const OptionalTensor& batch_sizes, const OptionalTensor& reset);

// Which rows a step has. Sequences are sorted by length, longest first; `order` maps that back to the
// caller's batch.
class RowTable {
 public:
  explicit RowTable(const LayerArgs& args);

  int64_t *active, *offset;      // [T], [T + 1]
  std::vector<int64_t> outside;  // [N'] the caller's row of a packed row; empty: the same
  int64_t rows() const { return offset[T_]; }
  bool ragged() const { return !order_.empty(); }  // by lengths: not all rows of the caller's are here
  int64_t length(int64_t sequence) const { return lengths_[sequence]; }
  int64_t caller(int64_t sequence) const { return order_.empty() ? sequence : order_[sequence]; }

 private:
  void sort(const std::vector<int64_t>& length);  // of unlike lengths: active, order_ and outside

  int64_t T_, *lengths_;            // [B] of the sorted sequences
  std::vector<int64_t> order_;      // [B] the caller's sequence of a sorted one; empty: the same
  std::unique_ptr<int64_t[]> all_;  // active, offset and lengths
};

}  // namespace fastrnn
