"""Fixtures of data sets that are written once."""

import shutil

import pytest
from multi_view_sets import CASES


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A folder of each multi-view data set."""
    folders = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, (_, write, _, _) in CASES.items():
        write(folders[case])
    return folders


@pytest.fixture
def copy_of(written, tmp_path):
    """Copies a data set to a folder that a test may spoil."""
    return lambda case: shutil.copytree(written[case], tmp_path / "source", dirs_exist_ok=True)
