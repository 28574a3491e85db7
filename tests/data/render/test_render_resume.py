"""A render that is killed goes on where its last commit ends, and becomes what an uninterrupted one is."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rendering import DEJAVU, FONTS, records, rendered, word_file

from lmim_fast import cli
from lmim_fast.config import RenderConfig
from lmim_fast.data.render import database
from lmim_fast.data.render.database import render
from lmim_fast.data.store import resumable
from lmim_fast.errors import UsageError

ROOT = Path(__file__).parents[3]
COUNT = 160
SCRIPT = f"""
import sys
from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.store import resumable
resumable.RECORDS_PER_COMMIT = 32
render(RenderConfig(output=sys.argv[1], count=int(sys.argv[2]), processes=2, fonts=({DEJAVU!r},)))
"""


def interrupted(output, monkeypatch, **options):
    """An unfinished render of 60 crops with 30 of them committed."""
    monkeypatch.setattr(resumable, "RECORDS_PER_COMMIT", 10)
    config = RenderConfig(output=str(output), count=60, processes=1, fonts=(DEJAVU,), **options)

    class Full(Exception):
        pass

    def put(writer, image, label):
        if writer.written == 35:
            raise Full
        original(writer, image, label)

    original = resumable.ResumableWriter.put
    with monkeypatch.context() as patch:
        patch.setattr(resumable.ResumableWriter, "put", put)
        with pytest.raises(Full):
            render(config)
    return config


def test_a_render_killed_again_and_again_equals_an_uninterrupted_one(tmp_path):
    output = tmp_path / "words"
    partial = tmp_path / "words.partial" / "records.partial"
    kills, sizes = 0, [8192]
    while True:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, output, str(COUNT)], cwd=ROOT, text=True)
        while process.poll() is None and kills < 2:
            if partial.exists() and partial.stat().st_size > sizes[-1]:
                sizes.append(partial.stat().st_size)
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        if process.wait(timeout=60) == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills == 2
    assert os.listdir(tmp_path) == ["words"]
    assert os.listdir(output) == ["data.mdb"]
    assert records(output) == rendered(tmp_path / "whole", count=COUNT, fonts=(DEJAVU,))


def test_a_resumed_render_says_where_it_goes_on_and_renders_the_rest_only(tmp_path, monkeypatch):
    config = interrupted(tmp_path / "words", monkeypatch)
    said, made = [], []
    original = resumable.ResumableWriter.put
    monkeypatch.setattr(
        resumable.ResumableWriter, "put", lambda *arguments: (made.append(1), original(*arguments))[1]
    )
    monkeypatch.setattr(database, "_WORTH_A_SPEED", 30)
    render(config, said.append)
    assert said[0] == "goes on with the unfinished render: 30 of 60 crops are there"
    assert re.fullmatch(r"30 crops in \d+ s: [\d,]+ crops/s with 1 process", said[1])
    assert len(made) == 30


def test_a_resume_with_another_option_is_refused_by_its_name(tmp_path, monkeypatch):
    config = interrupted(tmp_path / "words", monkeypatch)
    shares = {f"{name}_share": 0.5 for name in ("random", "sign")}
    for name, value in {"seed": 1, "count": 61, "max_length": 9, **shares}.items():
        with pytest.raises(UsageError, match=rf"another {name} \(.*--restart"):
            render(dataclasses.replace(config, **{name: value}))
    render(dataclasses.replace(config, processes=2))


def test_a_resume_with_other_words_or_fonts_is_refused_and_restart_begins_anew(tmp_path, monkeypatch):
    config = interrupted(tmp_path / "words", monkeypatch)
    words = (word_file(tmp_path, "other", "words"),)
    with pytest.raises(UsageError, match="another words"):
        render(dataclasses.replace(config, words=words))
    with pytest.raises(UsageError, match="another fonts"):
        render(dataclasses.replace(config, fonts=(str(FONTS["DejaVuSans-Bold.ttf"]),)))
    output = render(dataclasses.replace(config, words=words, random_share=0.0, restart=True))
    assert {label.lower().split()[0].strip(".,!?:") for label, _ in records(output)} <= {"other", "words"}


def test_the_command_renders_and_says_so(tmp_path, capsys):
    fonts = ["--fonts", str(ROOT / "lmim_fast"), str(tmp_path)]
    assert cli.main(["data", "render", "--output", str(tmp_path / "out"), "--count", "3", *fonts]) == 2
    assert "holds no .ttf" in capsys.readouterr().err
    words = ["--words", word_file(tmp_path, "one\t2", "two")]
    options = ["--count", "3", "--processes", "1", "--curved-share", "0.5", *words]
    assert cli.main(["data", "render", "--output", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out == f"rendered 3 crops into {tmp_path / 'out'}\n"
