"""No source makes an import read outside of its folder, wait for ever, crash or take all memory."""

import os
import tarfile
import tempfile
import threading

import pytest
from import_sources import encoded, imported, records, refused, rejects, write_folder, write_tar

from lmim_fast.data.importers import archive, paths, prepare
from lmim_fast.data.importers.entries import Refused
from lmim_fast.data.importers.paths import Root
from lmim_fast.data.store.resumable import ResumableWriter

IMAGE = encoded(1)


@pytest.fixture
def source(tmp_path):
    """A folder with one image; the folder above it has another one, that must stay unread."""
    (tmp_path / "secret.jpg").write_bytes(encoded(2))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "b.jpg").write_bytes(encoded(3))
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(IMAGE)
    return folder


def test_paths_of_a_list_stay_in_its_folder(source, capsys, tmp_path):
    os.symlink(tmp_path / "secret.jpg", source / "link.jpg")
    os.symlink("../secrets", source / "away")
    os.symlink("sub/a.jpg", source / "inside.jpg")
    os.symlink("sub", source / "near")
    os.symlink("loop.jpg", source / "loop.jpg")
    names = {
        "../secret.jpg": "path with ..",
        "sub/../../secret.jpg": "path with ..",
        "sub/../sub/a.jpg": "path with ..",
        str(tmp_path / "secret.jpg"): "absolute path",
        str(source / "sub" / "a.jpg"): "absolute path",
        "link.jpg": "link out of the folder",
        "away/b.jpg": "link out of the folder",
        "loop.jpg": "link to itself",
        "sub/a.jpg/x": "no such file",
        "x" * 300: "no such file",
        "sub": "not a regular file",
        ".": "not a regular file",
    }
    good = ["./sub/a.jpg", "sub//a.jpg", "inside.jpg", "near/a.jpg"]
    (source / "list.tsv").write_text("".join(f"{name}\tx\n" for name in [*names, *good]))
    imported(capsys, source / "list.tsv", "--output", tmp_path / "out", "--workers", 1)
    assert records(tmp_path / "out") == [(IMAGE, "x")] * len(good)
    reasons = list(names.values())
    assert [reason for _, reason in rejects(tmp_path / "out")] == reasons


def test_a_folder_that_becomes_a_link_to_the_outside_in_between_is_refused(source, tmp_path):
    root = Root(str(source))
    assert root.read("sub/a.jpg") == IMAGE
    (source / "sub").rename(source / "old")
    os.symlink(tmp_path / "secrets", source / "sub")
    with pytest.raises(Refused, match="link out of the folder"):
        root.read("sub/b.jpg")


def test_a_root_that_is_a_link_itself_is_followed(source, capsys, tmp_path):
    os.symlink(source, tmp_path / "latest")
    imported(capsys, tmp_path / "latest", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(IMAGE, None)]


def test_links_in_a_folder_lead_to_files_inside_or_nowhere(source, capsys, tmp_path):
    os.symlink("../secret.jpg", source / "1out.jpg")
    os.symlink("sub/a.jpg", source / "2in.jpg")
    os.symlink("../secrets", source / "3folder")
    os.symlink(".", source / "4circle")
    os.symlink("gone.jpg", source / "5gone.jpg")
    os.mkfifo(source / "6pipe.jpg")
    imported(capsys, source, "--output", tmp_path / "out", "--workers", 1)
    assert records(tmp_path / "out") == [(IMAGE, None)] * 2
    assert rejects(tmp_path / "out") == [
        (str(source / "1out.jpg"), "link out of the folder"),
        (str(source / "3folder"), "link to a folder"),
        (str(source / "4circle"), "link to a folder"),
        (str(source / "5gone.jpg"), "no such file"),
        (str(source / "6pipe.jpg"), "not a regular file"),
    ]


def test_names_that_are_no_text_are_read_but_are_no_labels(source, capsys, tmp_path):
    with open(os.fsencode(source) + b"/\xff\x1b.jpg", "wb") as file:
        file.write(IMAGE)
    imported(capsys, source, "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(IMAGE, None)] * 2
    said = imported(capsys, source, "--label-from", "name", "--output", tmp_path / "labels")
    assert records(tmp_path / "labels") == [(IMAGE, "a")]
    assert rejects(tmp_path / "labels") == [(f"{source}/\\udcff\\x1b.jpg", "not UTF-8")]
    assert "1 not UTF-8" in said


def test_members_of_a_tar_with_any_name_are_read_and_nothing_is_unpacked(source, capsys, tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.jpg"
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    names = ["../../up.jpg", "/etc/absolute.jpg", "sub/\x1b[2J.jpg"]
    write_tar(tmp_path / "bad.tar", [link, device, folder, *[(name, IMAGE) for name in names]])
    before = sorted(tmp_path.rglob("*"))
    said = imported(capsys, tmp_path / "bad.tar", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(IMAGE, None)] * 3
    assert rejects(tmp_path / "out") == [
        (f"{tmp_path}/bad.tar: link.jpg", "not a regular file"),
        (f"{tmp_path}/bad.tar: device.jpg", "not a regular file"),
    ]
    assert "\x1b" not in said
    left = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)}
    assert sorted(left) == before


def test_large_files_are_refused_before_they_are_read(source, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MAX_FILE_BYTES", 5000)
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 5000)
    with open(source / "huge.jpg", "wb") as file:
        file.truncate(2**40)  # a hole: a read of it would never end
    imported(capsys, source, "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(IMAGE, None)]
    assert [reason for _, reason in rejects(tmp_path / "out")] == ["file too large"]
    write_tar(tmp_path / "x.tar", [("a.jpg", IMAGE), ("b.jpg", bytes(6000)), ("c.jpg", IMAGE)])
    imported(capsys, tmp_path / "x.tar", "--output", tmp_path / "tar")
    assert records(tmp_path / "tar") == [(IMAGE, None)] * 2
    assert [reason for _, reason in rejects(tmp_path / "tar")] == ["file too large"]


def test_a_header_of_a_tar_that_claims_a_huge_size_is_no_read_of_it(tmp_path, capsys):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**40
    image = tarfile.TarInfo("a.jpg")
    image.size = len(IMAGE)
    data = image.tobuf() + IMAGE + bytes(-len(IMAGE) % 512) + header.tobuf()
    (tmp_path / "x.tar").write_bytes(data + bytes(1024))
    error = refused(capsys, "import", tmp_path / "x.tar", "--output", tmp_path / "out", code=1)
    assert "1 damaged archive" in error


def test_an_image_that_claims_too_many_pixels_is_never_decoded(tmp_path, capsys):
    made = write_folder(tmp_path / "in", 1)
    bomb = bytearray(encoded(1, height=90, width=30, suffix=".png"))  # vertical: it would be turned
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    (tmp_path / "in" / "bomb.png").write_bytes(bomb)
    imported(capsys, tmp_path / "in", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(made[0][1], None)]
    assert [reason for _, reason in rejects(tmp_path / "out")] == ["too large"]


def test_a_file_without_permission_is_rejected():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with open(f"{folder}/a.jpg", "wb") as file:
            os.fchmod(file.fileno(), 0)
        try:
            if user == 0:
                os.seteuid(65534)  # root may read anything
            with pytest.raises(Refused, match="no permission"):
                Root(folder).read("a.jpg")
        finally:
            os.seteuid(user)


def test_no_file_stays_open(source):
    root = Root(str(source))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        root.read("sub/a.jpg")
        with pytest.raises(Refused):
            root.read("sub")
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_images_are_held_in_memory_a_few_at_a_time_and_keep_their_order(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    made = [encoded(number, suffix=".jpg") for number in range(40)]  # small ones first
    made += [encoded(number, 300, 400, ".bmp") for number in range(100)]  # 360 KB each
    for number, image in enumerate(made):
        (folder / f"{number}.jpg").write_bytes(image)
    held, most, lock = 0, 0, threading.Lock()
    read, put = Root.read, ResumableWriter.put

    def reading(root, name):
        nonlocal held, most
        content = read(root, name)
        with lock:
            held += len(content)
            most = max(most, held)
        return content

    def putting(writer, image, label):
        nonlocal held
        put(writer, image, label)
        with lock:
            held -= len(image)

    monkeypatch.setattr(Root, "read", reading)
    monkeypatch.setattr(ResumableWriter, "put", putting)
    monkeypatch.setattr(prepare, "BYTES_AT_ONCE", 2**20)  # of a task; the tasks are made for more
    imported(capsys, folder, "--output", tmp_path / "out", "--workers", 1)
    assert records(tmp_path / "out") == [(image, None) for image in made]
    assert held == 0
    assert most < 3 * (2**20 + len(made[-1]))  # two tasks, and what one gave is being written
