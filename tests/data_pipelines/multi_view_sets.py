"""A head with three dots on it in a calibrated capture, as the published data sets store one."""

import argparse
import io
import json
import zipfile

import look_alikes
import numpy as np
from PIL import Image

from data_pipelines import cameras
from data_pipelines.datasets import ava256, cafca, nersemble
from data_pipelines.datasets.views import Camera

DOTS = {0: (-0.05, 0.04, 0.05), 1: (0.05, 0.03, 0.045), 2: (0.0, -0.06, 0.05)}
"""Places in the head frame, metres, of a red, a green and a blue dot."""

WIDTH, HEIGHT, FOCAL = 220, 320, 800.0
AZIMUTHS = {"front": 5.0, "left": 55.0, "right": -40.0}
TIMESTEPS = 3

CAPTURE_WORLD = cameras.rigid(
    cameras.axis_angle(np.array([1.0, 2, 3]), 1.1), np.array([3.0, -1, 2])
)
"""The head is not near the world's origin, and the world's axes are no head's."""


def camera(name):
    place = cameras.orbit(AZIMUTHS[name], 8.0, 1.3, np.array([0.03, -0.05, 0.02]))
    K = np.array([[FOCAL, 0, WIDTH / 2 + 3], [0, FOCAL, HEIGHT / 2 - 2], [0, 0, 1]])
    return Camera(K, CAPTURE_WORLD @ place)


def head(timestep):
    R = cameras.axis_angle(np.array([0.2, 1.0, 0.1]), 0.2 * timestep - 0.1)
    return CAPTURE_WORLD @ cameras.rigid(R, np.array([0.02 * timestep, 0.01, -0.01 * timestep]))


def project(view, points):
    """Pixels of points in the head frame and their distance along the camera's axis."""
    K, cam2head = view
    p = np.append(np.atleast_2d(points), np.ones((len(np.atleast_2d(points)), 1)), 1)
    p = (p @ np.linalg.inv(cam2head).T)[:, :3]
    pixels = p @ np.asarray(K).T
    return pixels[:, :2] / pixels[:, 2:], p[:, 2]


def view_of(name, timestep):
    return camera(name).K, np.linalg.inv(head(timestep)) @ camera(name).cam2world


def photo(name, timestep):
    image = np.full((HEIGHT, WIDTH, 3), 90.0)
    y, x = np.indices((HEIGHT, WIDTH)) + 0.5
    places, _ = project(view_of(name, timestep), list(DOTS.values()))
    for channel, (u, v) in zip(DOTS, places, strict=True):
        disc = np.clip(6.5 - np.hypot(x - u, y - v), 0, 1)[..., None]
        image += disc * (np.eye(3)[channel] * 200 + 30 - image)
    return image.round().astype(np.uint8)


def foreground(name, timestep):
    ((u, v),), _ = project(view_of(name, timestep), np.zeros(3))
    y, x = np.indices((HEIGHT, WIDTH)) + 0.5
    return np.where(np.hypot(x - u, y - v) < 60, np.uint8(255), np.uint8(0))


def crop_of(name, timestep):
    """A square round the head, (ymin, ymax, xmin, xmax), not quite in its middle."""
    (u, v), distance = (a[0] for a in project(view_of(name, timestep), np.zeros(3)))
    side = round(0.26 * FOCAL / distance)
    ymin, xmin = round(v + 3 - side / 2), round(u - 2 - side / 2)
    return ymin, ymin + side, xmin, xmin + side


def tracker_sees(name, timestep, crop, focal_error=1.0):
    """A tracker's `.frame`: by a camera that looks straight at the middle of the crop."""
    K, cam2head = view_of(name, timestep)
    ymin, ymax, xmin, xmax = crop
    axis = np.linalg.inv(K) @ [(xmin + xmax) / 2, (ymin + ymax) / 2, 1.0]
    z = axis / np.linalg.norm(axis)
    x = np.cross([0.0, 1.0, 0.0], z)
    x /= np.linalg.norm(x)
    turned = cameras.rigid(np.stack([x, np.cross(z, x), z], 1), np.zeros(3))
    head2cam = np.linalg.inv(turned) @ np.linalg.inv(cam2head)
    # A focal length that is wrong shows the same picture from a distance wrong by as much.
    head2cam[2, 3] *= focal_error
    world = cameras.orbit(12.0, -4.0, 0.9, np.zeros(3))
    focal = FOCAL * np.linalg.norm(axis) / (ymax - ymin) * focal_error
    content = look_alikes.flame_frame(timestep, world, world @ head2cam, focal)
    content["camera"]["pp"][:] = 256 / 256.5 - 1  # the middle of 512 pixels
    return content


def track(root, person, sequence, name, timesteps=range(TIMESTEPS)):
    """As the tracker would: one crop for the clip, so the head moves about in it."""
    crop = crop_of(name, timesteps[0])
    frames = [tracker_sees(name, t, crop) for t in timesteps]
    look_alikes.write_tracking(root, f"{person}/{sequence}/{name}", crop, frames)


def write_nersemble(root):
    for t in range(TIMESTEPS):
        look_alikes.write_image(
            root / f"masks/037/EMO-1-shout+laugh/left/{t:05d}.png", foreground("left", t)
        )
    for name in AZIMUTHS:
        look_alikes.write_video(
            root / f"037/sequences/EMO-1-shout+laugh/images/cam_{name}.mp4",
            [photo(name, t) for t in range(TIMESTEPS)],
        )
        (root / "037/sequences/BACKGROUND/images").mkdir(parents=True, exist_ok=True)
    K = camera("front").K.copy()
    K[:2] *= 2200 / WIDTH
    poses = {name: np.linalg.inv(camera(name).cam2world).tolist() for name in AZIMUTHS}
    (root / "037/calibration").mkdir()
    write_json(
        root / "037/calibration/camera_params.json",
        {"world_2_cam": poses | {"not recorded": np.eye(4).tolist()}, "intrinsics": K.tolist()},
    )
    write_json(
        root / "037/calibration/color_calibration.json",
        {name: np.eye(3, 4).tolist() for name in AZIMUTHS},
    )
    track(root, "037", "EMO-1-shout+laugh", "front")
    track(root, "037", "EMO-1-shout+laugh", "right")


def write_ava256(root):
    decoder = root / "20230831--0814--ADL311/decoder"
    for folder in ("image", "segmentation_parts"):
        (decoder / folder).mkdir(parents=True)
    ids = [120, 123, 126]
    rows = ["seg_id,frame_id", "EXP_other,000007"] + [f"EXP_jaw,{i:06d}" for i in ids]
    (decoder / "frame_list.csv").write_text("\n".join(rows) + "\n")
    krt = []
    for name in AZIMUTHS:
        with zipfile.ZipFile(decoder / f"image/cam{name}.zip", "w") as archive:
            for t, i in enumerate(ids):
                archive.writestr(f"cam{name}/{i:06d}.avif", encoded(photo(name, t), "AVIF"))
        with zipfile.ZipFile(decoder / f"segmentation_parts/cam{name}.zip", "w") as archive:
            for t, i in enumerate(ids):
                region = np.where(foreground(name, t) > 0, np.uint8(3), np.uint8(0))
                archive.writestr(f"cam{name}/{i:06d}.png", encoded(region, "PNG"))
        K = camera(name).K.copy()
        K[:2] *= 2668 / WIDTH
        K[:2, 2] -= 0.5
        T = np.linalg.inv(camera(name).cam2world)
        T[:3, 3] *= 1000
        krt.append({"cameraId": name, "K": K.T.tolist(), "T": T.T.tolist()})
    write_json(decoder / "camera_calibration.json", {"KRT": krt})
    track(root, "ADL311", "EXP_jaw", "front")


def write_cafca(root):
    for t in range(TIMESTEPS):
        scene = root / f"00000-00099/00007/{t:05d}_002"
        for name in AZIMUTHS:
            look_alikes.write_image(scene / f"color_image/{name}.png", photo(name, t))
            look_alikes.write_image(scene / f"foreground_mask/{name}.png", foreground(name, t))
            (scene / "cameras_json").mkdir(exist_ok=True)
            fields = {"K": camera(name).K.tolist(), "cam2world": camera(name).cam2world.tolist()}
            write_json(scene / f"cameras_json/{name}.json", fields | {"focal_length": FOCAL})
        track(root, "00007", f"{t:05d}_002", "front", [t])
        track(root, "00007", f"{t:05d}_002", "left", [t])


def write_json(path, content):
    path.write_text(json.dumps(content))


def encoded(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def open_set(module, root, *argv):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    (captures,) = module.capture_sets(parser.parse_args(["--source", str(root), *argv]))
    return captures


def clip_of(captures, sequence):
    (i,) = (i for i, p in enumerate(captures.performances) if p.sequence == sequence)
    return list(captures.clip(i))


CASES = {
    "nersemble": (nersemble, write_nersemble, "037", "EMO-1-shout+laugh"),
    "ava256": (ava256, write_ava256, "ADL311", "EXP_jaw"),
    "cafca": (cafca, write_cafca, "00007", "002"),
}
