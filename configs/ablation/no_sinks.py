"""Both sources, and one and the same sink for both."""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=True, multi_view=True, sinks=False)
