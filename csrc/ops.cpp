// The operators' schemas; each device registers its own implementation.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// What compiled this library, for `python -m fastrnn info`.
std::string build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
#if defined(__x86_64__)
  return compiler + ", x86-64";
#elif defined(__aarch64__)
  return compiler + ", aarch64";
#else
  return compiler;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(fastrnn, m) {
  // last: the states at each sequence's end, as `states`. seq: the sequences of the states after h, [D, T, B,
  // H] (packed [D, N, H]), empty unless save or return_states. saved: what layer_backward needs, empty unless
  // save.
  m.def(
      "layer(str cell, Tensor x, Tensor[] states, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? reset, bool save, bool return_states) -> (Tensor y, Tensor[] last, Tensor[] seq, Tensor[] "
      "saved)");
  // dy, dlast, dseq: gradients of layer's outputs; an empty list counts as zeros. dx has no elements unless
  // need_x, dparams is empty unless need_params.
  m.def(
      "layer_backward(str cell, Tensor? dy, Tensor[] dlast, Tensor[] dseq, Tensor x, Tensor[] states, "
      "Tensor[] params, Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor y, Tensor[] seq, "
      "Tensor[] saved, bool need_x, bool need_params) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
  // The weights of a layer as the kernels of this instruction set read them, in one tensor of the inputs'
  // type that only layer_packed understands. params as layer's; scales, of the rows of each weight, where the
  // weights are int8, else empty.
  m.def("pack(str cell, Tensor[] params, Tensor[] scales, int directions) -> Tensor");
  m.def(
      "layer_packed(str cell, Tensor x, Tensor[] states, Tensor weights, Tensor? lengths, Tensor? "
      "batch_sizes, "
      "Tensor? reset, bool return_states) -> (Tensor y, Tensor[] last, Tensor[] seq)");
  // layer, or layer_packed where p0 stands alone, for one direction without masks and for cells of one or two
  // states; in grad mode too it leaves no gradient, and says nothing. Lists of arguments, and Python's rules,
  // would take as long as a short step computes.
  m.def(
      "stream(str cell, Tensor x, Tensor h, Tensor? c, Tensor p0, Tensor? p1=None, Tensor? p2=None, Tensor? "
      "p3=None, Tensor? p4=None) -> (Tensor y, Tensor h, Tensor? c)");
  // All layers of one direction, states [L, B, .], params one layer's after another's: those of layer, or of
  // layer_packed where each has one tensor. At once where the plan says so; no gradient, as of stream.
  m.def(
      "stack(str cell, Tensor x, Tensor[] states, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? reset) -> (Tensor y, Tensor[] last)");
  // Recursive cells. The slots of a forest's nodes, given or by increasing number, and what is wrong with it
  // (kind, node, other); the schedule of one direction, see tree.h.
  m.def("tree_slots(Tensor parents, Tensor? slots) -> (Tensor slots, Tensor problem)");
  m.def("tree_schedule(Tensor parents, Tensor slots, bool down) -> Tensor");
  // Rows in the nodes' order. params: (w_ih, w_hh[, b_ih, b_hh]); states: those after h; saved: what
  // tree_backward needs, empty unless save.
  m.def(
      "tree(str cell, Tensor? x, Tensor[] params, Tensor schedule, bool save) -> (Tensor h, Tensor[] states, "
      "Tensor[] saved)");
  // dx has no elements unless need_x; that of w_ih is zeros without x.
  m.def(
      "tree_backward(str cell, Tensor? dh, Tensor[] dstates, Tensor? x, Tensor[] params, Tensor schedule, "
      "Tensor h, Tensor[] states, Tensor[] saved, bool need_x, bool need_params) -> (Tensor dx, Tensor[] "
      "dparams)");
  // What the forward pass of such a layer would do on the CPU: threads, the parts into which directions, rows
  // and units fall, and the bytes of second-level cache that the choice rests on; then, for a stack of such
  // layers, in how many groups they run at once, the parts of their units, and how many steps apart; whether
  // x and h enter one product; and the backward scan's threads and parts. x: its type and last size.
  m.def("plan(str cell, Tensor x, int T, int B, int N, int H, int P, int D, bool int8, int layers) -> int[]");
  // Attention after the products with weights; fastrnn.reference.attention has the arguments. weights has no
  // elements unless need_weights; lse [B, Tq], the logarithm of each softmax's sum, is for
  // attention_backward.
  m.def(
      "attention(Tensor query, Tensor keys, Tensor values, Tensor? v, Tensor? mask, float scale, bool "
      "need_weights) -> (Tensor context, Tensor weights, Tensor lse)");
  // What is not needed is not computed and has no elements; nor has dv where v is not given.
  m.def(
      "attention_backward(Tensor? dcontext, Tensor? dweights, Tensor query, Tensor keys, Tensor values, "
      "Tensor? v, Tensor? mask, float scale, Tensor context, Tensor lse, bool need_query, bool need_keys, "
      "bool need_values, bool need_v) -> (Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor dv)");
  // All steps of Luong's decoder with input feeding; fastrnn.reference.decoder has the arguments, with the
  // parameters of all layers in one list. saved: what decoder_backward needs, empty unless save.
  m.def(
      "decoder(str cell, Tensor x, Tensor[] states, Tensor feed, Tensor[] params, Tensor w_h, Tensor keys, "
      "Tensor values, Tensor? w_q, Tensor? v, Tensor? mask, Tensor[] drops, float scale, bool save) -> "
      "(Tensor "
      "out, Tensor[] last, Tensor weights, Tensor[] saved)");
  // dout, dlast, dweights: gradients of decoder's outputs; none counts as zeros. need_params: of all weights,
  // w_h, w_q and v among them. What is not needed has no elements, dparams is empty; dw_q and dv have none
  // where those are not given.
  m.def(
      "decoder_backward(str cell, Tensor? dout, Tensor[] dlast, Tensor? dweights, Tensor x, Tensor[] states, "
      "Tensor feed, Tensor[] params, Tensor w_h, Tensor keys, Tensor values, Tensor? w_q, Tensor? v, Tensor? "
      "mask, Tensor[] drops, float scale, Tensor out, Tensor weights, Tensor[] saved, bool need_x, bool "
      "need_params, bool need_keys, bool need_values) -> (Tensor dx, Tensor[] dstates, Tensor dfeed, "
      "Tensor[] dparams, Tensor dw_h, Tensor dkeys, Tensor dvalues, Tensor dw_q, Tensor dv)");
  m.def("instruction_sets() -> str[]");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
