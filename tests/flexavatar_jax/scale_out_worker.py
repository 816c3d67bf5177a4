"""Steps of a small experiment on meshes of 8 virtual devices: losses and collectives, as JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python scale_out_worker.py CONFIG OUT
"""

import json
import sys

import jax
from ml_collections import ConfigDict

from data_pipelines.mixture import make_iterator
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.planning.hlo import collectives
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training.sharding import make_mesh, place
from flexavatar_jax.training.train_step import TrainProgram

LAYOUTS = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))


def run(config: ConfigDict, layout: tuple[int, int, int]) -> dict:
    devices = jax.devices()[: layout[0] * layout[1] * layout[2]]
    mesh = make_mesh(*layout, devices=devices)
    program = TrainProgram.create(config, mesh, load_template())
    data = make_iterator(config.data, config.seed, config.batch)
    state, frozen, step, losses = program.init(), FrozenNetworks(), None, []
    for _ in range(config.steps):
        batch = place(next(data), mesh)
        step = step or program.jitted_step().lower(state, frozen, batch).compile()
        state, metrics, _ = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "collectives": collectives(step.as_text())}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        config = ConfigDict(json.load(file))
    results = {str(layout): run(config, layout) for layout in LAYOUTS}
    params = TrainProgram.create(config, make_mesh(), load_template()).abstract_state.params
    results["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)
