"""Collections of crops on disk for the tests of imports, and what must come of them."""

import io
import json
import tarfile

import cv2
import lmdb
import numpy as np

from lmim_fast import cli


def pixels(number, height=16, width=48):
    """Smooth pixels with the number in them."""
    rng = np.random.default_rng(number)
    return cv2.resize(rng.integers(0, 256, (2, 4, 3), dtype=np.uint8), (width, height))


def encoded(number, height=16, width=48, suffix=".jpg"):
    return cv2.imencode(suffix, pixels(number, height, width))[1].tobytes()


def crops(count, start=0):
    """Name, image and label of `count` crops of varied formats, none of them vertical."""
    for number in range(start, start + count):
        suffix = (".jpg", ".png", ".bmp")[number % 3]
        yield f"img{number}{suffix}", encoded(number, suffix=suffix), f"wörd {number}"


def write_folder(folder, count):
    """Images in sub-folders; their names, images and labels in natural order."""
    made = []
    for name, image, label in crops(count):
        path = folder / f"part{len(made) // 10}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        made.append((f"{path.parent.name}/{name}", image, label))
    return made


def write_source(kind, folder, count):
    """A source of each format in `folder`; its path, and the records that must come of it."""
    made = write_folder(folder, count)
    records = [(image, label) for _, image, label in made]
    if kind == "folder":
        return folder, [(image, None) for image, _ in records]
    if kind == "tsv":
        text = "".join(f"{name}\t{label}\n" for name, _, label in made)
    elif kind == "csv":
        text = "id,path,label\n" + "".join(f'1,"{name}","{label}"\n' for name, _, label in made)
    elif kind == "json":
        entries = [{"img_path": name, "instances": [{"text": label}]} for name, _, label in made]
        text = json.dumps({"metainfo": {"task_name": "textrecog"}, "data_list": entries}, indent=1)
    elif kind == "jsonl":
        text = "".join(json.dumps({"filename": name, "text": label}) + "\n" for name, _, label in made)
    elif kind == "paddleocr":
        text = "".join(f"{name}\t{label}\n" for name, _, label in made)
    elif kind in ("tar", "tar.gz"):
        path = folder / f"list.{kind}"
        write_tar(
            path,
            [
                member
                for name, image, label in made
                for member in ((name, image), (name[:-4] + ".txt", label.encode()))
            ],
        )
        return path, records
    path = folder / {"paddleocr": "list.txt"}.get(kind, f"list.{kind}")
    path.write_text(text, "utf-8")
    return path, records


SOURCES = ("folder", "tsv", "csv", "json", "jsonl", "paddleocr", "tar", "tar.gz")


def write_tar(path, members):
    """A tar of (name, content) pairs; a TarInfo is added as it is."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            information = tarfile.TarInfo(member[0])
            information.size = len(member[1])
            tar.addfile(information, io.BytesIO(member[1]))


def imported(capsys, *arguments):
    """What the command prints; it must succeed."""
    assert cli.main(["data", "import", *map(str, arguments)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def refused(capsys, *arguments, code=2):
    """The one line of an error."""
    assert cli.main(["data", *map(str, arguments)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def content(folder):
    """Every key and value of an LMDB."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


def records(folder):
    """Images and labels, in order; no other key than theirs and `num-samples` may be there."""
    found = content(folder)
    count = int(found.pop(b"num-samples"))
    made = [
        (found.pop(b"image-%09d" % number), found.pop(b"label-%09d" % number, None))
        for number in range(1, count + 1)
    ]
    assert found == {}
    return [(image, None if label is None else label.decode()) for image, label in made]


def rejects(folder):
    """(where, reason) of each reject."""
    lines = (folder / "rejects.tsv").read_text("utf-8").splitlines()
    assert lines[0] == "where\treason\tdetail"
    return [tuple(line.split("\t")[:2]) for line in lines[1:]]
