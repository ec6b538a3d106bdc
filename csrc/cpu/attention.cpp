// fastrnn::attention and its backward pass on the CPU.
#include "attention.h"

#include "workspace.h"

namespace fastrnn::cpu {
namespace {

// The arguments, checked and contiguous: [Tq, B, K], [S, B, K], [S, B, V], [K], [B, S] or [B, Tq, S].
struct AttentionInputs {
  Tensor query, keys, values;
  OptionalTensor v, mask;
  double scale;
  int64_t Tq, S, B, K, V;
  ScalarType dtype;
};

AttentionInputs check_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                                const OptionalTensor& v, const OptionalTensor& mask, double scale) {
  AttentionInputs a;
  a.dtype = dtype_of(query);
  STD_TORCH_CHECK(a.dtype == ScalarType::Float || a.dtype == ScalarType::Double,
                  "attention takes float32 and float64");
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3,
                  "query, keys and values must have 3 dimensions, got ", query.dim(), ", ", keys.dim(),
                  " and ", values.dim());
  a.Tq = query.size(0);
  a.B = query.size(1);
  a.K = query.size(2);
  a.S = keys.size(0);
  a.V = values.size(2);
  a.scale = scale;
  check_sizes("Tq, S and B", {a.Tq, a.S, a.B});
  check_sizes("the longer of Tq and S, B and the wider of K and V",
              {std::max(a.Tq, a.S), a.B, std::max(a.K, a.V)});
  a.query = expect("query", query, {a.Tq, a.B, a.K}, a.dtype, true);
  a.keys = expect("keys", keys, {a.S, a.B, a.K}, a.dtype, true);
  a.values = expect("values", values, {a.S, a.B, a.V}, a.dtype, true);
  if (v) a.v = expect("v", *v, {a.K}, a.dtype, true);
  if (mask) {
    a.mask = mask->dim() == 3 ? expect("mask", *mask, {a.B, a.Tq, a.S}, ScalarType::Bool, true)
                              : expect("mask", *mask, {a.B, a.S}, ScalarType::Bool, true);
  }
  return a;
}

// The gradients that are asked for.
struct Needs {
  bool query, keys, values, v;
};

template <class E>
class AttentionCall {
 public:
  explicit AttentionCall(const AttentionInputs& in) : in_(in), all_(in.B) {
    E* v = nullptr;
    if (in.v) {
      v = arena_.template zeros<E>(padded<E>(in.K));
      read(*in.v, 0, in.K, v);
    }
    bool* any = in.mask ? arena_.template get<bool>(in.B * in.S) : nullptr;
    for (int64_t b = 0; b < in.B; ++b) {
      Attend<E>& p = all_[b];
      p.query = data(in.query) + b * in.K;
      p.keys = data(in.keys) + b * in.K;
      p.values = data(in.values) + b * in.V;
      p.v = v;
      p.Tq = in.Tq;
      p.S = in.S;
      p.K = in.K;
      p.V = in.V;
      p.ld_query = p.ld_keys = in.B * in.K;
      p.ld_values = p.ld_context = in.B * in.V;
      p.ld_weights = in.S;
      p.scale = static_cast<E>(in.scale);
    }
    if (!any) return;
    for_rows(in.B, in.mask->numel() / std::max<int64_t>(in.B, 1), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) read_mask(all_[b], b, any + b * in.S);
    });
  }

  std::tuple<Tensor, Tensor, Tensor> forward(bool need_weights) {
    const auto& k = attention_kernels<E>();
    Tensor context = empty({in_.Tq, in_.B, in_.V}, in_.dtype), lse = empty({in_.B, in_.Tq}, in_.dtype);
    Tensor weights = need_weights ? empty({in_.B, in_.Tq, in_.S}, in_.dtype) : empty({0}, in_.dtype);
    for (int64_t b = 0; b < in_.B; ++b) {
      all_[b].context = data(context) + b * in_.V;
      all_[b].weights = need_weights ? data(weights) + b * in_.Tq * in_.S : nullptr;
      all_[b].lse = data(lse) + b * in_.Tq;
    }
    const int want = threads(2, in_.B * ceil_div(in_.Tq, kLeastAttendRows));
    // A thread's queries in as few calls as may be; those of a sequence of one size.
    const int64_t each = std::max<int64_t>(ceil_div(in_.B * in_.Tq, want), 1);
    const int64_t calls = ceil_div(each, kMostAttendRows);
    const int64_t blocks = ceil_div(in_.Tq, ceil_div(each, calls * kLeastAttendRows) * kLeastAttendRows);
    const int64_t rows = blocks > 0 ? ceil_div(in_.Tq, blocks) : 0;
    const int64_t scratch_each = all_.empty() ? 0 : k.scratch(all_[0], rows);
    run(in_.B * blocks, scratch_each, want, [&](int64_t task, E* scratch) {
      const int64_t q0 = task % blocks * rows;
      k.attend(all_[task / blocks], q0, std::min(q0 + rows, in_.Tq), scratch);
    });
    return {std::move(context), std::move(weights), std::move(lse)};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OptionalTensor& dcontext,
                                                      const OptionalTensor& dweights, const Tensor& context,
                                                      const Tensor& lse, const Needs& need) {
    const auto& k = attention_kernels<E>();
    const int64_t B = in_.B, Tq = in_.Tq, S = in_.S, K = in_.K, V = in_.V;
    const Shape shape{Tq, B, V};
    const Tensor dc =
        dcontext ? expect("dcontext", *dcontext, shape, in_.dtype, true) : zeros(in_.query, shape, in_.dtype);
    const Tensor c = expect("context", context, shape, in_.dtype, true);
    const Tensor l = expect("lse", lse, {B, Tq}, in_.dtype, true);
    const Tensor dw = dweights ? expect("dweights", *dweights, {B, Tq, S}, in_.dtype, true) : Tensor();
    Tensor dquery = need.query ? empty({Tq, B, K}, in_.dtype) : empty({0}, in_.dtype);
    // Zeros stay where no query attends.
    const auto fresh = [&](bool needed, const Shape& sizes) {
      if (!needed) return empty({0}, in_.dtype);
      return in_.mask || Tq == 0 ? zeros(in_.query, sizes, in_.dtype) : empty(sizes, in_.dtype);
    };
    Tensor dkeys = fresh(need.keys, {S, B, K}), dvalues = fresh(need.values, {S, B, V});
    const bool need_v = need.v && in_.v;
    const int64_t ld_v = padded<E>(K);
    E* dv = need_v ? arena_.template zeros<E>(B * ld_v) : nullptr;
    for (int64_t b = 0; b < B; ++b) {
      Attend<E>& p = all_[b];
      p.context = data(c) + b * V;
      p.lse = data(l) + b * Tq;
      p.dcontext = data(dc) + b * V;
      p.dweights = dw.defined() ? data(dw) + b * Tq * S : nullptr;
      p.dquery = need.query ? data(dquery) + b * K : nullptr;
      p.dkeys = need.keys ? data(dkeys) + b * K : nullptr;
      p.dvalues = need.values ? data(dvalues) + b * V : nullptr;
      p.dv = dv ? dv + b * ld_v : nullptr;
    }
    if (B > 0 && (need.values || all_[0].needs_scores())) {
      int64_t most = 0;
      for (const Attend<E>& p : all_) most = std::max(most, k.backward_scratch(p));
      const int products = 1 + all_[0].needs_scores() + need.query + need.keys + need.values;
      run_backward(most, products, [&](int64_t b, const Share& share, E* scratch) {
        k.attend_backward(all_[b], share, scratch);
      });
    }
    Tensor sum = empty({need_v ? K : 0}, in_.dtype);
    for (int64_t u = 0; u < sum.numel(); ++u) {
      double total = 0;
      for (int64_t b = 0; b < B; ++b) total += static_cast<double>(dv[b * ld_v + u]);
      data(sum)[u] = static_cast<E>(total);
    }
    return {std::move(dquery), std::move(dkeys), std::move(dvalues), std::move(sum)};
  }

 private:
  static E* data(const Tensor& t) { return static_cast<E*>(t.mutable_data_ptr()); }

  // Up to the last position that a query may attend to; no mask where they may attend to all before it.
  void read_mask(Attend<E>& p, int64_t b, bool* any) {
    const bool* mask = static_cast<const bool*>(in_.mask->const_data_ptr());
    const int64_t rows = in_.mask->dim() == 3 ? in_.Tq : 1, S = in_.S;
    p.mask = mask + b * rows * S, p.masked = true;
    p.ld_mask = rows == 1 ? 0 : S;
    std::fill_n(any, S, false);
    bool holes = false;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t s = 0; s < S; ++s) any[s] |= p.mask[i * S + s];
    while (p.S > 0 && !any[p.S - 1]) --p.S;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t s = 0; s < p.S; ++s) holes |= !p.mask[i * S + s];
    if (!holes) p.mask = nullptr;
    p.any = std::find(any, any + p.S, false) == any + p.S ? nullptr : any;
  }

  // Threads for products of Tq * S * (K or V) multiplications, at most so many.
  int threads(int64_t products, int64_t most) const {
    const int64_t work = products * in_.B * in_.Tq * in_.S * std::max(in_.K, in_.V);
    return static_cast<int>(std::clamp<int64_t>(most, 1, product_threads(work)));
  }

  // f(task, scratch) of all tasks, shared out over so many threads.
  template <class F>
  void run(int64_t tasks, int64_t scratch, int want, F&& f) {
    if (tasks == 0) return;
    const int64_t each = ceil_div(scratch, 64) * 64;
    E* all = arena_.template get<E>(want * each);
    run_team(want, [&](const Team& team) {
      for (int64_t i = tasks * team.member / team.size; i < tasks * (team.member + 1) / team.size; ++i)
        f(i, all + team.member * each);
    });
  }

  // f(sequence, share, scratch): a thread takes as many sequences as all others, then groups of threads take
  // one each of what is left.
  template <class F>
  void run_backward(int64_t scratch, int64_t products, F&& f) {
    const int64_t B = in_.B, each = ceil_div(scratch, 64) * 64;
    const int want = threads(products, team_threads());
    E* all = arena_.template get<E>(std::min<int64_t>(want, B) * each);
    run_team(want, [&](const Team& team) {
      const int64_t rounds = B / team.size, left = B - rounds * team.size;
      Share share{};
      share.parts = 1;
      for (int64_t i = 0; i < rounds; ++i) f(rounds * team.member + i, share, all + team.member * each);
      if (left == 0) return;
      const int64_t group = ((team.member + 1) * left - 1) / team.size;
      const int begin = static_cast<int>(group * team.size / left);
      share.part = team.member - begin;
      share.parts = static_cast<int>((group + 1) * team.size / left) - begin;
      share.places = team.group(begin);
      // The first of the group may still need its scratch.
      if (rounds > 0 && share.parts > 1) cpu::meet(share.places, share.part, share.parts);
      f(rounds * team.size + group, share, all + (rounds > 0 ? begin : group) * each);
    });
  }

  const AttentionInputs& in_;
  Arena arena_;
  std::vector<Attend<E>> all_;  // of each sequence
};

std::tuple<Tensor, Tensor, Tensor> attention(Tensor query, Tensor keys, Tensor values, OptionalTensor v,
                                             OptionalTensor mask, double scale, bool need_weights) {
  const AttentionInputs in = check_attention(query, keys, values, v, mask, scale);
  return in.dtype == ScalarType::Double ? AttentionCall<double>(in).forward(need_weights)
                                        : AttentionCall<float>(in).forward(need_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(OptionalTensor dcontext,
                                                              OptionalTensor dweights, Tensor query,
                                                              Tensor keys, Tensor values, OptionalTensor v,
                                                              OptionalTensor mask, double scale,
                                                              Tensor context, Tensor lse, bool need_query,
                                                              bool need_keys, bool need_values, bool need_v) {
  const AttentionInputs in = check_attention(query, keys, values, v, mask, scale);
  const Needs need{need_query, need_keys, need_values, need_v};
  return in.dtype == ScalarType::Double
             ? AttentionCall<double>(in).backward(dcontext, dweights, context, lse, need)
             : AttentionCall<float>(in).backward(dcontext, dweights, context, lse, need);
}

}  // namespace
}  // namespace fastrnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastrnn::cpu::attention));
  m.impl("attention_backward", TORCH_BOX(&fastrnn::cpu::attention_backward));
}
