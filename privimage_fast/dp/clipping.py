"""How a sample's gradient is bounded, given its norms: flat, per layer, automatic, adaptive.

Each strategy turns squared norms into factors and states the L2 sensitivity of the weighted sum, to which the noise is scaled.
Knows nothing of noise, sampling or accounting.

Formal guarantees: for every strategy, the sum Σ_b factor_b·g_b changes by at most ``sensitivity``·(1 + 1e-6) when one sample is
added or removed, whatever the others are; a sample whose gradient is not finite has factor 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from privimage_fast import ops

Factors = Tensor | dict[str, Tensor]


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not 1e-15 <= value < math.inf:  # below, factors and what they multiply are denormal floats
        raise ValueError(f"{name} is {value!r}; it must be a positive number of at least 1e-15")
    return value


class FlatClipping:
    """factor = min(1, C/‖g‖), with the norm over all parameters. Sensitivity C."""

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm

    @property
    def max_grad_norm(self) -> float:
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = _positive("max_grad_norm", value)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def factors(self, sq_norms: Mapping[str, Tensor]) -> Factors:
        """Parameter → (B,) float64 squared norms ⟶ (B,) float32 factors, or one such tensor for each parameter."""
        return ops.clip_factors(total(sq_norms), self.max_grad_norm)


class AutomaticClipping(FlatClipping):
    """factor = C/(‖g‖ + γ): every gradient has nearly length C (Bu et al., "Automatic Clipping", NeurIPS 2023). Sensitivity C."""

    def __init__(self, max_grad_norm: float, gamma: float = 0.01) -> None:
        super().__init__(max_grad_norm)
        self.gamma = _positive("gamma", gamma)

    def factors(self, sq_norms: Mapping[str, Tensor]) -> Factors:
        norm = total(sq_norms).sqrt()
        return torch.where(norm.isfinite(), self.max_grad_norm / (norm + self.gamma), 0.0).float()


class PerLayerClipping:
    """Each parameter tensor has its own bound. Sensitivity √ΣC_i², to which the noise of all is scaled.

    Args:
        bounds: parameter → C_i. From one number C, :meth:`split` gives each of L parameters C/√L, so that the sensitivity is C.
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        self.bounds = {name: _positive(f"max_grad_norm of {name!r}", c) for name, c in bounds.items()}

    @classmethod
    def split(cls, names: Sequence[str], max_grad_norm: float | Sequence[float]) -> PerLayerClipping:
        """One C for all, or one for each of ``names`` in their order."""
        if isinstance(max_grad_norm, int | float):
            return cls(dict.fromkeys(names, float(max_grad_norm) / math.sqrt(len(names))))
        if len(max_grad_norm) != len(names):
            raise ValueError(
                f"max_grad_norm holds {len(max_grad_norm)} bounds for {len(names)} trainable parameters; give one number, or one "
                f"for each parameter in the optimizer's order: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            )
        return cls(dict(zip(names, max_grad_norm, strict=True)))

    @property
    def sensitivity(self) -> float:
        return math.sqrt(math.fsum(c * c for c in self.bounds.values()))

    @property
    def max_grad_norm(self) -> float:
        """The norm of all bounds together."""
        return self.sensitivity

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        scale = _positive("max_grad_norm", value) / self.sensitivity
        self.bounds = {name: c * scale for name, c in self.bounds.items()}

    def factors(self, sq_norms: Mapping[str, Tensor]) -> Factors:
        missing = sorted(sq_norms.keys() - self.bounds.keys())
        if missing:
            raise ValueError(f"per-layer clipping has no bound for {missing[0]!r}; was it unfrozen after make_private?")
        found = {name: ops.clip_factors(sq, self.bounds[name]) for name, sq in sq_norms.items()}
        # A sample that is not finite anywhere is left out everywhere.
        finite = total(sq_norms).isfinite()
        return {name: torch.where(finite, f, 0.0) for name, f in found.items()}


class AdaptiveClipping(FlatClipping):
    """C follows a quantile of the norms, which is itself queried under noise (Andrew et al., NeurIPS 2021).

    Each step also releases Σ_b (1[‖g_b‖ ≤ C] − ½) with noise of standard deviation ``unclipped_num_std`` σ_b. Adding or removing
    a sample changes it by ½, so its noise multiplier is 2σ_b, and with gradient noise σ_g both together are one Gaussian
    mechanism of noise multiplier σ = (σ_g⁻² + (2σ_b)⁻²)^(−½) (their Theorem 1). σ is what the user states and what is charged.

    Args:
        target_unclipped_quantile: share of samples that should stay unclipped.
        clipbound_learning_rate: η in C ← C·exp(−η(share − target)).
        min_clipbound, max_clipbound: C stays between them.
        unclipped_num_std: σ_b; above half the noise multiplier.
    """

    def __init__(
        self, max_grad_norm: float, *, target_unclipped_quantile: float = 0.5, clipbound_learning_rate: float = 0.2,
        max_clipbound: float = 1e8, min_clipbound: float = 1e-8, unclipped_num_std: float,
    ) -> None:  # fmt: skip
        super().__init__(max_grad_norm)
        if not 0 <= target_unclipped_quantile <= 1:
            raise ValueError(f"target_unclipped_quantile is {target_unclipped_quantile!r}; it must be in [0, 1]")
        if not _positive("min_clipbound", min_clipbound) < _positive("max_clipbound", max_clipbound):
            raise ValueError(f"max_clipbound {max_clipbound} must be larger than min_clipbound {min_clipbound}")
        self.target_unclipped_quantile = float(target_unclipped_quantile)
        self.clipbound_learning_rate = float(clipbound_learning_rate)
        self.min_clipbound, self.max_clipbound = float(min_clipbound), float(max_clipbound)
        self.unclipped_num_std = _positive("unclipped_num_std", unclipped_num_std)
        self._count = 0.0  # Σ (1[unclipped] − ½) of the batch under way: private

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """σ_g for the combined σ. ValueError where the count's noise alone is not enough."""
        if noise_multiplier == 0:
            return 0.0
        if noise_multiplier >= 2 * self.unclipped_num_std:
            raise ValueError(
                f"noise_multiplier {noise_multiplier} with unclipped_num_std {self.unclipped_num_std}: the count alone would "
                "spend more than the whole; unclipped_num_std must be more than half the noise multiplier"
            )
        return (noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2) ** -0.5

    def factors(self, sq_norms: Mapping[str, Tensor]) -> Factors:
        norm = total(sq_norms).sqrt()
        self._count += float((norm <= self.max_grad_norm).sum()) - 0.5 * len(norm)
        return super().factors(sq_norms)

    def forget_count(self) -> None:
        self._count = 0.0

    def update(self, normal: float, expected_batch_size: float) -> None:
        """C for the next step, from the noised count; ``normal`` is a fresh N(0, 1) draw. The divisor is public."""
        share = 0.5 + (self._count + self.unclipped_num_std * normal) / expected_batch_size
        self._count = 0.0
        step = math.exp(-self.clipbound_learning_rate * (share - self.target_unclipped_quantile))
        self.max_grad_norm = min(max(self.max_grad_norm * step, self.min_clipbound), self.max_clipbound)


Clipping = FlatClipping | PerLayerClipping


def total(sq_norms: Mapping[str, Tensor]) -> Tensor:
    """(B,) float64: squared norms over all parameters."""
    return torch.stack([sq.double() for sq in sq_norms.values()]).sum(0)


def make_clipping(kind: str, max_grad_norm: float | Sequence[float], names: Sequence[str], options: dict[str, float]) -> Clipping:
    """The strategy of ``make_private``'s keyword ``clipping``; takes its own options out of ``options``."""
    if kind == "per_layer":
        return PerLayerClipping.split(names, max_grad_norm)
    if kind not in ("flat", "automatic", "adaptive"):
        raise ValueError(f"clipping is {kind!r}; it must be 'flat', 'per_layer', 'automatic' or 'adaptive'")
    if not isinstance(max_grad_norm, int | float):
        raise ValueError(f"max_grad_norm is {max_grad_norm!r}; {kind} clipping has one bound (a list is for 'per_layer')")
    if kind == "flat":
        return FlatClipping(max_grad_norm)
    if kind == "automatic":
        return AutomaticClipping(max_grad_norm, **{k: options.pop(k) for k in ("gamma",) if k in options})
    known = (
        "target_unclipped_quantile", "clipbound_learning_rate", "max_clipbound", "min_clipbound", "unclipped_num_std"
    )  # fmt: skip
    if "unclipped_num_std" not in options:
        raise ValueError("adaptive clipping needs unclipped_num_std, the noise of its quantile query (in samples)")
    return AdaptiveClipping(max_grad_norm, **{k: options.pop(k) for k in known if k in options})
