"""Probes of docs/compatibility.md: derivatives and transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from probing import Wrong, example, make, plain, probe, same, wide
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

TRANSFORMS = "Derivatives and `torch.func`"


def loss_of(layer: nn.Module) -> Callable[..., Tensor]:
    return lambda weights, x: functional_call(layer, weights, (x,))[0].square().sum()


def plain_loss(kind: str) -> Callable[..., Tensor]:
    return lambda weights, x: plain(kind, weights, x)[0].square().sum()


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in layer.named_parameters()}


def all_same(
    ours: dict[str, Tensor], truth: dict[str, Tensor], rtol: float = 1e-3, atol: float = 1e-4
) -> None:
    for name, value in truth.items():
        same(ours[name], value, rtol, atol)


@probe(TRANSFORMS, "`vmap` over inputs")
def vmap_inputs(library: Any, kind: str) -> None:
    layer, xs = make(library, kind), torch.stack([example(), 2 * example(), -example()])
    got = vmap(lambda x: layer(x)[0])(xs)
    same(got, torch.stack([plain(kind, wide(layer), x.double())[0] for x in xs]))


@probe(TRANSFORMS, "`vmap` over stacked parameters (an ensemble)")
def vmap_parameters(library: Any, kind: str) -> None:
    layers = [make(library, kind) for _ in range(3)]
    for k, layer in enumerate(layers):
        with torch.no_grad():
            layer.weight_hh_l0.mul_(k)
    weights, _ = stack_module_state(layers)
    x = example()
    got = vmap(lambda w: functional_call(layers[0], w, (x,))[0])(weights)
    same(got, torch.stack([plain(kind, wide(layer), x.double())[0] for layer in layers]))


@probe(TRANSFORMS, "per-sample gradients, `vmap(grad(...))`")
def per_sample(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    one = x.transpose(0, 1).unsqueeze(2)  # [B, T, 1, I]
    got = vmap(grad(loss_of(layer)), (None, 0))(parameters(layer), one)
    truth = [grad(plain_loss(kind))(wide(layer), v) for v in one.double()]
    all_same(got, {n: torch.stack([g[n] for g in truth]) for n in truth[0]})


@probe(TRANSFORMS, "`torch.func.grad` by the parameters")
def func_grad(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    got = grad(loss_of(layer))(parameters(layer), x)
    all_same(got, grad(plain_loss(kind))(wide(layer), x.double()))


@probe(TRANSFORMS, "`torch.func.jvp` by input and parameters")
def func_jvp(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()

    def directional(loss: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return jvp(
            loss, (weights, x), ({n: torch.ones_like(w) for n, w in weights.items()}, torch.ones_like(x))
        )[1]

    same(
        directional(loss_of(layer), parameters(layer), x),
        directional(plain_loss(kind), wide(layer), x.double()),
        1e-3,
    )


@probe(TRANSFORMS, "forward-mode AD with dual tensors")
def dual_numbers(library: Any, kind: str) -> None:
    from torch.autograd import forward_ad

    layer, x = make(library, kind), example()
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent
    if got is None:
        raise Wrong("wrong result: no tangent")
    weights = wide(layer)
    same(got, jvp(lambda v: plain(kind, weights, v)[0], (x.double(),), (torch.ones_like(x).double(),))[1])


def of_input(transform: Any, library: Any, kind: str) -> None:
    layer, x = make(library, kind), example(3, 2)
    weights = wide(layer)
    same(
        transform(lambda v: layer(v)[0].square().sum((0, 1)))(x),
        transform(lambda v: plain(kind, weights, v)[0].square().sum((0, 1)))(x.double()),
        1e-3,
        1e-4,
    )


@probe(TRANSFORMS, "`jacrev`")
def func_jacrev(library: Any, kind: str) -> None:
    of_input(jacrev, library, kind)


@probe(TRANSFORMS, "`jacfwd`")
def func_jacfwd(library: Any, kind: str) -> None:
    of_input(jacfwd, library, kind)


@probe(TRANSFORMS, "`hessian`")
def func_hessian(library: Any, kind: str) -> None:
    of_input(hessian, library, kind)


@probe(TRANSFORMS, "Hessian-vector product, forward over reverse")
def forward_over_reverse(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()

    def product(loss: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return jvp(lambda v: grad(lambda u: loss(weights, u))(v), (x,), (torch.ones_like(x),))[1]

    same(
        product(loss_of(layer), parameters(layer), x),
        product(plain_loss(kind), wide(layer), x.double()),
        1e-3,
        1e-4,
    )


def penalty(y: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), weights)


@probe(TRANSFORMS, "double backward (a gradient penalty)")
def double_backward(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example().requires_grad_()
    truth_x = x.detach().double().requires_grad_()
    weights = {n: w.requires_grad_() for n, w in wide(layer).items()}
    names = ["weight_ih_l0", "weight_hh_l0"]
    ours = penalty(layer(x)[0], x, [getattr(layer, n) for n in names])
    truth = penalty(plain(kind, weights, truth_x)[0], truth_x, [weights[n] for n in names])
    for a, b in zip(ours, truth, strict=True):
        same(a, b, 1e-3, 1e-4)


@probe(TRANSFORMS, "`torch.autograd.grad(is_grads_batched=True)`")
def batched_gradients(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example(3, 2).requires_grad_()
    y = layer(x)[0]
    rows = torch.eye(y.numel()).view(-1, *y.shape)
    got = torch.autograd.grad(y, x, rows, is_grads_batched=True)[0]
    weights = wide(layer)
    same(got.view(*y.shape, *x.shape), jacrev(lambda v: plain(kind, weights, v)[0])(x.detach().double()))
