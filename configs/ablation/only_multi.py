"""Multi-view captures alone: whole heads of few people.

    python -m flexavatar_jax.train --config configs/ablation/only_multi.py --workdir runs/only_multi

Five minutes on two CPU cores, with `make ablation`'s data; 13.2 dB on unseen people.
"""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=False, multi_view=True, sinks=False)
