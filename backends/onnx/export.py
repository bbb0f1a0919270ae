"""Write an ONNX model and a page that tells how to run it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import onnx
import onnxruntime
from onnx import helper

import qcompile.version
from qcompile.backends.target import LoweringRequest
from qcompile.errors import FileAccessError

MODEL_FILE = "model.onnx"
README_FILE = "README.md"

_README = """# {name}

An ONNX model in mode {mode}: low-bit codes as uint8; quantised layers between DequantizeLinear and
QuantizeLinear, or as MatMulInteger where their sums are needed exactly; everything else in float32.
Written by qcompile {version} for ONNX opset {opset} (IR version {ir}); checked with ONNX Runtime {runtime}.

Shapes are fixed. Names:

| | name | type | shape |
| --- | --- | --- | --- |
{table}

Run it with `pip install onnxruntime numpy`:

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])
feed = {{
{feed}
}}
outputs = session.run(None, feed)
```
"""


def export(model: onnx.ModelProto, request: LoweringRequest, folder: Path) -> tuple[Path, ...]:
    """Write `model.onnx` and `README.md`, both or neither.

    Raises:
        FileAccessError: if the folder or a file cannot be written.
    """
    contents = {MODEL_FILE: model.SerializeToString(), README_FILE: readme(model, request).encode()}
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
            written[folder / name] = _write_beside(folder / name, content)
        for path in contents:
            os.replace(written.pop(folder / path), folder / path)
    except OSError as cause:
        raise FileAccessError(f"cannot write to {folder}: {cause.strerror or cause}") from cause
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
    return tuple(folder / name for name in contents)


def _write_beside(path: Path, content: bytes) -> Path:
    """A complete temporary file next to `path`, with the permissions of new files."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Path(temporary)


def readme(model: onnx.ModelProto, request: LoweringRequest) -> str:
    """The page: names, types and shapes of inputs and outputs, and how to run them."""
    rows, feed = [], []
    for kind, infos in (("input", model.graph.input), ("output", model.graph.output)):
        for info in infos:
            dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            shape = tuple(one.dim_value for one in info.type.tensor_type.shape.dim)
            rows.append(f"| {kind} | `{info.name}` | {dtype} | {list(shape)} |")
            if kind == "input":
                feed.append(f'    "{info.name}": np.zeros({shape}, np.{dtype}),')
    return _README.format(
        name=MODEL_FILE,
        mode=request.model.mode.name,
        version=qcompile.version.__version__,
        opset=next(one.version for one in model.opset_import if one.domain == ""),
        ir=model.ir_version,
        runtime=onnxruntime.__version__,
        table="\n".join(rows),
        feed="\n".join(feed),
    )
