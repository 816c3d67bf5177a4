"""Avatars of people: created, kept, driven, rendered, interpolated."""

from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar, load_avatar, save_avatar
from flexavatar_jax.avatars.camera_paths import circle_cameras, orbit_cameras, read_camera_path
from flexavatar_jax.avatars.create import create_avatar
from flexavatar_jax.avatars.film import write_film
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.avatars.interpolation import corner_grid, interpolate, path_through
from flexavatar_jax.avatars.observations import read_observations
from flexavatar_jax.avatars.performances import read_performance

__all__ = [
    "Animator",
    "Avatar",
    "FitSettings",
    "circle_cameras",
    "corner_grid",
    "create_avatar",
    "interpolate",
    "load_avatar",
    "orbit_cameras",
    "path_through",
    "read_camera_path",
    "read_observations",
    "read_performance",
    "save_avatar",
    "write_film",
]
