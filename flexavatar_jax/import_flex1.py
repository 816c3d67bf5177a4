"""Imports published FLEX-1 weights: a PyTorch checkpoint becomes a folder like one of our runs.

    python -m flexavatar_jax.import_flex1 ckpt-900k.pt --model-config model_config.json \\
        --template gghead_template.obj --out runs/flex1

The checkpoint is a file of torch.save (read without PyTorch and without running anything in it),
a .safetensors or a .npz. Every tensor in it is accounted for.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import ml_dtypes
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from configs import flex1
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import write
from data_pipelines.torch_files import load_torch_file
from flexavatar_jax import cli
from flexavatar_jax.published.tensor_names import (
    RESAMPLE_FILTER,
    abstract_params,
    flatten,
    published_shapes,
    unused_shapes,
    used_tensors,
)
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.templates import format_obj, load_template

UNUSED_FILE = "published_unused.safetensors"
"""Beside an imported checkpoint: published tensors without effect, kept for the way back."""

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
"""Types of weights that float32 holds without loss."""

SIZES = {
    "num_heads": "head_transformer.transformer.n_heads",
    "width": "head_transformer.transformer.d_hidden",
    "encoder_depth": "head_transformer.transformer.n_layers",
    "decoder_depth": "head_transformer.n_layers_expression_transformer",
    "head_tokens": "head_transformer.res_head_tokens",
    "expression_size": "head_transformer.d_expression_codes",
    "expression_tokens": "head_transformer.n_expression_tokens",
    "patch_size": "patch_size",
    "vit_depth": "n_layers_encoder",
    "uv_resolution": "gaussian_decoder.res_uv_texture",
}
"""Field of `config.model` -> field of the published model_config.json, both a number."""

REQUIRED = {
    "in_channels": 3,
    "n_input_views": 1,
    "use_plucker": True,
    "head_transformer.head_transformer_type": "UV_TEXTURE",
    "head_transformer.use_lam_transformer": True,
    "head_transformer.use_lam_point_embedder": True,
    "head_transformer.use_head_tokens": True,
    "head_transformer.use_dataset_ids": True,
    "head_transformer.transformer.use_causal_attention": True,
    "gaussian_decoder.use_stylegan_pixelshuffle_upsampler": True,
    "gaussian_decoder.use_lam_gs_decoder": True,
    "gaussian_decoder.n_gaussians_per_token": 1,
    "gaussian_decoder.n_channels_color": 3,
    "gaussian_decoder.sh_degree": 0,
    "feature_dim": 768,
}
"""Fields of model_config.json of which this code knows one value. Those in neither table are dead
in the published code, or (such as `compile`) do not change what the model computes."""


def import_checkpoint(
    checkpoint: epath.PathLike,
    model_config: epath.PathLike,
    template: epath.PathLike,
    out: epath.PathLike,
    *,
    dtype: str = "bfloat16",
) -> str:
    """Writes the run folder `out`, which evaluate and avatar restore like a run's, and which
    training starts from (`config.init_from`).

    `dtype` is what the imported model's transformers compute in. Returns a sentence that accounts
    for the published number of parameters.

    Raises:
      UserError: an input that isn't there.
      UserError: `out` is there already.
      UserError: an input that is damaged or of another model; nothing is left at `out`.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another folder or move it away")
    config = flex1.get_config()
    config.model = read_model_config(model_config)
    config.model.dtype = dtype
    head = load_template(os.fspath(template))
    abstract = abstract_params(config.model, head)
    published = select_tensors(
        read_tensors(checkpoint), published_shapes(config.model, flatten(abstract)), checkpoint
    )
    for name in published:
        if name.endswith("resample_filter") and not np.allclose(published[name], RESAMPLE_FILTER):
            raise UserError(
                f"{checkpoint}: {name} is not outer([1,3,3,1],[1,3,3,1])/64, the only filter known"
            )
    unused = {name: published.pop(name) for name in unused_shapes(config.model)}
    params = adopt(published, abstract, config.model)
    with _written_whole(out) as folder:
        write(folder / "template.obj", format_obj(head))
        write(folder / "config.json", config.to_json_best_effort(indent=2, sort_keys=True))
        save_file(unused, folder / UNUSED_FILE)
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(0, params)
            checkpoints.wait()
    return account(config.model, abstract)


def adopt(
    published: dict[str, np.ndarray], abstract: nnx.State, config: ml_collections.ConfigDict
) -> nnx.State:
    """Our parameters from published tensors, which are taken out of `published` on the way."""
    values = {}
    for tensor in used_tensors(config):
        values |= tensor.adopt(published.pop(tensor.name))
    return nnx.from_flat_state(
        [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(abstract)]
    )


def read_model_config(path: epath.PathLike) -> ml_collections.ConfigDict:
    """`config.model` from the published model_config.json.

    What that file does not say (the upsampler's channels, ranges of the Gaussians) is as in
    configs/flex1.py.

    Raises:
      UserError: no such file.
      UserError: not JSON, a field missing, or a value that this code does not implement.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--model-config: no file {path}", status=TRY_AGAIN)
    try:
        published = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None

    def field(name: str) -> Any:
        value = published
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{path} has no field {name}; give the published model_config.json")
            value = value[part]
        return value

    def size(name: str) -> int:
        value = field(name)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} must be a positive whole number, not {value!r:.40}")
        return value

    for name, expected in REQUIRED.items():
        if field(name) != expected:
            raise UserError(
                f"{path}: {name} is {field(name)!r:.40}; only {expected!r} is implemented"
            )
    model = flex1.get_config().model
    for ours, name in SIZES.items():
        model[ours] = size(name)
    model.image_size = model.patch_size * size("head_transformer.res_image_tokens")
    upscale = size("gaussian_decoder.upscale_uv_texture")
    if upscale != 2 ** len(model.upsampler_channels):
        raise UserError(
            f"{path}: gaussian_decoder.upscale_uv_texture is {upscale}; only "
            f"{2 ** len(model.upsampler_channels)} is implemented"
        )
    model.sample_grid = model.head_tokens * upscale * size("gaussian_decoder.oversampling_factor")
    if type(field("use_feature_projection")) is not bool:
        raise UserError(f"{path}: use_feature_projection must be true or false")
    model.dino = field("use_feature_projection")
    return model


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All arrays in a .safetensors, a .npz or a torch.save file; nested names joined by dots.

    Raises:
      UserError: no such file.
      UserError: a file that is damaged, or that holds more than tensors and containers.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint {path}", status=TRY_AGAIN)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or not a safetensors file ({error}); fetch it again"
            ) from None
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is damaged or not an .npz of plain arrays ({error}); fetch it again"
            ) from None
    return dict(_leaves(load_torch_file(file)))


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, np.ndarray):
        yield name, tree


def select_tensors(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], source: epath.PathLike
) -> dict[str, np.ndarray]:
    """The tensors named in `shapes`, float32, wherever in a checkpoint they are nested.

    The state dict may lie under a key or its names may have a common prefix; what lies beside it
    (an optimiser's state) is left alone, what lies in it must be the model's.

    Raises:
      UserError: tensors missing, too many, or of another shape or kind; all of them by name.
    """
    # torch.compile puts this into the names of what it wraps.
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    prefixes = collections.Counter(
        name[: len(name) - len(suffix)]
        for name in tensors
        for suffix in _suffixes(name)
        if suffix in shapes
    ).most_common(2)
    if not prefixes:
        raise UserError(
            f"{source} holds no tensor of FLEX-1 (such as {next(iter(shapes))}); is it its "
            "checkpoint?"
        )
    if len(prefixes) == 2 and prefixes[0][1] == prefixes[1][1]:
        raise UserError(
            f"{source} holds the model twice, under {prefixes[0][0]!r} and {prefixes[1][0]!r}; "
            "save one of them alone"
        )
    prefix = prefixes[0][0]
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    problems = {
        "missing": [name for name in shapes if name not in found],
        "not the model's": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != tuple(shape)
        ],
        "no 32-bit or 16-bit floats": [
            f"{name} {found[name].dtype}"
            for name in shapes
            if name in found and found[name].dtype not in FLOATS
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items()
        )
        raise UserError(f"{source} does not fit the model of --model-config: {listed}")
    return {name: np.asarray(found[name], np.float32) for name in shapes}


def _suffixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


@contextlib.contextmanager
def _written_whole(out: epath.Path) -> Iterator[epath.Path]:
    """A temporary folder that becomes `out` when all went well, and else is removed."""
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        if folder.exists():
            folder.rmtree()


def account(config: ml_collections.ConfigDict, abstract: nnx.State) -> str:
    """How the published number of parameters comes about, in a sentence."""
    ours = parameter_overview.count_parameters(nnx.to_pure_dict(abstract))
    unused = unused_shapes(config)
    kinds = {
        "head tokens": "_head_token_embeddings",
        "weights of a zero style": "affine.weight",
        "constant filters": "resample_filter",
    }
    sizes = {
        kind: sum(math.prod(shape) for name, shape in unused.items() if name.endswith(end))
        for kind, end in kinds.items()
    }
    parts = " + ".join(f"{size:,} in unused {kind}" for kind, size in sizes.items())
    return f"{ours + sum(sizes.values()):,} published numbers = {ours:,} parameters + {parts}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.import_flex1", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("checkpoint", help="torch.save file, .safetensors or .npz")
    parser.add_argument("--model-config", required=True, help="the published model_config.json")
    parser.add_argument("--template", required=True, help="the head template's OBJ")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what the transformers compute in (float32 is faster on CPUs)",
    )
    args = parser.parse_args(argv)
    accounted = cli.guard(
        lambda: import_checkpoint(
            args.checkpoint, args.model_config, args.template, args.out, dtype=args.dtype
        )
    )
    print(f"{args.out}: {accounted}")


if __name__ == "__main__":
    main()
