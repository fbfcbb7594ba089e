"""Stage 3: ask the tuned model for one hard negative per (user, item) pair, and find the items nearest to it.

Paper: semantic negative sampling. Reads prep/, sft/. Writes generate/: pairs.npy int32 [N, 2], embeddings.npy float16
[N, d_llm] (h), matches.npy int32 [N, m], match_scores.npy float32 [N, m], quality.json; in text mode texts.jsonl too,
one line per question.

    python stages/03_generate.py --preset toy     # about 10 s on a CPU
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hnlm_ref.artifacts import Csr, Run, file_fingerprint, load_npy, own_share, resolve_path, save_json, save_npy
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.knobs import StageCommand, knob
from hnlm_ref.profiles import AskConfig


@dataclass(frozen=True)
class GenerateConfig(AskConfig):
    """Knobs of stage 3. Model and prompt are those of stage 2; the knobs for asking for text come first."""

    mode: str = knob("embedding", "the vector h(u, i), or a title written by the untuned model", ("embedding", "text"))
    tuned: bool = knob(True, "embedding: with the adapter of stage 2; without it, zero-shot vectors")
    pairs_per_user: int = knob(0, "pairs of a user, drawn at random; 0: all training pairs", low=0)
    # speed
    batch_size: int = knob(4, "rows per forward pass, a row being a user with some pairs", low=1)
    pairs_per_row: int = knob(32, "pairs of a user that share one encoding of the user part; 1: no sharing", low=1)
    rows_per_shard: int = knob(64, "rows per intermediate file; a restart keeps the finished ones", low=1)
    # matching
    match: str = knob("vector", "text mode: match by the title's vector, or by its words", ("vector", "title"))
    n_matches: int = knob(20, "items per generated negative (m)", low=1)
    min_similarity: float = knob(-1.0, "items less similar to the negative are no match", low=-1, high=1)
    max_similarity: float = knob(1.0, "items more similar are no match: probably false negatives", low=-1, high=1)
    skip_ranks: int = knob(0, "a user's top warm-up ranks, this many, are no match: false negatives lie there", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.min_similarity, self.max_similarity
        if self.mode == "text" and self.match == "title" and high < 1:
            raise UserError(f"max_similarity {high}: titles have no upper limit; take --match vector")
        if low > high:
            raise UserError(f"min_similarity {low} is above max_similarity {high}: no match")


def in_shards(
    rows: list, pairs: np.ndarray, cfg: GenerateConfig, run: Run, team: Any, encode: Callable
) -> tuple[np.ndarray, dict]:
    """h of every pair, float16 [N, d_llm], by way of files of fixed content: whoever computes one, and whenever, it
    comes out the same (case D17). Rows of like length share a batch; processes share the batches of a file, and the
    first one has the result."""
    import accelerate

    from hnlm_ref.llm import cut, in_parallel, n_tokens

    sizes, starts = list(map(n_tokens, rows)), np.cumsum([0, *(len(parts) for _, parts in rows)])
    bar, started = progress(total=sum(sizes), desc="generating", unit="token"), time.time()
    n_done, paths = 0, []
    for shard in cut(range(len(rows)), cfg.rows_per_shard):
        paths.append(run.out / f"shard{shard[0]:09d}.npy")
        if not paths[-1].exists():
            by_length = sorted(shard, key=lambda r: -sizes[r])
            found: list[tuple[int, np.ndarray]] = []
            own = [some for _, some, _ in own_share(cut(by_length, cfg.batch_size), team)]
            vectors = in_parallel(lambda some: encode([rows[r] for r in some]), own, run.device)
            for some, h in zip(own, vectors, strict=True):
                ends = np.cumsum([len(rows[r][1]) for r in some])
                found += zip(some, np.split(h, ends[:-1]), strict=True)
                bar.update(sum(sizes[r] for r in some))
            of_row = dict(accelerate.utils.gather_object(found))
            h = np.concatenate([of_row[r] for r in shard])
            for bad in np.flatnonzero(~np.isfinite(h).all(axis=1)):
                u, i = pairs[starts[shard[0]] + bad]
                raise UserError(f"the vector of user {u} and item {i} is not finite; tune and generate in float32")
            if team.is_main_process:
                save_npy(paths[-1], h)
            n_done += sum(sizes[r] for r in shard)
    bar.close()
    if not team.is_main_process:  # the first process alone goes on
        return np.empty(0), {}
    speed = {"tokens_per_second": round(n_done / (time.time() - started), 1)}
    return np.concatenate([load_npy(path, mmap=True) for path in paths]), speed  # held once: it may be many GB


def nearest_items(
    negatives: Any, items: Any, users: np.ndarray, refused: Csr, n: int, cfg: GenerateConfig, n_threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """The n items nearest to each negative that are not refused to its user, and their similarities.

    Negatives and items are vectors [N, d_out] and [I, d_out], compared by cosine, or lists of titles, by words.
    Returns int32 and float32 [N, n], best first; -1: none.
    """
    from hnlm_ref import _core
    from hnlm_ref.llm import cut

    graph, band = (refused.indptr, refused.indices), (cfg.min_similarity, cfg.max_similarity)
    if isinstance(items, list):
        return _core.match_titles(negatives, items, users, *graph, n, cfg.min_similarity)
    blocks = list(zip(cut(negatives, 1 << 14), cut(users, 1 << 14), strict=True))
    found = [
        _core.match_items(some, items, theirs, *graph, n, *band, n_threads)
        for some, theirs in progress(blocks, desc="matching", unit="block")
    ]
    matches, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return matches, scores


def main(cfg: GenerateConfig, run: Run) -> dict:
    import accelerate
    import torch

    from hnlm_ref import _core, llm, negatives, profiles, prompts

    prep, sft, out, device = run.prep(), run.folder("sft"), run.out, run.device
    tuning = run.manifest("sft")
    knobs = tuning["knobs"]
    if file_fingerprint(resolve_path(knobs["model"])) != tuning["counts"]["model fingerprint"]:
        raise UserError(f"model {knobs['model']} is no longer the one that was tuned; run again: {run.command('sft')}")
    cf = [load_npy(sft / f"cf_{side}.npy") for side in ("user", "item")]
    text = [load_npy(sft / f"{side}_text.npy") for side in ("user", "item")]
    if (prep.n_items - prep.train.degrees() <= cfg.skip_ranks).all():
        raise UserError(f"skip_ranks {cfg.skip_ranks} leaves nobody an item to match of {prep.n_items}; lower it")
    torch.set_num_threads(run.n_threads or torch.get_num_threads())
    team = accelerate.PartialState(cpu=device == "cpu")  # the processes that share the rows: one, unless launched so
    if cfg.mode == "text" and team.num_processes > 1:  # the others would wait for it longer than torch lets them
        raise UserError("--mode text: one process asks; start it without torchrun or accelerate launch")
    counts: dict[str, Any] = {"users who took every item": int((prep.train.degrees() == prep.n_items).sum())}
    timing: dict[str, float] = {}

    # The model is that of tuning, and so are the prompts.
    dtype = tuning["counts"]["dtype"]  # what "auto" was there, maybe on another machine
    base, tokenizer = llm.load_llm(knobs["model"], device, dtype, knobs["attention"], knobs["load_in_4bit"])
    model = llm.load_negative_model(base, sft, *cf) if cfg.mode == "embedding" and cfg.tuned else None
    pairs = negatives.choose_pairs(prep.train, cfg.pairs_per_user, run.seed)  # [N, 2]
    if cfg.mode == "embedding":
        # Rows: a user with up to `pairs_per_row` items, so that the user's part is computed once for all of them.
        limits = knobs["max_user_tokens"], knobs["max_item_tokens"]
        queries = llm.make_queries(tokenizer, prep.users, prep.items, *limits)
        of_users = np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, prep.n_users)))
        rows = [
            queries.row(u, some, soft=cfg.tuned)
            for u, items in enumerate(of_users)
            for some in llm.cut(items, cfg.pairs_per_row)
        ]

        def encode(some: list) -> np.ndarray:
            batch = llm.pack(some, device)
            h = model(batch)[0] if model else llm.embed(base, batch, pooling="mean")
            return h.half().cpu().numpy()

        h, timing = in_shards(rows, pairs, cfg, run, team, encode)  # [N, d_llm]
        if not team.is_main_process:
            return {}
        counts["tokens"] = sum(map(llm.n_tokens, rows))
    else:
        # One question per pair; a pair without an answer has no negative: it is counted, and left out from here on.
        questions = [prompts.negative_prompt(prep.users[u], prep.items[i]) for u, i in pairs]
        titles = [prep.items[i]["title"] for i in pairs[:, 1]]
        about = [{"user": int(u), "item": int(i)} for u, i in pairs]
        asked = questions, about, out / "texts.jsonl", prompts.NEGATIVE_KEY, titles
        replies = profiles.ask(cfg, knobs["model"], lambda: (base, tokenizer), *asked)
        counts["statuses"] = statuses = dict(Counter(reply.status for reply in replies))
        said = [reply.text for reply in replies if reply.text is not None]
        say(f"[generate] answers: {statuses}")
        if not said:
            raise UserError(f"none of {len(replies)} answers names an item ({statuses}); see {out / 'texts.jsonl'}")
        pairs = pairs[[reply.text is not None for reply in replies]]
        # Around the mean of the catalogue's titles: around their own, two answers would be each other's opposite.
        named = [item["title"] or prompts.NO_TITLE for item in prep.items]
        vectors = llm.text_vectors(base, tokenizer, named + said)
        vectors -= vectors[: prep.n_items].mean(axis=0)
        h = vectors[prep.n_items :].astype(np.float16)
    save_npy(out / "pairs.npy", pairs)
    save_npy(out / "embeddings.npy", h)

    # The nearest items, but for those the user took or the warm-up ranks highest: by the title's words, or by cosine in
    # the space that tuning compared in.
    items: Any = load_npy(sft / "targets.npy") if model else text[1]  # [I, d_out]
    if cfg.mode == "text" and cfg.match == "title":
        z, items = said, [item["title"] for item in prep.items]
    elif model:
        parts = torch.from_numpy(h).split(4096)
        found = llm.in_parallel(lambda part: model.head(part.float().to(device)).cpu(), parts, device)
        z = torch.cat(list(found)).numpy()  # [N, d_out]
    else:
        z = h.astype(np.float32)
        if cfg.mode == "embedding":  # around their own mean, where those of titles are around the catalogue's
            z -= h.mean(axis=0, dtype=np.float32)
    users, graph = np.ascontiguousarray(pairs[:, 0]), (prep.train.indptr, prep.train.indices)
    blocked = negatives.with_best_ranked(prep.train, cf, cfg.skip_ranks, run.n_threads)
    matches, scores = nearest_items(z, items, users, blocked, cfg.n_matches, cfg, run.n_threads)  # [N, m]
    if (matches < 0).all():
        raise UserError("no negative matches any item; widen min_similarity and max_similarity, or lower skip_ranks")
    save_npy(out / "matches.npy", matches)  # [N, m]
    save_npy(out / "match_scores.npy", scores)

    # What these negatives are like, beside sampled ones.
    pool = _core.sample_uniform(*graph, prep.n_items, users, 4, run.seed, run.n_threads)  # [N, 4]
    hardest = np.einsum("nd,nmd->nm", cf[0][users], cf[1][pool]).argmax(axis=1)
    kinds = {
        "uniform": pool[:, :1],
        "dns (M = 4)": np.take_along_axis(pool, hardest[:, None], 1),
        "nearest item": matches[:, :1],
        f"nearest {cfg.n_matches} items": matches,
    }
    table = negatives.quality(kinds, users, prep, cf, text)
    save_json(out / "quality.json", table)
    for figure in table["uniform"]:
        say(f"[generate] {figure:22}" + "".join(f"{name}: {figures[figure]!s:<12}" for name, figures in table.items()))
    nothing = Csr(np.zeros_like(prep.train.indptr), prep.train.indices[:0], prep.n_items)
    nearest = nearest_items(z, items, users, nothing, 1, cfg, run.n_threads)[0]  # [N, 1]
    n_taken = int((nearest >= 0).sum() - _core.filter_candidates(*graph, users, nearest)[1].sum())
    say(f"[generate] the nearest item of {n_taken / len(pairs):.1%} of the negatives is one their user took: left out")
    counts |= {"pairs": len(pairs), "pairs without match": int((matches[:, 0] < 0).sum())}
    counts["pairs whose nearest item was taken"] = n_taken
    return {"counts": counts, "timing": timing}


command = StageCommand("generate", GenerateConfig, main, reads=("prep", "sft"))
if __name__ == "__main__":
    command()
