"""What a finished run has to say: the table of results."""

from pathlib import Path

import numpy as np

from hnlm_ref.artifacts import load_json


def table(run_dir: Path) -> str:
    """Methods by metrics as text: mean and spread (sample standard deviation) over seeds, seconds of training."""
    result = load_json(run_dir / "eval" / "metrics.json")
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in result["k"]]
    rows = [["method", *columns, "seeds", "seconds"]]
    for method, seeds in result["methods"].items():
        row = [method]
        for column in columns:
            values = np.array([seed[column] for seed in seeds.values()])
            spread = f" ±{values.std(ddof=1):.4f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.4f}{spread}")
        manifests = [load_json(run_dir / "train" / method / seed / "manifest.json") for seed in seeds]
        seconds = sum(manifest["timing"]["seconds"] for manifest in manifests) / len(manifests)
        rows.append([*row, str(len(seeds)), f"{seconds:.1f}"])
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
