"""Per-sample gradient rules, one for each torch function that takes parameters.

A rule knows four things about one call ``y = f(x, parameters)``: how to compute y, how to compute the gradient of x,
how to compute each sample's gradient of each parameter (with its norm), and how to compute a weighted sum of those
without keeping them. Rules are tied to *functions* (``F.conv2d``), not to modules: a weight used through its module
and again through ``torch.nn.functional``, circular padding, or the order in which layers were registered are then
no special cases.

Weights may be parameters or tensors derived from them (``weight.t()``, a normalised weight); ``names`` holds the key under which
the collector keeps their gradients, and the tracker pulls those of derived tensors back to parameters.

Rows of a batch: sample b owns the K adjacent rows b·K … b·K+K−1; a call may see a whole multiple n of them (tokens or
patches flattened into the batch), and then uses K·n rows a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast import ops


class UncoveredParameterError(RuntimeError):
    """A trainable parameter takes part in the loss in a way for which no per-sample gradient is known."""


def like(tree: Any, values: Iterable[Any]) -> Any:
    """A list, tuple or named tuple of the same kind with other values."""
    return tree._make(values) if hasattr(tree, "_make") else type(tree)(values)


@dataclass
class Term:
    """One parameter's per-sample gradients from one call: squared norms (B,) float64 and values (B, *parameter)."""

    name: str
    sq_norms: Tensor
    stored: Tensor


@dataclass
class Rule:
    """One call of a function with trainable parameters. Tensors are the detached parameters; None where absent.

    ``names`` maps the role ("weight", "bias") to the parameter's qualified name, for trainable parameters only.
    """

    function: str
    names: dict[str, str]
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def take_more(self) -> tuple[Tensor, ...]:
        """``options["more"]``, taken out: what a graph saves must not be held by the rule as well."""
        return self.options.pop("more", ())

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns y and what the backward pass needs beside its inputs."""
        raise NotImplementedError

    def kept_inputs(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass is given of the inputs; the first has a row for each of x's."""
        return (x, *more)

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor | None:
        raise NotImplementedError

    def input_grads(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return (self.input_grad(x, g, saved) if needs[0] else None,)

    def backward(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], needs: Sequence[bool]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        """:meth:`input_grads`, and what :meth:`per_sample` of the same pass is given as ``saved``."""
        return self.input_grads(x, g, saved, needs), saved

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        """Per-sample gradients of every trainable parameter of the call; ``out[name]`` is accumulated into."""
        raise NotImplementedError

    def without_affine(self, x: Tensor) -> Tensor | None:
        """A normalisation without weight and bias, on x with its graph; None for what is no normalisation."""
        return None

    def scale_view(self, x: Tensor) -> tuple[int, ...]:
        """Shape in which a normalisation's weight broadcasts against x."""
        raise NotImplementedError

    def scale_rule(self, x: Tensor) -> tuple[ExpandRule, tuple[int, ...]]:
        """The normalisation's weight as a factor for each row, and the shape in which it broadcasts against x."""
        assert self.weight is not None
        rule = ExpandRule("expand", {"weight": self.names["weight"]}, self.weight, None, {"shape": tuple(self.weight.shape)})
        return rule, (x.shape[0], *self.scale_view(x)[1:])

    def describe(self) -> str:
        return f"{self.function}({', '.join(sorted(n.split(' at ')[0] for n in self.names.values()))})"


class ExpandRule(Rule):
    """A parameter copied for each row (``options["shape"]``: of a row); x is an empty tensor that tells the rows."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert self.weight is not None
        return self.weight.expand(x.shape[0], *self.options["shape"]).clone(), ()

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> None:
        return None

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        assert self.weight is not None
        name, shape = self.names["weight"], self.options["shape"]
        samples = x.shape[0] // multiplicity
        g = g.reshape(samples, multiplicity, *shape)
        own = tuple(self.weight.shape)
        own = (1,) * (len(shape) - len(own)) + own[max(0, len(own) - len(shape)) :]
        dims = [1, *(i + 2 for i, (o, s) in enumerate(zip(own, shape, strict=True)) if o == 1 and s != 1)]
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        stored = g.sum(dims, dtype=dtype).reshape(samples, *self.weight.shape)
        return [added_term(name, stored, out)]


def added_term(name: str, stored: Tensor, out: dict[str, Tensor]) -> Term:
    """The term of ``stored``, after what an earlier call of the parameter left."""
    if name in out:
        stored = out[name].add_(stored)
    return Term(name, squared_norms(stored), stored)


def squared_norms(stored: Tensor) -> Tensor:
    """(B, *shape) → (B,) float64, summed in double."""
    if stored[:1].numel() == 0:
        return torch.zeros(stored.shape[0], dtype=torch.float64, device=stored.device)
    return torch.linalg.vector_norm(stored.reshape(stored.shape[0], -1), dim=1, dtype=torch.float64).square()


class MatrixRule(Rule):
    """A rule whose weight gradient is a contraction over positions, so that norms can be had without storing it.

    The call is linear in x and in its weight, so its second-order gradients are contractions of the same kind.
    """

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor],
        store_dtype: torch.dtype = torch.float32,
    ) -> list[Term]:  # fmt: skip
        """As of any rule; a new weight gradient is rounded to ``store_dtype`` before its norm is taken."""
        raise NotImplementedError

    def weight_norms(self, x: Tensor, g: Tensor, multiplicity: int, strategy: str) -> Tensor:
        """(B,) float64 squared norms of the weight's per-sample gradients; ``strategy`` is "gram" or "norm-only"."""
        raise NotImplementedError

    def weighted_weight_grad(self, x: Tensor, g: Tensor) -> Tensor:
        """The ordinary weight gradient for output gradients g that already carry the clip factors."""
        raise NotImplementedError

    def positions(self, x: Tensor, g: Tensor) -> int:
        """Terms that a row adds to each weight's gradient."""
        raise NotImplementedError

    def offsets(self) -> int:
        """Weights that join an input and an output channel: 1, or the kernel's size."""
        assert self.weight is not None
        return math.prod(self.weight.shape[2:])

    def clipped_sum(self, x: Tensor, g: Tensor, factors: Tensor, multiplicity: int) -> Tensor | None:
        """Σ_b factors_b · (weight gradient of b), with products as exact as in the norms; None where no kernel does that."""
        return None

    def as_linear(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """x (R, T, d) and g (R, T, p) of the linear layer that has this weight gradient; None where there is none."""
        return None

    def without_bias(self) -> MatrixRule:
        return replace(self, bias=None, names={k: v for k, v in self.names.items() if k == "weight"})

    def weight_numel(self) -> int:
        assert self.weight is not None
        return self.weight.numel()

    def bias_terms(self, g: Tensor, multiplicity: int, out: dict[str, Tensor]) -> list[Term]:
        name = self.names.get("bias")
        if name is None:
            return []
        sq, stored = ops.bias_grad(g, channel_dim=self.options["channel_dim"], multiplicity=multiplicity, out=out.get(name))
        return [Term(name, sq, stored)]


class LinearRule(MatrixRule):
    """y = x Wᵀ + b on the last dimension; every dimension between the rows and the last is a position."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.linear(x, self.weight, self.bias), ()

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        return g @ self.weight

    def _positions(self, t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1])

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor],
        store_dtype: torch.dtype = torch.float32,
    ) -> list[Term]:  # fmt: skip
        terms = self.bias_terms(g, multiplicity, out)
        name = self.names.get("weight")
        if name is not None:
            sq, stored = ops.linear_weight_grad(
                self._positions(x), self._positions(g), multiplicity=multiplicity, out=out.get(name), store_dtype=store_dtype
            )
            terms.append(Term(name, sq, stored))
        return terms

    def weight_norms(self, x: Tensor, g: Tensor, multiplicity: int, strategy: str) -> Tensor:
        x, g = self._positions(x), self._positions(g)
        if strategy == "norm-only":
            return ops.linear_weight_grad(x, g, multiplicity=multiplicity, store=False)[0]
        return ops.linear_gram_norms(x, g, multiplicity=multiplicity)

    def clipped_sum(self, x: Tensor, g: Tensor, factors: Tensor, multiplicity: int) -> Tensor | None:
        return ops.linear_clipped_sum(self._positions(x), self._positions(g), factors, multiplicity=multiplicity)

    def weighted_weight_grad(self, x: Tensor, g: Tensor) -> Tensor:
        return g.flatten(0, -2).T @ x.flatten(0, -2)

    def as_linear(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self._positions(x), self._positions(g)

    def positions(self, x: Tensor, g: Tensor) -> int:
        return math.prod(x.shape[1:-1])


class ConvRule(MatrixRule):
    """1-d and 2-d convolution with zero padding (any other padding is applied by ``F.pad`` before the call)."""

    def _arguments(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        convolution = F.conv1d if x.dim() == 3 else F.conv2d
        return convolution(x, self.weight, self.bias, **self._arguments()), ()

    def contraction(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What the weight gradient slides over, and what it is summed with position by position."""
        return x, g

    def positions(self, x: Tensor, g: Tensor) -> int:
        return math.prod(self.contraction(x, g)[1].shape[2:])

    def _backward(self, x: Tensor, g: Tensor, mask: list[bool]) -> Tensor:
        a = self._arguments()
        spatial = x.dim() - 2
        out = torch.ops.aten.convolution_backward(
            g, x, self.weight, None, a["stride"], a["padding"], a["dilation"], False, [0] * spatial, a["groups"], mask
        )
        return out[mask.index(True)]

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        return self._backward(x, g, [True, False, False])

    def _kernel(self) -> dict[str, Any]:
        assert self.weight is not None
        return {"kernel_size": tuple(self.weight.shape[2:]), **self._arguments()}

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor],
        store_dtype: torch.dtype = torch.float32,
    ) -> list[Term]:  # fmt: skip
        terms = self.bias_terms(g, multiplicity, out)
        name = self.names.get("weight")
        if name is not None:
            sq, stored = ops.conv_weight_grad(
                *self.contraction(x, g), multiplicity=multiplicity, out=out.get(name), store_dtype=store_dtype, **self._kernel()
            )
            terms.append(Term(name, sq, stored))
        return terms

    def weight_norms(self, x: Tensor, g: Tensor, multiplicity: int, strategy: str) -> Tensor:
        x, g = self.contraction(x, g)
        if strategy == "norm-only":
            return ops.conv_weight_grad(x, g, multiplicity=multiplicity, store=False, **self._kernel())[0]
        return ops.conv_gram_norms(x, g, multiplicity=multiplicity, **self._kernel())

    def clipped_sum(self, x: Tensor, g: Tensor, factors: Tensor, multiplicity: int) -> Tensor | None:
        return ops.conv_clipped_sum(*self.contraction(x, g), factors, multiplicity=multiplicity, **self._kernel())

    def as_linear(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        a = self._arguments()
        if self.offsets() > 1 or a["groups"] > 1 or any(a["padding"]) or {*a["stride"]} != {1}:
            return None
        x, g = (t.flatten(2).mT for t in self.contraction(x, g))
        return x, g

    def weighted_weight_grad(self, x: Tensor, g: Tensor) -> Tensor:
        if ops.has_cpu_kernel("conv_weight_grad", x, g):
            # The batch as one sample a thread: two to five times faster than oneDNN's weight gradient.
            rows = x.shape[0]
            teams = max(t for t in range(1, torch.get_num_threads() + 1) if rows % t == 0)
            _, grads = ops.conv_weight_grad(*self.contraction(x, g), multiplicity=rows // teams, **self._kernel())
            return grads.sum(0)
        return self._backward(*self.contraction(x, g), [False, True, False])


class ConvTransposeRule(ConvRule):
    """Transposed convolution: the adjoint of a convolution, so input and output change places in the weight gradient."""

    def contraction(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        # An output padding of a stride or more leaves room in g for positions that x does not have: zeros stand for them.
        positions = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                g.shape[2:], self._kernel()["kernel_size"], self.options["stride"], self.options["padding"],
                self.options["dilation"], strict=True,
            )
        ]  # fmt: skip
        missing = [n - m for n, m in zip(positions, x.shape[2:], strict=True)]
        return g, F.pad(x, [side for m in reversed(missing) for side in (0, m)]) if any(missing) else x

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        convolution = F.conv_transpose1d if x.dim() == 3 else F.conv_transpose2d
        return convolution(x, self.weight, self.bias, output_padding=self.options["output_padding"], **self._arguments()), ()

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        convolution = F.conv1d if x.dim() == 3 else F.conv2d
        grad = convolution(g, self.weight, None, **self._arguments())
        return grad[(..., *(slice(n) for n in x.shape[2:]))]


class EmbeddingRule(Rule):
    """Rows of a table looked up by integer ids of shape (rows, …)."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.embedding(x, self.weight), ()

    def input_grad(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...]) -> None:
        return None

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        assert self.weight is not None
        name = self.names["weight"]
        sq, stored = ops.embedding_grad(
            x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), g.reshape(g.shape[0], -1, g.shape[-1]),
            num_embeddings=self.weight.shape[0], padding_idx=self.options["padding_idx"], multiplicity=multiplicity,
        )  # fmt: skip
        return [added_term(name, stored, out)] if name in out else [Term(name, sq, stored)]


@dataclass
class GeneralRule(Rule):
    """Any function that treats rows alike: each sample's gradient is taken alone. Slow, and right.

    x and ``more`` are the call's tensors of the batch; ``weights`` its parameters, by the roles "weight0", "weight1", …
    """

    func: Callable[..., Any] = lambda: None
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    weights: tuple[Tensor, ...] = ()
    places: dict[int, tuple[str, int]] = field(default_factory=dict)  # id of an argument → ("data" | "weight", number)
    rows: int = 0
    autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    @classmethod
    def make(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, weights: list[Tensor], names: list[str],
        data: list[Tensor], rows: int, where: str,
    ) -> GeneralRule:  # fmt: skip
        for t in data:
            if t.dim() == 0 or t.shape[0] % rows:
                raise UncoveredParameterError(
                    f"{where} was given a tensor of shape {tuple(t.shape)}, whose first dimension is not a multiple of the "
                    f"{rows} rows of the batch; rows must stay the first dimension"
                )
        places = {id(t): ("data", i) for i, t in enumerate(data)} | {id(t): ("weight", i) for i, t in enumerate(weights)}
        device = data[0].device.type
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        roles = {f"weight{i}": name for i, name in enumerate(names)}
        return cls(where, roles, None, None, {}, func, (args, kwargs), tuple(w.detach() for w in weights), places, rows, autocast)

    def _run(self, data: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        def filled(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                kind, number = self.places.get(id(tree), ("constant", 0))
                return data[number] if kind == "data" else weights[number] if kind == "weight" else tree
            if isinstance(tree, dict):
                return {key: filled(value) for key, value in tree.items()}
            return like(tree, (filled(value) for value in tree)) if isinstance(tree, list | tuple) else tree

        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.func(*filled(self.call[0]), **filled(self.call[1]))

    def _part(self, t: Tensor, index: int, parts: int) -> Tensor:
        size = t.shape[0] // parts
        return t[index * size : (index + 1) * size]

    def check_rows(self, out: Tensor, data: Sequence[Tensor]) -> None:
        """Raises UncoveredParameterError unless the function gives rows alone what it gives them in the batch."""
        with torch.no_grad():
            for row in {0, self.rows - 1}:
                try:
                    alone = self._run([self._part(t.detach(), row, self.rows) for t in data], self.weights)
                    whole = self._part(out, row, self.rows)
                    same = alone.shape == whole.shape and torch.allclose(alone, whole, 1e-3, 1e-5, equal_nan=True)
                except (RuntimeError, ValueError, IndexError):
                    same = False
                if not same:
                    raise UncoveredParameterError(
                        f"{self.describe()} has no per-sample gradient rule, and the general one does not apply: row {row} "
                        "alone gives another result than in the batch (rows not first, samples mixed, or a random function). "
                        "Freeze the parameter with requires_grad_(False), or express it through linear, convolution, "
                        "normalisation, embedding or broadcasting functions"
                    )

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._run((x, *more), self.weights), ()

    def input_grads(self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            data = [t.detach().requires_grad_(need) for t, need in zip((x, *saved), needs, strict=True)]
            wanted = [t for t in data if t.requires_grad]
            found = iter(torch.autograd.grad(self._run(data, self.weights), wanted, g, allow_unused=True) if wanted else ())
        return tuple(next(found) if t.requires_grad else None for t in data)

    def per_sample(
        self, x: Tensor, g: Tensor, saved: tuple[Tensor, ...], multiplicity: int, out: dict[str, Tensor]
    ) -> list[Term]:
        samples = x.shape[0] // multiplicity
        dtypes = [torch.float64 if w.dtype == torch.float64 else torch.float32 for w in self.weights]
        stored = [torch.zeros(samples, *w.shape, dtype=t, device=w.device) for w, t in zip(self.weights, dtypes, strict=True)]
        for b in range(samples):
            with torch.enable_grad():
                weights = [w.detach().requires_grad_() for w in self.weights]
                y = self._run([self._part(t.detach(), b, samples) for t in (x, *saved)], weights)
                grads = torch.autograd.grad(y, weights, self._part(g, b, samples), allow_unused=True)
            for into, grad in zip(stored, grads, strict=True):
                if grad is not None:
                    into[b] = grad
        return [added_term(self.names[f"weight{i}"], s, out) for i, s in enumerate(stored)]

    def describe(self) -> str:
        return self.function
