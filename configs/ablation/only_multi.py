"""Multi-view captures alone: whole heads of few people."""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=False, multi_view=True, sinks=False)
