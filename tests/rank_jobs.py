"""What the tests run on several ranks, each a process with the gloo backend, and how they run it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from nets import Residual
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile.passes.schemes.vertical import VerticalConfig

STEPS, BATCH = 20, 8


def on_ranks(count: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `job(rank, count, *args)` by rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (count, folder, job, args), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        torch.save(job(rank, count, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def all_of(rank: int, count: int, jobs: list[tuple[Callable[..., Any], dict[str, Any]]]) -> list[Any]:
    """Several jobs in the same processes."""
    return [job(rank, count, **options) for job, options in jobs]


def batches(steps: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The same batches for everyone."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=dtype),
            torch.randint(0, 5, (BATCH,), generator=generator),
        )
        for _ in range(steps)
    ]


def prepared(dtype: torch.dtype, config: Any, scheme: str = "vertical") -> nn.Module:
    """The same model for everyone."""
    torch.manual_seed(0)
    model = Residual().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a constant channel would else lie on the corner of ReLU
            nn.init.normal_(module.bias, 0.0, 0.3)
    return qcompile.prepare(
        model, torch.zeros(2, 3, 8, 8, dtype=dtype), scheme=scheme, bits=(2, 3, 4), config=config
    ).train()


def train(
    rank: int,
    count: int,
    recipe: str,
    dtype: torch.dtype,
    steps: int = STEPS,
    micro: int = 1,
    moo: str = "us",
    calibrated: bool = False,
    scheme: str = "vertical",
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of every step, averaged over the ranks; gradients of the first step; the final state.

    Recipes: `alone` (no wrapper), `model` and `per mode` (data parallel around the model), `joint` (around
    the joint loss), `sharded` (fully_shard).
    """
    model = prepared(dtype, VerticalConfig(moo=moo) if scheme == "vertical" else None, scheme)
    if calibrated:
        qcompile.calibrate(model, [x for x, _ in batches(1, dtype)])
    if count > 1:
        qcompile.sync_batch_norm(model)
    wrapped: nn.Module = model
    if recipe in ("model", "per mode"):
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    joint = qcompile.JointLoss(wrapped, nn.CrossEntropyLoss())
    called = DistributedDataParallel(joint) if recipe == "joint" else joint
    if recipe == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, first = [], {}
    for x, y in batches(steps, dtype):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        pieces = list(zip(x.chunk(micro), y.chunk(micro), strict=True))
        for number, (images, labels) in enumerate(pieces):
            own = images.chunk(count)[rank], labels.chunk(count)[rank]
            if recipe == "joint" or (recipe == "alone" and moo == "us"):
                waits = recipe == "joint" and number + 1 < len(pieces)
                loss = _whole(called, own, waits)
            elif recipe == "per mode":
                loss = _per_mode(joint, wrapped, own, waits=number + 1 < len(pieces))
            else:
                loss = _backward(joint, wrapped, own, waits=number + 1 < len(pieces))
            total += loss.detach() / micro
        if count > 1:
            dist.all_reduce(total)
        losses.append(total / count)
        if not first:
            first = {name: _whole_tensor(one.grad) for name, one in model.named_parameters()}
        optimizer.step()
    return losses, first, {name: _whole_tensor(value) for name, value in model.state_dict().items()}


def _whole_tensor(value: Any) -> Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone()


def _quiet(module: nn.Module, waits: bool) -> Any:
    return module.no_sync() if waits and isinstance(module, DistributedDataParallel) else nullcontext()


def _whole(called: nn.Module, own: tuple[Tensor, Tensor], waits: bool) -> Tensor:
    with _quiet(called, waits):
        loss = called(*own)
        loss.backward()
    return loss


def _backward(joint: qcompile.JointLoss, wrapped: nn.Module, own: Any, waits: bool) -> Tensor:
    with _quiet(wrapped, waits):
        return joint.backward(*own)


def _per_mode(joint: qcompile.JointLoss, wrapped: nn.Module, own: Any, waits: bool) -> Tensor:
    total = torch.zeros((), dtype=own[0].dtype)
    with _quiet(wrapped, waits):
        for loss in joint.losses_per_mode(*own):
            loss.backward()
            total += loss.detach()
    return total


def refusals(rank: int, count: int) -> dict[str, str]:
    """What wrong set-ups are told."""
    model = prepared(torch.float32, VerticalConfig())
    x, y = (piece.chunk(count)[rank] for piece in batches(1, torch.float32)[0])
    criterion = nn.CrossEntropyLoss()
    around_model = DistributedDataParallel(model, find_unused_parameters=True)
    around_joint = DistributedDataParallel(qcompile.JointLoss(model, criterion))
    calls: dict[str, Callable[[], Any]] = {
        "no wrapper, backward": lambda: qcompile.JointLoss(model, criterion).backward(x, y),
        "no wrapper, call": lambda: qcompile.JointLoss(model, criterion)(x, y),
        "no wrapper, per mode": lambda: list(qcompile.JointLoss(model, criterion).losses_per_mode(x, y)),
        "find_unused_parameters": lambda: qcompile.JointLoss(
            DistributedDataParallel(model), criterion
        ).backward(x, y),
        "static_graph": lambda: qcompile.JointLoss(
            DistributedDataParallel(model, find_unused_parameters=True, static_graph=True), criterion
        ).backward(x, y),
        "called with a wrapped model": lambda: qcompile.JointLoss(around_model, criterion)(x, y),
        "backward of the inner joint loss": lambda: around_joint.module.backward(x, y),
        "loop reduces itself": lambda: qcompile.JointLoss(model, criterion, reduces_itself=True).backward(
            x, y
        ),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except qcompile.errors.InvalidArgument as error:
            said[name] = str(error)
    return said


def first_steps(rank: int, count: int) -> dict[str, Tensor]:
    """Activation steps after a first batch that differs between the ranks."""
    model = prepared(torch.float64, VerticalConfig())
    qcompile.sync_batch_norm(model)
    x = batches(1, torch.float64)[0][0].chunk(count)[rank]
    for bits in qcompile.modes(model):
        qcompile.at(model, bits)(x)
    return {name: value.detach().clone() for name, value in model.named_parameters() if "input_q" in name}


def view_of_a_wrapped_model(rank: int, count: int) -> dict[str, Tensor]:
    """Gradients of one mode through `at` of a data parallel model."""
    model = prepared(torch.float64, VerticalConfig())
    wrapped: nn.Module = model
    if count > 1:
        qcompile.sync_batch_norm(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    x, y = (one.chunk(count)[rank] for one in batches(1, torch.float64)[0])
    nn.functional.cross_entropy(qcompile.at(wrapped, 3)(x), y).backward()
    return {name: one.grad for name, one in model.named_parameters()}


def searched(rank: int, count: int) -> list[str]:
    """Policies that each method finds, as text."""
    model, data = prepared(torch.float32, VerticalConfig()), batches(2, torch.float32)
    qcompile.calibrate(model, [x for x, _ in data])
    found = [qcompile.search(model, data, "bitops<=0.7x", method) for method in ("greedy", "evolution")]
    return [policy.to_json() for policy in found]


def search_with_own_checkpoints(rank: int, count: int) -> str:
    """What every rank is told if only the first of them finds the losses of an earlier search."""
    model, data = prepared(torch.float32, VerticalConfig()), batches(1, torch.float32)
    qcompile.calibrate(model, [x for x, _ in data])
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": model,
            "loader": data,
            "budget": "bitops<=0.7x",
            "checkpoint": f"{folder}/losses.json",
        }
        qcompile.search(**given)  # the first rank writes
        try:
            qcompile.search(**given)
        except qcompile.errors.InvalidArgument as error:
            return str(error)
    return ""


def one_bad_batch(rank: int, count: int, value: float) -> str:
    """What every rank says if one of them gets a batch with NaN or infinity first."""
    model = prepared(torch.float32, VerticalConfig())
    x = batches(1, torch.float32)[0][0].chunk(count)[rank]
    try:
        model(x if rank else torch.full_like(x, value))
    except qcompile.errors.InvalidArgument as error:
        return str(error)
    return ""


def unset_and_sharded(rank: int, count: int) -> str:
    """What a model is told that is sharded before its steps are set."""
    from torch.distributed.fsdp import fully_shard

    model = prepared(torch.float32, VerticalConfig())
    fully_shard(model)
    try:
        model(batches(1, torch.float32)[0][0])
    except qcompile.errors.InvalidArgument as error:
        return str(error)
    return ""


def batch_norm(rank: int, count: int, momentum: float | None) -> tuple[Tensor, ...]:
    """Output, input gradient, parameter gradients and statistics of one row over both ranks' batches."""
    from qcompile.modes import ActiveMode
    from qcompile.passes.batchnorm import ModeBatchNorm

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) * 3 + 1
    upstream = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    # ranks may have batches of different sizes
    own, gradient = (one.split([3, 2])[rank] if count > 1 else one for one in (x, upstream))
    own = own.clone().requires_grad_()
    layer = ModeBatchNorm(nn.BatchNorm2d(4, momentum=momentum).double(), 2, "full")
    if count > 1:
        layer.ranks = dist.group.WORLD
    for _ in range(2):
        output = layer(own, ActiveMode(1))
    output.backward(gradient)
    grads = [layer.weight.grad, layer.bias.grad]
    if count > 1:
        for one in grads:
            dist.all_reduce(one)
    return output.detach(), own.grad, *grads, layer.running_mean, layer.running_var
