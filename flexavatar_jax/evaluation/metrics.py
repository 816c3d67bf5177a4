"""What is measured on test people, and the best constant that it is held against."""

from __future__ import annotations

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.shards import open_at_size
from flexavatar_jax.evaluation.people import SECTORS, evenly_spaced, on_white, sector
from flexavatar_jax.training.losses import psnr, ssim


def score(
    predictions: Float[np.ndarray, "T H W 3"], truths: Float[np.ndarray, "T H W 3"]
) -> dict[str, Float[np.ndarray, "T"]]:
    """PSNR (dB) and SSIM of each image, RGB in [0, 1]."""
    return {
        "psnr": np.asarray(psnr(predictions, truths)),
        "ssim": np.asarray(ssim(predictions, truths)),
    }


def mask_iou(
    alpha: Float[np.ndarray, "T H W"], masks: UInt8[np.ndarray, "T H W"]
) -> Float[np.ndarray, "T"]:
    """Intersection over union of where an avatar and where the person covers half of a pixel.

    An empty avatar of a person who is there gets 0; two empty images are alike: 1.
    """
    ours, theirs = alpha >= 0.5, masks >= 128
    both, either = ((ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2)))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def summarise(rows: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Means over images, all and by sector, of the scores of (sector, scores)."""
    metrics = {}
    for name in ("all", *SECTORS):
        chosen = [scores for where, scores in rows if name in ("all", where)]
        for key in chosen[0] if chosen else ():
            metrics[f"{key}_{name}"] = round(float(np.mean([s[key] for s in chosen])), 4)
    return metrics


def training_sets(config: ConfigDict) -> list[epath.Path]:
    """Folders of the data sets trained on; those of weight 0 need not be there."""
    mixture = config.data.mixture.items()
    return [epath.Path(config.data.root) / name for name, weight in mixture if weight != 0]


def sector_means(config: ConfigDict) -> dict[str, Float[np.ndarray, "H W 3"]]:
    """The mean training image of each sector: the best constant in the mean square.

    Sectors that training never saw have the mean of all.
    """
    size = config.model.image_size
    sums = {name: np.zeros((size, size, 3)) for name in SECTORS}
    counts = dict.fromkeys(SECTORS, 0)
    for folder in training_sets(config):
        data = open_at_size(folder, size)
        wanted = evenly_spaced(len(data), config.eval.constant_images)
        for i in tqdm(wanted, desc=f"mean image of {data.name}", unit="image"):
            frame = data.frame(int(i), size)
            sums[sector(frame.cam2head)] += on_white(frame)
            counts[sector(frame.cam2head)] += 1
    everything = sum(sums.values()) / sum(counts.values())
    return {n: sums[n] / counts[n] if counts[n] else everything for n in SECTORS}
