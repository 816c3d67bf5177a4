"""Monocular clips alone: many people, each from the front only.

    python -m flexavatar_jax.train --config configs/ablation/only_mono.py --workdir runs/only_mono

Five minutes on two CPU cores, with `make ablation`'s data; 11.0 dB on unseen people.
"""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=True, multi_view=False, sinks=False)
