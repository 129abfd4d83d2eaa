"""A model file that shrinks while it is in use ends in an error that names it, and not the process."""

import os
import subprocess
import sys

import pytest
from shrinking_moments import MOMENTS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each moment, by name; the process, and how it ended, as "process"."""
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join([tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "shrinking_moments", os.fspath(tmp_path_factory.mktemp("shrinking"))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    lines = [line.partition(": ") for line in result.stdout.splitlines()]
    return {name: outcome for name, _, outcome in lines} | {"process": (result.returncode, result.stderr)}


def test_the_process_outlives_every_moment(outcomes):
    code, errors = outcomes["process"]
    assert code == 0, f"ended with {code} after {list(outcomes)[:-1][-1:]}: {errors}"


@pytest.mark.parametrize("name", MOMENTS)
def test_a_file_that_shrinks_is_an_error_that_names_it(outcomes, name):
    outcome = outcomes.get(name, "the process ended")
    if outcome.startswith("skipped"):
        pytest.skip(outcome)
    assert outcome == "refused"
