"""The stages on a pretended GPU: tensors that say they are on "cuda" and are computed by the CPU.

    python tests/test_pretended_gpu.py STAGE --device cuda [OPTION ...]

Every call of torch is looked at: results are where their inputs are, and tensors of two devices in one call are
refused as a GPU would refuse them. So the paths of a GPU are walked, to the numbers of the CPU; its kernels, its
memory and its speed are not seen. For those there is `test_gpu.py`.
"""

import shutil
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_python
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hnlm_ref.artifacts import Run, load_jsonl, load_npy

ANYWHERE = ("copy_", "_has_compatible_shallow_copy_type")  # calls that take tensors of two devices
INDEXING = ("__getitem__", "__setitem__", "index_put")  # the CPU may tell the places


def on_gpu(tensor: Tensor) -> bool:
    return tensor.__dict__.get("on_gpu", False)


def put(tensor: Tensor, gpu: bool) -> Tensor:
    tensor.__dict__["on_gpu"] = gpu
    return tensor


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class PretendedGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        if function == Tensor.device.__get__:
            return torch.device("cuda", 0) if on_gpu(args[0]) else torch.device("cpu")
        if function == Tensor.is_cuda.__get__:
            return on_gpu(args[0])
        if function == Tensor.grad.__get__:
            gradient = function(*args)
            return gradient if gradient is None else put(gradient, on_gpu(args[0]))
        if function == Tensor.data.__set__:
            put(args[0], on_gpu(args[1]))
            return function(*args)
        if function in (Tensor.to, Tensor.cpu):
            return self.move(*args, **kwargs) if function is Tensor.to else self.move(args[0], "cpu")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device, gpu = kwargs.get("device"), any(map(on_gpu, tensors))
        if gpu and name not in ANYWHERE:
            here = [t for t in tensors if not on_gpu(t) and t.dim()]
            if name in INDEXING and on_gpu(args[0]):
                here = [t for t in here if not any(t is place for place in tree_leaves(args[1]))]
            if here or name == "numpy":
                raise RuntimeError(f"{name}: tensors on the GPU and, of shapes {[*map(np.shape, here)]}, on the CPU")
        if (generator := kwargs.get("generator")) is not None and generator.gpu != is_gpu(device):
            raise RuntimeError(f"{name}: its generator is on another device")
        if device is not None:
            kwargs["device"], gpu = "cpu", is_gpu(device)
        found = function(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and (gpu or device is not None):
                put(leaf, gpu)
        return found

    def move(self, tensor, *words, device=None, dtype=None, copy=False, **others):
        for word in words:
            if isinstance(word, Tensor):
                device, dtype = "cuda" if on_gpu(word) else "cpu", word.dtype
            elif isinstance(word, torch.dtype):
                dtype = word
            elif isinstance(word, str | torch.device):
                device = word
        gpu = on_gpu(tensor) if device is None else is_gpu(device)
        moved = tensor.to(dtype or tensor.dtype, copy=copy or gpu != on_gpu(tensor))
        return moved if moved is tensor else put(moved, gpu)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.gpu = is_gpu(device)
        return self


class Autocast(torch.autocast):
    def __init__(self, device_type, *words, **others):
        super().__init__("cpu", *words, **others)


def pretend() -> None:
    """From here on, in every thread of this process."""
    of_file, of_loss, run_thread = safetensors.torch.load_file, torch.autograd.grad, threading.Thread.run

    def load_file(path, device="cpu"):
        return {name: put(tensor, is_gpu(device)) for name, tensor in of_file(path).items()}

    def grad(outputs, inputs, *words, **others):
        found = of_loss(outputs, inputs, *words, **others)
        return tuple(put(g, on_gpu(t)) for g, t in zip(found, tree_leaves(inputs), strict=True))

    def run(thread):
        with PretendedGpu():
            run_thread(thread)

    safetensors.torch.load_file, torch.autograd.grad, threading.Thread.run = load_file, grad, run
    torch.Generator, torch.autocast = Generator, Autocast
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.set_device = lambda device: None
    for name in [name for name in dir(torch.optim.Optimizer) if name.endswith("capture_health_check")]:
        setattr(torch.optim.Optimizer, name, lambda optimiser: None)  # it would ask the driver
    PretendedGpu().__enter__()


def test_what_a_gpu_refuses_is_refused():
    with PretendedGpu():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert (there * 2).is_cuda and (there @ there).device.type == "cuda" and there.to(here).device.type == "cpu"
        assert (there + torch.tensor(1.0)).tolist() == [2, 2] and there[torch.tensor([0, 1])].is_cuda
        for call in (
            lambda: there + here,
            lambda: here[there.long()],
            lambda: torch.nn.Linear(2, 2)(there),
            lambda: torch.nn.Linear(2, 2).to("cuda")(here),
            lambda: there.numpy(),
            lambda: torch.rand(2, generator=Generator("cuda")),
        ):
            with pytest.raises(RuntimeError, match=r"on the GPU and|another device"):
                call()


def figures(folder) -> dict[str, np.ndarray]:
    """What is the same on both devices but for rounding. Dropout is not: on a GPU its masks are those of more rows."""
    log = load_jsonl(folder / "log.jsonl") if folder.name != "generate" else []
    lines = [line for line in log if line.get("head") or "epoch" in line]  # of tuning, those before the first step
    numbers = [[value for value in line.values() if isinstance(value, float)] for line in lines]
    names = {"sft": ("cf_item", "item_text", "targets"), "generate": ("embeddings", "match_scores")}
    tables = {name: load_npy(folder / f"{name}.npy") for name in names.get(folder.name, ("user", "item"))}
    return {"log": np.array(numbers), **tables}


@pytest.mark.parametrize(
    "stage", ["sft", "generate", "train --method dns", "train --method hnlm"], ids=lambda words: words.split()[-1]
)
def test_a_stage_ends_with_the_numbers_of_the_cpu(toy_run, tmp_path, stage):
    """It reads what the CPU made before it."""
    run, (name, *words) = tmp_path / "run", stage.split()
    folder = f"{name}/{words[-1]}/seed0" if words else name
    shutil.copytree(toy_run, run)
    shutil.rmtree(run / folder)
    words = name, "--preset", "toy", "--run-dir", run, "--device", "cuda", *words
    done = run_python(__file__, *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert Run(run).manifest(folder)["device"] == "cuda"
    for (name, expected), found in zip(figures(toy_run / folder).items(), figures(run / folder).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3, err_msg=name)


if __name__ == "__main__":
    from hnlm_ref.cli import load_stage

    pretend()
    load_stage(sys.argv[1])(sys.argv[2:])
