import dataclasses
from pathlib import Path

import pytest

from lmim_fast.config import DataConfig, FinetuneConfig, ModelConfig, OptimConfig, PretrainConfig
from lmim_fast.config.io import to_dict
from lmim_fast.errors import UsageError
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.checkpoint.resume import check_same_run, differences

CONFIG = PretrainConfig(data=("a", "b"), steps=10)
DATA = {"count": 5, "databases": [{"name": "a", "count": 3}, {"name": "b", "count": 2}]}
SAVED = Checkpoint(Path("run/checkpoints/step-00000004"), {"config": to_dict(CONFIG), "data": DATA}, {}, {})


def changed(**values):
    return dataclasses.replace(CONFIG, **values)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (changed(seed=1), "seed was 0, now 1"),
        (changed(compile=True), "compile was False, now True"),
        (changed(precision="fp32"), "precision was 'auto', now 'fp32'"),
        (changed(model=ModelConfig(gelu_epilogue="on")), r"model\.gelu_epilogue was 'auto', now 'on'"),
        (changed(optim=OptimConfig(betas=(0.9, 0.99))), r"optim\.betas\[1\] was 0.95, now 0.99"),
        (changed(loader=DataConfig(max_pixels=9)), r"loader\.max_pixels was"),
        (changed(loader=DataConfig(device="cpu")), r"loader\.device was 'auto', now 'cpu'"),
    ],
)
def test_r14_a_changed_setting_is_refused_by_name_with_both_values(config, field):
    with pytest.raises(UsageError, match=field):
        check_same_run(SAVED, config, DATA)


def test_r14_changed_data_is_refused_and_says_which_database():
    data = {"count": 6, "databases": [{"name": "a", "count": 3}, {"name": "b", "count": 3}]}
    with pytest.raises(UsageError, match=r"data\.databases\[1\]\.count was 2, now 3"):
        check_same_run(SAVED, CONFIG, data)


def test_the_same_records_in_renamed_folders_are_the_same_data():
    renamed = {"count": 5, "databases": [{"name": "x", "count": 3}, {"name": "y", "count": 2}]}
    check_same_run(SAVED, CONFIG, renamed)


def test_settings_that_move_no_number_may_change():
    config = changed(
        data=("/moved/a", "/moved/b"),
        output="elsewhere",
        teacher="other/spelling.pth",
        init="other/spelling.pth",
        device="cpu",
        accumulation=2,
        parallel="shard",
        shard_size=2,
        reshard=True,
        activation_checkpointing=True,
        cuda_graph="off",
        keep_every=100,
        checkpoint_layout="sharded",
        max_time=1.0,
        timeout=60.0,
        eval_data=("held out",),
        eval_every=5,
        eval_images=64,
        profile=5,
        wandb="project",
        checkpoint_every=7,
        keep_checkpoints=9,
        log_every=3,
        loader=DataConfig(threads=3, prefetch=5, max_bad_fraction=0.5),
    )
    check_same_run(SAVED, config, DATA)
    check_same_run(SAVED, changed(data=("all",)), DATA)


def test_a_checkpoint_older_than_a_field_counts_as_its_default():
    state = to_dict(CONFIG)
    del state["compile"], state["cuda_graph"], state["model"]["gelu_epilogue"]
    older = dataclasses.replace(SAVED, state={"config": state, "data": DATA})
    check_same_run(older, CONFIG, DATA)
    with pytest.raises(UsageError, match="compile was False, now True"):
        check_same_run(older, changed(compile=True), DATA)
    with pytest.raises(UsageError, match=r"model\.gelu_epilogue was 'auto', now 'off'"):
        check_same_run(older, changed(model=ModelConfig(gelu_epilogue="off")), DATA)


def test_differences_name_the_place_of_added_and_removed_values():
    old, new = {"a": [1, {"b": 2}], "gone": 0}, {"a": [1, {"b": 3}], "new": 4}
    assert list(differences(old, new, "x")) == [("x.a[1].b", 2, 3), ("x.gone", 0, None), ("x.new", None, 4)]


def fingerprinted(hash_, images=None, targets=None):
    """A fingerprint of one database; without `images` and `targets`, as older versions made it."""
    database = {"name": "words", "count": 5, "has_labels": True, "hash": hash_}
    data = {"count": 5, "databases": [database | ({"images": images} if images else {})]}
    return data | {"labels": {"kept": 5, **({"targets": targets} if targets else {})}}


@pytest.mark.parametrize(
    ("saved", "now", "pretrain", "finetune"),
    [
        (("h", "i", "t"), ("h", "i", "t"), None, None),
        (("h", "i", "t"), ("H", "i", "t"), None, "the records of words are not those"),
        (("h", "i", "t"), ("h", "i", "T"), None, r"data\.labels\.targets was 't', now 'T'"),
        (("h", "i", "t"), ("H", "I", "t"), "the images of words are not those", "the records of words"),
        (("h",), ("h", "i", "t"), None, None),
        (("h",), ("H", "i", "t"), "the records of words are not those", "the records of words"),
    ],
)
def test_r14_a_changed_label_is_other_data_for_fine_tuning_alone_and_older_fingerprints_are_known(
    saved, now, pretrain, finetune
):
    for kind, refused in ((PretrainConfig, pretrain), (FinetuneConfig, finetune)):
        config = kind(data=("words",), steps=10)
        was, there = fingerprinted(*saved), fingerprinted(*now)
        if kind is PretrainConfig:
            del was["labels"], there["labels"]
        state = {"config": to_dict(config), "data": was}
        checkpoint = Checkpoint(Path("run/checkpoints/step-00000004"), state, {}, {})
        if refused is None:
            check_same_run(checkpoint, config, there)
        else:
            with pytest.raises(UsageError, match=refused):
                check_same_run(checkpoint, config, there)
