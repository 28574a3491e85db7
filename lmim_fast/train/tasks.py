"""The table of tasks."""

from __future__ import annotations

from lmim_fast.config import Objective, RunConfig
from lmim_fast.errors import LmimError, shared
from lmim_fast.train.pretraining import LmimTask, MaeTask
from lmim_fast.train.recognition import RecognizerTask
from lmim_fast.train.task import Task

TASKS: dict[Objective, type[Task]] = {"lmim": LmimTask, "mae": MaeTask, "recognizer": RecognizerTask}


def make_task(config: RunConfig) -> Task:
    """The task of a run.

    Raises:
        UsageError: the config names a file that cannot be read.
    """
    kind = TASKS[config.objective]
    try:
        return kind(kind.settle(config))
    except LmimError as error:  # the same on every rank
        raise shared(error) from error.__cause__
