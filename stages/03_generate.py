"""Stage 3: ask the tuned model for one hard negative per (user, item) pair, and find the items it comes nearest to.

Paper: semantic negative sampling. Reads prep/, sft/. Writes generate/: pairs.npy int32 [N, 2], embeddings.npy float16
[N, d_llm] (h), item_vectors.npy float32 [I, d_out], matches.npy int32 [N, m], match_scores.npy float32 [N, m],
quality.json; in text mode texts.jsonl too.

    python stages/03_generate.py --preset toy     # about 10 s on a CPU
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hnlm_ref.artifacts import Csr, Prep, Run, load_npy, resolve_path, save_json, save_npy
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.knobs import knob, stage_command


@dataclass(frozen=True)
class GenerateConfig:
    """Knobs of stage 3. Model and prompt are those of stage 2."""

    mode: str = knob("embedding", "h(u, i) of the model, or titles it writes (untuned)", ("embedding", "text"))
    tuned: bool = knob(True, "embedding: with the adapter of stage 2; without it, zero-shot vectors")
    sft_dir: str | None = knob(
        None, "sft folder of another run whose adapter is used here (transfer); none: this run's"
    )
    pairs_per_user: int = knob(0, "pairs of a user, drawn at random; 0: all training pairs", low=0)
    # speed
    batch_size: int = knob(4, "rows per forward pass, a row being a user with some pairs", low=1)
    pairs_per_row: int = knob(32, "pairs that share one encoding of their user's part; 1: the plain way", low=1)
    rows_per_shard: int = knob(
        64, "rows per file of work in progress, which is what a restart need not do again", low=1
    )
    # matching
    n_matches: int = knob(20, "items per generated negative (m)", low=1)
    min_similarity: float = knob(-1.0, "items less similar to the negative are no match", low=-1, high=1)
    max_similarity: float = knob(1.0, "items more similar are taken for false negatives", low=-1, high=1)


def choose_pairs(train: Csr, pairs_per_user: int, seed: int) -> np.ndarray:
    """Training pairs by user and item number, at most n of each user, int32 [N, 2]."""
    pairs = train.pairs()
    order = np.random.default_rng(seed).permutation(len(pairs))
    order = order[np.argsort(pairs[order, 0], kind="stable")]  # users in order, their pairs shuffled
    place = np.arange(len(pairs)) - np.repeat(train.indptr[:-1], train.degrees())  # of a pair among its user's
    return pairs[np.sort(order[place < (pairs_per_user or len(pairs))])]


def vectors(model: Any, rows: list, batch_size: int, device: str) -> np.ndarray:
    """h of every pair of some rows, float16 [n, d_llm] in row order; rows of like length share a batch."""
    import torch

    from hnlm_ref.llm import pack

    by_length = sorted(range(len(rows)), key=lambda r: -sum(map(len, rows[r][1])) - len(rows[r][0]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), batch_size):
        some = by_length[start : start + batch_size]
        with torch.inference_mode():
            h = model(pack([rows[r] for r in some], device))[0].half().cpu().numpy()
        found |= dict(zip(some, np.split(h, np.cumsum([len(rows[r][1]) for r in some])[:-1]), strict=True))
    return np.concatenate([found[r] for r in range(len(rows))])


def quality(matches: np.ndarray, users: np.ndarray, prep: Prep, sft: Path) -> dict[str, float]:
    """How hard, how false and how varied some negatives are; matches int32 [N, m] of users int32 [N], -1 for none.

    warm_up_percentile  share of the items not taken that the warm-up scores lower: 1 is hardest, 0.5 random
    false_rate          share of negatives that are held-out positives of the user (FHNS), on valid: test stays closed
    false_rate_chance   the same for a random item not taken
    false_rate_as_hard  the same for a random item of the same warm-up rank (mean over users, window of 21 ranks)
    profile_similarity  cosine of item text and user text
    popularity          share of the items with fewer training users; 0.5 random
    coverage            share of the catalogue that is used; most_used: share of the most frequent item
    """
    cf_user, cf_item, user_text, item_text = (
        load_npy(sft / f"{name}.npy") for name in ("cf_user", "cf_item", "user_text", "item_text")
    )
    n_items = prep.n_items
    taken, held_out = (np.zeros((prep.n_users, n_items), bool) for _ in range(2))
    for mark, part in ((taken, prep.train), (held_out, prep.valid)):
        mark[tuple(part.pairs().T)] = True
    scores = np.where(taken, -np.inf, cf_user @ cf_item.T)  # [U, I]
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)  # 0 is hardest
    free = n_items - prep.train.degrees()  # [U]
    by_rank = np.zeros(n_items)
    np.add.at(by_rank, rank[held_out], 1 / prep.n_users)
    as_hard = np.convolve(by_rank, np.ones(21), "same") / np.convolve(np.ones(n_items), np.ones(21), "same")
    user_text, item_text = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (user_text, item_text)
    )
    popularity = np.bincount(prep.train.indices, minlength=n_items)

    row, place = np.nonzero(matches >= 0)
    u, j = users[row], matches[row, place]
    used = np.bincount(j, minlength=n_items)
    figures = {
        "warm_up_percentile": 1 - rank[u, j] / free[u],
        "false_rate": held_out[u, j],
        "false_rate_chance": prep.valid.degrees()[u] / free[u],
        "false_rate_as_hard": as_hard[rank[u, j]],
        "profile_similarity": (user_text[u] * item_text[j]).sum(1),
        "popularity": np.searchsorted(np.sort(popularity), popularity)[j] / n_items,
        "coverage": (used > 0).mean(),
        "most_used": used.max() / max(len(j), 1),
        "matched": (matches >= 0).any(1).mean(),
    }
    return {name: round(float(np.mean(values)), 5) for name, values in figures.items()}


def main(cfg: GenerateConfig, run: Run) -> dict:
    from hnlm_ref import _core, llm

    prep, out, device, sft = run.prep(), run.out, run.device, run.folder("sft")
    knobs = run.manifest("sft")["knobs"]
    llm.set_threads(run.n_threads)

    # The model and the prompts are those of tuning.
    base, tokenizer = llm.load_llm(knobs["model"], device, knobs["dtype"], knobs["attention"], knobs["load_in_4bit"])
    adapter = resolve_path(cfg.sft_dir) if cfg.sft_dir else sft
    model = llm.load_negative_model(base, adapter, load_npy(sft / "cf_user.npy"), load_npy(sft / "cf_item.npy"))
    queries = llm.make_queries(tokenizer, prep.users, prep.items, knobs["max_user_tokens"], knobs["max_item_tokens"])

    # Rows: a user with up to `pairs_per_row` items, so that the user's part is computed once for all of them.
    pairs = choose_pairs(prep.train, cfg.pairs_per_user, run.seed)  # [N, 2]
    rows, first = [], []
    for u in range(prep.n_users):
        low, high = np.searchsorted(pairs[:, 0], [u, u + 1])
        for start in range(low, high, cfg.pairs_per_row):
            rows.append(queries.row(u, pairs[start : min(start + cfg.pairs_per_row, high), 1].tolist()))
            first.append(start)
    sizes = np.array([len(prefix) + sum(map(len, parts)) for prefix, parts in rows])

    # Shards of fixed content: whoever computes one, and whenever, it comes out the same (case D17).
    n_tokens, started = 0, time.perf_counter()
    bar = progress(total=int(sizes.sum()), desc="generating", unit="token")
    shards = [slice(s, s + cfg.rows_per_shard) for s in range(0, len(rows), cfg.rows_per_shard)]
    paths = [out / f"shard{first[shard.start]:09d}.npy" for shard in shards]
    for shard, path in zip(shards, paths, strict=True):
        if not path.exists():
            h = vectors(model, rows[shard], cfg.batch_size, device)
            for row in np.flatnonzero(~np.isfinite(h).all(axis=1))[:1]:
                u, i = pairs[first[shard.start] + row]
                raise UserError(f"the vector of user {u} and item {i} is not finite; try --dtype float32 in sft")
            save_npy(path, h)
            n_tokens += int(sizes[shard].sum())
        bar.update(int(sizes[shard].sum()))
    bar.close()
    seconds = time.perf_counter() - started
    h = np.concatenate([load_npy(path) for path in paths])  # [N, d_llm]
    save_npy(out / "pairs.npy", pairs)
    save_npy(out / "embeddings.npy", h)

    # The nearest items that the user has not taken, by cosine in the space tuning compared in.
    item_vectors = load_npy(adapter / "targets.npy")  # [I, d_out]
    users, graph = np.ascontiguousarray(pairs[:, 0]), (prep.train.indptr, prep.train.indices)
    band = cfg.min_similarity, cfg.max_similarity
    z = llm.apply_head(model, h)  # [N, d_out]
    matches, scores = _core.match_items(z, item_vectors, users, *graph, cfg.n_matches, *band, run.n_threads)  # [N, m]
    save_npy(out / "item_vectors.npy", item_vectors)
    save_npy(out / "matches.npy", matches)
    save_npy(out / "match_scores.npy", scores)

    # What these negatives are like, beside sampled ones.
    pool = _core.sample_uniform(*graph, prep.n_items, users, 4, run.seed, run.n_threads)  # [N, 4]
    cf_user, cf_item = load_npy(sft / "cf_user.npy"), load_npy(sft / "cf_item.npy")
    hardest = np.einsum("nd,nmd->nm", cf_user[users], cf_item[pool]).argmax(1)
    kinds = {
        "uniform": pool[:, :1],
        "dns (M = 4)": np.take_along_axis(pool, hardest[:, None], 1),
        "generated, nearest item": matches[:, :1],
        f"generated, {cfg.n_matches} nearest items": matches,
    }
    table = {name: quality(found, users, prep, sft) for name, found in kinds.items()}
    save_json(out / "quality.json", table)
    say("[generate] " + ", ".join(next(iter(table.values()))))
    for name, figures in table.items():
        say(f"[generate] {name:32}" + "".join(f"{value:10.4f}" for value in figures.values()))
    for path in paths:
        path.unlink()
    counts = {"pairs": len(pairs), "tokens": int(sizes.sum()), "pairs without match": int((matches[:, 0] < 0).sum())}
    return {"counts": counts, "timing": {"tokens_per_second": round(n_tokens / seconds, 1)}}


command = stage_command(
    "generate",
    GenerateConfig,
    main,
    reads=("prep", "sft"),
    files=lambda cfg: [cfg.sft_dir] if cfg.sft_dir else [],
)
if __name__ == "__main__":
    command()
