"""Several configs, each trained with several seeds and evaluated on the same people."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from data_pipelines.files import write
from flexavatar_jax.evaluate import evaluate
from flexavatar_jax.evaluation.people import SECTORS
from flexavatar_jax.train import train
from flexavatar_jax.training.metric_log import read_metrics

MEASURES = {
    "psnr_unseen": ("PSNR, dB", 2),
    "ssim_unseen": ("SSIM", 3),
    "iou_unseen": ("mask IoU", 3),
    "identity": ("identity rank-1", 2),
}
"""Of each sector, with a title and digits."""

Results = dict[str, dict[str, dict[str, Any]]]


def read_experiment(path: str) -> tuple[str, ConfigDict]:
    """Name and config of `FILE.py`, or of `FILE.py:NAME`, whose `get_config` takes the name.

    Raises:
      UserError: no such file, or no `get_config` in it.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--configs names {file}, which is no file; expected FILE.py[:NAME],...")
    spec = importlib.util.spec_from_file_location(f"experiment_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--configs names {file}, which has no get_config(); see configs/demo.py")
    return argument or Path(file).stem, module.get_config(*([argument] if argument else []))


def run_matrix(
    configs: dict[str, ConfigDict], seeds: list[int], folder: epath.PathLike
) -> Iterator[tuple[str, int, int]]:
    """Trains and evaluates every config with every seed, in `folder`/NAME/SEED.

    Seed by seed, so that all configs have one before any has two. What is there is not done again,
    and a training that was stopped goes on. Yields name, seed and exit status (0: done) of each.
    """
    for seed in seeds:
        for name, config in configs.items():
            workdir = epath.Path(folder) / name / str(seed)
            status = 0
            if not _is_done(workdir, config.steps):
                seeded = ConfigDict(config)
                seeded.seed = seed
                status = train(seeded, workdir)
                if not status:
                    evaluate(workdir)
            yield name, seed, status


def _is_done(workdir: epath.Path, steps: int) -> bool:
    metrics = workdir / "metrics.json"
    return metrics.exists() and json.loads(metrics.read_text())["steps"] == steps


def read_results(configs: dict[str, ConfigDict], folder: epath.PathLike) -> Results:
    """Config -> seed -> the metrics of `evaluate`, of all runs that are finished."""
    results: Results = {}
    for name, config in configs.items():
        for workdir in sorted(epath.Path(folder).glob(f"{name}/*")):
            if _is_done(workdir, config.steps):
                metrics = json.loads((workdir / "metrics.json").read_text())
                results.setdefault(name, {})[workdir.name] = metrics
    return results


def spread_text(values: list[float], digits: int) -> str:
    """Mean, and with several values their standard deviation (of the sample)."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(results: Results) -> list[list[str]]:
    """Titles, then a row a config: mean and spread over its seeds, a column a measure and sector.

    PSNR and SSIM by sector, then what is measured once.
    """
    columns = [
        (f"{key}_{name}", f"{title}, {name}" if name != "all" else title, digits)
        for key, (title, digits) in MEASURES.items()
        for name in ("all", *SECTORS)
    ]
    columns += [
        ("mouth_correlation", "mouth follows", 2),
        ("jaw_change", "jaw opens", 3),
        ("eyes_correlation", "eyes follow", 2),
        ("gaze_change", "eyes turn", 3),
        ("steadiness", "steady under code's pose, dB", 1),
        ("seconds", "training, s", 0),
    ]
    some = [metrics for seeds in results.values() for metrics in seeds.values()]
    columns = [column for column in columns if any(column[0] in metrics for metrics in some)]
    rows = [["config", "seeds", "steps", *(title for _, title, _ in columns)]]
    for name, seeds in results.items():
        cells = [name, str(len(seeds)), str(next(iter(seeds.values()))["steps"])]
        for key, _, digits in columns:
            values = [metrics[key] for metrics in seeds.values() if key in metrics]
            cells.append(spread_text(values, digits) if values else "")
        rows.append(cells)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row has the titles."""
    titles, *others = rows
    lines = [titles, ["---"] * len(titles), *others]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def commit() -> str:
    """The repository's commit, marked if files differ from it; "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


def write_results(results: Results, folder: epath.Path) -> None:
    """`folder`/results.json: `{"commit": ..., "runs": {config: {seed: metrics}}}`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commit": commit(), "runs": results}, indent=2) + "\n"
    write(folder / "results.json", text)


COLOURS = ("#c33", "#e90", "#36c", "#292", "#639", "#099", "#963", "#666")


def curves(configs: dict[str, ConfigDict], folder: epath.PathLike) -> str:
    """SVG: the training loss of each config's first seed over its steps, both log scales."""
    lines = {}
    for name in configs:
        runs = sorted(epath.Path(folder).glob(f"{name}/*/metrics.jsonl"))
        found = [(row["step"], row["loss"]) for row in read_metrics(runs[0].parent)] if runs else []
        if len(found) > 1:
            lines[name] = np.log(np.array(found, float))
    if not lines:
        return ""
    width, height = 600, 300
    every = np.concatenate(list(lines.values()))
    low, high = every.min(0), every.max(0)
    parts = []
    for (name, points), colour in zip(lines.items(), COLOURS * 9, strict=False):
        at = (points - low) / np.maximum(high - low, 1e-9)
        path = " ".join(f"{width * x:.1f},{height * (1 - y):.1f}" for x, y in at)
        row = 16 * len(parts)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>'
            f'<text x="{width - 150}" y="{14 + row}" fill="{colour}">{name}</text>'
        )
    numbers = "".join(
        f'<text x="-8" y="{height * (1 - part) + 4:.0f}" text-anchor="end">'
        f"{np.exp(low[1] + part * (high[1] - low[1])):.3g}</text>"
        f'<text x="{width * part:.0f}" y="{height + 18}" text-anchor="middle">'
        f"{np.exp(low[0] + part * (high[0] - low[0])):.0f}</text>"
        for part in (0, 0.5, 1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-60 -10 {width + 90} {height + 40}" '
        f'width="{width + 90}" font-family="sans-serif" font-size="12">'
        f'<rect x="-60" y="-10" width="{width + 90}" height="{height + 40}" fill="white"/>'
        f'<path d="M0 0V{height}H{width}" fill="none" stroke="#ccc"/>{"".join(parts)}'
        f'<g fill="#666">{numbers}</g></svg>\n'
    )
