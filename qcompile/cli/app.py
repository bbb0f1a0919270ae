"""Commands and their options; each calls the same functions that Python users call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..version import __version__
from .tables import print_json, print_table

app = typer.Typer(
    name="qcompile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="One low-bit model for every device: quantise, inspect, verify and lower .qcm files. "
    "--debug anywhere shows tracebacks.",
)

File = Annotated[Path, typer.Argument(help="A .qcm file.")]
Bits = Annotated[Optional[str], typer.Option("--bits", help="A mode, for example 2 or w2a4.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def _version(value: bool) -> None:
    if value:
        print(f"qcompile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: qcompile quantize net:build --weights w.safetensors --calibrate data.npz -o net.qcm"
)
def quantize(
    factory: Annotated[str, typer.Argument(help="module:function that returns the float model.")],
    calibrate: Annotated[Path, typer.Option(help=".npz with inputs, named as in `forward`, or `x`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .qcm file to write.")],
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file with the model's state dict.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Quantisation scheme.")] = "vertical",
    bits: Annotated[Optional[str], typer.Option(help="Bit-widths, for example 2,3,4.")] = None,  # noqa: UP045
    modes: Annotated[Optional[str], typer.Option(help="In place of --bits: w2a2,w4a8.")] = None,  # noqa: UP045
    skip: Annotated[Optional[list[str]], typer.Option(help="A layer to leave in float; repeatable.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(help="Samples per calibration batch.")] = 64,
) -> None:
    """Quantise without training: step sizes and batch normalisation from sample inputs."""
    from .quantize import quantize_command

    quantize_command(factory, weights, scheme, bits, modes, skip or [], calibrate, batch, output)


@app.command(
    epilog="Example: qcompile search net:build --weights trained.safetensors --data train.npz "
    "--budget 'bitops<=0.3x' -o policy.json"
)
def search(
    factory: Annotated[str, typer.Argument(help="module:function that returns the float model.")],
    weights: Annotated[
        Path,
        typer.Option(help="safetensors file with the state dict of the prepared or the float model."),
    ],
    data: Annotated[Path, typer.Option(help=".npz with training inputs and labels in `y`.")],
    budget: Annotated[
        list[str], typer.Option(help="bitops<=1.2G, size<=60KB, latency<=2ms@x86, bitops<=0.3x; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The policy's JSON; numbered if several.")],
    scheme: Annotated[str, typer.Option(help="Quantisation scheme.")] = "coupled",
    bits: Annotated[Optional[str], typer.Option(help="Bit-widths, for example 2,3,4.")] = None,  # noqa: UP045
    modes: Annotated[Optional[str], typer.Option(help="In place of --bits: w2a2,w4a8.")] = None,  # noqa: UP045
    skip: Annotated[Optional[list[str]], typer.Option(help="A layer that is in float; repeatable.")] = None,  # noqa: UP045
    method: Annotated[str, typer.Option(help="greedy, knapsack or evolution.")] = "greedy",
    start: Annotated[
        str, typer.Option(help="Of greedy: the highest uniform policy, or the nearest.")
    ] = "highest",
    samples: Annotated[int, typer.Option(help="Samples to compare policies on.")] = 256,
    batch: Annotated[int, typer.Option(help="Samples per batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Of evolution.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep losses here; a search that was stopped goes on from it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the bits of every layer: .svg, .png or .pdf.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A .qcm file to write with the policies.")] = None,
    json: Json = False,
) -> None:
    """Choose bits for every layer of a trained model that fit a budget."""
    from .search import search_command

    search_command(
        factory,
        weights,
        scheme,
        bits,
        modes,
        skip or [],
        data,
        budget,
        method,
        start,
        samples,
        batch,
        seed,
        checkpoint,
        output,
        plot,
        file,
        json,
    )


@app.command(epilog="Example: qcompile inspect model.qcm --target x86")
def inspect(
    file: File,
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Compile every mode for it too: kernels picked, bytes of working memory."),
    ] = None,
    json: Json = False,
) -> None:
    """Show modes, sections, layers, sizes, BitOPs and checksums of a file."""
    from .inspect import inspect_command

    inspect_command(file, target, json)


@app.command("eval", epilog="Example: qcompile eval model.qcm --data test.npz --bits 2")
def evaluate(
    file: File,
    data: Annotated[
        Path, typer.Option(help=".npz with inputs, named as in `forward` or `x`, and labels in `y`.")
    ],
    bits: Bits = None,
    target: Annotated[Optional[str], typer.Option(help="Run it lowered to this target.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(help="Samples per call.")] = 64,
    json: Json = False,
) -> None:
    """Top-1 accuracy of every mode (or of one) on labelled inputs."""
    from .evaluate import evaluate_command

    evaluate_command(file, data, bits, target, batch, json)


@app.command(epilog="Example: qcompile lower model.qcm --target onnx-qdq --bits 2 -o build/")
def lower(
    file: File,
    target: Annotated[str, typer.Option(help="See `qcompile targets`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    bits: Bits = None,
    batch: Annotated[int, typer.Option(help="Samples per call of the lowered model.")] = 1,
    cpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="x86 and arm: only the kind that this processor, cortex-a72 for example, belongs to."
        ),
    ] = None,
    features: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only these kinds of processors: of amx,bitalg,vnni,avx2 or of dotprod,neon."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="x86 and arm: measure for longer which kernels are fastest here.")
    ] = False,
) -> None:
    """Compile one mode for a target and write what a device needs."""
    from ..lower import lower as lower_model

    kinds = None if features is None else features.split(",")
    for path in lower_model(file, target, bits, batch, cpu=cpu, features=kinds, tune=tune).export(output):
        print(path)


@app.command(epilog="Example: qcompile bench model.qcm --target x86 --against onnx-qdq,onnx-packed")
def bench(
    file: File,
    target: Annotated[str, typer.Option(help="See `qcompile targets`.")] = "x86",
    against: Annotated[Optional[str], typer.Option(help="Further targets, measured in turns.")] = None,  # noqa: UP045
    bits: Bits = None,
    float_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--float", help="module:function that returns the float network, for peers."),
    ] = None,
    peers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Other runtimes: torch, torch-bf16, torch-compile, onnxruntime, onnxruntime-int8, openvino, "
            "openvino-bf16, openvino-int8."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples per call.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of every target.")] = 1,
    runs: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 50,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw best and median latency as bars: .svg, .png or .pdf."),
    ] = None,
    json: Json = False,
) -> None:
    """Latency of every mode (or of one) on this machine, alternatives taking turns."""
    from .bench import bench_command

    names = [target, *(against.split(",") if against else [])]
    others = peers.split(",") if peers else []
    bench_command(file, names, bits, float_model, others, batch, threads, runs, plot, json)


@app.command(epilog="Example: qcompile verify model.qcm --target onnx-qdq --data test.npz")
def verify(
    file: File,
    target: Annotated[
        str | None, typer.Option(help="Check this target too; default: the integer graph.")
    ] = None,
    bits: Bits = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz with inputs, named as in `forward` or `x`; default: random ones."),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many samples to check.")] = 16,
    json: Json = False,
) -> None:
    """Prove that a mode computes exactly its integers; exit code 1 if it does not."""
    from .verify import verify_command

    if not verify_command(file, target, bits, data, samples, json):
        raise typer.Exit(1)


@app.command(epilog="Example: qcompile targets --json")
def targets(json: Json = False) -> None:
    """List what models can be lowered to."""
    from ..registry import find_target
    from ..registry import targets as names

    rows = [{"target": name, "summary": find_target(name).summary} for name in names()]
    print_json(rows) if json else print_table("Targets", rows)


@app.command(epilog="Example: qcompile demo")
def demo(
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Keep the .qcm file here.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Train a small network on scikit-learn's digits, save it, lower it, and print what every mode does."""
    from .demo import demo_command

    demo_command(output, json)
