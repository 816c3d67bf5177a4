"""The procedural data sets: clips of made-up people as the model's sources and its test see them.

- `procedural_monocular`: many people, each before one camera that stands nearly in front while the
  head turns. As real trackers report it, the turn is in the expression code (neck, R, t), so the
  code tells where the camera stands: the leak that bias sinks absorb. Trackers of one camera's
  video may report a part of the turn only (`reported_turn`; code and camera then err alike), and
  take heads for larger and farther than they are (`reported_size`), which one camera can't tell.
- `procedural_multiview`: few people amid cameras all round. Their heads turn too, so that a code's
  head pose does not tell the source; where the camera stands it does not tell either.
- `procedural_test`: other people, one camera in front (the input) and others all round.

Each clip follows from (seed, set, number) alone, so any of them can be made anywhere, in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, Frame
from data_pipelines.procedural.expression import head_to_world
from data_pipelines.procedural.figure import Figure
from data_pipelines.procedural.noise import waves
from data_pipelines.procedural.performance import as_tracked, perform
from data_pipelines.procedural.person import sample_person
from data_pipelines.procedural.renderer import render

INPUT_CAMERA = "input"
"""Name of the test set's camera in front."""

_STREAMS = {"procedural_monocular": 0, "procedural_multiview": 1, "procedural_test": 2}
"""Numbers that keep the sets' random streams apart: nobody is in two sets."""


@dataclasses.dataclass(frozen=True)
class ProceduralSet:
    """One data set, made clip by clip.

    Attributes:
      name: one of `procedural_monocular`, `procedural_multiview`, `procedural_test`.
      num_clips: people; a clip each.
      timesteps: moments of a clip.
      num_cameras: cameras that see each moment.
      size: side of the pictures in pixels.
      seed: of everything random.
      reported_turn: see `performance.as_tracked`; 1 unless one camera alone is tracked.
      reported_size: how large heads, and how far cameras, are taken to be, in terms of what they
        are; likewise.
      distance_spread: how far cameras' distances differ between clips: at s, a clip's cameras stand
        at 1 / (1 + s) to 1 + s times the ordinary distance, with a focal length by which heads keep
        their size in the picture.
    """

    name: str
    num_clips: int
    timesteps: int
    num_cameras: int
    size: int
    seed: int
    reported_turn: float = 1.0
    reported_size: float = 1.0
    distance_spread: float = 0.0

    @property
    def frames_per_clip(self) -> int:
        return self.timesteps * self.num_cameras

    def clip_name(self, index: int) -> str:
        return f"{self.name.removeprefix('procedural_')}_{index:05d}"

    def clip(self, index: int) -> Iterator[Frame]:
        """Frames of a person, moment by moment, camera by camera.

        Raises:
          IndexError: if there is no such clip.
        """
        if not 0 <= index < self.num_clips:
            raise IndexError(f"{self.name} has clips 0 to {self.num_clips - 1}, not {index}")
        rng = np.random.default_rng([self.seed, _STREAMS[self.name], index])
        figure = Figure(sample_person(rng), self.size)
        monocular = self.name == "procedural_monocular"
        codes = perform(rng, self.timesteps, turn=1.0 if monocular else 0.5)
        views = _views(rng, self.name, self.num_cameras)
        backdrop = _backdrop(rng, self.size)
        zoom = (1 + self.distance_spread) ** rng.uniform(-1, 1)
        for cam2world, K in views.values():
            cam2world[:3, 3] *= zoom
            K[[0, 1], [0, 1]] *= zoom
        for timestep, code in enumerate(codes):
            scene = figure.scene(code)
            reported = as_tracked(code, self.reported_turn)
            world2head = cameras.invert_rigid(head_to_world(code))
            reported_world2head = cameras.invert_rigid(head_to_world(reported))
            for camera, (cam2world, K) in views.items():
                image, mask = render(scene, world2head @ cam2world, K, self.size, backdrop)
                cam2head = reported_world2head @ cam2world
                cam2head[:3, 3] *= self.reported_size
                yield Frame(
                    image=image,
                    mask=mask,
                    cam2head=cam2head.astype(np.float32),
                    K=K.astype(np.float32),
                    expression=reported,
                    person=self.clip_name(index),
                    sequence="performance",
                    timestep=timestep,
                    camera=camera,
                    source=MONOCULAR if monocular else MULTI_VIEW,
                )


def procedural_sets(
    *,
    size: int = 128,
    seed: int = 0,
    monocular_people: int = 200,
    multiview_people: int = 20,
    test_people: int = 8,
    monocular_timesteps: int = 16,
    multiview_timesteps: int = 8,
    test_timesteps: int = 3,
    num_cameras: int = 16,
    reported_turn: float = 1.0,
    reported_size: float = 1.0,
    distance_spread: float = 0.0,
) -> list[ProceduralSet]:
    """The three sets.

    Raises:
      ValueError: if a number is out of its range.
    """
    if not 16 <= size <= 512:
        raise UserError(f"size of procedural pictures must be 16 to 512 pixels, got {size}")
    counts = {
        "monocular_people": monocular_people,
        "multiview_people": multiview_people,
        "test_people": test_people,
        "monocular_timesteps": monocular_timesteps,
        "multiview_timesteps": multiview_timesteps,
        "test_timesteps": test_timesteps,
        "num_cameras": num_cameras,
    }
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} of the procedural sets must be 1 or more, got {count}")
    if seed < 0:
        raise UserError(f"seed of the procedural sets must be 0 or more, got {seed}")
    if not 0 <= reported_turn <= 1:
        raise UserError(f"reported_turn of the procedural sets must be 0 to 1, got {reported_turn}")
    if not 0.5 <= reported_size <= 2:
        raise UserError(
            f"reported_size of the procedural sets must be 0.5 to 2, got {reported_size}"
        )
    if not 0 <= distance_spread <= 1:
        raise UserError(
            f"distance_spread of the procedural sets must be 0 to 1, got {distance_spread}"
        )

    def make(
        name: str, people: int, timesteps: int, views: int, **tracking: float
    ) -> ProceduralSet:
        return ProceduralSet(
            f"procedural_{name}",
            people,
            timesteps,
            views,
            size,
            seed,
            distance_spread=distance_spread,
            **tracking,
        )

    errors = {"reported_turn": reported_turn, "reported_size": reported_size}
    return [
        make("monocular", monocular_people, monocular_timesteps, 1, **errors),
        make("multiview", multiview_people, multiview_timesteps, num_cameras),
        make("test", test_people, test_timesteps, num_cameras),
    ]


def _views(
    rng: np.random.Generator, name: str, count: int
) -> dict[str, tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "3 3"]]]:
    """Camera name -> cam2world and K: in front, or all round at changing heights."""
    views = {}
    for i in range(count):
        azimuth, elevation = 360 * i / count, 12 + 22 * np.sin(2.4 * i)
        label = f"cam_{i:02d}"
        if name == "procedural_monocular":
            azimuth, elevation = rng.normal(0, 5), rng.normal(0, 4)
        elif name == "procedural_test" and i == 0:
            elevation, label = 0.0, INPUT_CAMERA
        else:
            azimuth, elevation = azimuth + rng.uniform(-8, 8), elevation + rng.uniform(-5, 5)
        target = np.array([0, -0.002, -0.02]) + rng.normal(0, 0.004, 3)
        distance = rng.uniform(0.98, 1.06)
        focal = rng.uniform(3.0, 3.2)
        center = 0.5 + rng.normal(0, 0.004, 2)
        K = np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1]])
        views[label] = cameras.orbit(azimuth, elevation, distance, target), K
    return views


def _backdrop(rng: np.random.Generator, size: int) -> Float[np.ndarray, "h w 3"]:
    """What is behind a person: plain, a gradient or clouds, of random colours."""
    kind = rng.choice(["plain", "gradient", "clouds"])
    one, other = rng.uniform(0, 1, (2, 3)).astype(np.float32)
    grid = (np.indices((size, size)) + 0.5) / size
    if kind == "plain":
        amount = np.zeros((size, size), np.float32)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        amount = 0.5 + 0.6 * ((grid[1] - 0.5) * np.cos(angle) + (grid[0] - 0.5) * np.sin(angle))
    else:
        amount = 0.5 + 0.25 * waves(np.moveaxis(grid, 0, -1), rng, rng.uniform(0.15, 0.6))
    return one + np.clip(amount, 0, 1).astype(np.float32)[..., None] * (other - one)
