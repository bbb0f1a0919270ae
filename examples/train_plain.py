"""One model for 2, 3 and 4 bits in a plain training loop, with everything such loops have.

    python examples/train_plain.py --amp bf16 --compile --accumulate 2 --checkpoint run.pt --save digits.qcm

Started again with the same arguments, it goes on from the checkpoint and ends with the same bits as a run
that was never stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qcompile
from qcompile.cli.digits import DigitsNet, digits

AMP = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Train, score every width, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--amp", choices=AMP, default="no", help="autocast; fp16 also scales gradients")
    parser.add_argument("--compile", action="store_true", help="torch.compile, one graph for each width")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step")
    parser.add_argument("--ema", action="store_true", help="score and save the average of the weights")
    parser.add_argument("--checkpoint", type=Path, help="write the state here every 20 steps; resume from it")
    parser.add_argument("--save", type=Path, help="write every width to this .qcm file")
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = qcompile.prepare(DigitsNet(), x[:2], bits=(2, 3, 4)).train()
    model = model.to(memory_format=torch.channels_last)
    joint = qcompile.JointLoss(torch.compile(model) if options.compile else model, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.05), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=options.amp == "fp16")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    state = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
        "average": average,
    }
    start = resume(options.checkpoint, state)

    for step in range(start, options.steps):
        optimizer.zero_grad()
        for _ in range(options.accumulate):
            chosen = torch.randint(0, len(y), (64,))
            with torch.autocast("cpu", dtype=AMP[options.amp], enabled=options.amp != "no"):
                for loss in joint.losses_per_mode(x[chosen], y[chosen]):
                    scaler.scale(loss / options.accumulate).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        average.update_parameters(model)
        if options.checkpoint and (step + 1) % 20 == 0:
            write(options.checkpoint, state, step + 1)

    trained = (average.module if options.ema else model).eval()
    for bits in qcompile.modes(trained):
        right = qcompile.at(trained, bits)(test_x).argmax(1) == test_y
        print(f"{bits} bits: {100 * float(right.float().mean()):.2f} %")
    if options.save:
        qcompile.save(trained, options.save)


def write(path: Path, state: dict, step: int) -> None:
    """The whole state of training, never half-written."""
    content = {name: one.state_dict() for name, one in state.items()}
    partial = path.with_suffix(".partial")
    torch.save({**content, "step": step, "rng": torch.get_rng_state()}, partial)
    os.replace(partial, path)


def resume(path: Path | None, state: dict) -> int:
    """Read the state back, if there is one; returns the number of steps done."""
    if path is None or not path.exists():
        return 0
    content = torch.load(path, weights_only=True)
    for name, one in state.items():
        one.load_state_dict(content[name])
    torch.set_rng_state(content["rng"])
    return content["step"]


if __name__ == "__main__":
    main()
