"""Training scripts in the shape of Opacus' examples, with both imports: the same weights at zero noise, and the same ε."""

from __future__ import annotations

import math

import pytest
import torch
from scripts import cifar10, dcgan, mnist
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        torch.testing.assert_close(ours[key], t, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def both(script, *arguments: str):  # type: ignore[no-untyped-def]
    return [script.main(["--library", library, *arguments]) for library in ("privimage_fast", "opacus")]


def test_mnist_agrees_at_zero_noise() -> None:
    ours, theirs = both(mnist, "--sigma", "0", "--no-poisson", "--epochs", "3")
    assert_same(ours[0], theirs[0])
    start = mnist.main(["--sigma", "0", "--no-poisson", "--epochs", "0"])[0]
    assert max(float((ours[0][key] - t).abs().max()) for key, t in start.items()) > 1e-2  # it trained


def test_cifar10_agrees_at_zero_noise() -> None:
    """BatchNorm replaced by both libraries' validators, physical batches, NAdam, a scheduler made on the private optimizer."""
    ours, theirs = both(cifar10, "--sigma", "0", "--no-poisson")
    assert_same(ours[0], theirs[0])


def test_dcgan_agrees_at_zero_noise() -> None:
    """D's two calls of a step are one gradient a sample; G's backward pass through D leaves nothing in D's next step."""
    ours, theirs = both(dcgan, "--sigma", "0", "--no-poisson")
    assert_same(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])


@pytest.mark.parametrize("script", [mnist, dcgan])
def test_epsilon_of_the_scripts(script) -> None:  # type: ignore[no-untyped-def]
    """The scripts' default run, with noise and Poisson batches: our PLD figure and Opacus' PRV bound, within its stated error."""
    ours, theirs = both(script)
    assert math.isfinite(ours[-1 if script is dcgan else 1])
    assert ours[-1 if script is dcgan else 1] == pytest.approx(theirs[-1 if script is dcgan else 1], abs=0.03)


def test_cifar10_meets_its_target_epsilon() -> None:
    _, spent = cifar10.main(["--epsilon", "5"])
    assert 4.9 < spent <= 5.0


def test_mnist_learns_under_noise() -> None:
    _, _, accuracy = mnist.main(["--sigma", "0.4", "--epochs", "8", "--samples", "200", "--batch-size", "50", "--lr", "0.5"])
    assert accuracy > 0.8
