"""What a user sees while a stage works: one-sentence errors, lines and progress on stderr."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

QUIET = "HNLM_QUIET"  # set by --quiet; an environment variable, so that the stages `hnlm-ref all` starts inherit it


class UserError(click.ClickException):
    """A mistake of the user's, told in one sentence: what, where, the offending value, what to do. Exit code 1."""


@contextmanager
def system_errors_told() -> Iterator[None]:
    """One sentence for what the system says of files (missing, not permitted ...) and for a package that is missing."""
    try:
        yield
    except BrokenPipeError:  # `hnlm-ref show RUN | head`: click ends quietly
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except ImportError as error:
        core = "_core" in str(error)  # cases R04, F04
        cure = "build it with: pip install --editable ." if core else "run: pip install 'hnlm-ref[llm]'"
        raise UserError(f"{'the Rust extension is missing' if core else error}; {cure}") from error


def say(text: str) -> None:
    """Print one line to stderr; silent under --quiet."""
    if not os.environ.get(QUIET):
        print(text, file=sys.stderr, flush=True)


def progress(iterable: Iterable | None = None, **bar: Any) -> Any:
    """tqdm with rate and time left on stderr; nothing when stderr is no terminal or under --quiet (case G06)."""
    quiet = True if os.environ.get(QUIET) else None  # None: tqdm asks whether stderr is a terminal
    return tqdm(iterable, **bar, disable=quiet, leave=False, dynamic_ncols=True)
