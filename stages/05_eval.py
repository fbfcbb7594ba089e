"""Stage 5: rank the whole catalogue for every test user and compare the methods.

Paper: evaluation section. Reads prep/ (the only stage to open its test part), train/*. Writes eval/: metrics.json,
per_user/*.npy.

    python stages/05_eval.py --preset toy     # about 1 s on a CPU
"""

from dataclasses import dataclass

import numpy as np

from hnlm_ref.artifacts import Run, load_npy, save_json, save_npy
from hnlm_ref.knobs import knob, stage_command


@dataclass(frozen=True)
class EvalConfig:
    """Knobs of stage 5."""

    k: tuple[int, ...] = knob((10, 20), "lengths K of the recommended lists, all evaluated in one pass", low=1)


def main(cfg: EvalConfig, run: Run) -> dict:
    from hnlm_ref import metrics

    # What is found again: the test items. What can never be recommended: training and validation items (case C16).
    prep, test = run.prep(), run.test()
    known = prep.train.union(prep.valid)
    evaluated = test.degrees() > 0
    (run.out / "per_user").mkdir(exist_ok=True)

    # One row of metrics per user, for every method and seed.
    results: dict[str, dict] = {}
    for name in run.trained():
        folder = run.folder(name)
        user_emb, item_emb = load_npy(folder / "user.npy"), load_npy(folder / "item.npy")  # [U, d], [I, d]
        per_user = metrics.evaluate(user_emb, item_emb, known, test, cfg.k, run.n_threads)
        _, method, seed = name.split("/")
        save_npy(run.out / "per_user" / f"{method}-{seed}.npy", np.stack(list(per_user.values())))  # [n_columns, U]
        results.setdefault(method, {})[seed] = {column: metrics.mean(values) for column, values in per_user.items()}

    save_json(
        run.out / "metrics.json",
        {"k": list(cfg.k), "columns": list(per_user), "users": int(evaluated.sum()), "methods": results},
    )
    return {"counts": {"users": int(evaluated.sum()), "users without test items": int((~evaluated).sum())}}


command = stage_command("eval", EvalConfig, main, reads=lambda cfg, run: ("prep", *run.trained()))
if __name__ == "__main__":
    command()
