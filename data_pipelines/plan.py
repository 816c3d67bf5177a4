"""What a run's input needs of its hosts, and whether they have it, before they are paid for:

    python -m data_pipelines.plan --config configs/flex1.py --topology v5e:16x16 \\
        --config.batch=256 --step-time 0.14

The step's time is what `flexavatar_jax.compile_ahead` predicts for the same config and topology.
`--figures FILE` are those that `data_pipelines.benchmark DIR --json FILE` measured: of your own
data, at best read from the bucket by a machine of that type. Without, the project's own are taken.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import runpy
import sys
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import MissingFileError, UserError, report_error
from data_pipelines.examples import REQUESTS
from data_pipelines.figures import MEASURED, Figures
from data_pipelines.machines import EXAMPLES, Machine, parse_topology

REQUEST_SECONDS = 0.05
"""Assumed of a request to a bucket in the same region where figures were measured on a disk."""

BATCHES_HELD = 3
"""By each worker: the one that it makes, the one that it offers, the one that is taken."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 also where input would starve a step."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.plan",
        description="Says what a run's input needs a host.",
        epilog="--config.FIELD=VALUE changes a field of the config.",
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--topology", required=True, help=f"such as {EXAMPLES}")
    parser.add_argument("--step-time", type=float, help="seconds of a step to be fed")
    parser.add_argument("--figures", default=str(MEASURED), help="of `benchmark --json`")
    args, changes = parser.parse_known_args(argv)
    try:
        if args.step_time is not None and not args.step_time > 0:
            raise UserError(f"--step-time is {args.step_time}; expected a positive number")
        config = read_config(args.config, changes)
        machine, hosts = parse_topology(args.topology)
        plan = Plan.of(config, machine, hosts, Figures.read(args.figures))
        print(plan.report(args.step_time))
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What input can give and takes on each host.

    Attributes:
      machine, hosts: which, and how many.
      figures: what an image costs.
      examples: a step on each host.
      images: the same in images, inputs and targets.
      workers: processes that read, on each host.
      workers_memory: bytes that they take.
      limits: images a second at most, by what sets the limit.
    """

    machine: Machine
    hosts: int
    figures: Figures
    examples: int
    images: int
    workers: int
    workers_memory: float
    limits: dict[str, float]

    @classmethod
    def of(cls, config: ConfigDict, machine: Machine, hosts: int, figures: Figures) -> Plan:
        """The plan of a run; raises `UserError` if its batch does not divide among processes."""
        processes = hosts * machine.processes
        if config.batch % processes:
            raise UserError(
                f"a batch of {config.batch} does not divide among the {processes} processes of "
                f"{hosts} hosts; change --config.batch"
            )
        data, each = config.data, config.batch // processes
        if data.image_size != figures.size:
            # What a picture costs grows with its area.
            scale = (data.image_size / figures.size) ** 2
            figures = dataclasses.replace(
                figures,
                size=data.image_size,
                stages={
                    name: s if name == "draw" else scale * s for name, s in figures.stages.items()
                },
                record_bytes=scale * figures.record_bytes,
            )
        shapes = Batch.shapes(each, data.targets, data.image_size).values()
        batch = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)
        busy = max(1, data.workers)  # 0: threads of the process itself
        workers = busy * machine.processes
        waits = figures.request_seconds if figures.remote else REQUEST_SECONDS
        at_a_time = workers * min(REQUESTS, each)
        return cls(
            machine=machine,
            hosts=hosts,
            figures=figures,
            examples=each * machine.processes,
            images=each * machine.processes * (1 + data.targets),
            workers=workers,
            workers_memory=workers * (figures.worker_bytes + BATCHES_HELD * batch),
            limits={
                f"the {workers} workers": workers / figures.seconds,
                f"the {machine.cores} cores": machine.cores / figures.seconds,
                f"{at_a_time} requests at a time, {1e3 * waits:.0f} ms each": at_a_time / waits,
                "the network": machine.network / figures.record_bytes,
            },
        )

    def report(self, step_time: float | None) -> str:
        """Needs and means in words; `step_time` seconds to be fed, if known."""
        m, f = self.machine, self.figures
        slowest = min(self.limits, key=self.limits.get)
        rate = self.limits[slowest]
        lines = [
            f"{self.hosts} hosts of {m.name}: {m.cores} cores, {m.memory / 1e9:.0f} GB, "
            f"{8 * m.network / 1e9:.0f} Gbit/s each",
            f"step: {self.examples} examples a host, {self.images} images of {f.size} pixels",
            f"an image takes {1e3 * f.seconds:.1f} ms of a core ({f.machine}) and "
            f"{f.record_bytes / 1e3:.0f} kB, by {', '.join(f.data)}",
            "at most so many images a second come to a host by",
            *(f"  {name:<45}{limit:12.0f}" for name, limit in self.limits.items()),
            f"so a step is fed in {self.images / rate:.3f} s; what sets the limit: {slowest}",
            f"workers take {self.workers_memory / 1e9:.1f} of {m.memory / 1e9:.0f} GB",
        ]
        if self.workers > m.cores:
            lines.append(f"WARNING: {self.workers} workers a host have only {m.cores} cores")
        if self.workers_memory > m.memory / 2:
            lines.append("WARNING: workers take more than half of a host's memory")
        if not f.remote:
            lines.append(
                f"these figures are of a disk: requests to a bucket are taken for "
                f"{1e3 * REQUEST_SECONDS:.0f} ms and no work; measure them there"
            )
        if step_time:
            needed = self.images / step_time
            lines.append(
                f"a step of {step_time:g} s needs {needed:.0f} images/s a host: "
                f"{needed * f.seconds:.1f} cores and {8e-9 * needed * f.record_bytes:.2f} Gbit/s"
            )
            if rate < needed:
                lines.append(
                    f"WARNING: input would starve the step: {rate / needed:.0%} of that comes by "
                    f"{slowest}{self._remedy(slowest, needed)}"
                )
            else:
                lines.append(f"input feeds the step {rate / needed:.1f} times")
        return "\n".join(lines)

    def _remedy(self, slowest: str, needed: float) -> str:
        per_process = np.ceil(needed * self.figures.seconds / self.machine.processes)
        if "network" in slowest or per_process * self.machine.processes > self.machine.cores:
            return "; take more hosts or a larger one"
        return f"; set --config.data.workers={per_process:.0f} or more"


def read_config(path: str, changes: list[str]) -> ConfigDict:
    """The config of a file with fields changed by "--config.FIELD=VALUE"; raises `UserError`."""
    if not epath.Path(path).is_file():
        raise MissingFileError(f"--config {path}: no such file")
    config: ConfigDict = runpy.run_path(path)["get_config"]().lock()
    for change in changes:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", change)
        if not found:
            raise UserError(f"{change} is no option; fields are changed by --config.FIELD=VALUE")
        try:
            config.update_from_flattened_dict({found[1]: _value(found[2])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split()).split(". ")[0].strip("'")
            raise UserError(f"{change}: {reason}") from None
    return config


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
