"""What was tried to learn most in the demo's few minutes: the demo with one thing changed.

    python -m flexavatar_jax.compare --configs configs/search.py:demo,configs/search.py:adam ...

docs/experiments.md has the results.
"""

from ml_collections import ConfigDict

from configs import demo

SETTINGS = {
    "demo": {},
    "adam": {"optimizer.name": "adam"},
    "adam_fast": {"optimizer.name": "adam", "optimizer.learning_rate": 3e-3},
    "patch_16": {"model.patch_size": 16},
    "muon_slow": {"optimizer.muon_learning_rate": 2.5e-3},
    "muon_fast": {"optimizer.muon_learning_rate": 1e-2},
    "encoder_1": {"model.encoder_depth": 1},
    "decoder_1": {"model.decoder_depth": 1},
    "width_96": {"model.width": 96},
    "gaussians_36": {
        "model.gaussian_resolution": 36,
        "model.uv_resolution": 36,
        "model.max_scale": 0.027,
    },
    "batch_8": {"batch": 8},
    "targets_2": {"batch": 8, "data.targets": 2},
    "l1": {"loss.l1": 0.8, "loss.mse": 0.0},
    "no_ssim": {"loss.ssim": 0.0},
}


def get_config(name: str = "demo") -> ConfigDict:
    """The demo with the changes of the setting `name`."""
    config = demo.get_config()
    for field, value in SETTINGS[name].items():
        *parents, last = field.split(".")
        holder = config
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    config.checkpoint.keep = 1
    return config
