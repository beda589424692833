"""Rules of normalisation layers, and of the ops that stand for several of a block's layers on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast import ops
from privimage_fast.dp.rules import Rule, Term, added_term
from privimage_fast.ops import normalise


def _dense(x: Tensor) -> Tensor:
    """x in a layout that torch's group norm takes: contiguous, or channels last with the strides that belong to it."""
    if x.dim() == 4 and not x.is_contiguous():
        _, channels, height, width = x.shape
        if x.stride() == (channels * height * width, 1, width * channels, channels):
            return x
    return x.contiguous()


class GroupNormRule(Rule):
    """Affine terms of group normalisation; statistics are per row, so samples never mix."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(
            _dense(x),
            self.weight,
            self.bias,
            rows,
            channels,
            math.prod(x.shape[2:]),
            self.options["num_groups"],
            self.options["eps"],
        )
        return y, (mean, rstd)

    def without_affine(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.options["num_groups"], None, None, self.options["eps"])

    def scale_view(self, x: Tensor) -> tuple[int, ...]:
        return (1, x.shape[1], *[1] * (x.dim() - 2))

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        rows, channels = x.shape[:2]
        x = _dense(x)
        # The kernel reads both in the order of x: a g in another order gives another gradient, without an error.
        g = g.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        return torch.ops.aten.native_group_norm_backward(
            g, x, *saved, self.weight, rows, channels, math.prod(x.shape[2:]),
            self.options["num_groups"], [True, False, False],
        )[0]  # fmt: skip

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        return _affine_terms(
            self.names,
            ops.group_norm_affine_grad(
                x, g, *saved, num_groups=self.options["num_groups"], multiplicity=multiplicity, **_affine_out(self.names, out)
            ),
        )


def _terms_of_rows(names: dict[str, str], rows: dict[str, Tensor], multiplicity: int, out: dict[str, Tensor]) -> list[Term]:
    """Of (R, C) gradients of each row, which are the caller's to give away: what is stored is added to in place later."""
    samples = {role: t.unflatten(0, (-1, multiplicity)).sum(1) if multiplicity > 1 else t for role, t in rows.items()}
    return [added_term(name, samples[role], out) for role, name in names.items()]


class FusedGroupNormRule(Rule):
    """Group normalisation, then SiLU or nothing, as :func:`privimage_fast.ops.normalise.group_norm` on a GPU has it.

    One pass makes the input's gradient and, on its way, each row's gradients of weight and bias. ``more`` is the shift, if any.
    """

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        o = self.options
        y, mean, rstd = normalise.forward(x, o["num_groups"], self.weight, self.bias, o["eps"], o["silu"], *more)
        return y, (mean, rstd)

    def backward(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], needs: Sequence[bool]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        *shift, mean, rstd = saved
        found = normalise.backward(x, g, mean, rstd, self.weight, self.bias, self.options["silu"], *shift, needs_x=needs[0])
        return found[: len(needs)], found[2:]

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        weight, bias = saved
        return _terms_of_rows(self.names, {"weight": weight, "bias": bias}, multiplicity, out)


class ResidualRule(Rule):
    """:func:`privimage_fast.ops.normalise.residual`: the second image is ``more``, the biases are weight and bias."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return normalise.residual_forward(x, *more, self.weight, self.bias, self.options["scale"]), ()

    def kept_inputs(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return (x.new_empty(x.shape[0], 0),)

    def backward(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], needs: Sequence[bool]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        grad, rows = normalise.residual_backward(g, self.options["scale"])
        return tuple(grad if need else None for need in needs), (rows,)

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        # Each parameter's in memory of its own: one tensor for both would take in what is added to either, unmeasured.
        return _terms_of_rows(self.names, {role: saved[0].clone() for role in self.names}, multiplicity, out)


class LayerNormRule(Rule):
    """Affine terms of layer normalisation over the trailing ``normalized_shape``."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = torch.native_layer_norm(x, self.options["normalized_shape"], self.weight, self.bias, self.options["eps"])
        return y, (mean, rstd)

    def without_affine(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.options["normalized_shape"], None, None, self.options["eps"])

    def scale_view(self, x: Tensor) -> tuple[int, ...]:
        shape = self.options["normalized_shape"]
        return (*[1] * (x.dim() - len(shape)), *shape)

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x.contiguous(), self.options["normalized_shape"], *saved, self.weight, self.bias,
            [True, False, False],
        )[0]  # fmt: skip

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        width, rows = math.prod(self.options["normalized_shape"]), x.shape[0]
        positions = math.prod(x.shape[1:]) // width
        mean, rstd = (s.reshape(rows, positions) for s in saved)
        x, g = x.reshape(rows, positions, width), g.reshape(rows, positions, width)
        flat_out = {name: t.flatten(1) for name, t in out.items() if name in self.names.values()}
        terms = _affine_terms(
            self.names,
            ops.layer_norm_affine_grad(x, g, mean, rstd, multiplicity=multiplicity, **_affine_out(self.names, flat_out)),
        )
        return [Term(t.name, t.sq_norms, t.stored.unflatten(1, self.options["normalized_shape"])) for t in terms]


def _affine_out(names: dict[str, str], out: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"out_{role}": out.get(names[role]) if role in names else None for role in ("weight", "bias")}


def _affine_terms(names: dict[str, str], grads: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Term]:
    sq_weight, weight, sq_bias, bias = grads
    found = {"weight": (sq_weight, weight), "bias": (sq_bias, bias)}
    return [Term(name, *found[role]) for role, name in names.items()]
