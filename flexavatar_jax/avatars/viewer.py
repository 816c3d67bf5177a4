"""Avatars in the browser, live: `avatar view`. The page and its splats are drawn by viser.

One thread decodes: callbacks of sliders say what is wanted and leave, so that only the newest
position of a slider that is being dragged is decoded. All tabs show the same avatar, each from a
camera of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, neutral_code
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar
from flexavatar_jax.avatars.export.splats import clamp_scales, covariances, rotations, write_splats
from flexavatar_jax.avatars.interpolation import interpolate
from flexavatar_jax.avatars.performances import read_performance
from flexavatar_jax.avatars.sliders import move, random_values, sliders_of
from kernels.ply import GaussianCloud

if TYPE_CHECKING:
    import viser

ReadAvatars = Callable[[argparse.Namespace, Sequence[str]], tuple[Animator, Sequence[Avatar]]]
"""Loads the model and the avatars that a command names."""

SCENE_SCALE = 100.0
"""viser sends covariances as float16, and those of a head, in square metres, are below its range:
the scene is in centimetres."""

FRAMES_PER_SECOND = 24
SINKS = {"multi-view (z_3D)": MULTI_VIEW, "monocular (z_2D)": MONOCULAR}
NO_CLIP = "none"
PICTURE_SIZES = ("256", "512", "1024", "2048")


def add_command(
    commands: argparse._SubParsersAction, model: argparse.ArgumentParser, read: ReadAvatars
) -> None:
    """Registers `view` with the parser of `flexavatar_jax.avatar`; `model` has its options."""
    command = commands.add_parser("view", parents=[model], help="look at avatars in the browser")
    command.add_argument(
        "avatars", nargs="+", metavar="AVATAR", help="FILE.avatar, or what one is made from"
    )
    command.add_argument(
        "--driving", action="append", default=[], help="performance to play; may be given again"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    command.add_argument("--port", type=int, default=8080, help="port to listen on, or one after")
    command.add_argument("--no-browser", action="store_true", help="don't open the browser")

    def run(args: argparse.Namespace) -> None:
        check_options(args)
        view_avatars(args, *read(args, args.avatars))

    command.set_defaults(run=run)


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` if viser isn't installed or the port is none."""
    try:
        import viser  # noqa: F401
    except ImportError as error:
        raise UserError("`avatar view` needs viser; `pip install '.[view]'`") from error
    if not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port}; expected 1 to 65535")


def view_avatars(args: argparse.Namespace, animator: Animator, avatars: Sequence[Avatar]) -> None:
    """The `view` command, its options checked: runs until Ctrl-C."""
    import viser

    clips = {Path(source).name: read_performance(source).expressions for source in args.driving}
    server = viser.ViserServer(host=args.host, port=args.port, label="FlexAvatar", verbose=False)
    viewer = Viewer(server, animator, avatars, clips)
    address = f"http://{'localhost' if args.host == '127.0.0.1' else args.host}:{server.get_port()}"
    print(f"{address} shows the avatar; Ctrl-C ends", flush=True)
    if not args.no_browser and _has_display():
        webbrowser.open(address)
    try:
        viewer.run()
    except KeyboardInterrupt:
        print()
    finally:
        server.stop()


def _has_display() -> bool:
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or sys.platform in ("darwin", "win32")


@dataclasses.dataclass
class Wanted:
    """What the controls ask for: all that decides which Gaussians are shown."""

    first: int = 0
    second: int = 0
    between: float = 0.0
    source: int = MULTI_VIEW
    clip: str = NO_CLIP
    frame: float = 0.0
    values: dict[str, float] = dataclasses.field(default_factory=dict)


class Viewer:
    """Controls and splats on a viser server.

    Args:
      server: a running server, which it fills.
      animator: of the model that decodes the avatars.
      avatars: to choose among.
      clips: performances by name, [T, 135] each.
    """

    def __init__(
        self,
        server: viser.ViserServer,
        animator: Animator,
        avatars: Sequence[Avatar],
        clips: dict[str, Float[np.ndarray, "T 135"]],
    ):
        self.server, self.avatars = server, avatars
        # One expression at a time: a chunk of more would only keep a slider waiting.
        self.animator = Animator(animator.loaded, chunk=1)
        self.sliders = sliders_of(animator.loaded.config)
        self.clips = {a.name: a.expressions for a in avatars if len(a.expressions) > 1} | clips
        self.wanted = Wanted()
        self.gaussians: GaussianCloud | None = None
        self.updates = 0
        """How often splats were sent."""
        self._changed = threading.Event()
        self._playing = False
        self._quiet = False
        server.scene.set_up_direction("+y")
        self._place_camera(avatars[0])
        self._controls()
        self.update()

    # --- what is shown

    def run(self) -> None:
        """Decodes whatever is asked for, until interrupted."""
        while True:
            self.step(timeout=None if not self._playing else 1 / FRAMES_PER_SECOND)

    def step(self, timeout: float | None = 0.0) -> None:
        """Waits for a change, at most `timeout` seconds, and shows it."""
        start = time.monotonic()
        self._changed.wait(timeout)
        self._changed.clear()
        if self._playing:
            time.sleep(max(0.0, 1 / FRAMES_PER_SECOND - (time.monotonic() - start)))
            self._advance(time.monotonic() - start)
        self.update()

    def update(self) -> None:
        """Decodes what is wanted and sends it to all tabs."""
        wanted = dataclasses.replace(self.wanted, values=dict(self.wanted.values))
        gaussians = self.animator.gaussians(
            self.code(wanted), self.expression(wanted)[None], wanted.source
        )
        gaussians, _ = clamp_scales(GaussianCloud(*(x[0] for x in gaussians[:5])))
        self.gaussians = gaussians
        splats = (
            gaussians.means * SCENE_SCALE,
            covariances(gaussians) * SCENE_SCALE**2,
            np.clip(gaussians.colors, 0, 1),
            gaussians.opacities[:, None],
        )
        if self.updates:
            self._splats.set_gaussians(*splats)
        else:
            self._splats = self.server.scene.add_gaussian_splats("/head", *splats)
        self.updates += 1

    def code(self, wanted: Wanted) -> Float[np.ndarray, "N D"]:
        """The avatar code, perhaps between two people."""
        first, second = (self.avatars[i].code for i in (wanted.first, wanted.second))
        if not wanted.between or wanted.first == wanted.second:
            return first
        return interpolate(first, second, np.array([wanted.between]))[0]

    def expression(self, wanted: Wanted) -> Float[np.ndarray, "135"]:
        """The expression code: sliders on top of a clip's frame, or of a relaxed face."""
        base = neutral_code()
        if wanted.clip != NO_CLIP:
            frames = self.clips[wanted.clip]
            base = frames[int(np.clip(round(wanted.frame), 0, len(frames) - 1))]
        return move(base, self.sliders, wanted.values)

    def picture(self, camera: viser.CameraHandle, size: int) -> Float[np.ndarray, "size size 3"]:
        """What a tab's camera sees, by the project's own rasterizer, in the middle square."""
        R = rotations(np.asarray(camera.wxyz, np.float64))
        cam2head = cameras.rigid(R, np.asarray(camera.position, np.float64) / SCENE_SCALE)
        focal = 0.5 / np.tan(camera.fov / 2)
        K = np.array([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]])
        wanted = self.wanted
        return self.animator.render(
            self.code(wanted),
            self.expression(wanted)[None],
            cam2head[None],
            K[None],
            size=size,
            source=wanted.source,
            background=tuple(x / 255 for x in self._background.value),
        )[0]

    # --- controls

    def _controls(self) -> None:
        gui = self.server.gui
        gui.configure_theme(control_layout="collapsible", show_logo=False, show_share_button=False)
        names = [f"{i + 1}: {a.name}" if len(self.avatars) > 1 else a.name
                 for i, a in enumerate(self.avatars)]  # fmt: skip
        with gui.add_folder("Avatar"):
            first = gui.add_dropdown("avatar", names)
            second = gui.add_dropdown("towards", names, initial_value=names[-1])
            between = gui.add_slider("between", 0.0, 1.0, 0.01, 0.0)
            second.visible = between.visible = len(names) > 1
            sink = gui.add_dropdown("bias sink", tuple(SINKS))
        self.wanted.second = len(names) - 1
        first.on_update(lambda _: self._want(first=names.index(first.value)))
        second.on_update(lambda _: self._want(second=names.index(second.value)))
        between.on_update(lambda _: self._want(between=between.value))
        sink.on_update(lambda _: self._want(source=SINKS[sink.value]))
        with gui.add_folder("Expression"):
            gui.add_button("Reset").on_click(lambda _: self.set_sliders({}))
            gui.add_button("Random").on_click(
                lambda _: self.set_sliders(random_values(self.sliders, np.random.default_rng()))
            )
            self._handles = {}
            for slider in self.sliders:
                label = f"{slider.name} {slider.unit}".strip()
                handle = gui.add_slider(label, slider.low, slider.high, slider.step, 0.0)
                handle.on_update(lambda _: self._read_sliders())
                self._handles[slider.name] = handle
        if self.clips:
            self._clip_controls(gui)
        with gui.add_folder("Picture", expand_by_default=False):
            self._background = gui.add_rgb("background", (255, 255, 255))
            self._background.on_update(lambda _: self._show_background())
            size = gui.add_dropdown("pixels", PICTURE_SIZES, initial_value="512")
            gui.add_button("Save picture").on_click(
                lambda event: self._save_picture(event.client, int(size.value))
            )
            gui.add_button("Save splats (.ply)").on_click(
                lambda event: event.client.send_file_download("head.ply", self.ply())
            )
            gui.add_button("Save slider values").on_click(
                lambda event: event.client.send_file_download(
                    "sliders.json", json.dumps(self.wanted.values, indent=2).encode()
                )
            )

    def _clip_controls(self, gui) -> None:
        with gui.add_folder("Performance"):
            clip = gui.add_dropdown("performance", (NO_CLIP, *self.clips))
            play = gui.add_button("Play")
            self._frame = gui.add_slider("frame", 0, max(map(len, self.clips.values())) - 1, 1, 0)
            self._speed = gui.add_slider("speed", 0.25, 2.0, 0.25, 1.0)

        def choose(_) -> None:
            self._want(clip=clip.value, frame=0.0)

        def toggle(_) -> None:
            if self.wanted.clip == NO_CLIP:
                clip.value = next(iter(self.clips))
                self._want(clip=clip.value)
            self._playing = not self._playing
            play.label = "Pause" if self._playing else "Play"
            self._changed.set()

        def scrub(_) -> None:
            if not self._quiet:
                self._want(frame=float(self._frame.value))

        clip.on_update(choose)
        play.on_click(toggle)
        self._frame.on_update(scrub)

    def set_sliders(self, values: dict[str, float]) -> None:
        """Puts the sliders somewhere; those without a value go to rest."""
        for name, handle in self._handles.items():
            handle.value = values.get(name, 0.0)
        self._read_sliders()

    def _read_sliders(self) -> None:
        values = {name: float(handle.value) for name, handle in self._handles.items()}
        self._want(values={name: value for name, value in values.items() if value})

    def _want(self, **changes) -> None:
        self.wanted = dataclasses.replace(self.wanted, **changes)
        self._changed.set()

    def _advance(self, seconds: float) -> None:
        frames = len(self.clips[self.wanted.clip]) if self.wanted.clip != NO_CLIP else 1
        ahead = seconds * FRAMES_PER_SECOND * self._speed.value
        frame = (self.wanted.frame + ahead) % frames
        self.wanted = dataclasses.replace(self.wanted, frame=frame)
        self._quiet = True
        self._frame.value = int(frame)
        self._quiet = False

    def _show_background(self) -> None:
        self.server.scene.set_background_image(
            np.full((8, 8, 3), self._background.value, np.uint8), format="png"
        )

    def _save_picture(self, client: viser.ClientHandle, size: int) -> None:
        image = np.round(self.picture(client.camera, size) * 255).astype(np.uint8)
        with tempfile.SpooledTemporaryFile() as file:
            Image.fromarray(image).save(file, "PNG")
            file.seek(0)
            client.send_file_download("avatar.png", file.read())

    def ply(self) -> bytes:
        """The Gaussians that are shown, as a .ply file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.ply"
            write_splats(path, self.gaussians)
            return path.read_bytes()

    def _place_camera(self, avatar: Avatar) -> None:
        """Tabs open with the avatar's own camera, and turn about the head."""
        camera, view = self.server.initial_camera, np.asarray(avatar.cam2head, np.float64)
        position, forward = view[:3, 3], view[:3, 2]
        camera.position = position * SCENE_SCALE
        camera.look_at = (position - (position @ forward) * forward) * SCENE_SCALE
        camera.up = (0.0, 1.0, 0.0)
        camera.fov = float(2 * np.arctan(0.5 / avatar.K[1, 1]))
