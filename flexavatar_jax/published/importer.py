"""Published weights to a folder like one of our runs; every tensor is accounted for."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from safetensors.numpy import save_file

from configs import flex1
from data_pipelines.errors import UserError
from data_pipelines.files import cannot_write, write
from flexavatar_jax.published.model_config import read_model_config
from flexavatar_jax.published.tensor_files import read_tensors, select_tensors
from flexavatar_jax.published.tensor_names import (
    RESAMPLE_FILTER,
    abstract_params,
    flatten,
    params_from_published,
    published_shapes,
    unused_shapes,
)
from flexavatar_jax.runs import digests
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.templates import format_obj, load_template

UNUSED_FILE = "published_unused.safetensors"
"""Beside an imported checkpoint: published tensors without effect, kept for the way back."""


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
    config.data.image_size = config.model.image_size
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
    params = params_from_published(published, abstract, config.model)
    with _written_whole(out) as folder:
        write(folder / "template.obj", format_obj(head))
        write(folder / "config.json", config.to_json_best_effort(indent=2, sort_keys=True))
        save_file(unused, folder / UNUSED_FILE)
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(0, params)
            checkpoints.wait()
        digests.record(folder, below=False)
    return account(config.model, abstract)


@contextlib.contextmanager
def _written_whole(out: epath.Path) -> Iterator[epath.Path]:
    """A temporary folder that becomes `out` when all went well, and else is removed."""
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
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
