"""Rows that values of the batch chose: which calls make them, and which give them a place by sample again.

Which sample such a row belongs to changes from batch to batch, without a trace in any shape, so neither a rule nor one look at
the gradients can tell whose gradient it carries. The tracker marks them, and refuses a parameter that meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from privimage_fast.dp.calls import named

_FINDS = named("nonzero", "argwhere", "unique", "unique_consecutive")  # as many as the values say
_TOPK = named("topk")
_SORTS = named("sort") | _TOPK  # function(input, …, dim=-1)
_READS = named("item", "tolist", "__bool__", "__int__", "__index__", "__float__")
_PUTS_BY_MASK = named("masked_scatter", "masked_scatter_", "__setitem__")  # (into, where, …)
# (into, dim, where, …), or (into, where, …)
_PUTS = ("scatter", "scatter_add", "index_put", "index_add", "index_copy")
_PUTS_BACK = _PUTS_BY_MASK | named(*_PUTS, *(f"{name}_" for name in _PUTS))
_STACKS = named("stack")

# function → names of its arguments in order, and the one whose values choose
_CHOOSES = {
    **dict.fromkeys(named("masked_select"), (("input", "mask"), "mask")),
    **dict.fromkeys(named("take"), (("input", "index"), "index")),
    **dict.fromkeys(named("index_select", "gather"), (("input", "dim", "index"), "index")),
    **dict.fromkeys(named("take_along_dim"), (("input", "indices", "dim"), "indices")),
    **dict.fromkeys(named("repeat_interleave"), (("input", "repeats", "dim"), "repeats")),
}

_MAY_CHOOSE = _FINDS | _SORTS | set(_CHOOSES) | {torch.where, Tensor.__getitem__}


def reads_values(func: Callable[..., Any]) -> bool:
    """Whether a call hands values of a tensor to Python, which may then do anything by them."""
    return func in _READS


def selects_rows(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], from_batch: Callable[[Tensor], bool]
) -> bool:
    """Whether the result's first dimension counts what values of the batch chose: ``x[mask]``, ``x[order]``, ``nonzero``.

    Which sample such a row belongs to changes from batch to batch, without a trace in any shape.
    """
    if func not in _MAY_CHOOSE:
        return False
    source = kwargs.get("input", kwargs.get("self", args[0] if args else None))
    if not isinstance(source, Tensor) or not from_batch(source):
        return False
    if func in _FINDS or (func is torch.where and len(args) + len(kwargs) == 1):
        return True
    if func in _SORTS:
        given = args[2:] if func in _TOPK else args[1:]
        return _is_first(source, kwargs.get("dim", given[0] if given and not isinstance(given[0], bool) else -1))
    if func in _CHOOSES:
        names, by = _CHOOSES[func]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        chooser = given.get(by)
        return isinstance(chooser, Tensor) and from_batch(chooser) and _is_first(source, given.get("dim", 0))
    return func is Tensor.__getitem__ and _leads(source, args[1], from_batch)


def _is_first(source: Tensor, dim: Any) -> bool:
    return dim is None or (isinstance(dim, int) and dim % max(1, source.dim()) == 0)


def _leads(source: Tensor, index: Any, from_batch: Callable[[Tensor], bool]) -> bool:
    """Whether an index that comes from the batch is about the first dimension; further ones choose within rows."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if first is Ellipsis:
        return any(isinstance(i, Tensor) and i.dtype == torch.bool and i.dim() == source.dim() and from_batch(i) for i in rest)
    return isinstance(first, Tensor) and first.dim() > 0 and from_batch(first)


def puts_back(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], from_batch: Callable[[Tensor], bool], rows: int
) -> bool:
    """Whether a call gives chosen rows a place by sample again: where the batch's values say, or one piece a row."""
    if func is torch._C._nn.pad_sequence:
        return True
    if func in _STACKS:
        pieces = kwargs.get("tensors", args[0] if args else ())
        return len(pieces) == rows and _is_first(pieces[0], kwargs.get("dim", args[1] if len(args) > 1 else 0))
    if func not in _PUTS_BACK:
        return False
    places = (*args[1 : 2 if func in _PUTS_BY_MASK else 3], *(kwargs.get(name) for name in ("mask", "index", "indices")))
    found = [t for place in places for t in (place if isinstance(place, list | tuple) else (place,)) if isinstance(t, Tensor)]
    return any(from_batch(t) for t in found)
