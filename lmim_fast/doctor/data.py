"""Whether the data of a run opens and decodes."""

from __future__ import annotations

from collections.abc import Sequence

from lmim_fast.config import RunConfig
from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.plan import Plan

SAMPLE = 400  # records decoded of each database: under a second


def check_data(plan: Plan, findings: Findings) -> None:
    """Look into each database; if all can be read, open the records of the run: they become the plan's."""
    good = _check_paths(plan.config.data, "--data", plan.config, findings)
    for name in ("eval_data", "val"):
        paths = getattr(plan.config, name, ())
        if paths:
            _check_paths(paths, f"--{name.replace('_', '-')}", plan.config, findings)
    if not good:
        return
    with findings.check("records"):
        said: list[str] = []
        plan.store = plan.task.records(said.append)
        findings.ok("records", f"{len(plan.store):,} to train on")
        # Lines of examples are indented further.
        for line in (line.strip() for line in said if line[:4] != "    "):
            findings.ok("labels", line.removeprefix("labels: "))


def _check_paths(paths: Sequence[str], option: str, config: RunConfig, findings: Findings) -> bool:
    """Whether all databases of an option can be used."""
    before, records, broken = findings.count("error"), 0, 0.0
    with findings.check(option):
        from lmim_fast.data.store.databases import find_databases

        for path in find_databases(paths):
            with findings.check(option):
                count, share = _check_database(path, option, config, findings)
                records += count
                broken += share * count
    if findings.count("error") > before:
        return False
    allowed = config.loader.max_bad_fraction
    if option == "--data" and records and broken > allowed * records:
        findings.error(
            option,
            f"{broken / records:.1%} of the records are broken, a run stops above {allowed:.1%}",
            "repair or leave out the databases above, or pass --loader.max-bad-fraction",
        )
    return True


def _check_database(path: str, option: str, config: RunConfig, findings: Findings) -> tuple[int, float]:
    """Records of a database, and the share of them that is broken, by an even sample."""
    from lmim_fast.data.store.records import RecordStore
    from lmim_fast.data.tools.inspect import summarize

    store = RecordStore([path], max_pixels=config.loader.max_pixels)
    try:
        summary = summarize(store, store.databases[0], SAMPLE)
    finally:
        store.close()
    text = f"{path}: {summary.records:,} records"
    if summary.labelled == summary.sampled:
        text += " with labels"
    elif summary.labelled:
        text += f", {summary.labelled / summary.sampled:.0%} with a label"
    share = summary.broken / summary.sampled
    if not summary.broken:
        findings.ok(option, f"{text}; {summary.sampled:,} decoded, all good")
        return summary.records, share
    example = summary.broken_examples[0]
    findings.warning(
        option,
        f"{text}; {summary.broken} of {summary.sampled:,} are broken ({share:.1%}), "
        f"for example {example.key}: {example.reason}",
        "others take their place in training; `lmim data inspect` names more",
    )
    return summary.records, share
