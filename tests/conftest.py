"""Fixtures that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets; they are not part of the project, so a test that needs them skips without them."""
    folder = Path(os.environ.get("HNLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HNLM_DATA")
    return folder


@pytest.fixture(scope="session")
def case_input(shared_data):
    """Path of one of the small inputs of the collected cases, or skip."""
    return lambda name: shared_data.parent / "cases" / "inputs" / name


def readme_code(beginning: str, language: str = "python") -> str:
    """The example of README.md that begins so."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return next(block for block in blocks if block.startswith(beginning)).split("```")[0]


PEAK = """
import pathlib, resource, sys

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def run_measured(program: str) -> list[int]:
    """The whole numbers a Python program prints; its `peak()` is the most memory it has held so far, in bytes.

    On Linux that is not ru_maxrss, which begins with the peak of the process it was started from: of pytest.
    """
    done = subprocess.run([sys.executable, "-c", PEAK + program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def run_python(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run `python WORDS` with this tree's package and give back what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def run_cli(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run `hnlm-ref WORDS` as a user would and give back what it printed."""
    return run_python("-m", "hnlm_ref.cli", *words, cwd=cwd, **env)


@pytest.fixture(scope="session")
def cli():
    return run_cli


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> Path:
    """The toy preset run once to the end; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    done = run_cli("all", "--preset", "toy", "--run-dir", folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    (folder.parent / "stderr").write_text(done.stderr, encoding="utf-8")
    return folder
