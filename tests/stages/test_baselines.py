"""What the baselines need of the configuration: joined public sets, a capped share, one seed of public training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import PRIVATE, PUBLIC, TEST, tiny_config

from privimage_fast.config import ConfigError, build_config, load_yaml
from privimage_fast.data import save_npz
from privimage_fast.pipeline import Run
from privimage_fast.report.facts import read_facts
from privimage_fast.stages.folder import RunFolder
from privimage_fast.stages.select import SelectConfig, run_select, selected_subset


def chosen(folder: Path, mode: str, cap: float | None, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    run = RunFolder(folder)
    run.create()
    counts = np.zeros((3, 6))
    counts[0, 1], counts[1, 4], counts[2, 5] = 9, 9, 9
    selection = run_select(
        run, SelectConfig(mode=mode, max_image_ratio=cap), public=PUBLIC, class_names=PRIVATE.label_names,
        query={"counts": counts.tolist()}, labels_each=1, seed=seed,
    )  # fmt: skip
    indices, labels = selected_subset(selection, PUBLIC, PRIVATE.label_names)
    assert len(indices) == len(set(indices.tolist())) == selection["selected_images"]
    return indices, labels


@pytest.mark.parametrize(("mode", "whole"), [("semantic", 120), ("random", 120), ("all", 240)])
def test_a_cap_takes_so_many_of_what_the_mode_gives(tmp_path: Path, mode: str, whole: int) -> None:
    everything, labels = chosen(tmp_path / "all", mode, None)
    some, some_labels = chosen(tmp_path / "some", mode, 0.05)
    assert len(everything) == whole and len(some) == 12
    if mode != "random":  # two random draws share nothing but their seed
        of = dict(zip(everything.tolist(), labels.tolist(), strict=True))
        assert [of[i] for i in some.tolist()] == some_labels.tolist()
    assert not np.array_equal(some, chosen(tmp_path / "other", mode, 0.05, seed=4)[0])
    assert np.array_equal(chosen(tmp_path / "wide", mode, 1.0)[0], everything)  # a cap above what is there


@pytest.mark.parametrize("cap", [0.0, 1.5, -1.0])
def test_a_cap_is_a_share(cap: float) -> None:
    with pytest.raises(ValueError, match="max_image_ratio"):
        SelectConfig(max_image_ratio=cap)


def test_public_sets_in_a_list_are_joined(tmp_path: Path) -> None:
    save_npz(PUBLIC, tmp_path / "letters.npz")
    save_npz(PUBLIC.subset(np.arange(12)), tmp_path / "more.npz")
    save_npz(PRIVATE, tmp_path / "private.npz")
    sources = [str(tmp_path / "letters.npz"), str(tmp_path / "more.npz")]
    config = tiny_config(tmp_path / "run", data={"public": sources, "private": str(tmp_path / "private.npz")})
    assert build_config(load_yaml(config.to_yaml())) == config
    run = Run(config)
    assert (
        len(run.public) == 252 and run.public.label_names[0] == "letters/letter0" and run.public.label_names[6] == "more/letter0"
    )
    for resume in (False, True):
        with run.opened(resume=resume):
            pass
    assert read_facts(tmp_path / "run").source("public") == "letters.npz + more.npz"
    with pytest.raises(ConfigError, match="public"):
        build_config({"data": {"public": 3}})


def test_one_public_seed_is_one_start_for_every_seed(tmp_path: Path) -> None:
    def start(seed: int, public_seed: int | None) -> list[np.ndarray]:
        config = build_config({"seed": seed, "public_seed": public_seed}, tiny_config(tmp_path))
        model = Run(config, public=PUBLIC, private=PRIVATE, test=TEST).model()
        return [p.detach().numpy() for p in model.parameters()]

    def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(start(0, 7), start(1, 7)) and same(start(7, None), start(1, 7))
    assert not same(start(0, None), start(1, None))
