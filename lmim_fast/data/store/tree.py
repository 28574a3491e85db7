"""LMDBs in a tree of folders, and what was passed over on the way."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field

from lmim_fast.errors import DataError

_FILES = (".lmdb", ".mdb")  # of databases without a folder of their own
_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")
_SHOWN = 3  # names of a kind in a warning
# A folder that may not be listed, or is gone since its name was read. When a disk fails, nothing goes on.
_PASSABLE = (errno.EACCES, errno.EPERM, errno.ENOENT)


def data_file(path: str) -> str:
    """The file of a database that is named by its folder, or by itself."""
    return path if os.path.isfile(path) else os.path.join(path, "data.mdb")


@dataclass
class Tree:
    """Databases at or under a path: folders with a `data.mdb`, and single files."""

    root: str
    databases: list[str] = field(default_factory=list)
    """Sorted paths."""
    hidden: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    only_labels: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What was passed over, a line a reason."""
        reasons = (
            (self.hidden, "hidden (a name with a dot in front); give it as a path of its own to read it"),
            (self.closed, "not readable by this user; change its permissions if it holds data"),
            (self.dangling, "a link that leads nowhere; mend it if it should lead to data"),
            (self.strange, "named like an LMDB file without being one; copy it again if it should be"),
            (self.beside, "an LMDB file beside a data.mdb; give it as a path of its own to read it"),
            (self.only_labels, "an LMDB of labels without images; records need both in one database"),
            (self.again, "another name of a database that is read already; it counts once"),
        )
        return [f"{len(names)} passed over: {self._names(names)}: {why}" for names, why in reasons if names]

    def _names(self, paths: list[str]) -> str:
        names = [repr(os.path.relpath(path, self.root))[1:-1] for path in sorted(paths)]  # escapes
        return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def search(root: str) -> Tree:
    """All databases at or under an absolute path. Links are followed, a folder is entered once.

    Raises:
        DataError: the path itself cannot be read or is no database, a link `data.mdb` leads nowhere, or a
            disk fails.
    """
    tree = Tree(root)
    try:
        mode = os.stat(root).st_mode
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror}); check the data path") from error
    if stat.S_ISDIR(mode):
        _walk(tree)
    elif os.path.basename(root) == "data.mdb":
        tree.databases.append(os.path.dirname(root))
    elif stat.S_ISREG(mode) and (root.endswith(_FILES) or _is_lmdb(root)):
        tree.databases.append(root)
    else:
        raise DataError(
            f"{root}: not a folder, and not an LMDB file; give the folder that holds data.mdb, or the LMDB's"
            " file"
        )
    tree.databases.sort()
    return tree


def _walk(tree: Tree) -> None:
    entered: set[tuple[int, int]] = set()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(tree.root, ())]
    twice: list[str] = []
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if folder == tree.root or error.errno not in _PASSABLE:
                raise DataError(
                    f"{folder}: cannot be listed ({error.strerror}); check its permissions and its disk"
                ) from error
            tree.closed.append(folder)
            continue
        identity = status.st_dev, status.st_ino
        if identity in entered:
            if identity not in above:  # else a link to a folder that it lies in
                twice.append(folder)
            continue
        entered.add(identity)
        children = _look_at(tree, folder, entries)
        waiting += [(child, (*above, identity)) for child in reversed(children)]
    real = [os.path.realpath(path) for path in tree.databases] if twice else []
    for folder in twice:
        inside = os.path.realpath(folder)
        if any(path == inside or path.startswith(inside + os.sep) for path in real):
            tree.again.append(folder)


def _look_at(tree: Tree, folder: str, entries: list[os.DirEntry[str]]) -> list[str]:
    """Note what a folder holds; the folders in it that are entered."""
    children, files = [], []
    for entry in entries:
        try:
            is_folder = entry.is_dir()
            nowhere = not is_folder and entry.is_symlink() and not os.path.exists(entry.path)
        except OSError:  # links in a circle
            is_folder, nowhere = False, True
        named_like_one = entry.name.endswith(_FILES)
        if nowhere and entry.name == "data.mdb":
            raise DataError(
                f"{entry.path}: a link to {os.readlink(entry.path)}, which is not there or not readable; mend"
                " the link or remove it"
            )
        if entry.name.startswith("."):
            if is_folder or (named_like_one and not entry.name.startswith("._")):  # "._": kept by macOS
                tree.hidden.append(entry.path)
        elif nowhere:
            tree.dangling.append(entry.path)
        elif is_folder:
            children.append(entry.path)
        elif named_like_one and entry.name != "lock.mdb" and entry.is_file():
            files.append(entry)
    has_folder_file = any(entry.name == "data.mdb" for entry in files)
    if has_folder_file:
        tree.databases.append(folder)
    for entry in files:
        if entry.name == "data.mdb":
            continue
        if not _is_lmdb(entry.path):
            tree.strange.append(entry.path)
        elif has_folder_file:
            tree.beside.append(entry.path)
        else:
            tree.databases.append(entry.path)
    return children


def _is_lmdb(file: str) -> bool:
    """Whether the first page is an LMDB's; also True if it cannot be read, which opening it then tells."""
    try:
        with open(file, "rb") as opened:
            return opened.read(20)[16:] == _MAGIC
    except OSError:
        return True
