import threading

import pytest
import torch
from evaluation_sets import ColourReader, encoded, reading, word, write_set

from lmim_fast.data.normalize import waics
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError
from lmim_fast.evaluation.metrics import score_readings
from lmim_fast.evaluation.scoring import evaluate_store
from lmim_fast.train.world import World


def alone():
    return World(0, 1, torch.device("cpu"))


class Threads(World):
    """Two ranks as threads of this process; `gather` waits for both."""

    box: dict
    barrier: threading.Barrier

    def gather(self, value):
        self.box[self.rank] = value
        self.barrier.wait(60)
        return [self.box[rank] for rank in range(self.size)]


def evaluate(folder, model=None, world=None, **options):
    return evaluate_store(model or ColourReader(), RecordStore([folder]), world or alone(), **options)


def test_every_image_is_read_once_and_the_last_batch_may_be_small(tmp_path):
    model = ColourReader()
    score, readings = evaluate(write_set(tmp_path / "set", 23), model, batch_size=5)
    assert model.batches == [list(range(start, min(start + 5, 23))) for start in range(0, 23, 5)]
    assert readings.indices.tolist() == list(range(23))
    assert readings.labels == [word(number) for number in range(23)]
    assert readings.strings == [reading(number) for number in range(23)]
    wrong = [number for number in range(23) if number % 7 == 3]
    assert [number for number in range(23) if not readings.correct[number]] == wrong
    assert score == score_readings(readings.labels, list(readings.strings), waics)
    assert score.correct == 23 - len(wrong)
    assert score.exact == sum(reading(number) == word(number) for number in range(23))
    assert readings.probabilities.tolist() == pytest.approx([1 / (1 + number % 11) for number in range(23)])


def test_a_label_longer_than_the_model_reads_counts(tmp_path):
    folder = write_set(tmp_path / "set", 19)
    score, _ = evaluate(folder, ColourReader(lambda number: word(number)[:10]), batch_size=8)
    assert score.images == 19
    assert score.lengths["21+"].images > 0
    assert score.lengths["21+"].correct == 0


@pytest.mark.filterwarnings("ignore:.*some lack image or label")
def test_two_ranks_read_the_batches_of_one_and_agree_with_it(tmp_path):
    folder = write_set(tmp_path / "set", 23, broken=(4, 12), unlabelled=(9,))
    single = ColourReader()
    expected_score, expected = evaluate(folder, single, batch_size=4)
    box, barrier = {}, threading.Barrier(2)
    results, models = {}, [ColourReader(), ColourReader()]

    def work(rank):
        world = Threads(rank, 2, torch.device("cpu"))
        object.__setattr__(world, "box", box)
        object.__setattr__(world, "barrier", barrier)
        results[rank] = evaluate(folder, models[rank], world, batch_size=4)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert models[0].batches == single.batches[::2]
    assert models[1].batches == single.batches[1::2]
    for rank in range(2):
        score, readings = results[rank]
        assert score == expected_score
        for name in ("labels", "strings", "broken", "unlabelled"):
            assert getattr(readings, name) == getattr(expected, name)
        for name in ("indices", "probabilities", "correct"):
            assert getattr(readings, name).tolist() == getattr(expected, name).tolist()


def test_a_broken_image_is_wrong_named_and_not_replaced(tmp_path):
    model = ColourReader()
    score, readings = evaluate(write_set(tmp_path / "set", 6, broken=(2, 6)), model, batch_size=4)
    assert model.batches == [[0, 2, 3], [4]]
    assert readings.broken == {1: "truncated", 5: "truncated"}
    assert (score.images, score.broken, score.correct) == (6, 2, 3)
    assert readings.correct.tolist() == [True, False, True, False, True, False]
    assert readings.strings[1] == ""
    assert readings.probabilities[1] == 0


def test_an_image_whose_pixels_fail_is_wrong_and_the_others_of_its_batch_are_read(tmp_path):
    import lmdb

    folder = write_set(tmp_path / "set", 5)
    whole = bytearray(encoded(2))
    start = whole.index(b"IDAT") + 4
    whole[start : start + 8] = b"\xff" * 8  # the header is fine, the compressed pixels are not
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"image-000000003", bytes(whole))
    model = ColourReader()
    score, readings = evaluate(folder, model)
    assert model.batches == [[0, 1, 3, 4]]
    assert readings.broken == {2: "pixel data cannot be decoded"}
    assert score.broken == 1


@pytest.mark.filterwarnings("ignore:.*some lack image or label")
def test_a_record_without_a_label_is_not_counted(tmp_path):
    score, readings = evaluate(write_set(tmp_path / "set", 6, unlabelled=(2, 3)))
    assert (score.images, score.unlabelled) == (4, 2)
    assert readings.indices.tolist() == [0, 3, 4, 5]


def test_a_set_without_any_label_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"set: no record has a label"):
        evaluate(write_set(tmp_path / "set", 3, labels=False))


@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_the_model_evaluates_without_gradients_and_is_as_before_afterwards(tmp_path, precision, bf16):
    model = ColourReader().train()
    model.child.eval()  # a frozen part
    evaluate(write_set(tmp_path / "set", 3), model, precision=precision)
    assert model.flags == [(False, False, False, bf16)]
    assert (model.training, model.child.training) == (True, False)


def test_the_model_is_as_before_after_a_failure(tmp_path):
    def fail(number):
        raise RuntimeError("out of memory")

    model = ColourReader(fail).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(write_set(tmp_path / "set", 3), model)
    assert model.training


def test_more_than_one_beam_is_a_beam_search(tmp_path):
    _, readings = evaluate(write_set(tmp_path / "set", 2), beam=3)
    assert readings.strings == [f"{reading(0)}|3", f"{reading(1)}|3"]


def test_images_get_the_resize_of_training(tmp_path, real_crops):
    from lmim_fast.data.dali import DaliViews, Stage

    store = RecordStore([real_crops / "test" / "SVT_647"])
    seen = []

    class Keeper(ColourReader):
        def _answer(self, images):
            seen.append(images.clone())
            return super()._answer(images)

    class First(RecordStore):
        def __len__(self):
            return 4

    evaluate_store(Keeper(), First([real_crops / "test" / "SVT_647"]), alone(), threads=1)
    views = DaliViews(
        batch_size=4, threads=1, device=torch.device("cpu"), image_size=(8, 32), stage=Stage.PLAIN
    )
    (expected,) = views(store.images(range(4)), None)
    views.close()
    assert torch.equal(seen[0], expected)
