"""Watches one forward pass and replaces every call on a trainable parameter by its rule.

Inside ``with tracker:`` each torch function call is seen with its arguments. A call that takes a trainable parameter
is run through an autograd function whose backward computes the input gradient only and hands (rule, x, g) to the
tracker; autograd itself never forms a weight gradient. A call on a parameter for which there is no rule is refused by
the parameter's name, and so is one whose input does not depend on the batch: its output gradient would already be
summed over the samples, and the clip bound silently lost.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from privimage_fast.dp.rules import RULES, Rule, UncoveredParameterError


@dataclass
class Use:
    """What the backward pass left of one call: the rule, its input, its output gradient, and what forward saved."""

    rule: Rule
    x: Tensor
    g: Tensor
    saved: tuple[Tensor, ...]


class _Call(torch.autograd.Function):
    """y = rule(x). The anchor keeps the call in the graph when x itself needs no gradient (first layers, ids)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, rule: Rule, sink: Callable[[Use], None]) -> Tensor:
        y, saved = rule.forward(x)
        ctx.rule, ctx.sink = rule, sink
        ctx.save_for_backward(x, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None, None, None]:
        x, *saved = ctx.saved_tensors
        input_grad = ctx.rule.input_grad(x, g, tuple(saved)) if ctx.needs_input_grad[1] else None
        ctx.sink(Use(ctx.rule, x, g, tuple(saved)))
        return None, input_grad, None, None


class Tracker(TorchFunctionMode):
    """Context in which a module's forward pass runs.

    Args:
        parameters: qualified name → trainable parameter; a tied parameter appears once.
        inputs: the tensors that carry the batch (directly or nested in tuples, lists and dicts).
        sink: receives each :class:`Use` during the backward pass, last call first.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], inputs: Any, sink: Callable[[Use], None]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in parameters.items()}
        self._sink = sink
        self._batch = WeakIdKeyDictionary()
        self.anchor = torch.zeros((), requires_grad=True)
        self.calls: Counter[str] = Counter()
        self.without_grad: dict[str, str] = {}  # parameter → function that used it where gradients are off
        for tensor in _tensors(inputs):
            self._batch[tensor] = True

    def _depends_on_batch(self, tensor: Tensor) -> bool:
        # Parameters reach the graph only through calls on batch inputs, so a gradient path implies the batch as well.
        return tensor.requires_grad or tensor in self._batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        tracked = [self._names[id(t)] for t in tensors if id(t) in self._names]
        if func in (F.batch_norm, torch.batch_norm):
            self._refuse_batch_norm(func, args, kwargs, tracked)
        if tracked and torch.is_grad_enabled():
            out = self._covered(func, args, kwargs, tracked)
        else:
            out = func(*args, **kwargs)
            if tracked and func.__name__ not in ("detach", "__get__") and any(t.is_floating_point() for t in _tensors(out)):
                self.without_grad |= dict.fromkeys(tracked, _function_name(func))
        if any(self._depends_on_batch(t) for t in tensors if id(t) not in self._names):
            # In-place calls change their first argument and may return nothing (``buffer[:, :n] = x``).
            for tensor in (*_tensors(out), *_tensors(args[:1] if out is None else ())):
                self._batch[tensor] = True
        return out

    def _covered(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[str]) -> Any:
        parse = RULES.get(func)
        if parse is None:
            out = func(*args, **kwargs)
            # Reading a shape or detaching is harmless; anything differentiable is a use that nobody clips.
            if any(t.requires_grad for t in _tensors(out) if id(t) not in self._names):
                raise UncoveredParameterError(
                    f"parameter {tracked[0]!r} is used by {_function_name(func)}, for which there is no per-sample gradient "
                    f"rule (known: {', '.join(sorted(_function_name(f) for f in RULES))}); freeze it with "
                    "requires_grad_(False) or express it through one of those functions"
                )
            return out
        call = inspect.signature(parse).bind({}, *args, **kwargs).arguments
        names = {role: self._names[id(call[role])] for role in ("weight", "bias") if id(call.get(role)) in self._names}
        for role in ("weight", "bias"):
            other = call.get(role)
            if isinstance(other, Tensor) and other.requires_grad and role not in names:
                raise UncoveredParameterError(
                    f"{_function_name(func)} mixes the parameter {tracked[0]!r} with a computed {role} that needs a gradient "
                    f"itself; compute the {role} without gradient, or freeze {tracked[0]!r}"
                )
        if len(set(names.values())) < len(names):
            raise UncoveredParameterError(
                f"parameter {tracked[0]!r} is both weight and bias of one {_function_name(func)} call; use two parameters"
            )
        if id(call["input"]) in self._names:
            raise UncoveredParameterError(
                f"parameter {self._names[id(call['input'])]!r} is the input of {_function_name(func)}; only weights and biases "
                "have per-sample gradient rules; freeze it with requires_grad_(False)"
            )
        if not self._depends_on_batch(call["input"]):
            raise UncoveredParameterError(
                f"parameter {tracked[0]!r} is applied by {_function_name(func)} to a tensor that does not come from the batch "
                f"(shape {tuple(call['input'].shape)}), so its gradient cannot be told apart by sample; pass every batch tensor "
                "through `args`, and expand position ids to (rows, positions) before they are embedded"
            )
        self.calls.update(names.values())
        detached = {role: call[role].detach() for role in ("weight", "bias") if isinstance(call.get(role), Tensor)}
        x, rule = parse(**{**call, **detached, "names": names})
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x, rule = _autocast(x, rule)
        return _Call.apply(self.anchor.to(x.device), x, rule, self._sink)

    def _refuse_batch_norm(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tracked: list[str]
    ) -> None:
        position = 5  # (input, running_mean, running_var, weight, bias, training, …); torch.batch_norm swaps 1–2 with 3–4
        training = kwargs["training"] if "training" in kwargs else args[position] if len(args) > position else False
        if training:
            where = f" (parameter {tracked[0]!r})" if tracked else ""
            raise UncoveredParameterError(
                f"batch normalisation{where} uses the statistics of the whole batch, so one sample's gradient depends on the "
                "others and cannot be clipped; use GroupNorm, or put the layer in eval() mode with frozen parameters"
            )


def _autocast(x: Tensor, rule: Rule) -> tuple[Tensor, Rule]:
    """Casts as autocast would, but outside the call, so that x and g of a :class:`Use` have one dtype.

    Normalisation keeps fp32: its statistics do not survive bf16.
    """
    low = rule.function not in ("group_norm", "layer_norm", "embedding")
    dtype = torch.get_autocast_dtype(x.device.type) if low else torch.float32
    rule.weight = None if rule.weight is None else rule.weight.to(dtype)
    rule.bias = None if rule.bias is None else rule.bias.to(dtype)
    return x.to(dtype), rule


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _function_name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", repr(func))
    # Property getters arrive as their slot wrapper's __get__, whose own name says nothing.
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Qualified name → parameter for every parameter that requires a gradient; tied ones once, by their first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def batch_tensors(tree: Any) -> Iterable[Tensor]:
    """Every tensor of a nested structure of tuples, lists and dicts, in order."""
    return list(_tensors(tree))
