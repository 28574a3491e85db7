"""Damaged input for the C++ parts, under the address and undefined behaviour sanitizers.

    PYTHONPATH=.:tests/data python tests/csrc/fuzz.py [--count 200000] [--seed 0]

Compiles `fuzz.cpp` with the sources of `csrc/` that need no Python. It feeds it mutated images, whose
verdicts are compared with the Python form's; mutated LMDB files, a twentieth as many, which are searched for
all keys; and views of random crops, a twentieth as many, whose draws may be any number. A part that is added
to `fuzz.cpp` gets a function here and a line in `PARTS`. `make fuzz` sets the paths of modules.
"""

import argparse
import random
import shutil
import struct
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import lmdb
from encoded_images import mutations, variants

from lmim_fast.data.store.probe import Status, probe_in_python

ROOT = Path(__file__).parents[2]
MAX_PIXELS = 2**26
_CHUNK = 5000  # images or files given to one process
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_FLAGS = ["-std=c++17", "-g", "-O1", "-pthread", *_SANITIZERS]
_RECORDS = 150
_PAGE = 4096


class Unavailable(Exception):
    """There is no compiler with sanitizers."""


def build(folder):
    """The fuzzer.

    Raises:
        Unavailable: it cannot be built here.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler")
    trial = folder / "trial.cpp"
    trial.write_text("int main() {}")
    command = [compiler, *_FLAGS, str(trial), "-o", str(folder / "trial")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise Unavailable("the compiler has no sanitizers")
    # bindings.h is Python's.
    sources = [
        path
        for path in sorted((ROOT / "csrc").glob("*.cpp"))
        if not any(name in path.read_text() for name in ("pybind11", '"bindings.h"'))
    ]
    files = [str(path) for path in (Path(__file__).with_name("fuzz.cpp"), *sources)]
    subprocess.run([compiler, *_FLAGS, f"-I{ROOT / 'csrc'}", *files, "-o", str(folder / "fuzz")], check=True)
    return folder / "fuzz"


def run(fuzzer, arguments, stream):
    """The numbers that the fuzzer prints, a tuple for each line; RuntimeError with what a sanitizer found."""
    command = [str(fuzzer), *map(str, arguments)]
    found = subprocess.run(command, input=stream, capture_output=True, timeout=600, check=False)
    if found.returncode:
        raise RuntimeError(f"{arguments[0]}: exit code {found.returncode}\n{found.stderr.decode()[-4000:]}")
    return [tuple(map(int, line.split())) for line in found.stdout.splitlines()]


def fuzz_probe(fuzzer, folder, count, rng):
    """Verdicts on mutated images, which are those of the Python form."""
    verdicts = Counter()
    images = [b"", *variants().values()]
    images += [data[:size] for data in variants().values() for size in range(0, min(len(data), 200), 5)]
    source = mutations(rng, count)
    for _ in range(0, count, _CHUNK):
        images += [data for data, _ in zip(source, range(_CHUNK), strict=False)]
        stream = b"".join(struct.pack("<I", len(data)) + data for data in images)
        found = run(fuzzer, ["probe", MAX_PIXELS], stream)
        columns = (column.tolist() for column in probe_in_python(images, MAX_PIXELS))
        expected = list(zip(*columns, strict=True))
        if found != expected:
            row = next(row for row, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1)
            raise AssertionError(f"{images[row]!r}: {found[row]}, in Python {expected[row]}")
        verdicts.update(Status(status).name for status, *_ in found)
        images = []
    return verdicts


def database(folder):
    """An LMDB of three levels with values of all kinds: its bytes, and where values lie in it.

    It ends with a leaf, so that a read behind the leaf's end is one behind the memory.
    """
    rng = random.Random(0)
    sizes = [0, 1, 30, 1000, 2000, _PAGE - 17, _PAGE - 16, _PAGE - 15, 9000]
    values = {b"image-%09d" % number: rng.randbytes(rng.choice(sizes)) for number in range(1, _RECORDS)}
    values |= {b"image-%09d" % number: variants()["jpeg"] + rng.randbytes(8) for number in range(20, 40)}
    values |= {b"image-%09d" % number: rng.randbytes(150) for number in range(_RECORDS - 50, _RECORDS)}
    values |= {b"a%06d" % number + b"x" * 490: b"" for number in range(300)}  # few keys to a branch page
    with lmdb.open(str(folder), map_size=1 << 26) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in sorted(values.items()):
                transaction.put(key, value)
        assert environment.stat()["depth"] >= 3
    content = (folder / "data.mdb").read_bytes()
    assert _is_of_a_tree(content, len(content) - _PAGE)
    places = [(content.index(value), len(value)) for value in values.values() if len(value) > 100]
    return content, places


def _is_of_a_tree(content, page):
    number, flags = struct.unpack_from("<Q2xH", content, page)
    return number == page // _PAGE and flags in (1, 2)  # branch, leaf


def _changes(rng, content, places, kind):
    """Size of the file, and (place, byte) pairs."""
    size = len(content)
    if kind == "cut":
        return rng.randrange(size), []
    if kind == "values":
        start, length = rng.choice(places)
        return size, [(start + rng.randrange(length), rng.randrange(256)) for _ in range(4)]
    pages = [*range(0, size, _PAGE)]
    trees = [page for page in pages if _is_of_a_tree(content, page)]
    changes = []
    for _ in range(rng.randint(1, 6)):
        page = rng.choice(trees if rng.random() < 0.8 else pages)
        if rng.random() < 0.3:
            page = rng.choice([*pages[:2], pages[-1]])
        places = [range(16), range(12, 48), range(_PAGE - 8)]  # header, pointers to nodes, anywhere
        if page in trees:
            node = struct.unpack_from("<H", content, page + 16 + 2 * rng.randrange(4))[0] % (_PAGE - 8)
            places += [range(node, node + 8)] * 2
        length = rng.choice([1, 2, 4, 8])
        filled = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
        if length == 8 and rng.random() < 0.5:
            filled = struct.pack("<Q", rng.randrange(size // _PAGE + 2))  # perhaps another page
        at = page + rng.choice(rng.choice(places))
        changes += [(at + i, value) for i, value in enumerate(filled)]
    return size, changes


def fuzz_lmdb(fuzzer, folder, count, rng):
    """Outcomes of looking up every record of mutated LMDB files."""
    content, places = database(folder)
    outcomes = Counter()
    for start in range(0, max(1, count // 20), _CHUNK):
        kinds, stream = [], b""
        for _ in range(min(_CHUNK, count // 20 - start)):
            kinds.append(rng.choice(["cut", "values", *["anywhere"] * 6]))
            size, changes = _changes(rng, content, places, kinds[-1])
            stream += struct.pack("<QI", size, len(changes))
            stream += b"".join(struct.pack("<QB", place, value) for place, value in changes)
        for kind, (same, other, absent, errors) in zip(
            kinds, run(fuzzer, ["lmdb", folder / "data.mdb", _RECORDS], stream), strict=True
        ):
            assert same + other + absent + errors == _RECORDS
            if kind == "values":  # no number of the tree was touched
                assert (other <= 1, absent, errors) == (True, 0, 0), (same, other, absent, errors)
            if kind == "cut":
                assert errors == _RECORDS
            outcomes.update({"same": same, "other": other, "absent": absent, "errors": errors})
            outcomes["files with errors"] += errors > 0
    return outcomes


def _numbers(rng, count):
    """Doubles: usual ones, or any."""
    usual = [rng.uniform(-2.0, 2.0) for _ in range(count)]
    strange = [0.0, 1e-300, 1e300, -1e300, float("inf"), float("-inf"), float("nan"), 1e9, -0.5]
    return [rng.choice(strange) if rng.random() < 0.05 else value for value in usual]


def fuzz_views(fuzzer, folder, count, rng):
    """Views of random crops; a map never leaves its crop, whatever was drawn."""
    outcomes = Counter()
    cases = max(1, count // 20)
    for start in range(0, cases, _CHUNK // 10):
        stream = b""
        for _ in range(min(_CHUNK // 10, cases - start)):
            height, width = rng.randint(1, 40), rng.randint(1, 90)
            if rng.random() < 0.1:
                height, width = rng.choice([(1, 700), (300, 1), (200, 600)])
            view = rng.choice([(32, 128), (1, 1), (7, 13), (33, 101)])
            order = rng.sample(range(-1, 11), 10)
            drawn = [*_numbers(rng, 1), rng.uniform(0.01, 5.0), *_numbers(rng, 7 + 32 + 8 + 2 + 4)]
            stream += struct.pack("<4I10q4q", height, width, *view, *order, *rng.sample(range(-1, 5), 4))
            stream += struct.pack("<55d3Q", *drawn, *(rng.randrange(2) for _ in range(3)))
            stream += rng.randbytes(3 * height * width)
        for (inside,) in run(fuzzer, ["views"], stream):
            assert inside
            outcomes["inside"] += 1
    return outcomes


PARTS = {"probe": fuzz_probe, "lmdb": fuzz_lmdb, "views": fuzz_views}


def fuzz(count, seed, folder):
    """What each part found; an exception at the first failure."""
    fuzzer = build(folder)
    for name, part in PARTS.items():
        place = folder / name
        place.mkdir()
        start = time.perf_counter()
        found = part(fuzzer, place, count, random.Random(f"{name} {seed}"))
        yield name, found, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, found, seconds in fuzz(args.count, args.seed, Path(folder)):
            counts = ", ".join(f"{kind} {number:,}" for kind, number in sorted(found.items()))
            print(f"{name}, {seconds:.0f} s: {counts}", flush=True)
    print("no failure")


if __name__ == "__main__":
    main()
