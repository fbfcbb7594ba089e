"""Every worked example in a docstring of the library gives what stands below it."""

import doctest
import importlib
from pathlib import Path

import pytest

import hnlm_ref

MODULES = sorted(path.stem for path in Path(hnlm_ref.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    assert not doctest.testmod(importlib.import_module(f"hnlm_ref.{name}")).failed


def test_every_equation_has_an_example():
    from hnlm_ref import losses

    lacking = [
        name for name, function in vars(losses).items() if name.endswith("_loss") and ">>>" not in function.__doc__
    ]
    assert not lacking and ">>>" in losses.mix.__doc__ and ">>>" in losses.info_nce.__doc__
