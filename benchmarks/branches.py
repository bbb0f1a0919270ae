"""Whether the branches of a multi-branch mode run faster as one grouped convolution per layer.

    python benchmarks/branches.py

Two networks with the same arithmetic: branches as chains of their own, and one chain whose convolutions have
a group per branch. Both are quantised at 2-bit weights and lowered; the quotient grouped / separate is below
1 where grouping pays. Best of many runs, alternatives interleaved; random weights and images, on which times
do not depend.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial

import torch
from resnet20 import processor
from torch import Tensor, nn

import qcompile
from qcompile.timing import best_of

#: (channels, size of the image): the three stages of ResNet-20, and one of ResNet-18.
SHAPES = ((16, 32), (32, 16), (64, 8), (128, 28))
DEPTH = 4


def layer(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Separate(nn.Module):
    """A chain per branch; their averages over the image go to the classifier side by side."""

    def __init__(self, branches: int, channels: int) -> None:
        super().__init__()
        self.stem = layer(3, channels)
        chain = partial(layer, channels, channels)
        self.branches = nn.ModuleList(
            nn.Sequential(*(chain() for _ in range(DEPTH))) for _ in range(branches)
        )
        self.head = nn.Linear(branches * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 10)."""
        x = self.stem(x)
        return self.head(torch.cat([branch(x).mean((2, 3)) for branch in self.branches], 1))


class Grouped(nn.Module):
    """One chain; its first convolution feeds all groups."""

    def __init__(self, branches: int, channels: int) -> None:
        super().__init__()
        wide = branches * channels
        self.stem, self.first = layer(3, channels), layer(channels, wide)
        self.rest = nn.Sequential(*(layer(wide, wide, branches) for _ in range(DEPTH - 1)))
        self.head = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 10)."""
        return self.head(self.rest(self.first(self.stem(x))).mean((2, 3)))


def same_weights(separate: Separate, grouped: Grouped) -> None:
    """Give the grouped network the weights of the separate one, and check that they agree."""
    for theirs, ours in ((separate.stem, grouped.stem), (separate.head, grouped.head)):
        ours.load_state_dict(theirs.state_dict())
    layers = [grouped.first, *grouped.rest]
    for depth, one in enumerate(layers):
        convolutions = [branch[depth][0].weight for branch in separate.branches]
        one[0].weight.data = torch.cat([weight.data for weight in convolutions])


def compare(branches: int, channels: int, size: int, target: str, runs: int) -> dict[str, float]:
    """Milliseconds of both, at 2-bit weights and 4-bit activations."""
    torch.manual_seed(0)
    separate, grouped = Separate(branches, channels).eval(), Grouped(branches, channels).eval()
    same_weights(separate, grouped)
    image = torch.randn(1, 3, size, size)
    torch.testing.assert_close(separate(image), grouped(image), rtol=1e-4, atol=1e-4)
    called = {}
    for name, network in (("separate", separate), ("grouped", grouped)):
        model = qcompile.prepare(network, image, bits=("w2a4",))
        qcompile.calibrate(model, [image.expand(4, -1, -1, -1)])
        lowered = qcompile.lower(model.eval(), target=target, batch=1, threads=1)
        called[name] = partial(lowered, image)
    return {name: 1e3 * seconds for name, seconds in best_of(runs, called).items()}


def main() -> None:
    """Print one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--targets", nargs="+", default=["x86", "onnx-packed", "onnx-qdq"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| target | branches | channels | image | separate ms | grouped ms | grouped / separate |")
    print("|---|---|---|---|---|---|---|")
    records = []
    for target in options.targets:
        for branches in (2, 4):
            for channels, size in SHAPES:
                times = compare(branches, channels, size, target, options.runs)
                records.append({"target": target, "branches": branches, "channels": channels, **times})
                cells = [target, branches, channels, size]
                cells += [f"{times['separate']:.3f}", f"{times['grouped']:.3f}"]
                cells += [f"{times['grouped'] / times['separate']:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    machine = {"machine": processor(), "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({**machine, "qcompile": qcompile.__version__, "results": records}))


if __name__ == "__main__":
    main()
