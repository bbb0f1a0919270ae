"""Policies beyond PyTorch: converted, verified, lowered, and kept as text."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import example, trained

import qcompile
from qcompile.errors import FileAccessError, FileFormatError, InvalidArgument
from qcompile.modes import Mode
from qcompile.passes.schemes.n2uq import N2UQConfig
from qcompile.passes.schemes.quantizable import QuantizableConfig
from qcompile.passes.schemes.vertical import VerticalConfig

torch.set_num_threads(1)


def _random_policy(model, seed):
    chosen = random.Random(seed)
    layers = [one.name for one in model.records if one.quantized and not one.is_fixed]
    modes = [mode for mode in model.prepared_modes if not mode.is_float]
    return qcompile.Policy({name: chosen.choice(modes) for name in layers})


@pytest.mark.parametrize("name", ["residual", "mobile", "dense"])
@pytest.mark.parametrize("seed", range(3))
def test_random_policies_are_exact(name, seed):
    model, x = trained(name)
    policy = _random_policy(model, seed)
    assert qcompile.verify(model, x, bits=policy).exact
    graph = qcompile.convert(model, policy)
    assert graph.mode == policy
    torch.testing.assert_close(graph(x)[0], qcompile.at(model.eval(), policy)(x), rtol=0, atol=0)
    bits = {str(n.meta["layer"]): n.meta["weight_bits"] for n in graph.graph.nodes if "weight_bits" in n.meta}
    assert bits == {layer: mode.weight_bits for layer, mode in policy.items}


@pytest.mark.parametrize("target", sorted(qcompile.targets()))
@pytest.mark.parametrize("scheme", ["vertical", pytest.param("coupled", marks=pytest.mark.slow)])
def test_policies_lower_to_every_target(scheme, target):
    model, x = trained("residual", scheme=scheme)
    report = qcompile.verify(model, x[:2], bits=_random_policy(model, 1), target=target)
    assert report.exact, report.failures


@pytest.mark.parametrize(
    ("scheme", "config", "modes"),
    [
        ("vertical", VerticalConfig(batch_norm="stats"), ("w2a2", "w2a4", "w4a2", "w4a4")),
        ("quantizable", QuantizableConfig(activation_range="data"), ("w1a2", "w2a3", "w5a5", "w32a32")),
        ("n2uq", N2UQConfig(activation_scale="data", distillation=None), ("w2a2", "w3a3", "w4a4")),
        ("coupled", None, ("w2a2", "w3a4", "w6a6")),
    ],
)
def test_policies_of_every_scheme_are_exact(scheme, config, modes):
    float_model, x = example("residual")
    model = qcompile.prepare(float_model, x, scheme=scheme, modes=modes, config=config)
    qcompile.calibrate(model, [x])
    for seed in range(2):
        policy = _random_policy(model, seed)
        assert len({mode for _, mode in policy.items}) > 1
        report = qcompile.verify(model, x, bits=policy)
        assert report.exact, report.failures


def test_verify_finds_a_layer_that_runs_at_another_mode():
    model, x = trained("residual")
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2})
    other = qcompile.Policy({"conv1": 2, "conv2": 4, "down": 4, "conv3": 2})
    graph = qcompile.convert(model.eval(), other)
    with pytest.raises(InvalidArgument, match="the target is of mode policy"):
        qcompile.verify(model, x, bits=policy, target=graph)
    graph.mode = policy
    report = qcompile.verify(model, x, target=graph)
    assert not report.exact
    assert "conv2" in report.failures[0]


def test_float_state_has_the_batch_normalisation_of_the_policy():
    model, _ = trained("residual")
    policy = qcompile.Policy({"conv1": 2, "conv2": 3, "down": 4, "conv3": 2})
    state = qcompile.float_state_dict(model, policy)
    for path, bits in (("bn1", 2), ("bn2", 3), ("bn3", 4)):
        uniform = qcompile.float_state_dict(model, bits)
        for name in ("running_mean", "running_var", "weight", "bias"):
            assert torch.equal(state[f"{path}.{name}"], uniform[f"{path}.{name}"])


names = st.text('ab0._ \n"\\\u00e9\u2028\U0001f600', max_size=12)
modes = st.builds(Mode, st.integers(1, 8), st.integers(1, 8))


@given(st.dictionaries(names, modes, max_size=6))
def test_text_gives_the_policy_back(layers):
    policy = qcompile.Policy(layers)
    text = policy.to_json()
    assert qcompile.Policy.from_json(text) == policy
    assert json.loads(text)["version"] == 1
    assert qcompile.Policy(dict(reversed(layers.items()))).to_json() == text


def test_files_give_the_policy_back(tmp_path):
    policy = qcompile.Policy({"conv1": 2, "conv2": "w3a8"})
    policy.save(tmp_path / "policy.json")
    assert qcompile.Policy.load(tmp_path / "policy.json") == policy
    assert [one.name for one in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON is not valid"),
        ("[]", "no policy"),
        (
            '{"format": "qcompile policy", "version": 2, "layers": {}}',
            "version 2; this release reads 1",
        ),
        ('{"format": "qcompile policy", "version": 1, "layers": []}', "maps names of layers to modes"),
        ('{"format": "qcompile policy", "version": 1, "layers": {"a": 9}}', "layer 'a' of the policy"),
        ('{"format": "qcompile policy", "version": 1, "layers": {"a": [2]}}', "layer 'a' of the policy"),
        ('{"format": "qcompile policy", "version": 1, "layers": {"a": 2, "a": 3}}', "repeats the key 'a'"),
        ('{"format": "qcompile policy", "version": 1, "layers": {}, "x": 1}', "no entry 'x'"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path, text, message):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message) as caught:
        qcompile.Policy.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(FileAccessError, match=r"cannot read .*nothing"):
        qcompile.Policy.load(tmp_path / "nothing.json")
    with pytest.raises(FileAccessError, match=r"cannot write .*nowhere"):
        qcompile.Policy({"a": 2}).save(tmp_path / "nowhere" / "policy.json")
