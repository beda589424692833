"""Which layers cannot be trained privately, by name, and what to put in their place. Opacus' names."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

logger = logging.getLogger(__name__)


class UnsupportedModuleError(ValueError):
    """A layer that cannot be trained with differential privacy; several are joined into one."""


class ShouldReplaceModuleError(UnsupportedModuleError):
    """There is a private layer to put in its place: :meth:`ModuleValidator.fix` does."""


class IllegalModuleConfigurationError(UnsupportedModuleError):
    """The layer is covered, but not with these options."""


def _error(name: str, layer: nn.Module) -> UnsupportedModuleError | None:
    where = f"{name or 'the module'} ({type(layer).__name__})"
    if isinstance(layer, _BatchNorm) and layer.training:
        return ShouldReplaceModuleError(
            f"{where} normalises with the statistics of the whole batch, so one sample's gradient depends on the others; replace "
            "it by GroupNorm (ModuleValidator.fix does), or keep it in eval() mode"
        )
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats and layer.training:
        return IllegalModuleConfigurationError(
            f"{where} keeps running statistics of the batch, which nobody would noise; use track_running_stats=False "
            "(ModuleValidator.fix does)"
        )
    if isinstance(layer, nn.RNNBase) and any(p.requires_grad for p in layer.parameters()):
        return UnsupportedModuleError(
            f"{where} runs in one fused call whose gradients are summed over samples; write it with nn.Linear "
            "(opacus.layers.DPLSTM, DPGRU and DPRNN are written so), or freeze it with requires_grad_(False)"
        )
    return None


def _replacement(layer: nn.Module, num_groups: int | None, replace_bn_with_in: bool) -> nn.Module | None:
    if isinstance(layer, _BatchNorm):
        if replace_bn_with_in:
            dims = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm2d: nn.InstanceNorm2d, nn.BatchNorm3d: nn.InstanceNorm3d}
            kind = next((new for old, new in dims.items() if isinstance(layer, old)), None)
            if kind is None:
                raise UnsupportedModuleError(f"{type(layer).__name__} has no InstanceNorm counterpart; use GroupNorm")
            return kind(layer.num_features, eps=layer.eps, affine=layer.affine)
        groups = math.gcd(32, layer.num_features) if num_groups is None else num_groups
        if layer.num_features % groups:
            raise ValueError(f"num_groups {groups} does not divide the {layer.num_features} channels of a batch norm")
        return nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=layer.affine)
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine)
    return None


class ModuleValidator:
    """Checks a module layer by layer, and replaces what has a private counterpart."""

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """One error for each layer that cannot be trained privately. Raises them as one UnsupportedModuleError if ``strict``."""
        errors = [e for name, layer in module.named_modules() if (e := _error(name, layer)) is not None]
        if strict and errors:
            kind = type(errors[0]) if len({type(e) for e in errors}) == 1 else UnsupportedModuleError
            raise kind("; ".join(str(e) for e in errors))
        return errors

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        return not cls.validate(module)

    @classmethod
    def fix(cls, module: nn.Module, *, num_groups: int | None = None, replace_bn_with_in: bool = False) -> nn.Module:
        """A copy with new layers for BatchNorm (GroupNorm of ``num_groups``, by default gcd(32, channels); or InstanceNorm) and
        for InstanceNorm with running statistics. Weights and biases are kept, running statistics dropped. Make the optimizer
        after it.
        """
        if num_groups is not None and replace_bn_with_in:
            raise ValueError("num_groups and replace_bn_with_in exclude each other: InstanceNorm has one group a channel")
        module = copy.deepcopy(module)
        for name, layer in list(module.named_modules()):
            new: Any = _replacement(layer, num_groups, replace_bn_with_in)
            if new is None:
                continue
            new.train(layer.training)
            if getattr(layer, "weight", None) is not None:
                new.load_state_dict({"weight": layer.weight, "bias": layer.bias})
                new.to(layer.weight.device, layer.weight.dtype)  # type: ignore[call-overload]
                new.requires_grad_(layer.weight.requires_grad)  # type: ignore[union-attr]
            logger.info("%s: %s replaced by %s", name or "the module", layer, new)
            if not name:
                return new
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, new)
        return module

    @classmethod
    def fix_and_validate(cls, module: nn.Module, **options: Any) -> nn.Module:
        """:meth:`fix`, then :meth:`validate` with ``strict``."""
        module = cls.fix(module, **options)
        cls.validate(module, strict=True)
        return module
