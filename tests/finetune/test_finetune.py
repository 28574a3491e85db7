"""Fine-tuning through the command line: what a run reads, says and leaves, and the inputs that it refuses."""

import json
import shutil

import pytest
import torch
import warm
from finetune_runs import WORDS, files, options, validation, write_words
from pretrain_runs import curve, lines, write_lmdb
from pretrain_runs import options as pretrain_options
from safetensors.torch import load_file

from lmim_fast import cli
from lmim_fast.config import RecognizerConfig
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import load_recognizer
from lmim_fast.train.export import load_model
from lmim_fast.train.recognizer_start import find_recognizer, recognizer_of, start_recognizer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "held", 11)


@pytest.fixture(scope="module")
def finished(data, held_out, tmp_path_factory):
    """A finished run with validation, an average of the weights, smoothing and drop path."""
    run = tmp_path_factory.mktemp("runs") / "one"
    more = ["--val", str(held_out), "--validate-every", "5", "--optim.ema-decay", "0.5"]
    more += ["--model.drop-path", "0.2", "--model.label-smoothing", "0.1"]
    assert cli.main(["finetune", *options(data, run, *more)]) == 0
    return run


def error_of(capsys, arguments, code=2):
    capsys.readouterr()
    assert cli.main(arguments) == code
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert len(captured.splitlines()) == 1
    return captured


def test_a_run_leaves_recogniser_best_validation_and_curve(finished):
    assert files(finished) >= {
        *("config.json", "metrics.jsonl", "validation.jsonl", "wrong_readings.json"),
        *("recognizer.safetensors", "best/recognizer.safetensors"),
    }
    assert "encoder.safetensors" not in files(finished)
    assert [line["step"] for line in validation(finished)] == [5, 10, 12]
    assert all(line["sets"]["held"]["images"] == 11 for line in validation(finished))
    losses = [line["loss"] for line in lines(finished)]
    assert losses[-1] < losses[0]
    config = json.loads((finished / "config.json").read_text())["config"]
    assert len(config["characters"]) == 94


def test_what_is_kept_is_the_average_of_the_weights(finished):
    kept = load_recognizer(finished / "recognizer.safetensors")
    trained, _ = load_model(finished)
    state = load_file(finished / "checkpoints" / "step-00000012" / "optimizer.safetensors")
    name = "decoder.classifier.weight"
    assert torch.equal(kept.state_dict()[name], state["average." + name])
    assert not torch.equal(kept.state_dict()[name], trained.state_dict()[name])


@pytest.mark.parametrize(
    "more", [[], ["--beam", "3"], ["--precision", "bf16"]], ids=["greedy", "beam", "bf16"]
)
def test_a_finished_run_is_evaluated(finished, held_out, tmp_path, more):
    arguments = ["evaluate", str(finished), str(held_out), "--output", str(tmp_path / "scores"), *more]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    (scores,) = json.loads((tmp_path / "scores" / "evaluation.json").read_text())["sets"]
    assert scores["images"] == 11
    best = max(validation(finished), key=lambda line: line["accuracy"])["sets"]["held"]
    if not more:
        assert scores["accuracy"] == pytest.approx(100 * best["accuracy"])
        assert scores["one_minus_ned"] == pytest.approx(100 * best["ned"])


def test_a_checkpoint_of_a_fine_tuning_stands_for_its_averaged_recogniser(
    finished, held_out, tmp_path, capsys
):
    run, last = tmp_path / "run", "step-00000012"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "best")
    checkpoint = run / "checkpoints" / last
    assert cli.main(["evaluate", str(checkpoint), str(held_out), "--device", "cpu"]) == 0
    assert f"read with {checkpoint}; its averaged weights\n" in capsys.readouterr().out
    assert (run / f"evaluation-{last}" / "evaluation.html").is_file()
    kept = load_recognizer(run / "recognizer.safetensors")

    def started_from(name):
        model = Recognizer(kept.config, kept.characters)
        lines = []
        start_recognizer(str(name), model, lines.append)
        state = kept.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return lines

    exported = f"recogniser starts from {run / 'recognizer.safetensors'} (of step 12)"
    assert started_from(run) == [exported]
    (run / "recognizer.safetensors").unlink()  # as of a run that is not finished
    said = [f"recogniser starts from {checkpoint} (its averaged weights)"]
    assert [started_from(run), started_from(checkpoint)] == [said, said]
    (run / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"")
    place = find_recognizer(str(run))
    assert place.path.name == "step-00000008"
    assert "the newest that is whole" in place.told()[1]


def test_a_sharded_checkpoint_of_a_fine_tuning_holds_its_recogniser(data, tmp_path):
    more = ["--checkpoint-layout", "sharded"]
    assert cli.main(["finetune", *options(data, tmp_path / "run", *more, steps=1)]) == 0
    place = find_recognizer(str(tmp_path / "run" / "checkpoints" / "step-00000001"))
    kept = load_recognizer(tmp_path / "run" / "recognizer.safetensors").state_dict()
    found = recognizer_of(place.checkpoint).state_dict()
    assert (place.checkpoint.path / "shards").is_dir()
    assert all(torch.equal(value, kept[name]) for name, value in found.items())


def test_the_same_command_on_a_finished_run_changes_nothing(finished, data, held_out):
    before = (finished / "metrics.jsonl").read_bytes(), (finished / "validation.jsonl").read_bytes()
    more = ["--val", str(held_out), "--validate-every", "5", "--optim.ema-decay", "0.5"]
    more += ["--model.drop-path", "0.2", "--model.label-smoothing", "0.1"]
    assert cli.main(["finetune", *options(data, finished, *more)]) == 0
    assert before == ((finished / "metrics.jsonl").read_bytes(), (finished / "validation.jsonl").read_bytes())


def test_two_ranks_train_and_validate_as_one(data, held_out, tmp_path):
    more = ["--val", str(held_out), "--model.dropout", "0", "--augment.kind", "none"]
    assert cli.main(["finetune", *options(data, tmp_path / "one", *more, steps=6)]) == 0
    warm.finish(["finetune", *options(data, tmp_path / "two", *more, steps=6)])
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = (validation(tmp_path / name)[-1]["sets"]["held"] for name in ("two", "one"))
    assert ours["images"] == theirs["images"] == 11


@pytest.mark.parametrize("recipe", ["lmim", "strong"])
def test_both_recipes_run_with_their_augmentation(data, tmp_path, recipe):
    assert cli.main(["finetune", "--recipe", recipe, *options(data, tmp_path / "run", steps=3)]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["augment"]["kind"] == {"lmim": "abinet", "strong": "parseq"}[recipe]


@pytest.mark.filterwarnings("ignore:.* some lack image or label:UserWarning")
def test_labels_that_do_not_fit_are_reported_before_training(tmp_path, capsys):
    words = [*WORDS, "toolongforthis", "naïve", "", None]
    data = write_words(tmp_path / "data", 28, words=words)
    assert cli.main(["finetune", *options(data, tmp_path / "run", steps=1)]) == 0
    said = capsys.readouterr().out
    for part in ("'toolongforthis': 14 characters, more than 7", "'naïve': read as 'naive'", "22 of 28"):
        assert part in said, said
    assert said.index("toolongforthis") < said.index("step 1/1")


def test_data_is_mixed_by_weights(data, tmp_path):
    other = write_words(tmp_path / "other", 5)
    arguments = options(data, tmp_path / "run", "--weights", "1", "3", steps=4)
    arguments[arguments.index("--data") + 1 : arguments.index("--data") + 2] = [str(data), str(other)]
    assert cli.main(["finetune", *arguments]) == 0


def test_a_broken_record_is_replaced_together_with_its_label(tmp_path):
    data = write_words(tmp_path / "data", 20, broken=(4,))
    assert cli.main(["finetune", *options(data, tmp_path / "run", steps=6)]) == 0
    assert lines(tmp_path / "run")[-1]["bad_records"] == 1
    assert "image-000000004" in (tmp_path / "run" / "bad_records.jsonl").read_text()


def test_a_pre_trained_run_is_where_it_starts(data, tmp_path, capsys):
    words = write_lmdb(tmp_path / "unlabelled", 12)
    model = ["--model.heads", "1", "--model.patch-size", "8", "--model.pos-grid", "true"]
    assert cli.main(["pretrain", *pretrain_options(words, tmp_path / "mae", *model, steps=2)]) == 0
    more = ["--init", str(tmp_path / "mae")]
    assert cli.main(["finetune", *options(data, tmp_path / "run", *more, steps=2)]) == 0
    assert f"encoder starts from {tmp_path / 'mae' / 'encoder.safetensors'}" in capsys.readouterr().out


def test_a_recogniser_with_other_characters_is_transplanted(finished, data, tmp_path, capsys):
    more = ["--init", str(finished), "--charset", "36"]
    assert cli.main(["finetune", *options(data, tmp_path / "run", *more, steps=1)]) == 0
    said = capsys.readouterr().out
    assert "36 of 36 kept" in said
    assert "characters that are no longer read: ABC" in said
    assert load_recognizer(tmp_path / "run" / "recognizer.safetensors").characters[:10] == "0123456789"


def test_a_finished_run_converts_to_the_released_layout_with_its_averaged_weights(finished, tmp_path, capsys):
    assert cli.main(["convert", str(finished), str(tmp_path / "released.pth")]) == 0
    told = capsys.readouterr().err
    assert f"step 12 of {finished}, its averaged weights\n" in told
    assert "--model.encoder.depth 1 instead of 12, " in told
    assert "characters" not in told
    state = torch.load(tmp_path / "released.pth", weights_only=True)["model"]
    kept = finished / "recognizer.safetensors"
    assert cli.main(["convert", str(kept), str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert {
        "pos_embed",
        "encoder.pos_embed",
        "patch_embed.proj.weight",
        "decoder.trg_word_emb.weight",
    } <= set(state)


def test_data_without_labels_and_a_validation_set_without_labels_are_refused(data, tmp_path, capsys):
    bare = write_lmdb(tmp_path / "bare", 5)
    error = error_of(capsys, ["finetune", *options(bare, tmp_path / "run")], code=1)
    assert f"none of 5 records has a label ({bare})" in error
    more = ["--val", str(bare)]
    error = error_of(capsys, ["finetune", *options(data, tmp_path / "run", *more)])
    assert f"--val {bare}: no record has a label" in error
    gone = str(tmp_path / "gone")
    error = error_of(capsys, ["finetune", *options(data, tmp_path / "run", "--val", gone)])
    assert f"--val {gone}: cannot be opened" in error


def test_another_character_set_in_the_same_folder_is_another_run(finished, data, capsys):
    told = error_of(capsys, ["finetune", *options(data, finished, "--charset", "36")])
    assert "is of another run" in told


def test_a_charset_file_that_is_not_there_and_an_unknown_recipe_are_one_line(data, tmp_path, capsys):
    told = error_of(capsys, ["finetune", *options(data, tmp_path / "run", "--charset", "gone.txt")])
    assert "gone.txt" in told
    assert "unknown recipe" in error_of(capsys, ["finetune", "--recipe", "best", "--data", "x"])


def test_a_released_recogniser_that_does_not_say_its_characters_is_refused(data, tmp_path, capsys):
    characters = "".join(map(chr, range(0x4E00, 0x4E80)))
    model = Recognizer(RecognizerConfig(classes=131, decoder_depth=1), characters)
    torch.save({"model": model.state_dict()}, tmp_path / "chinese.pth")
    arguments = options(data, tmp_path / "run", "--init", str(tmp_path / "chinese.pth"))
    assert "has 128 characters and does not say which" in error_of(capsys, ["finetune", *arguments], code=1)


def test_help_shows_the_numbers_of_the_recipe(capsys):
    assert cli.main(["finetune", "--recipe", "strong", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "one_cycle" in shown or "one-cycle" in shown
    assert "parseq" in shown


def test_r20_the_curve_of_a_seed_is_repeatable(finished, data, held_out, tmp_path):
    more = ["--val", str(held_out), "--validate-every", "5", "--optim.ema-decay", "0.5"]
    more += ["--model.drop-path", "0.2", "--model.label-smoothing", "0.1"]
    assert cli.main(["finetune", *options(data, tmp_path / "again", *more)]) == 0
    assert curve(tmp_path / "again") == curve(finished)
    assert validation(tmp_path / "again") == validation(finished)
