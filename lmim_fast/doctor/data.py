"""Whether the data of a run opens and decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmim_fast.config import RunConfig
from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.plan import Plan

if TYPE_CHECKING:
    from lmim_fast.data.skip_list import SkipList

SAMPLE = 400  # records decoded of each database: under a second


def check_data(plan: Plan, findings: Findings) -> None:
    """Look into each database; if all can be read, open the records of the run: they become the plan's."""
    config = plan.config
    skip = _skip_list(config, findings)
    good = _check_paths(config.data, "--data", config, skip, findings)
    if config.eval_data:
        _check_paths(config.eval_data, "--eval-data", config, skip, findings)
    if val := getattr(config, "val", ()):  # sets that are read for scores ignore the list
        _check_paths(val, "--val", config, None, findings)
    if not good:
        return
    with findings.check("records"):
        said: list[str] = []
        plan.store = plan.task.records(said.append)
        findings.ok("records", f"{len(plan.store):,} to train on")
        # Lines of examples are indented further.
        for line in (line.strip() for line in said if line[:4] != "    "):
            findings.ok("labels", line.removeprefix("labels: "))
    if skip is None or plan.store is None:
        return
    with findings.check("skip list"):
        from lmim_fast.train.start import skip_list_digest

        skip_list_digest(
            config, plan.store, lambda line: findings.ok("skip list", line.removeprefix("skip list: "))
        )


def _skip_list(config: RunConfig, findings: Findings) -> SkipList | None:
    """The skip list of the run, if it has one that can be read."""
    if config.loader.skip is None:
        return None
    with findings.check("skip list"):
        from lmim_fast.data.skip_list import SkipList

        return SkipList.read(config.loader.skip)
    return None


def _check_paths(
    paths: Sequence[str], option: str, config: RunConfig, skip: SkipList | None, findings: Findings
) -> bool:
    """Whether all databases of an option can be used."""
    before, records, broken = findings.count("error"), 0, 0.0
    with findings.check(option):
        from lmim_fast.data.store.databases import find_databases

        for path in find_databases(paths):
            with findings.check(option):
                count, share = _check_database(path, option, config, skip, findings)
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


def _check_database(
    path: str, option: str, config: RunConfig, skip: SkipList | None, findings: Findings
) -> tuple[int, float]:
    """Records of a database that are read, and the share of them that is broken, by an even sample."""
    from lmim_fast.data.store.records import RecordStore
    from lmim_fast.data.tools.inspect import summarize

    store = RecordStore([path], max_pixels=config.loader.max_pixels)
    try:
        listed = {} if skip is None else skip.reasons(store)
        summary = summarize(store, store.databases[0], SAMPLE, listed)
    finally:
        store.close()
    text = f"{path}: {summary.records:,} records"
    if listed:
        text += f", {len(listed):,} of them on the skip list"
    count = summary.records - len(listed)
    if not summary.sampled:
        findings.warning(option, f"{text}; none was decoded", "nothing of it is trained on")
        return count, 0.0
    if summary.labelled == summary.sampled:
        text += " with labels"
    elif summary.labelled:
        text += f", {summary.labelled / summary.sampled:.0%} with a label"
    share = summary.broken / summary.sampled
    if not summary.broken:
        findings.ok(option, f"{text}; {summary.sampled:,} decoded, all good")
        return count, share
    example = summary.broken_examples[0]
    findings.warning(
        option,
        f"{text}; {summary.broken} of {summary.sampled:,} are broken ({share:.1%}), "
        f"for example {example.key}: {example.reason}",
        "others take their place in training; `lmim data inspect` names more",
    )
    return count, share
