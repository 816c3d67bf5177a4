"""The paper's ablation at the demo's size: four runs that differ in sources and sinks alone.

    make ablation

Three seeds of each take an hour of two CPU cores; docs/ablation has what they reach.
Multi-view people are scarce, as in the paper (60, for 2,000 monocular ones), and the monocular
clips have the leak: head pose in the code tells where the camera stands, and tracking errs as one
camera's does. So does that of the portraits that test people's avatars are made of; what these
avatars are held to are calibrated captures.
"""

from ml_collections import ConfigDict

from configs import demo

MONOCULAR, MULTI_VIEW = "procedural_monocular", "procedural_multiview"
SHARES = {MONOCULAR: 0.7, MULTI_VIEW: 0.3}
"""Of the examples, where both sources are used: monocular video is what there is plenty of."""

REPORTED_SIZE = 1.2
"""What monocular tracking takes heads for, in training clips (Makefile) and test portraits."""


def make_config(*, monocular: bool, multi_view: bool, sinks: bool) -> ConfigDict:
    """The common setting, on one or both sources, with a bias sink for each or one for all."""
    config = demo.get_config()
    config.steps = config.optimizer.decay_steps = 500
    config.eval.every = 250
    config.eval.portrait_size = REPORTED_SIZE
    config.data.root = "data/ablation"
    sources = [name for name, on in ((MONOCULAR, monocular), (MULTI_VIEW, multi_view)) if on]
    total = sum(SHARES[name] for name in sources)
    config.data.mixture = ConfigDict({name: SHARES[name] / total for name in sources})
    config.model.bias_sinks = sinks
    config.checkpoint.keep = 1
    return config
