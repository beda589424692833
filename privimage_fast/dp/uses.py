"""Calls on trainable parameters as autograd functions, and what their backward passes leave: uses.

The backward of such a call computes the input gradient only and hands (rule, x, g) to a :class:`Sink`; autograd itself never
forms a weight gradient. Under ``create_graph`` (a gradient penalty) the input gradient is differentiable itself, and what it
takes of a weight is a use of that weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privimage_fast.dp.rules import MatrixRule, Rule, UncoveredParameterError


@dataclass
class Use:
    """What the backward pass left of one call: the rule, its input, its output gradient, and what forward saved.

    ``second_order``: x is the gradient that came back, and g belongs to an earlier pass (a gradient penalty).
    """

    rule: Rule
    x: Tensor
    g: Tensor
    saved: tuple[Tensor, ...]
    second_order: bool = False

    @property
    def incoming(self) -> Tensor:
        """What the backward pass brought: zero on rows whose loss is not differentiated."""
        return self.x if self.second_order else self.g


class Sink:
    """Where uses go: nowhere until a receiver is set. ``calls`` counts how often each parameter is used in a step."""

    def __init__(self) -> None:
        self.receiver: Callable[[Use], None] | None = None
        self.calls: Counter[str] = Counter()

    def __call__(self, use: Use) -> None:
        if self.receiver is not None:
            self.receiver(use)


def _wanted(anchor: Tensor) -> bool:
    """Whether the backward pass that is running asks for weight gradients.

    A gradient penalty differentiates with respect to inputs; nothing of that pass is a parameter's gradient.
    """
    return torch._C._will_engine_execute_node(anchor.grad_fn)  # type: ignore[attr-defined]


class RuleCall(torch.autograd.Function):
    """y = rule(x). The anchor keeps the call in the graph when x itself needs no gradient (first layers, ids)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rule: Rule, sink: Sink, x: Tensor, *more: Tensor) -> Tensor:
        y, saved = rule.forward(x, *more)
        if y._is_view():  # F.linear's reshaped product: a view made in here could not be changed in place outside
            y = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.rule, ctx.sink, ctx.anchor = rule, sink, anchor
        ctx.save_for_backward(*rule.kept_inputs(x, *more), *saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors  # computes a checkpointed part again, watched
        needs, kept = ctx.needs_input_grad[3:], tuple(rest)
        with torch._C.DisableTorchFunction():  # rules and kernels need not be watched: thousands of small calls a step
            if torch.is_grad_enabled() and any(needs):  # create_graph: differentiable itself, and its use of weights seen
                grads = _differentiable_input_grad(ctx, x, g, rest)
            else:
                grads, kept = ctx.rule.backward(x, g, kept, needs)
            if _wanted(ctx.anchor):
                ctx.sink(Use(ctx.rule, x.detach(), g.detach(), kept))
        return None, None, None, *grads


def _differentiable_input_grad(ctx: Any, x: Tensor, g: Tensor, rest: list[Tensor]) -> tuple[Tensor | None, ...]:
    rule: Rule = ctx.rule
    if isinstance(rule, MatrixRule):
        ctx.sink.calls.update([rule.names["weight"]] if "weight" in rule.names else [])
        return (_InputGrad.apply(ctx.anchor, rule.without_bias(), ctx.sink, g, x.detach()),)
    plain = rule.without_affine(x)
    if plain is None:
        raise UncoveredParameterError(
            f"a gradient was taken through {rule.describe()} with create_graph=True (a gradient penalty?); the engine covers "
            "that for linear, convolution and normalisation layers and broadcast parameters only"
        )
    if "weight" in rule.names:
        ctx.sink.calls[rule.names["weight"]] += 1
        scale, view = rule.scale_rule(x)
        g = g * RuleCall.apply(ctx.anchor, scale, ctx.sink, x.new_empty(x.shape[0], 0)).view(view)
    elif rule.weight is not None:
        g = g * rule.weight.view(rule.scale_view(x))
    return torch.autograd.grad(plain, x, g, create_graph=True)


class _InputGrad(torch.autograd.Function):
    """dx = ∂⟨g, f(x, W)⟩/∂x of a call f that is linear in x and in W; itself a use of W, with ``gg`` in the place of x."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rule: Rule, sink: Sink, g: Tensor, x: Tensor) -> Tensor:
        ctx.rule, ctx.sink, ctx.anchor = rule, sink, anchor
        ctx.save_for_backward(g)
        return rule.input_grad(x, g, ())

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[None, None, None, Tensor, None]:
        (g,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise UncoveredParameterError(f"third-order gradients through {ctx.rule.describe()} are not covered")
        with torch._C.DisableTorchFunction():
            if _wanted(ctx.anchor):
                ctx.sink(Use(ctx.rule, gg.detach(), g.detach(), (), second_order=True))
            return None, None, None, ctx.rule.forward(gg)[0], None
