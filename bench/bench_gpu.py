"""Tuning and generation on a GPU with a model of the paper's size: the shape of Llama-3-8B, random weights, bfloat16.

    pytest bench/bench_gpu.py -s

Prompts have the lengths of the paper's presets, 400 tokens of the user and 112 of each item: 16 users with 9 pairs to
generate for, 16 with 4 to tune on (4 users where activations are kept). A pass takes 2 operations for each weight of
the layers and token; tuning takes two passes, as frozen weights want no gradient of their own (activations computed
again are not counted). Both are held against a product of 8192 x 8192 x 8192 in bfloat16 on the same card.
Without a GPU a model of two small layers does it all, which checks this file and measures nothing.
"""

import time

import numpy as np
import pytest
import torch
import transformers

from hnlm_ref import llm, losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_3_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
N_USERS, N_ITEMS, D_CF = 16, 64, 64
USER_TOKENS, ITEM_TOKENS = (400, 112) if DEVICE == "cuda" else (40, 12)


def median_seconds(function, rounds: int) -> float:
    """Of a call of `function`, the GPU's work included; one call more goes before."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds + 1):
        wait()
        started = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


@pytest.fixture(scope="module")
def model():
    config = transformers.AutoConfig.for_model("llama", **(LLAMA_3_8B if DEVICE == "cuda" else SMALL))
    with torch.device(DEVICE):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    cf = [rng.normal(size=(n, D_CF)).astype(np.float32) for n in (N_USERS, N_ITEMS)]
    return llm.NegativeModel(llm.add_lora(base, 32, 64, 0.05), *cf, D_CF)


@pytest.fixture(scope="module")
def peak():
    """Operations a second of a plain product."""
    n = 8192 if DEVICE == "cuda" else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, 10)


def rows(n_pairs: int) -> list:
    """(prefix, continuations) of every user, soft tokens included."""
    rng = np.random.default_rng(1)

    def parts(n: int, n_tokens: int) -> list:
        return rng.integers(2, 300, (n, n_tokens)).tolist()

    queries = llm.Queries(parts(N_USERS, USER_TOKENS), parts(N_ITEMS, ITEM_TOKENS - 3), [], [2], 0)
    return [queries.row(u, range(u, u + n_pairs)) for u in range(N_USERS)]


def tell(what: str, model, some: list, seconds: float, n_passes: int, peak: float) -> None:
    decoder = model.llm.get_base_model().get_decoder()
    embeddings = set(decoder.get_input_embeddings().parameters())
    n_weights = sum(p.numel() for p in decoder.parameters() if p not in embeddings and not p.requires_grad)
    n_tokens = sum(map(llm.n_tokens, some))
    speed = 2 * n_passes * n_weights * n_tokens / seconds
    card, memory = "no GPU", 0.0
    if DEVICE == "cuda":
        card, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    print(
        f"\n{what} ({card}, {n_weights / 1e9:.2f} billion weights): {n_tokens:,} tokens in {seconds:.3f} s, "
        f"{n_tokens / seconds:,.0f} a second, {speed / 1e12:,.1f} TFLOP/s, {speed / peak:.0%} of a plain product's "
        f"{peak / 1e12:,.1f}, at most {memory:.1f} GiB"
    )


def test_generating(model, peak):
    some, model = rows(9), model.eval()

    @torch.no_grad()
    def generate():
        return model(llm.pack(some, DEVICE))[0].half().cpu()

    tell("generating", model, some, median_seconds(generate, 5), 1, peak)
    assert generate().isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_step_of_tuning(model, peak, checkpointing):
    """One micro-batch and the step after it."""
    some, model = rows(4)[: None if checkpointing else 4], model.train()
    if checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    numbers = torch.arange(4 * len(some), device=DEVICE)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-4)
    targets = torch.randn(2, len(numbers), D_CF, device=DEVICE)

    def read(users):
        return (model(llm.pack([some[u] for u in users], DEVICE))[1],)

    def loss(o):
        return {"objective": losses.sft_loss(o, *targets, numbers // 4, numbers, 0.05)}

    def step():
        figures, gradients = llm.gradients(model, read, list(range(len(some))), loss, 0)
        for p, gradient in zip(trainable, gradients, strict=True):
            p.grad = gradient
        optimiser.step()
        return figures["objective"].item()

    before = step()
    tell(f"tuning, checkpointing {checkpointing}", model, some, median_seconds(step, 5), 2, peak)
    assert step() < before
