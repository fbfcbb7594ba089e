"""The typed stub, the twin and the built module have the same functions with the same parameters."""

import ast
import inspect
from pathlib import Path

import hnlm_ref
from hnlm_ref import _core, reference

STUB = Path(hnlm_ref.__file__).with_name("_core.pyi")
ONLY_SPEED = {"n_threads", "out"}  # arguments that change no result; the twin goes without them


def stub_functions():
    return [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]


def test_stub_and_module_agree_on_names_parameters_and_defaults():
    found = {node.name: [arg.arg for arg in node.args.args] for node in stub_functions()}
    functions = {name: f for name, f in vars(_core).items() if callable(f) and not name.startswith("_")}
    assert found == {name: list(inspect.signature(f).parameters) for name, f in functions.items()}
    for node in stub_functions():
        parameters = list(inspect.signature(functions[node.name]).parameters.values())
        defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
        assert defaults == [ast.literal_eval(default) for default in node.args.defaults], node.name


def test_the_twin_has_every_function_with_the_same_arguments():
    for node in stub_functions():
        if node.name in ("kernels", "use_kernel"):
            continue
        arguments = [arg.arg for arg in node.args.args if arg.arg not in ONLY_SPEED]
        assert list(inspect.signature(getattr(reference, node.name)).parameters) == arguments, node.name


def test_every_function_explains_itself():
    for node in stub_functions():
        assert len(getattr(_core, node.name).__doc__.split()) > 8, node.name
