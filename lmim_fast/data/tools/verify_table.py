"""What `lmim data verify` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmim_fast.data.tools.verified import Bad, Verified
from lmim_fast.data.tools.words import share_text
from lmim_fast.data.visible import visible

_EXAMPLES = 3  # of a kind


def print_verified(found: Verified, console: Console) -> None:
    """Print databases with broken records, and a table of the kinds."""
    for database in found.databases:
        if database["bad"]:
            path = visible(database["path"])
            share = share_text(database["bad"], database["records"])
            console.print(Text(f"{path}: {share} broken"), soft_wrap=True)
    if found.bad or found.bad_labels:
        console.print(_table(found))
    unlabelled = sum(not database["labels"] for database in found.databases)
    if unlabelled:
        console.print(f"{unlabelled} of {len(found.databases)} databases have no labels", highlight=False)
    speed = found.records / max(found.seconds, 1e-9)
    verdict = f"{share_text(len(found.bad), found.records)} broken" if found.bad else "none broken"
    console.print(
        f"{found.records:,} records in {len(found.databases)} databases decoded in {found.seconds:.1f} s"
        f" ({speed:,.0f} a second): {verdict}",
        soft_wrap=True,
        highlight=False,
    )


def _table(found: Verified) -> Table:
    table = Table()
    table.add_column("what", no_wrap=True)
    table.add_column("records", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("examples", overflow="fold")
    for records, kinds in ((found.bad, found.kinds), (found.bad_labels, found.label_kinds)):
        for kind, count in kinds.items():
            share = f"{100 * count / found.records:.4g} %"
            table.add_row(Text(kind), f"{count:,}", share, Text(_examples(found, records, kind)))
        if records is found.bad and records and found.bad_labels:
            table.add_section()
    return table


def _examples(found: Verified, records: Sequence[Bad], kind: str) -> str:
    """The first records of a kind, each named by folder and key."""
    named = []
    for bad in records:
        if bad.reason == kind:
            database, key = found.locate(bad.record)
            named.append(f"{visible(database['name'])} {key}")
            if len(named) == _EXAMPLES:
                break
    return "\n".join(named)
