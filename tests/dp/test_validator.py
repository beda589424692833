"""Layers that cannot be private: named, and replaced where there is a counterpart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privimage_fast.utils.batch_memory_manager import BatchMemoryManager
from privimage_fast.validators import (
    IllegalModuleConfigurationError,
    ModuleValidator,
    ShouldReplaceModuleError,
    UnsupportedModuleError,
)


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.ReLU())


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (nn.BatchNorm2d(12), ShouldReplaceModuleError, r"1 \(BatchNorm2d\) .*GroupNorm"),
        (nn.BatchNorm2d(12, affine=False), ShouldReplaceModuleError, "GroupNorm"),
        (nn.BatchNorm2d(12).requires_grad_(False), ShouldReplaceModuleError, "GroupNorm"),  # frozen, it still mixes samples
        (nn.SyncBatchNorm(12), ShouldReplaceModuleError, "SyncBatchNorm"),
        (nn.InstanceNorm2d(12, track_running_stats=True), IllegalModuleConfigurationError, "track_running_stats=False"),
        (nn.LSTM(3, 4), UnsupportedModuleError, "DPLSTM"),
    ],
)
def test_layers_are_refused_by_name(layer: nn.Module, kind: type[Exception], message: str) -> None:
    module = net(layer)
    (error,) = ModuleValidator.validate(module)
    assert type(error) is kind and not ModuleValidator.is_valid(module)
    with pytest.raises(kind, match=message):
        ModuleValidator.validate(module, strict=True)


def test_all_layers_are_named_at_once() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(3)), nn.GRU(3, 3))
    with pytest.raises(UnsupportedModuleError, match=r"0 \(BatchNorm1d\).*1\.0 \(BatchNorm1d\).*2 \(GRU\)"):
        ModuleValidator.validate(module, strict=True)


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(3, 12), nn.InstanceNorm2d(12), nn.BatchNorm2d(12).eval(), nn.LSTM(3, 4).requires_grad_(False)]
)
def test_layers_that_keep_samples_apart_are_valid(layer: nn.Module) -> None:
    assert ModuleValidator.is_valid(net(layer))


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (12, 4), (7, 1)])
def test_batch_norm_becomes_group_norm_with_its_weights(channels: int, groups: int) -> None:
    norm = nn.BatchNorm2d(channels, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(nn.Sequential(norm))
    fixed = ModuleValidator.fix_and_validate(module)
    new = fixed[0][0]
    assert isinstance(new, nn.GroupNorm) and (new.num_groups, new.eps) == (groups, 1e-3)
    assert torch.equal(new.weight, norm.weight) and torch.equal(new.bias, norm.bias) and new.weight is not norm.weight
    assert module[0][0] is norm  # the original is left alone


def test_options_and_roots() -> None:
    assert ModuleValidator.fix(nn.BatchNorm2d(12), num_groups=3).num_groups == 3
    assert isinstance(ModuleValidator.fix(nn.BatchNorm1d(12), replace_bn_with_in=True), nn.InstanceNorm1d)
    fixed = ModuleValidator.fix(net(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)))
    assert ModuleValidator.is_valid(fixed) and fixed[1].affine and not list(fixed.buffers())
    assert not ModuleValidator.fix(net(nn.BatchNorm2d(12).requires_grad_(False)))[1].weight.requires_grad
    with pytest.raises(ValueError, match="does not divide"):
        ModuleValidator.fix(nn.BatchNorm2d(12), num_groups=5)
    with pytest.raises(ValueError, match="exclude each other"):
        ModuleValidator.fix(nn.BatchNorm2d(12), num_groups=3, replace_bn_with_in=True)
    with pytest.raises(UnsupportedModuleError, match="no InstanceNorm counterpart"):
        ModuleValidator.fix(nn.SyncBatchNorm(12), replace_bn_with_in=True)


def test_opacus_import_paths() -> None:
    import privimage_fast as pf

    assert pf.BatchMemoryManager is BatchMemoryManager and pf.ModuleValidator is ModuleValidator
    assert {"PrivacyEngine", "DPOptimizer", "DPDataLoader", "BatchMemoryManager", "ModuleValidator"} <= set(pf.__all__)
