"""The skip list: records that training never reads. `lmim data verify` writes it, people may edit it.

A line is DATABASE, KEY and REASON with tabs between. DATABASE is NAME@HASH, the folder's own name and the
database's hash in a run's fingerprint: so a list stays right when folders move, and two databases of one name
are two. The hash decides; the name does only between databases of equal hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmim_fast.data.store.databases import image_key
from lmim_fast.data.store.records import Records
from lmim_fast.errors import UsageError

_HEADER = """\
# Records that training never reads: DATABASE <tab> KEY <tab> REASON.
# DATABASE is the folder's name, @ and the hash of its contents. Lines may be deleted and added.
# Use it with: lmim pretrain --loader.skip FILE (or lmim finetune).
"""
_DATABASE = re.compile(r"(?P<name>.+)@(?P<hash>[0-9a-f]{32})")
_KEY = re.compile(r"image-(\d{9,})")
_SHOWN = 80  # characters of a line in a message


class Skipped(NamedTuple):
    """One line."""

    line: int
    """Its number in the file, from 1."""
    name: str
    """Of the database, as `database_name` writes it."""
    hash: str
    number: int
    """Of the record in its database, from 1."""
    reason: str

    @property
    def database(self) -> str:
        """As the file has it."""
        return f"{self.name}@{self.hash}"


@dataclass(frozen=True)
class SkipList:
    """The lines of a skip list."""

    path: str
    lines: tuple[Skipped, ...]

    @classmethod
    def read(cls, path: str | Path) -> SkipList:
        """Read a file: UTF-8, comments and empty lines allowed, spaces or tabs between the fields.

        Raises:
            UsageError: it cannot be read, or a line of it is no record; names the line.
        """
        try:
            text = Path(path).read_text("utf-8-sig")
        except OSError as error:
            raise UsageError(f"skip list {path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UsageError(
                f"skip list {path}: byte {error.start} is not UTF-8; write it with `lmim data verify`"
            ) from error
        lines = []
        for number, line in enumerate(text.split("\n"), 1):
            fields = line.split(None, 2)
            if fields and not fields[0].startswith("#"):
                lines.append(_parsed(path, number, fields))
        return cls(str(path), tuple(lines))

    def reasons(self, store: Records) -> dict[int, str]:
        """The listed records of a store, index -> reason; lines of other databases are passed over.

        Raises:
            UsageError: a line's record is not in its database, or the database is twice in the store.
        """
        databases = store.fingerprint()["databases"]
        by_database: dict[int, list[Skipped]] = {}
        places: dict[tuple[str, str], int | None] = {}
        for line in self.lines:
            named = line.name, line.hash
            if named not in places:
                places[named] = self._place(line, databases)
            place = places[named]
            if place is not None:
                first = store.databases[place].first_number
                if not first <= line.number < first + databases[place]["count"]:
                    raise UsageError(
                        f"skip list {self.path}, line {line.line}: {line.database} has"
                        f" {databases[place]['count']} records, not {image_key(line.number).decode()}"
                    )
                by_database.setdefault(place, []).append(line)
        reasons: dict[int, str] = {}
        for place, lines in by_database.items():
            indices = store.indices_of(place, [line.number for line in lines])
            reasons |= {i: line.reason for i, line in zip(indices, lines, strict=True) if i is not None}
        return reasons

    def check(self, stores: Sequence[Records]) -> None:
        """Refuse a list with a line of another database than those of `stores`.

        Raises:
            UsageError: names the first such line and the databases that there are.
        """
        there = [database for store in stores for database in store.fingerprint()["databases"]]
        known = {database["hash"] for database in there}
        strange = [line for line in self.lines if line.hash not in known]
        if strange:
            names = [database_name(database["name"], database["hash"]) for database in there[:5]]
            more = f", {len(there) - 5} more" if len(there) > 5 else ""
            others = f" (and {len(strange) - 1} other lines)" if len(strange) > 1 else ""
            raise UsageError(
                f"skip list {self.path}, line {strange[0].line}: no database of this run is"
                f" {strange[0].database}{others}; there are {', '.join(names)}{more}."
                " Delete the lines, or run `lmim data verify` again if the data was changed"
            )

    def digest(self) -> str:
        """Sixteen hex digits, different for lists of different records."""
        records = sorted({(line.hash, line.name, line.number) for line in self.lines})
        return hashlib.blake2b(repr(records).encode(), digest_size=8).hexdigest()

    def _place(self, line: Skipped, databases: Sequence[dict[str, Any]]) -> int | None:
        """The database of a line among a store's, None if it is not one of them."""
        same = [place for place, database in enumerate(databases) if database["hash"] == line.hash]
        if len(same) > 1:  # copies
            same = [place for place in same if escaped(databases[place]["name"]) == line.name] or same
        if len(same) > 1:
            raise UsageError(
                f"skip list {self.path}, line {line.line}: {len(same)} databases of this run are"
                f" {line.database}; they are copies: drop one, or give it another name and write that in its"
                " lines"
            )
        return same[0] if same else None


def skip_list_text(records: Iterable[tuple[str, str, str, str]]) -> str:
    """The file of (name, hash, key, reason) of records."""
    lines = [f"{database_name(name, hash_)}\t{key}\t{reason}\n" for name, hash_, key, reason in records]
    return _HEADER + "".join(lines)


def database_name(name: str, hash_: str) -> str:
    """How a database is called in a list."""
    return f"{escaped(name)}@{hash_}"


def escaped(name: str) -> str:
    """A file name as one printable word: white space, what is not printable, % and # become %XX."""
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape")) if _is_special(c) else c
        for c in name
    )


def _is_special(character: str) -> bool:
    return character.isspace() or character in "%#" or not character.isprintable()


def _parsed(path: str | Path, number: int, fields: Sequence[str]) -> Skipped:
    database = _DATABASE.fullmatch(fields[0])
    key = _KEY.fullmatch(fields[1]) if len(fields) > 1 else None
    if database is None or key is None or not all(field.strip().isprintable() for field in fields):
        shown = ascii(" ".join(fields)[:_SHOWN])
        raise UsageError(
            f"skip list {path}, line {number}: {shown} is not NAME@HASH, a tab and a key like"
            " image-000000012; correct the line or put # before it"
        )
    reason = fields[2].strip() if len(fields) > 2 else ""
    return Skipped(number, database["name"], database["hash"], int(key[1]), reason)
