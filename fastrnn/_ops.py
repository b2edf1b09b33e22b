"""torch.func.vmap over the native ops.

Input, states and gradients that are batched fold into the batch of the op (N becomes B * N), so that one call does the
work of B; the weight gradients of such a call come back apart for each of the B blocks (``groups``). Batched weights,
and packed rows, whose number differs from call to call, run one after the other.

A rule may call nothing but differentiable ops: a helper without a derivative of its own gave silently wrong nested
Jacobians.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Op = Callable[..., list[Tensor]]


def register(states: Mapping[str, int]) -> None:
    """Register the vmap rules of every cell's two ops; ``states`` says how many states each cell has."""
    for cell, count in states.items():
        for name, rule in ((f"{cell}_layer", _layer), (f"{cell}_layer_backward", _backward)):
            op = getattr(torch.ops.fastrnn, name).default
            torch.library.register_vmap(f"fastrnn::{name}", _bound(rule, op, count))


def _bound(rule: Callable[..., Any], op: Op, states: int) -> Callable[..., Any]:
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError("vmap over a dimension of size 0 is not supported")
        return rule(op, states, info.batch_size, in_dims, *arguments)

    return vmap


def _batched(dims: Any) -> bool:
    return any(dim is not None for dim in pytree.tree_leaves(dims, is_leaf=lambda dim: dim is None))


def _fold(tensor: Tensor | None, dim: int | None, size: int, at: int) -> Tensor | None:
    """Merge the vmapped dimension into dimension ``at`` (the batch), as its outer part."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, at).flatten(at, at + 1)


def _fold_all(tensors: Sequence[Any], dims: Sequence[int | None], size: int, at: Sequence[int]) -> list[Any]:
    return [_fold(tensor, dim, size, place) for tensor, dim, place in zip(tensors, dims, at, strict=True)]


def _unfold(tensor: Tensor, size: int, at: int) -> Tensor:
    return tensor.unflatten(at, (size, tensor.shape[at] // size))


def _one_by_one(op: Op, size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    leaves, spec = pytree.tree_flatten(arguments)
    dims = pytree._broadcast_to_and_flatten(in_dims, spec)
    if dims is None:  # dims follow the arguments, lists and all
        raise RuntimeError("vmap: the dimensions do not fit the arguments")
    calls = []
    for i in range(size):
        each = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
        calls.append(op(*pytree.tree_unflatten(each, spec)))
    return [torch.stack(results) for results in zip(*calls, strict=True)], [0] * len(calls[0])


def _layer(op: Op, states: int, size: int, dims: tuple[Any, ...], *arguments: Any) -> Any:
    input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first, need_steps, need_reserve = arguments
    if _batched(dims[2]) or batch_sizes is not None:
        return _one_by_one(op, size, dims, arguments)
    n = 0 if batch_first else 1
    results = op(
        _fold(input, dims[0], size, n),
        _fold_all(hx, dims[1], size, [1] * len(hx)),
        weights,
        _fold(lengths, dims[3], size, 0),
        _fold(reset, dims[4], size, n),
        None,
        bidirectional,
        batch_first,
        need_steps,
        need_reserve,
    )
    # output, final states, per-step states other than h, and the reserve with its directions in front
    at = [n, *[1] * states, *[n] * (states - 1 if need_steps else 0), n + 1 if need_reserve else None]
    return [r if place is None else _unfold(r, size, place) for r, place in zip(results, at, strict=True)], at


def _backward(op: Op, states: int, size: int, dims: tuple[Any, ...], *arguments: Any) -> Any:
    grads, input, hx, weights, lengths, reset, batch_sizes, output, reserve, *rest = arguments
    bidirectional, batch_first, mask, groups = rest
    if _batched(dims[3]) or batch_sizes is not None:
        return _one_by_one(op, size, dims, arguments)
    n = 0 if batch_first else 1
    # gradients of the output, the final states, and of per-step states if there are any
    at = [n, *[1] * states, *[n] * (len(grads) - 1 - states)]
    results = op(
        _fold_all(grads, dims[0], size, at),
        _fold(input, dims[1], size, n),
        _fold_all(hx, dims[2], size, [1] * len(hx)),
        weights,
        _fold(lengths, dims[4], size, 0),
        _fold(reset, dims[5], size, n),
        None,
        _fold(output, dims[7], size, n),
        _fold(reserve, dims[8], size, n + 1),
        bidirectional,
        batch_first,
        mask,
        size * max(groups, 1),
    )
    places = [n, *[1] * len(hx), *[0] * len(weights)]
    unfolded, out_dims = [], []
    for i, (result, place, wanted) in enumerate(zip(results, places, mask, strict=True)):
        if wanted and i <= len(hx):
            result = _unfold(result, size, place)
        elif wanted and groups > 0:
            result = result.unflatten(0, (size, groups))
        unfolded.append(result)
        out_dims.append(place if wanted else None)
    return unfolded, out_dims
