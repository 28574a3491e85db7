"""A small run of the fuzzer of csrc; `make fuzz` makes a large one."""

import fuzz
import pytest

from lmim_fast.data.store.probe import Status


@pytest.mark.slow
def test_damaged_images_and_databases_never_lead_outside_their_memory(tmp_path):
    try:
        found = {name: counts for name, counts, _ in fuzz.fuzz(2000, 0, tmp_path)}
    except fuzz.Unavailable as reason:
        pytest.skip(str(reason))
    assert set(found) == set(fuzz.PARTS)
    assert set(found["probe"]) == {status.name for status in Status} - {
        "UNDECODABLE"
    }  # the fuzz reaches every verdict
    assert all(found["lmdb"][outcome] for outcome in ("same", "other", "absent", "errors"))
    assert found["views"] == {"inside": 100}
