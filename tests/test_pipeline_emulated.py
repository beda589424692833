"""The whole method on the CUDA kernels, emulated: what a GPU would run, from pre-training to images, beside the CPU's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import RATES, emulate, replay
from safetensors.torch import load_file
from tiny import PRIVATE, PUBLIC, run_all, tiny_config

from privimage_fast import planning
from privimage_fast.dp import graphs, planner
from privimage_fast.ops import native
from privimage_fast.pipeline import Run

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")


def refuse_what_fused_adam_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it wants gradients and averages laid out as their parameters, and steps counted beside them."""
    step = torch.optim.Adam.step

    def strict(self: torch.optim.Adam, *args: Any) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                beside = [p.grad, *(t for t in self.state[p].values() if t.dim())]
                assert all(t.stride() == p.stride() and t.dtype == p.dtype for t in beside)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", strict)


@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_a_run_on_the_kernels_is_the_cpus(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "privacy": {"secure": False}, "pretrain": {"steps": 3}, "warmup": {"steps": 2},
        "finetune": {"steps": 3, "checkpoint_steps": 2}, "sample": {"per_class": 4},
    }  # fmt: skip
    if family == "gan":
        small = {"latent": 8, "generator_channels": 8, "discriminator_channels": 8, "max_mult": 2, "features": 8}
        sections["model"] = {"family": "gan", "gan": small, "adversarial": {"discriminator_steps": 2, "generator_batch": 12}}
        sections["finetune"] |= {"multiplicity": 1}
    monkeypatch.setattr(planner, "machine_rates", lambda *key: RATES)
    plain = run_all(tmp_path / "cpu", test=None, **sections)
    refuse_what_fused_adam_refuses(monkeypatch)
    used = emulate(monkeypatch)
    found = run_all(tmp_path / "emulated", test=None, **sections)
    assert {"conv_weight_grad", "bias_grad"} <= used and ({"group_norm", "residual"} <= used) == (family == "diffusion")
    for name in ("pretrain", "warmup", "finetune"):
        ours, cpus = (load_file(run.folder.checkpoint(name)) for run in (found, plain))
        for key in cpus:
            torch.testing.assert_close(ours[key], cpus[key], rtol=1e-2, atol=2e-4, msg=lambda m, k=key, n=name: f"{n}, {k}: {m}")
    images = [np.load(run.folder.synthetic)["images"].astype(float) for run in (found, plain)]
    assert np.abs(images[0] - images[1]).mean() < 1


@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_the_plan_times_the_step_from_its_graphs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accumulate and its noised step, each replayed as often as it is timed, with the budget that the run's state leaves."""
    replayed = replay(monkeypatch)

    def best(work: Callable[[], None], enough: float = 1.0) -> float:
        replayed.append(work.__name__)
        work()
        return 1.0

    monkeypatch.setattr(planner, "machine_rates", lambda *key: RATES)
    monkeypatch.setattr(planning, "_best", best)
    emulate(monkeypatch)
    monkeypatch.setattr(graphs, "_on_gpu", lambda device: True)
    sections: dict[str, Any] = {}
    if family == "gan":
        small = {"latent": 8, "generator_channels": 8, "discriminator_channels": 8, "max_mult": 2, "features": 8}
        sections = {"model": {"family": "gan", "gan": small, "adversarial": {"discriminator_steps": 2}}}
    plan = Run(tiny_config(tmp_path / "a", **sections), public=PUBLIC, private=PRIVATE).plan()
    rounds = 2 if family == "gan" else 1  # the GAN's generator is trained after every second of them
    assert replayed == ["draw", "public_step", "private_accumulate", "accumulate", "after_steps", *["launch"] * rounds]
    assert plan.finetune_seconds > plan.steps  # a second for what follows, and parts of seconds for images


def test_a_plan_without_private_steps_times_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_private_seconds", lambda *args: pytest.fail("there is no such step"))
    plan = Run(tiny_config(tmp_path / "a", privacy={"train": False}), public=PUBLIC, private=PRIVATE).plan()
    assert plan.finetune_seconds == 0 < plan.pretrain_seconds
