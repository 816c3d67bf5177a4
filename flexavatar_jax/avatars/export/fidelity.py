"""How true an avatar's web page is: its pictures against the decoder's, rendered by `kernels`.

    python -m flexavatar_jax.avatars.export.fidelity A.avatar --workdir runs/demo --driving CLIP

needs Chromium and Playwright (`pip install playwright`). Prints the table of docs/viewer.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.frame import neutral_code
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar, check_belongs, load_avatar
from flexavatar_jax.avatars.export.command import export_page, seen_expressions
from flexavatar_jax.avatars.performances import read_performance
from flexavatar_jax.avatars.sliders import move, sliders_of
from flexavatar_jax.runs.loading import load_model

READY = "canvas[data-ready]"
PATIENCE = 120_000
"""Milliseconds: WebGL by software on a busy machine."""

_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-first-run"),
)
_DRAW = """async ([camera, values, clip]) => {
  Object.assign(page, { fixed: camera, clip });
  page.setSliders(values);
  await page.settle();
  page.draw();
  return page.canvas.toDataURL();
}"""

Pictures = list[tuple[dict[str, float], int | None, Float[np.ndarray, "135"]]]
"""What is compared: sliders' values, a frame of the clip, and the code that they stand for."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium, its WebGL done in software.

    Raises:
      UserError: Chromium or Playwright is not installed.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        raise UserError("there is no chromium to open the page with: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("the browser is driven by Playwright: pip install playwright") from error
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield browser
        browser.close()


def open_page(browser: Any, address: str, ready: str = READY, width: int = 640, height: int = 420):
    """A new tab at `address` once `ready` is there; its errors and requests gather on it."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.troubles, page.requests = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.troubles.append(m.text))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    page.wait_for_selector(ready)
    return page


def page_picture(
    tab: Any,
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    size: int,
    values: dict[str, float],
    frame: int | None = None,
) -> Float[np.ndarray, "size size 3"]:
    """What the page of an avatar draws for sliders, or for a frame of its first clip."""
    camera = {"cam2head": cam2head.tolist(), "K": K.tolist(), "size": size}
    clip = None if frame is None else {"number": 0, "frame": frame}
    return decode_picture(tab.evaluate(_DRAW, [camera, values, clip]))


def decode_picture(url: str) -> Float[np.ndarray, "H W 3"]:
    """RGB in [0, 1] of a data: address."""
    content = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255


def fidelity(
    animator: Animator,
    avatar: Avatar,
    driving: Float[np.ndarray, "T 135"] | None,
    size: int,
    *,
    pairs: bool,
    frames: int = 12,
    mixtures: int = 12,
) -> tuple[int, dict[str, list[float]]]:
    """Size of the avatar's page in bytes, and PSNRs (dB) of its pictures by what they show."""
    sliders = sliders_of(animator.loaded.config)
    code, cam2head, K = avatar.code, avatar.cam2head, avatar.K
    relaxed, rng = neutral_code(), np.random.default_rng(0)
    clip = seen_expressions(avatar) if driving is None else driving
    ends = [{s.name: end} for s in sliders for end in (s.low, s.high) if end]
    mixed = [
        {sliders[i].name: rng.uniform(sliders[i].low, sliders[i].high) for i in chosen}
        for chosen in (rng.permutation(len(sliders))[:4] for _ in range(mixtures))
    ]
    moments = np.unique(np.linspace(0, len(clip) - 1, frames).astype(int))
    groups: dict[str, Pictures] = {
        "neutral": [({}, None, relaxed)],
        "each slider at its ends": [(v, None, move(relaxed, sliders, v)) for v in ends],
        "a driven clip": [({}, int(i), clip[i]) for i in moments],
        "four sliders at random": [(v, None, move(relaxed, sliders, v)) for v in mixed],
    }
    found: dict[str, list[float]] = {name: [] for name in groups}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = Path(folder) / "head.html"
        view = (cam2head, K)
        length = export_page(
            path, animator.loaded, code, {"clip": clip}, *view, name=avatar.name, pairs=pairs
        )
        tab = open_page(browser, path.as_uri())
        progress = tqdm(total=sum(map(len, groups.values())), desc="comparing", unit="picture")
        for name, pictures in groups.items():
            for values, frame, expression in pictures:
                shown = page_picture(tab, cam2head, K, size, values, frame)
                true = animator.render(code, expression[None], cam2head[None], K[None], size=size)
                error = np.mean((np.asarray(true[0], np.float64) - shown) ** 2)
                found[name].append(float(-10 * np.log10(error + 1e-12)))
                progress.update()
        progress.close()
    return length, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("avatar", help="FILE.avatar")
    parser.add_argument("--workdir", required=True, help="the run that it belongs to")
    parser.add_argument("--driving", help="a performance, as `avatar render --driving` takes")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--no-pairs", action="store_true", help="as of `avatar export`")
    args = parser.parse_args(argv)

    def run() -> None:
        avatar, loaded = load_avatar(args.avatar), load_model(args.workdir)
        check_belongs(avatar, loaded, args.avatar, args.workdir)
        driving = read_performance(args.driving).expressions if args.driving else None
        animator = Animator(loaded, chunk=1)
        pairs = not args.no_pairs
        length, found = fidelity(animator, avatar, driving, args.size, pairs=pairs)
        print(f"page of {length / 1e6:.2f} MB; PSNR in dB of pictures of {args.size} pixels a side")
        print("| | pictures | lowest | mean |\n| --- | --- | --- | --- |")
        for name, values in found.items():
            print(f"| {name} | {len(values)} | {min(values):.1f} | {np.mean(values):.1f} |")

    cli.guard(run)


if __name__ == "__main__":
    main()
