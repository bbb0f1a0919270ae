"""One model for 2, 3 and 4 bits on several ranks, data parallel or sharded; gloo on CPUs, nccl on GPUs.

torchrun --nproc-per-node 2 examples/train_torchrun.py --recipe model
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile.cli.digits import DigitsNet, digits


def main() -> None:
    """Train and score every width on the first rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--recipe",
        choices=("model", "joint", "sharded"),
        default="model",
        help="DistributedDataParallel around the model, around the joint loss, or fully_shard",
    )
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.set_num_threads(1)

    torch.manual_seed(0)
    x, y, test_x, test_y = (one.to(device) for one in digits())
    model = qcompile.prepare(DigitsNet().to(device), x[:2], bits=(2, 3, 4)).train()
    qcompile.sync_batch_norm(model)
    criterion = nn.CrossEntropyLoss()
    if options.recipe == "model":
        joint = qcompile.JointLoss(DistributedDataParallel(model, find_unused_parameters=True), criterion)
    elif options.recipe == "joint":
        joint = DistributedDataParallel(qcompile.JointLoss(model, criterion))
    else:
        qcompile.calibrate(model, x[:1024].split(256))  # activation steps are set before sharding
        fully_shard(model)
        joint = qcompile.JointLoss(model, criterion)
    optimizer = torch.optim.SGD(qcompile.param_groups(model, lr=0.05), momentum=0.9)

    for _ in range(options.steps):
        chosen = torch.randint(0, len(y), (64,)).chunk(ranks)[rank].to(device)  # one seed, so one batch
        optimizer.zero_grad()
        if options.recipe == "joint":
            joint(x[chosen], y[chosen]).backward()
        else:
            joint.backward(x[chosen], y[chosen])
        optimizer.step()

    scored = model.eval()
    if options.recipe == "sharded":
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        scored = qcompile.prepare(DigitsNet().to(device), x[:2], bits=(2, 3, 4))
        scored.load_state_dict(whole)
        scored.eval()
    if rank == 0:
        for bits in qcompile.modes(scored):
            right = qcompile.at(scored, bits)(test_x).argmax(1) == test_y
            print(f"{bits} bits: {100 * float(right.float().mean()):.2f} %")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
