"""LMDB folders for tests, with the faults that users meet."""

import contextlib
import os

import lmdb


def image(number, name="crops"):
    return (
        f"{name} image {number} ".encode() * 200
    )  # does not fit in a leaf page: an overflow page, as crops have


def write_database(folder, count, *, claimed=None, labels=True, skip=(), extra=()):
    """An LMDB in the field's layout; `skip` leaves out keys, `extra` adds (key, value) pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(1, count + 1):
            transaction.put(b"image-%09d" % number, image(number, folder.name))
            if labels:
                transaction.put(b"label-%09d" % number, f"word {number}".encode())
        transaction.put(b"num-samples", str(count if claimed is None else claimed).encode())
        for key, value in extra:
            transaction.put(key, value)
        for key in skip:
            transaction.delete(key)
    return folder


@contextlib.contextmanager
def ordinary_user():
    """Permissions count inside: root may read everything."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
