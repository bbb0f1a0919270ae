"""Tables of the records that `cifar10_resnet20.py` makes of its runs."""

from __future__ import annotations

from collections.abc import Collection

import torch


def print_schemes(records: list[dict], float_accuracy: float) -> None:
    """One run of every scheme on the exact test images."""
    widths = sorted({int(bits) for record in records for bits in record["exact"]})
    print(f"float: {float_accuracy:.2f}")
    print("| scheme | minutes | " + " | ".join(f"{bits} bits" for bits in widths) + " |")
    print("|---" * (len(widths) + 2) + "|")
    for scheme in dict.fromkeys(record["recipe"]["scheme"] for record in records):
        own = [record for record in records if record["recipe"]["scheme"] == scheme]
        scores = {int(bits): f"{score:.2f}" for record in own for bits, score in record["exact"].items()}
        minutes = ", ".join(f"{record['seconds'] / 60:.0f}" for record in own)
        print(f"| {scheme} | {minutes} | {' | '.join(scores.get(bits, '') for bits in widths)} |")


def print_comparison(records: list[dict], apart: Collection[str]) -> None:
    """Mean and standard deviation over seeds, exact and JPEG images pooled by their number.

    Args:
        records: of all runs.
        apart: schemes whose widths are models of their own.
    """
    columns = sorted({int(bits) for record in records for bits in record["exact"]})
    rows: dict[tuple[str, tuple[object, ...]], list[dict[int, float]]] = {}
    for record in records:
        pooled = {
            int(bits): (1017 * score + 10000 * record["jpeg"][bits]) / 11017
            for bits, score in record["exact"].items()
        }
        recipe = record["recipe"]
        loops = [name for name in ("autocast", "compiled") if recipe[name]]
        trained = ("each alone",) if recipe["scheme"] in apart else tuple(recipe["bits"])
        rows.setdefault((", ".join([recipe["variant"], *loops]), trained), []).append(pooled)
    print("| variant | trained widths | " + " | ".join(f"{bits} bits" for bits in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for (variant, widths), scores in rows.items():
        cells = []
        for bits in columns:
            values = torch.tensor([score[bits] for score in scores if bits in score], dtype=torch.float64)
            cells.append(f"{values.mean():.2f} ± {values.std():.2f}" if len(values) > 1 else "")
        print(f"| {variant} | {', '.join(map(str, widths))} | " + " | ".join(cells) + " |")
