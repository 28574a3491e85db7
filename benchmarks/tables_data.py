"""Tables of the input pipeline."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import machine, table


def data(result: dict[str, Any]) -> str:
    """The input pipeline, stage by stage, and against the released manner."""
    names = ("images_per_second", "lowest", "highest")
    rows = [
        [row["stage"], *(f"{row[name]:,.0f}" for name in names), f"{row['cpu_microseconds']:,.1f}"]
        for row in result["rows"]
    ]
    settings = f"Batch {result['batch']}, {result['dali_threads']} DALI threads, {result['records']} records."
    blocks = [
        f"## Input pipeline: {result['device']}",
        f"{machine(result)} {settings}",
        table(("stage", "images/s", "lowest", "highest", "CPU us an image"), rows),
    ]
    blocks += [
        f"Both views normalised, a core, against one in the {row['stage'].partition(',')[0]}:"
        f" {row['ratio_by_clock']:.1f}x by the clock, {row['ratio_by_cpu_time']:.1f}x by CPU time."
        for row in result["released"]
    ]
    return "\n\n".join(blocks)


def gather(result: dict[str, Any]) -> str:
    """Reading batches at random places of a large database."""
    rows = [
        [
            row["pages"],
            row["beside"],
            row["way"],
            f"{row['images_per_second']:,.0f}",
            f"{row['serial_us']:.2f}",
        ]
        for row in result["rows"]
    ]
    size, records = f"{result['bytes'] / 1e9:.1f} GB", f"{result['records']:,} records"
    memory = ", read as if larger than the memory" if result["larger_than_memory"] else ""
    return "\n\n".join(
        [
            f"## Reading batches: {result['device']}",
            f"{machine(result)} {size}, {records}{memory}; batches of {result['batch']} at random places.",
            table(("pages", "beside", "way", "images/s", "serial us an image"), rows),
        ]
    )
