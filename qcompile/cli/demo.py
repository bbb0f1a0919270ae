"""`qcompile demo`: the whole way on data that a package ships."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..file.load import load
from ..file.save import save
from ..joint_loss import JointLoss
from ..lower import lower
from ..own_parameters import param_groups
from ..prepare import prepare
from ..switching import at
from .data import Inputs
from .digits import DigitsNet, digits
from .evaluate import top1
from .tables import print_json, print_table

TARGET = "onnx-qdq"
FLOAT_EPOCHS, JOINT_EPOCHS, BATCH = 20, 20, 64


def demo_command(output: Path | None, as_json: bool) -> None:
    """Train, switch bits, save, load, lower, run; print one row per precision."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the images are so small that a second thread only waits
    try:
        _run(output, as_json)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path | None, as_json: bool) -> None:
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    network = DigitsNet()
    _fit(network.train(), x, y, FLOAT_EPOCHS, 0.1)
    prepared = prepare(network, x[:2], scheme="vertical", bits=(2, 3, 4))
    _fit_jointly(prepared, network.eval(), x, y)
    prepared.eval()
    samples = Inputs({"x": test_x}, frozenset())
    rows: list[dict[str, Any]] = [
        {
            "mode": "float",
            "trained %": top1(network, samples, test_y, BATCH),
            "lowered %": None,
            "bytes read": sum(4 * parameter.numel() for parameter in network.parameters()),
            "latency us": _latency(network, test_x[:1]),
        }
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = output or Path(folder) / "digits.qcm"
        save(prepared, path)
        for mode in reversed(prepared.prepared_modes):
            recorder = RecordingFile(path.read_bytes())
            loaded = load(recorder, bits=mode)
            run = lower(loaded, TARGET, batch=BATCH, threads=1, chunk=True)
            single = lower(loaded, TARGET, batch=1, threads=1)
            rows.append(
                {
                    "mode": f"{mode.label} bits",
                    "trained %": top1(at(prepared, mode), samples, test_y, BATCH),
                    "lowered %": top1(run, samples, test_y, BATCH),
                    "bytes read": recorder.bytes_read,
                    "latency us": _latency(single, test_x[:1]),
                }
            )
    if as_json:
        print_json(rows)
    else:
        print_table("scikit-learn digits, one model, every precision", rows)
        print(
            "trained: float in torch, modes as integer graphs; lowered: from the file, in ONNX Runtime.\n"
            "latency: one image, one thread, best of 200 calls; float in torch, modes in ONNX Runtime."
        )


class RecordingFile(io.BytesIO):
    """A file in memory that counts what is read from it.

    Attributes:
        bytes_read: bytes handed out so far.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        """As `io.BytesIO.read`, counted."""
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """As `io.BytesIO.readinto`, counted."""
        count = super().readinto(buffer)
        self.bytes_read += count
        return count


def _fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()


def _fit_jointly(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> None:
    joint = JointLoss(model.train(), nn.CrossEntropyLoss(), teacher=teacher)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.02), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, JOINT_EPOCHS)
    for _ in range(JOINT_EPOCHS):
        for chosen in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            joint.backward(x[chosen], y[chosen])
            optimizer.step()
        schedule.step()


def _latency(run: Callable[[Tensor], Any], image: Tensor) -> float:
    """Microseconds of the fastest of 200 calls."""
    times = []
    with torch.no_grad():
        for _ in range(200):
            started = time.perf_counter()
            run(image)
            times.append(time.perf_counter() - started)
    return round(1e6 * min(times), 1)
