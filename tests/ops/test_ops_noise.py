"""The noise generator: RFC 8439, one stream at every instruction set, and the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from privimage_fast import ops
from privimage_fast.ops import native, reference

KEY = bytes(range(32))

# RFC 8439, section 2.3.2, and appendix A.1 test vectors 1, 2 and 3: key, counter, nonce, block.
RFC_BLOCKS = [
    (
        KEY, 1, bytes.fromhex("000000090000004a00000000"),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32), 0, bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32), 1, bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01", 1, bytes(12),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "nonce", "block"), RFC_BLOCKS)
@pytest.mark.parametrize("module", [ops, reference])
def test_rfc_8439_blocks(module: object, key: bytes, counter: int, nonce: bytes, block: str) -> None:
    words = tuple(int.from_bytes(nonce[i : i + 4], "little") for i in (0, 4, 8))
    assert module.chacha20_block(key, counter, words).hex() == block  # type: ignore[attr-defined]


def test_normals_are_the_documented_function_of_the_blocks(isa: str) -> None:
    """Block i, words in pairs, 53 bits, Box–Muller: from the block function alone, with numpy's log and cos."""
    expected = []
    for block in range(3):
        words = np.frombuffer(reference.chacha20_block(KEY, block, (7, 5, 9)), dtype="<u8") >> np.uint64(11)
        u = (words.astype(np.float64) + 0.5) / 2.0**53
        for a, b in zip(u[::2], u[1::2], strict=True):
            radius = np.sqrt(-2 * np.log(a))
            expected += [radius * np.cos(2 * np.pi * b), radius * np.sin(2 * np.pi * b)]
    got = native.gaussian_noise(KEY, step=9, rank=5, stream=7, n=24)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-15)


def test_same_bits_at_every_level_and_close_to_the_reference(isa: str) -> None:
    got = native.gaussian_noise(KEY, step=1, rank=0, stream=2, n=50_001, offset=3)
    native._C.set_cpu_isa("baseline")
    assert np.array_equal(got, native.gaussian_noise(KEY, step=1, rank=0, stream=2, n=50_001, offset=3))
    expected = reference.gaussian_noise(KEY, step=1, rank=0, stream=2, n=50_001, offset=3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("module", [ops, reference])
def test_offsets_cut_one_stream(module: object) -> None:
    whole = module.gaussian_noise(KEY, step=1, rank=2, stream=3, n=1000)  # type: ignore[attr-defined]
    for offset, n in ((0, 1), (1, 7), (7, 2), (8, 8), (123, 456), (999, 1), (500, 0)):
        part = module.gaussian_noise(KEY, step=1, rank=2, stream=3, n=n, offset=offset)  # type: ignore[attr-defined]
        assert np.array_equal(part, whole[offset : offset + n])


def test_every_part_of_the_address_changes_the_noise() -> None:
    address = dict(step=1, rank=2, stream=3)
    base = ops.gaussian_noise(KEY, n=64, **address)
    others = [ops.gaussian_noise(KEY, n=64, **{**address, name: 77}) for name in address]
    others.append(ops.gaussian_noise(KEY[:-1] + b"\0", n=64, **address))
    others.append(ops.gaussian_noise(KEY, n=64, step=2, rank=1, stream=3))
    for other in others:
        assert not np.intersect1d(base, other).size


def test_distribution() -> None:
    n = 1_000_000
    z = ops.gaussian_noise(KEY, step=0, rank=0, stream=0, n=n)
    # Five standard deviations of each statistic; the key is fixed, so this does not flicker.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert np.abs(z).max() > 4.5  # tails are there
    for lag in (1, 2, 8):
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / n**0.5
    radius, angle = z[0::2] ** 2 + z[1::2] ** 2, np.arctan2(z[1::2], z[0::2])
    assert stats.kstest(radius, "chi2", args=(2,)).pvalue > 1e-4
    assert stats.kstest(angle, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 1e-4


@pytest.mark.slow
def test_distribution_of_twenty_million() -> None:
    """Moments to the eighth, the whole distribution, and the tails beyond 5σ, where a short uniform would show."""
    n = 20_000_000
    z = ops.gaussian_noise(KEY, step=1, rank=0, stream=0, n=n)
    for order, moment, twice in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10_395), (8, 105, 2_027_025)):
        assert abs((z**order).mean() - moment) < 5 * ((twice - moment**2) / n) ** 0.5, f"moment {order}"
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for bound in (3.0, 4.0, 5.0, 5.5):
        for tail in (z > bound, z < -bound):
            expected = n * stats.norm.sf(bound)
            assert stats.poisson.cdf(tail.sum(), expected) > 1e-5
            assert stats.poisson.sf(tail.sum() - 1, expected) > 1e-5
    # Neighbours share a block, a radius or a register: no two of them may know of each other.
    for lag in (1, 2, 7, 8, 64, 128, 256):
        for x, y in ((z[:-lag], z[lag:]), (z[:-lag] ** 2 - 1, z[lag:] ** 2 - 1)):
            assert abs((x * y).mean()) < 5 * (x.var() * y.var() / n) ** 0.5, f"lag {lag}"


@pytest.mark.parametrize("first", [0, 2**32 - 40])
def test_blocks_of_one_batch_are_consecutive(isa: str, first: int) -> None:
    """Each of the blocks that run side by side is RFC 8439's block of its own number, at both ends of the counter."""
    from_words = []
    for block in range(first, first + 40):
        words = np.frombuffer(reference.chacha20_block(KEY, block, (3, 1, 2)), dtype="<u8") >> np.uint64(11)
        u = (words.astype(np.float64) + 0.5) / 2.0**53
        radius, angle = np.sqrt(-2 * np.log(u[::2])), 2 * np.pi * u[1::2]
        from_words += np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel().tolist()
    got = native.gaussian_noise(KEY, step=2, rank=1, stream=3, n=320, offset=8 * first)
    np.testing.assert_allclose(got, from_words, rtol=0, atol=4e-15)


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    draws = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            draws.append(ops.gaussian_noise(KEY, step=1, rank=0, stream=2, n=10_007, offset=3))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize("module", [ops, reference])
def test_refusals(module: object) -> None:
    draw = module.gaussian_noise  # type: ignore[attr-defined]
    last = draw(KEY, step=0, rank=0, stream=0, n=3, offset=8 * 2**32 - 3)
    assert np.isfinite(last).all()
    with pytest.raises(ValueError, match=r"gaussian_noise: offset \+ n is .*expected within the 2\^35 normals"):
        draw(KEY, step=0, rank=0, stream=0, n=4, offset=8 * 2**32 - 3)
    with pytest.raises(ValueError, match="length of key is 31"):
        draw(KEY[:-1], step=0, rank=0, stream=0, n=1)
    with pytest.raises(TypeError, match="key is str, expected bytes"):
        draw("k" * 32, step=0, rank=0, stream=0, n=1)
    for name in ("step", "rank", "stream"):
        for bad in (-1, 2**32):
            with pytest.raises(ValueError, match=f"gaussian_noise: {name} is {bad}"):
                draw(KEY, **{"step": 0, "rank": 0, "stream": 0, name: bad}, n=1)
