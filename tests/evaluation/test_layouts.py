from dataclasses import replace

import pytest
from evaluation_sets import write_set

from lmim_fast.data.normalize import chinese, waics
from lmim_fast.errors import UsageError
from lmim_fast.evaluation.layouts import find_test_sets


def folders(root, *names):
    for name in names:
        write_set(root / name, 2)
    return str(root)


def datasets(sets):
    return {entry.name: (entry.benchmark, entry.dataset) for entry in sets}


def test_the_six_benchmarks_are_recognised_by_the_names_they_go_by(tmp_path):
    names = ("IIIT5K_3000", "IC13_1015", "SVT", "icdar-2015", "SVTP_645", "CUTE80", "SVT_train")
    assert datasets(find_test_sets([folders(tmp_path, *names)])) == {
        "IIIT5K_3000": ("six", "IIIT5K"),
        "IC13_1015": ("six", "IC13"),
        "SVT": ("six", "SVT"),
        "icdar-2015": ("six", "IC15"),
        "SVTP_645": ("six", "SVTP"),
        "CUTE80": ("six", "CUTE80"),
        "SVT_train": ("plain", None),
    }


def test_everyday_names_need_the_benchmark_s_name_or_a_second_set(tmp_path):
    folders(tmp_path, "a/general", "b/curve", "b/multi_oriented", "u14m/salient", "chinese/scene/test", "web")
    alone = find_test_sets([str(tmp_path / "a/general")])
    assert datasets(alone) == {"general": ("plain", None)}
    two = find_test_sets([str(tmp_path / "b")])
    assert datasets(two) == {"curve": ("union14m", "curve"), "multi_oriented": ("union14m", "multi_oriented")}
    parent = find_test_sets([str(tmp_path / "u14m/salient"), str(tmp_path / "chinese/scene/test")])
    assert datasets(parent) == {"salient": ("union14m", "salient"), "scene/test": ("chinese", "scene")}
    assert [entry.normalize for entry in parent] == [waics, chinese]


def test_a_given_layout_places_every_set_or_says_which_it_does_not_know(tmp_path):
    folders(tmp_path, "web", "mine")
    chosen = find_test_sets([str(tmp_path)], "chinese")
    assert datasets(chosen) == {"web": ("chinese", "web"), "mine": ("chinese", None)}
    assert {entry.normalize for entry in chosen} == {chinese}
    with pytest.raises(UsageError, match=r"'mine' is no set of --layout six \(IIIT5K, .*; name it NAME="):
        find_test_sets([str(tmp_path / "mine")], "six")
    (named,) = find_test_sets([f"IC15={tmp_path / 'mine'}"], "six")
    assert (named.dataset, named.path) == ("IC15", tmp_path / "mine")
    assert datasets(find_test_sets([folders(tmp_path / "p", "SVT")], "plain")) == {"SVT": ("plain", None)}


def test_a_named_folder_is_one_set_and_a_tree_one_set_for_each_database(tmp_path):
    root = folders(tmp_path, "x/one", "x/two")
    assert [entry.name for entry in find_test_sets([root])] == ["x/one", "x/two"]
    assert [entry.name for entry in find_test_sets([f"both={root}"])] == ["both"]
    with pytest.raises(UsageError, match=r"two test sets are called 'one'"):
        find_test_sets([f"one={root}/x/one", f"one={root}/x/two"])


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    (entry,) = find_test_sets([folders(tmp_path, "lr=3") + "/lr=3"])
    assert entry.name == "lr=3"


@pytest.mark.parametrize(
    ("name", "count", "split"),
    [
        ("IC13", 857, "IC13-857"),
        ("IC13", 1015, "IC13-1015"),
        ("IC15", 1811, "IC15-1811"),
        ("IC15", 2000, "IC15, not a known split (has 2000 images, not 2077 or 1811)"),
        ("own", 9, ""),
    ],
)
def test_the_split_is_read_from_the_number_of_records(name, count, split, tmp_path):
    (entry,) = find_test_sets([f"{name}={folders(tmp_path, 'data')}"])
    assert entry.split(count) == split


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "cannot be opened (No such file or directory)"),
        ("empty", "no LMDB here"),
        ("=x", "is not NAME=FOLDER"),
        ("x=", "is not NAME=FOLDER"),
        ("x=missing", "cannot be opened"),
    ],
)
def test_a_path_without_a_test_set_is_refused(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as error:
        find_test_sets([path])
    assert message in str(error.value)


def test_the_real_test_sets_are_known_splits(real_crops):
    from lmim_fast.data.store.records import RecordStore

    sets = find_test_sets([str(real_crops / "test")])
    splits = {entry.split(len(RecordStore([entry.path]))) for entry in sets}
    assert splits == {"IC13-1015", "IC15-2077", "IIIT5K-3000", "SVT-647"}


def test_sets_of_no_benchmark_are_compared_by_the_models_characters(tmp_path):
    write_set(tmp_path / "mine", 2)
    write_set(tmp_path / "IIIT5K", 2)
    plain, six = sorted(find_test_sets([str(tmp_path)]), key=lambda entry: entry.name.lower(), reverse=True)
    assert (plain.name, six.name) == ("mine", "IIIT5K")
    assert replace(plain, characters="0aZ!").normalize is waics
    assert replace(plain, characters="0a中").normalize is chinese, "two Chinese texts would all be equal"
    assert replace(six, characters="0a中").normalize is waics
