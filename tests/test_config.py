"""Configurations: known keys, possible values, and what a user is told otherwise."""

from __future__ import annotations

import pytest

from privimage_fast.config import ConfigError, build_config, load_yaml, valid_keys


def test_unknown_keys_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'privacy.epsilo'; did you mean privacy.epsilon"):
        load_yaml("privacy: {epsilo: 3}", "run.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*finetune.lr"):
        build_config({"lr": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy": {"epsilon": 0}}, "epsilon"),
        ({"privacy": {"delta": 2.0}}, "delta"),
        ({"finetune": {"batch_size": "many"}}, "^finetune.batch_size: expected a whole number, found 'many'$"),
        ({"query": {"clusters": "foo"}}, "^query.clusters: expected a whole number or auto or null, found 'foo'$"),
        ({"data": {"public": 3}}, "^data.public: expected text or a list of texts, found 3$"),
        ({"privacy": {"secure": "maybe"}}, "^privacy.secure: expected true or false, found 'maybe'$"),
        ({"model": {"unet": {"channel_mult": "a"}}}, "^model.unet.channel_mult: expected a list of whole numbers, found 'a'$"),
        ({"finetune": 3}, "finetune"),
        ({"model": {"preset": "huge"}}, "small, base, large"),
        ({"sample": {"formats": ["tar"]}}, "tar"),
        ({"sample": {"sampler": {"method": "euler"}}}, "heun or ddim"),
        ({"data": {"holdout": 1.0}}, "holdout"),
        ({"precision": "fp8"}, "auto, float32 or bfloat16"),
    ],
)
def test_bad_values_name_the_key(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(values)


def test_yaml_that_is_none() -> None:
    for text, message in (("[1]", "found list"), ("a: [", "not valid YAML")):
        with pytest.raises(ConfigError, match=message):
            load_yaml(text)
    assert load_yaml("") == {}
    assert "finetune.max_grad_norm" in valid_keys() and "query.classifier.width" in valid_keys()


def test_a_key_given_twice_is_refused() -> None:
    """Of two sections the last would count: an ε of 1 above it would silently be 10."""
    text = "privacy:\n  epsilon: 1\nseed: 2\nprivacy:\n  delta: 1.0e-4\n"
    with pytest.raises(ConfigError, match=r"'privacy' is given twice, in lines 1 and 4"):
        load_yaml(text)
    with pytest.raises(ConfigError, match="'epsilon' is given twice"):
        load_yaml("privacy: {epsilon: 10, epsilon: 3}")
    assert load_yaml("a: &x {b: 1}\n".replace("a", "privacy").replace("b", "epsilon")) == {"privacy": {"epsilon": 1}}
