"""One model for 2, 3 and 4 bits in a loop of Hugging Face Accelerate (`pip install accelerate`).

python examples/train_accelerate.py
accelerate launch --cpu --num_processes 2 --mixed_precision bf16 examples/train_accelerate.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qcompile
from qcompile.cli.digits import DigitsNet, digits


def main() -> None:
    """Train and score every width on the main process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = qcompile.prepare(DigitsNet(), x[:2], bits=(2, 3, 4)).train()
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.05), momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    joint = qcompile.JointLoss(wrapped, nn.CrossEntropyLoss())

    for _ in range(options.epochs):
        for images, labels in loader:
            with accelerator.accumulate(wrapped):
                for loss in joint.losses_per_mode(images, labels):
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(wrapped).eval()
        for bits in qcompile.modes(trained):
            right = qcompile.at(trained, bits)(test_x.to(accelerator.device)).argmax(1).cpu() == test_y
            print(f"{bits} bits: {100 * float(right.float().mean()):.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
