"""How the tests check signatures: `jaxtyping`'s import hook in conftest takes `check` from here."""

import pathlib

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from etils import epath

check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,
        hint_overrides=BeartypeHintOverrides(
            {
                int: int | np.integer,
                epath.Path: epath.Path | pathlib.Path,
                pathlib.Path: pathlib.Path | epath.Path,
            }
        ),
    )
)
"""Beartype, for which integers are numbers, NumPy's integers are integers, and paths are paths."""
