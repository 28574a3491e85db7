"""Files that are whole or absent: links at their names, other writers, disks that refuse."""

import errno
import os
import shutil

import pytest

from lmim_fast import durable


@pytest.fixture(autouse=True)
def _forget_warnings():
    durable._told.clear()


def refuse(monkeypatch, name, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


def test_a_link_at_the_temporary_name_is_removed_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for plant in (os.symlink, os.link):
        plant(victim, tmp_path / "out.json.tmp")
        durable.write_file(tmp_path / "out.json", b"content")
        assert victim.read_bytes() == b"precious"
        assert (tmp_path / "out.json").read_bytes() == b"content"
    os.symlink(tmp_path / "nowhere", tmp_path / "out.json.tmp")
    durable.write_file(tmp_path / "out.json", b"new")
    assert sorted(os.listdir(tmp_path)) == ["out.json", "victim"]


def test_a_link_at_the_final_name_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    os.symlink(tmp_path / "victim", tmp_path / "out.json")
    durable.write_file(tmp_path / "out.json", b"content")
    assert not (tmp_path / "out.json").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    durable.write_file(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    for name in ("out.json", "out.json.tmp"):
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError):
            durable.write_file(tmp_path / "out.json", b"content")
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).rmdir()


def test_what_a_second_writer_has_begun_is_not_published_by_the_first(tmp_path):
    path = tmp_path / "out.json"
    first = durable.writing(path)
    first.__enter__().write(b"first")
    durable.create(durable.temporary_name(path)).close()
    with pytest.raises(FileExistsError, match="another process writes it"):
        first.__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["out.json.tmp"]  # of the second


def test_a_failed_block_leaves_the_older_file(tmp_path):
    durable.write_file(tmp_path / "out.json", b"old")
    block = durable.writing(tmp_path / "out.json")
    block.__enter__().write(b"half")
    assert block.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert (tmp_path / "out.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_flush_is_warned_of_once(tmp_path, monkeypatch, number):
    refuse(monkeypatch, "fsync", number)
    with pytest.warns(UserWarning, match=r"cannot flush \(.*new files may be lost"):
        durable.write_file(tmp_path / "a", b"content")
    durable.flush_folder(tmp_path)  # a second warning would be an error
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_disk_that_fails_to_flush_is_an_error(tmp_path, monkeypatch, number):
    durable.write_file(tmp_path / "a", b"old")
    refuse(monkeypatch, "fsync", number)
    for write in (lambda: durable.write_file(tmp_path / "a", b"new"), lambda: durable.flush_folder(tmp_path)):
        with pytest.raises(OSError, match=os.strerror(number)):
            write()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    os.symlink(tmp_path / "folder", tmp_path / "link")
    durable.remove(tmp_path / "link")
    assert os.listdir(tmp_path / "folder") == ["file"]
    durable.remove(tmp_path / "folder")
    durable.remove(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_free_space_that_the_file_system_does_not_tell_is_unknown(tmp_path, monkeypatch):
    assert durable.free_bytes(tmp_path) > 0
    assert durable.free_bytes(tmp_path / "gone") is None
    nothing = type(shutil.disk_usage(tmp_path))(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    assert durable.free_bytes(tmp_path) is None
