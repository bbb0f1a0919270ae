"""Policies that carry their own statistics of batch normalisation."""

from __future__ import annotations

import copy
import json
import random
import warnings

import pytest
import torch
from nets import example, trained
from torch import nn

import qcompile
from qcompile.errors import FileFormatError, InvalidArgument, InvalidInputType
from qcompile.passes.batchnorm import ModeBatchNorm
from qcompile.passes.schemes.n2uq import N2UQConfig

torch.set_num_threads(1)


def _policy(model, seed=0):
    chosen = random.Random(seed)
    layers = [one.name for one in model.records if one.quantized]
    return qcompile.Policy({name: chosen.choice(model.prepared_modes) for name in layers})


def _norms(model):
    return {path: one for path, one in model.named_modules() if isinstance(one, ModeBatchNorm)}


def _inputs_of_norms(model, policy, x):
    """What each batch normalisation sees where all of them normalise by the batch's unbiased variance."""
    seen = {}

    def normalising(path):
        def output(norm, args, _):
            given, active = args
            seen[path] = given.detach()
            rows = given.detach().transpose(0, 1).flatten(1)
            affine, _ = norm.rows_of(int(active.row_of(norm.slot)))
            shape = (-1, *[1] * (given.dim() - 2))
            values = rows.mean(1), (rows.var(1) + norm.eps).sqrt(), norm.weight[affine], norm.bias[affine]
            mean, deviation, weight, bias = (one.reshape(shape) for one in values)
            return (given - mean) / deviation * weight + bias

        return output

    copied = copy.deepcopy(model).eval()
    for path, one in _norms(copied).items():
        one.register_forward_hook(normalising(path))
    copied.float_chain(copied.rows_of(policy), [x])
    return seen


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_statistics_are_the_mean_over_batches_of_what_the_policy_gives(name):
    model, x = trained(name)
    policy, batches = _policy(model), [x, 1.5 * x]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measured = qcompile.calibrate(model, batches, policy=policy)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert measured.layers == policy.layers
    assert not policy.statistics
    seen = [_inputs_of_norms(model, policy, one) for one in batches]
    for path, (mean, variance) in measured.statistics.items():
        rows = [one[path].transpose(0, 1).flatten(1).double() for one in seen]
        torch.testing.assert_close(
            mean.double(), torch.stack([r.mean(1) for r in rows]).mean(0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            variance.double(), torch.stack([r.var(1) for r in rows]).mean(0), rtol=1e-4, atol=1e-6
        )
    assert measured.statistics.keys() == _norms(model).keys()


@pytest.mark.parametrize(
    "scheme", ["vertical", *(pytest.param(one, marks=pytest.mark.slow) for one in ("quantizable", "n2uq"))]
)
def test_every_use_of_a_policy_normalises_with_them(scheme):
    net, x = example("residual")
    config = N2UQConfig(activation_scale="data") if scheme == "n2uq" else None
    model = qcompile.prepare(net, x, scheme=scheme, bits=(2, 4), config=config)
    qcompile.calibrate(model, [x])
    plain = _policy(model)
    policy = qcompile.calibrate(model, [3.0 * x + 0.5], policy=plain)
    report = qcompile.verify(model.eval(), x, bits=policy)
    assert report.exact, report.failures
    outputs = qcompile.at(model, policy)(x)
    assert not torch.equal(outputs, qcompile.at(model, plain)(x))
    chain = model.float_chain(model.rows_of(policy), [x])
    torch.testing.assert_close(
        chain[0] if isinstance(chain, (tuple, list)) else chain, outputs, rtol=1e-3, atol=1e-4
    )
    for target in ("onnx-qdq", "x86"):
        report = qcompile.verify(model, x[:2], bits=policy, target=target)
        assert report.exact, report.failures
    state = qcompile.float_state_dict(model, policy)
    for path, (mean, variance) in policy.statistics.items():
        assert torch.equal(state[f"{path}.running_mean"], mean)
        assert torch.equal(state[f"{path}.running_var"], variance)


def test_compiled_models_run_them():
    model, x = trained("residual")
    model.eval()
    policies = [qcompile.calibrate(model, [s * x], policy=_policy(model, 1)) for s in (1.0, 2.0)]
    compiled = torch.compile(model, fullgraph=True)
    for policy in policies:
        expected = qcompile.at(model, policy)(x)
        torch.testing.assert_close(compiled(x, qcompile_mode=model.rows_of(policy)), expected, rtol=0, atol=0)


def test_the_float_networks_statistics_are_moved():
    torch.manual_seed(0)
    net, x = example("residual")
    net.train()(x)
    model = qcompile.prepare(net.eval(), x, bits=(2, 8))
    qcompile.calibrate(model, [x])
    policy = qcompile.Policy({one.name: 8 for one in model.records if one.quantized})
    measured = qcompile.calibrate(model, [x], policy=policy).statistics
    for path, norm in _norms(model).items():  # as calibrate does for the uniform mode
        torch.testing.assert_close(measured[path][0], norm.running_mean[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(measured[path][1], norm.running_var[1], rtol=1e-5, atol=1e-6)


def test_a_model_in_parts():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, _ = example("residual")
            self.second = nn.Linear(5, 5)

        def forward(self, x):
            y = self.first(x)
            return self.second(y) if float(y.sum()) > 0 else y

    _, x = example("residual")
    model = qcompile.prepare(Gate(), x, bits=(2, 4), submodules=["first"])
    qcompile.calibrate(model, [x])
    layers = [f"first.{one.name}" for one in model.parts["first"].records if one.quantized]
    policy = qcompile.Policy(dict.fromkeys(layers, 2))
    measured = qcompile.calibrate(model, [2.0 * x], policy=policy)
    assert all(path.startswith("first.") for path in measured.statistics)
    qcompile.set_bits(model.eval(), measured)
    first = model(x)
    qcompile.set_bits(model, 2)
    assert not torch.equal(first, model(x))


def test_statistics_are_kept_as_text(tmp_path):
    model, x = trained("residual")
    policy = qcompile.calibrate(model, [x], policy=_policy(model))
    policy.save(tmp_path / "policy.json")
    loaded = qcompile.Policy.load(tmp_path / "policy.json")
    assert loaded == policy
    assert hash(loaded) == hash(policy)
    assert loaded != qcompile.Policy(policy.layers)
    content = json.loads(policy.to_json())
    for broken in (
        3,
        {"n": 3},
        {"n": {"mean": [1.0]}},
        {"n": {"mean": [1.0], "variance": [1.0, 2.0]}},
        {"n": {"mean": [], "variance": []}},
        {"n": {"mean": [1.0], "variance": [-1.0]}},
        {"n": {"mean": [1e39], "variance": [1.0]}},
        {"n": {"mean": [True], "variance": [1.0]}},
        {"n": {"mean": ["1"], "variance": [1.0]}},
        {"n": {"mean": [1.0], "variance": [1.0], "more": []}},
    ):
        with pytest.raises(FileFormatError, match="statistics"):
            qcompile.Policy.from_json(json.dumps({**content, "statistics": broken}))


def test_policies_without_statistics_warn():
    model, x = trained("residual")
    policy = _policy(model)
    with pytest.warns(UserWarning, match="has no batch normalisation statistics of its own"):
        qcompile.convert(model.eval(), policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcompile.convert(model, qcompile.calibrate(model, [x], policy=policy))


def test_bad_input_is_one_line():
    model, x = trained("residual")
    policy = qcompile.calibrate(model, [x], policy=_policy(model))
    path, (mean, variance) = next(iter(policy.statistics.items()))
    others = {name: pair for name, pair in policy.statistics.items() if name != path}
    with pytest.raises(InvalidArgument, match=f"statistics of '{path}' are of 0 channels"):
        qcompile.convert(model, policy.with_statistics(others))
    with pytest.raises(InvalidArgument, match=f"statistics of '{path}' are of 1 channels"):
        qcompile.convert(model, policy.with_statistics({**others, path: (mean[:1], variance[:1])}))
    with pytest.raises(InvalidArgument, match="'other'"):
        qcompile.convert(model, policy.with_statistics({**policy.statistics, "other": (mean, variance)}))
    with pytest.raises(InvalidInputType, match=r"qcompile\.Policy"):
        qcompile.calibrate(model, [x], policy={"conv1": 2})
    with pytest.raises(InvalidArgument, match="at least one batch"):
        qcompile.calibrate(model, [], policy=policy)
    with pytest.raises(InvalidArgument, match="NaN"):
        qcompile.calibrate(model, [x * torch.nan], policy=policy)
    net, x = example("residual")
    fresh = qcompile.prepare(net, x, bits=(2, 4))
    with pytest.raises(InvalidArgument, match="never set"):
        qcompile.calibrate(fresh, [x], policy=_policy(fresh))
