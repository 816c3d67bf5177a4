"""Monocular clips alone: many people, each from the front only."""

from ml_collections import ConfigDict

from configs.ablation import make_config


def get_config() -> ConfigDict:
    return make_config(monocular=True, multi_view=False, sinks=False)
