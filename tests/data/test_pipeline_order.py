"""R3 of what training reads: the batches of real pipelines, in order, for any split and stop."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_runs import database

from lmim_fast.config import DataConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.records import RecordStore


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Databases of 1 to 7 records, some of them broken, which moves no sample."""
    root = tmp_path_factory.mktemp("lmdb")
    broken = {count: {count // 2: b"junk"} if count > 2 else {} for count in range(1, 8)}
    return {count: database(root / str(count), junk, count) for count, junk in broken.items()}


def passes(folder, batch_size, seed, world_size, accumulation, start, end):
    """(epoch, index) pairs of the steps from start to end - 1, in the order of the global batch."""
    store = RecordStore([folder])
    by_rank = []
    for rank in range(world_size):
        with ViewPipeline(
            store,
            SampleOrder(len(store), batch_size, seed),
            guidance=None,
            loader=DataConfig(threads=1, max_bad_fraction=1.0),
            seed=seed,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            start_step=start,
            end_step=end,
        ) as batches:
            by_rank.append(list(batches))
    pairs = []
    for together in zip(*by_rank, strict=True):  # the ranks' shares of one pass
        assert len({(batch.step, batch.micro) for batch in together}) == 1
        for batch in together:
            pairs += zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)
    return pairs


@settings(max_examples=12)
@given(
    count=st.integers(1, 7),
    size=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    before=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    steps=st.integers(1, 4),
    data=st.data(),
)
def test_r03_pipelines_stopped_anywhere_and_resumed_in_another_world_read_the_one_sequence(
    folders, count, size, seed, before, after, steps, data
):
    stop = data.draw(st.integers(0, steps))
    batch_size = size * 12  # a multiple of every world x accumulation
    read = passes(folders[count], batch_size, seed, *before, 0, stop)
    read += passes(folders[count], batch_size, seed, *after, stop, steps)
    epochs, indices = SampleOrder(count, batch_size, seed).places(0, steps * batch_size)
    assert read == list(zip(epochs.tolist(), indices.tolist(), strict=True))
