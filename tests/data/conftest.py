"""A database of smooth crops, and the views of a run over it.

What makes them is imported when it is needed: on some GPU machines it is not installed, and tests that do
without it run there.
"""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from pipeline_runs import database

    return database(tmp_path_factory.mktemp("lmdb"))


@pytest.fixture(scope="session")
def expected(folder):
    from pipeline_runs import samples

    return samples(folder)
