"""The executable of the ONNX target: calls, files, errors."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx_networks import lowered, prepared

import qcompile
from qcompile.backends.onnx import OnnxQdqTarget
from qcompile.backends.onnx.executable import OnnxExecutable
from qcompile.errors import FileAccessError, FileFormatError, InvalidArgument, LoweringError


@pytest.fixture(scope="module")
def executable() -> OnnxExecutable:
    model, _ = prepared("residual")
    return lowered(model, 3)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return prepared("residual")[1][0]


def test_the_target_is_listed() -> None:
    assert "onnx-qdq" in qcompile.targets()


def test_another_batch_size_is_refused_in_one_line(executable: OnnxExecutable, x: torch.Tensor) -> None:
    with pytest.raises(InvalidArgument, match="has batch 2, the model was lowered for batch 3") as caught:
        executable(x[:2])
    assert "\n" not in str(caught.value)


def test_another_shape_is_refused(executable: OnnxExecutable, x: torch.Tensor) -> None:
    with pytest.raises(InvalidArgument, match="shape"):
        executable(x[:, :, :8])
    with pytest.raises(InvalidArgument, match=r"has shape \(3, 3, 8, 12\), the model was lowered for"):
        executable.run([x[:, :, :8].numpy()])


def test_the_number_of_inputs_is_checked(executable: OnnxExecutable) -> None:
    with pytest.raises(InvalidArgument, match="takes 1 inputs, got 0"):
        executable.run([])


def test_shapes_that_the_model_cannot_take_are_refused(executable: OnnxExecutable) -> None:
    request = replace(executable.request, input_shapes=((3, 2, 12, 12),))
    with pytest.raises(InvalidArgument, match=r"does not run on inputs of shape \(3, 2, 12, 12\)"):
        OnnxQdqTarget().compile(request)


def test_inputs_may_be_strided_and_require_gradients(executable: OnnxExecutable, x: torch.Tensor) -> None:
    strided = x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert torch.equal(executable(strided), executable(x))


def test_threads_may_share_an_executable(executable: OnnxExecutable, x: torch.Tensor) -> None:
    inputs = [x + 0.1 * index for index in range(8)]
    alone = [executable(one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(executable, inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("threads", [None, 2])
def test_the_number_of_threads_is_the_callers(x: torch.Tensor, threads: int | None) -> None:
    model, _ = prepared("residual")
    executable = qcompile.lower(model, "onnx-qdq", bits=3, batch=3, threads=threads)
    torch.testing.assert_close(executable(x), lowered(model, 3)(x))


def test_an_exported_folder_runs_without_qcompile(
    executable: OnnxExecutable, x: torch.Tensor, tmp_path: Path
) -> None:
    files = executable.export(tmp_path / "build")
    assert sorted(file.name for file in files) == ["README.md", "model.onnx"]
    assert sorted((tmp_path / "build").iterdir()) == sorted(files)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "build" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    assert np.array_equal(session.run(None, feed)[0], executable(x).numpy())


def test_the_readme_runs_and_names_no_folder_of_this_machine(
    executable: OnnxExecutable, tmp_path: Path
) -> None:
    executable.export(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "w3a3" in text
    assert "| input | `input_1` | float32 | [3, 3, 12, 12] |" in text
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
    code = text.partition("```python\n")[2].partition("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_export_replaces_what_was_there_before(executable: OnnxExecutable, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    executable.export(tmp_path)
    assert onnx.load(tmp_path / "model.onnx") == executable.model


def test_a_folder_that_cannot_be_written_is_an_error(executable: OnnxExecutable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="cannot write"):
        executable.export(tmp_path / "file")
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(FileAccessError, match="cannot write"):
        executable.export(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "model.onnx"]


def test_an_exported_folder_loads_again(executable: OnnxExecutable, x: torch.Tensor, tmp_path: Path) -> None:
    executable.export(tmp_path)
    for path in (tmp_path, tmp_path / "model.onnx"):
        loaded = OnnxQdqTarget().load(path, executable.request)
        assert torch.equal(loaded(x), executable(x))
        ours, theirs = executable.constants(), loaded.constants()
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_files_that_are_no_model_are_refused(executable: OnnxExecutable, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="cannot read"):
        OnnxExecutable.load(tmp_path, executable.request)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xfenot a model")
    with pytest.raises(FileFormatError, match="is not an ONNX model"):
        OnnxExecutable.load(tmp_path, executable.request)


def test_a_model_that_the_runtime_refuses_is_an_error(executable: OnnxExecutable) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(executable.model)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(LoweringError, match="ONNX Runtime refuses the model"):
        OnnxExecutable(executable.request, broken)


def test_a_trace_of_another_model_is_an_error(executable: OnnxExecutable, x: torch.Tensor) -> None:
    other = lowered(prepared("plain")[0], 3)
    with pytest.raises(LoweringError, match="was not lowered from this model"):
        OnnxExecutable(executable.request, other.model).trace([x.numpy()])


def test_every_constant_has_a_layer(executable: OnnxExecutable) -> None:
    assert all("/" in name for name in executable.constants())


def test_every_changed_initializer_shows_among_the_constants(executable: OnnxExecutable) -> None:
    before = executable.constants()
    for index, initializer in enumerate(executable.model.graph.initializer):
        array = numpy_helper.to_array(initializer).copy()
        flat = array.reshape(-1)
        flat[-1:] = np.nextafter(flat[-1:], np.inf) if array.dtype.kind == "f" else flat[-1:] ^ 1
        changed = onnx.ModelProto()
        changed.CopyFrom(executable.model)
        changed.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, initializer.name))
        after = _constants(changed)
        names = [name for name in before if not np.array_equal(before[name], after[name])]
        assert names == [initializer.name]


def test_a_changed_attribute_shows_among_the_constants(executable: OnnxExecutable) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(executable.model)
    node = next(one for one in changed.graph.node if one.name == "1.branch.0.0/conv")
    next(one for one in node.attribute if one.name == "pads").ints[0] += 1
    before, after = executable.constants(), _constants(changed)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == [
        "1.branch.0.0/conv.pads"
    ]


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    blank = object.__new__(OnnxExecutable)
    blank.model = model
    return dict(blank.constants())


def test_a_changed_weight_shows_in_the_accumulators(x: torch.Tensor) -> None:
    model, _ = prepared("residual")
    executable = lowered(model, 3)
    before = executable.trace([x.numpy()]).values
    for layer in ("1.branch.0.0", "1.branch.1.0"):  # one is fused, the other a matrix product
        changed = onnx.ModelProto()
        changed.CopyFrom(executable.model)
        weight = next(one for one in changed.graph.initializer if one.name == f"{layer}/weight")
        array = numpy_helper.to_array(weight).copy()
        array.reshape(-1)[array.size // 2] ^= 1
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        after = OnnxExecutable(executable.request, changed).trace([x.numpy()]).values
        name = f"_{layer.replace('.', '_')}_accumulate"
        assert not np.array_equal(before[name], after[name])


def test_importing_qcompile_imports_no_onnx() -> None:
    code = (
        "import sys, qcompile, qcompile.backends.onnx\n"
        "found = {name.partition('.')[0] for name in sys.modules} & {'onnx', 'onnxruntime', 'onnxscript'}\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import torch, qcompile\n"
        "from torch import nn\n"
        "x = torch.randn(2, 4)\n"
        "layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))\n"
        "model = qcompile.prepare(layers, x, bits=(2,)).train()\n"
        "model(x)\n"
        "try:\n"
        "    qcompile.lower(model.eval(), 'onnx-qdq')\n"
        "except qcompile.errors.MissingExtra as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == f"the target onnx-qdq needs the package {package}: pip install 'qcompile[onnx]'\n"
