"""R12: each defect of a record, made at a known index: the same substitutes, counts, reasons everywhere."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from crop_views import psnr
from pipeline_runs import assert_same, pipeline, samples
from reference_view import reference_plain
from torture import broken, layout, reasons, torture_database, unusual

from lmim_fast.config import DataConfig, VerifyConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.samples import SampleReader
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.verify import check_records, verify
from lmim_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")
TOLERANT = DataConfig(threads=2, max_bad_fraction=0.5)
BATCH = 12
STEPS = 2 * -(-(60 + len(broken()) + len(unusual())) // BATCH)  # two epochs: each defect is met twice


@pytest.fixture(scope="module")
def torture(tmp_path_factory):
    return torture_database(tmp_path_factory.mktemp("torture") / "words")


def run(folder, world_size, loader=TOLERANT):
    """Views of all samples by (epoch, index), and index -> reason of what any rank refused."""
    views, named, seen = {}, {}, 0
    for rank in range(world_size):
        with pipeline(
            *(folder,), batch_size=BATCH, loader=loader, rank=rank, world_size=world_size, end_step=STEPS
        ) as batches:
            for batch in batches:
                finished = batch.views()
                for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
                    views[key] = [batch.plain[row], batch.warped[row], finished[0][row], finished[1][row]]
            entries = batches.bad.entries
            assert len(entries) == batches.bad.count
            seen += batches.bad.seen
            for entry in entries:
                assert entry.database == str(folder)
                named[int(entry.key[-9:]) - 1] = entry.reason
    return views, named, seen


@pytest.fixture(scope="module")
def alone(torture):
    return run(torture, 1)


def test_r12_each_defect_is_refused_for_its_reason_and_what_is_merely_odd_is_used(alone):
    _, named, seen = alone
    places = layout()
    assert {places[index]: reason for index, reason in named.items()} == {
        name: reason for name, (_, reason) in broken().items()
    }
    assert seen == STEPS * BATCH


def test_r12_odd_images_are_shown_with_their_own_pixels(alone):
    views, _, _ = alone
    compared = 0
    for index, name in layout().items():
        if name in unusual():
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(unusual()[name], np.uint8), flags)
            if image is not None:  # OpenCV reads a little less than DALI
                literal = reference_plain(np.ascontiguousarray(image[..., ::-1]))
                floor = 25 if "cmyk" in name else 30  # CMYK has two ways to RGB
                assert psnr(views[0, index][0].numpy()[None], literal[None])[0] > floor, name
                compared += 1
    assert compared >= len(unusual()) - 2


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_r12_the_ranks_of_any_world_show_the_same_bits_and_refuse_the_same_records(
    torture, alone, world_size
):
    views, named, seen = run(torture, world_size)
    assert_same(views, alone[0])
    assert named == alone[1] == reasons()
    assert seen == STEPS * BATCH


def test_r12_a_substitute_is_the_first_good_candidate_of_seed_epoch_and_index(torture, alone):
    views, _, _ = alone
    refused = reasons()
    order = SampleOrder(60 + len(layout()), BATCH, 3)
    for (epoch, index), shown in views.items():
        if index in refused and epoch < 2:
            candidates = (order.substitute(epoch, index, attempt) for attempt in itertools.count())
            chosen = next(candidate for candidate in candidates if candidate not in refused)
            assert torch.equal(shown[0], views[epoch, chosen][0]), (epoch, layout()[index])


def test_r12_too_many_of_them_stop_the_run_and_name_the_last(torture):
    loader = DataConfig(threads=2, max_bad_fraction=0.1)
    with (
        pipeline(torture, batch_size=BATCH, loader=loader, end_step=100) as batches,
        pytest.raises(DataError, match=r"max-bad-fraction 0\.1 .*words image-000000\d+: \w+"),
    ):
        list(batches)


def test_r12_verify_finds_exactly_what_training_refuses_for_the_same_reasons(torture):
    store = RecordStore([torture])
    found = check_records(store, threads=2)
    assert {bad.record: bad.reason for bad in found.bad} == reasons()
    assert found.records == len(store)
    assert found.bad_labels == []


def test_r12_a_skip_list_changes_no_bit_reads_no_broken_record_and_counts_none(
    torture, alone, tmp_path, monkeypatch
):
    verify(VerifyConfig((str(torture),), output=str(tmp_path)))
    loader = DataConfig(threads=2, max_bad_fraction=0.0, skip=str(tmp_path / "skip.txt"))

    def met(reader, samples, row, reason):
        raise AssertionError(f"record {samples.sources[row]} was read: {reason}")

    monkeypatch.setattr(SampleReader, "replace", met)
    views, named, seen = run(torture, 3, loader)
    assert_same(views, alone[0])
    assert named == {}
    assert seen == sum(index not in reasons() for _, index in views)


def test_r12_half_a_skip_list_changes_no_bit_and_the_rest_is_named(torture, alone, tmp_path):
    verify(VerifyConfig((str(torture),), output=str(tmp_path)))
    lines = (tmp_path / "skip.txt").read_text().splitlines()
    kept = [line for number, line in enumerate(lines) if line.startswith("#") or number % 2]
    (tmp_path / "half.txt").write_text("\n".join(kept))
    loader = DataConfig(threads=2, max_bad_fraction=0.5, skip=str(tmp_path / "half.txt"))
    actual = samples(torture, loader=loader, batch_size=BATCH, end_step=STEPS)
    assert_same(actual, alone[0])
