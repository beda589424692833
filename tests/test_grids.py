"""The variants that come with the package, and the grids of benchmarks/grids: each shows what its first lines say."""

from __future__ import annotations

from pathlib import Path

import pytest

from privimage_fast.compare import built_in_variants, load_comparison
from privimage_fast.config import build_config, differing_keys
from privimage_fast.dp.accounting import GaussianEvent, epsilon


@pytest.mark.parametrize("name", sorted(built_in_variants()))
def test_built_in_variants_are_configuration(name: str) -> None:
    changes = built_in_variants()[name]
    assert build_config(changes) != build_config({}) or name == "privimage-means"
    assert build_config(changes).warms_up is ("-means" in name)
    assert build_config(changes).relabels is name.endswith("-means-labels")


GRIDS = sorted((Path(__file__).parents[1] / "benchmarks" / "grids").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in GRIDS if p.stem == "ratio-cpu"], ids=lambda p: p.stem)
def test_the_grid_of_shares_has_each_chosen_and_blindly_drawn(path: Path) -> None:
    cells = {(c.config.select.mode, c.config.select.ratio, c.seed) for c in load_comparison(path).cells}
    assert cells == {(mode, r, seed) for mode in ("semantic", "random") for r in (0.01, 0.05, 0.1, 0.2) for seed in (0, 1)}
    assert not any(c.config.warms_up for c in load_comparison(path).cells)


@pytest.mark.parametrize("path", [p for p in GRIDS if p.stem.endswith("labels-cpu")], ids=lambda p: p.stem)
def test_the_grids_of_labels_are_the_runs_of_other_grids_but_for_these(path: Path) -> None:
    """What they are compared with."""
    cells = {(c.config.privacy.epsilon, c.seed): c.config for c in load_comparison(path).cells}
    assert set(cells) == {(e, seed) for e in (1, 10) for seed in range(3)} and all(c.relabels for c in cells.values())
    prefix = path.stem.removesuffix("labels-cpu")
    for grid, spent in ((f"{prefix or 'mnist-'}cpu", 10), (f"{prefix}epsilon-1-cpu", 1)):
        others = [c.config for c in load_comparison(path.with_name(f"{grid}.yaml")).cells if c.variant == "privimage-means"]
        for seed in range(3):
            changes = [differing_keys(other, cells[spent, seed]) for other in others]
            assert changes.count(["out", "label.steps"]) == 1


@pytest.mark.parametrize("path", [p for p in GRIDS if p.stem.endswith("labelled-baselines-cpu")], ids=lambda p: p.stem)
def test_baselines_with_labels_differ_from_the_method_by_who_chooses_them_alone(path: Path) -> None:
    found = load_comparison(path).cells
    cells, keys = {(c.variant, c.seed): c.config for c in found}, {(c.variant, c.seed): c.training_key for c in found}
    for means in ("", "-means"):
        for seed in range(3):
            names = [(f"{name}{means}", seed) for name in ("privimage", "blind-labels", "all-labels")]
            assert len({keys[name] for name in names}) == 3  # neither learns what another does
            method, blind, whole = (cells[name] for name in names)
            assert differing_keys(method, blind) == ["out", "query.noise_multiplier"]
            choice = {"select.labels_per_class", "select.ratio", "select.max_image_ratio"}
            assert set(differing_keys(blind, whole)) == {"out", *choice}
            assert blind.query.noise_multiplier == 1e6  # no vote of some thousands is seen in it
            assert epsilon([GaussianEvent(1e6)], 1e-5) < 1e-3
    assert {c.privacy.epsilon for c in cells.values()} == {10}


@pytest.mark.parametrize("path", [p for p in GRIDS if p.stem.endswith("-28-cpu")], ids=lambda p: p.stem)
def test_the_grids_of_full_size_are_of_one_model_at_both_budgets(path: Path) -> None:
    cells = load_comparison(path).cells
    assert [(c.config.privacy.epsilon, c.config.finetune.steps) for c in cells] == [(10, 300), (1, 100)]
    for c in (cell.config for cell in cells):
        assert c.data.resolution == 28 and c.model.patch == 2 and c.model.edm.sigma_data is None and c.warms_up


@pytest.mark.parametrize(("name", "more"), [("epsilon-1-cpu", ["privimage"]), ("fashion-epsilon-1-cpu", [])])
def test_the_grids_of_a_small_budget_have_three_seeds(name: str, more: list[str]) -> None:
    cells = load_comparison(GRIDS[0].with_name(f"{name}.yaml")).cells
    variants = [*more, "privimage-means", "random-means", "pdp-means", "dpdm-means"]
    assert {(c.variant, c.seed) for c in cells} == {(variant, seed) for variant in variants for seed in range(3)}
    assert {c.config.privacy.epsilon for c in cells} == {1}


PARTS = (  # show one thing each
    "ratio-cpu", "epsilon-1-cpu", "fashion-epsilon-1-cpu", "mnist-28-cpu", "fashion-28-cpu", "labels-cpu", "fashion-labels-cpu",
    "labelled-baselines-cpu", "fashion-labelled-baselines-cpu",
)  # fmt: skip


@pytest.mark.parametrize("path", [p for p in GRIDS if p.stem not in PARTS], ids=lambda p: p.stem)
def test_the_committed_grids_have_the_baselines_and_three_seeds_where_the_claim_is(path: Path) -> None:
    comparison = load_comparison(path)
    baselines = ("privimage", "random", "pdp-diffusion", "dpdm")
    if comparison.base.model.family == "gan":
        baselines = ("privimage-gan", "random-gan", "pdp-gan", "dpgan")
    at_ten = {(c.variant, c.seed) for c in comparison.cells if c.config.privacy.epsilon == 10}
    assert at_ten >= {(variant, seed) for variant in baselines for seed in range(3)}
    assert {c.config.privacy.epsilon for c in comparison.cells if c.variant == baselines[0]} >= (
        {10} if path.stem == "order-cpu" else {1, 10}
    )
    assert {c.config.select.max_image_ratio for c in comparison.cells if c.variant == baselines[2]} == {None}
    assert all((c.config.model.family == "gan") == ("gan" in c.variant) for c in comparison.cells)
