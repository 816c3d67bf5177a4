"""Both sources, each with its own bias sink: the paper's method."""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=True, multi_view=True, sinks=True)
