"""One optimisation step: batch in, rendered targets, loss, new parameters.

The step is one jitted program over the mesh of `sharding.py`. The transformer runs under XLA's
automatic partitioning; rendering and image losses are mapped over each device's own examples
(`shard_map`), so that no collective runs inside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from flexavatar_jax.frozen import dinov2
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.gaussians import Gaussians
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.training.augment import finish_batch
from flexavatar_jax.training.focus import focus_weights
from flexavatar_jax.training.losses import draw_targets, training_loss
from flexavatar_jax.training.muon import muon
from flexavatar_jax.training.sharding import (
    BATCH_AXES,
    batch_sharding,
    parameter_shardings,
    replicated,
)
from flexavatar_jax.training.targets import preview_rows, render_targets

SCOPES = (
    "augmentation",
    "features",
    "encoder",
    "decoder",
    "upsampler",
    "gaussians",
    "rasterizer",
    "losses",
    "optimizer",
)
"""The step's parts by their `jax.named_scope`, as traces and compiled programs show them."""


class TrainState(NamedTuple):
    """All that a step changes.

    `skipped` counts the steps whose loss or gradient was not finite (or beyond
    `config.max_gradient_norm`): they change nothing but the step number and this count.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    skipped: jax.Array


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam or Muon with linear warm-up, then constant or (if `decay_steps` is set) cosine decay."""
    o = config.optimizer
    adam = functools.partial(optax.adam, _schedule(o, o.learning_rate), b1=o.b1, b2=o.b2, eps=o.eps)
    if o.name == "muon":
        # Updates of matrices are as large as Adam's usually are, so one rate's schedule does for
        # both.
        rate = _schedule(o, o.muon_learning_rate)
        rest = adam(nesterov=True)  # as the matrices' momenta are
        optimizer = muon(rate, beta=o.muon_beta, is_matrix=_is_matrix, rest=rest)
    else:
        optimizer = adam()
    if not o.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), optimizer)


def _schedule(o: ml_collections.ConfigDict, peak: float) -> optax.Schedule | float:
    if o.decay_steps:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if o.warmup_steps else peak,
            peak_value=peak,
            warmup_steps=o.warmup_steps,
            decay_steps=o.decay_steps,
            end_value=o.final_learning_rate,
        )
    return optax.linear_schedule(0.0, peak, o.warmup_steps) if o.warmup_steps else peak


SMALLEST_MATRIX = 16
"""Muon is for matrices that mix many with many: not for the few numbers of a Gaussian."""


def _is_matrix(path: tuple, x: jax.Array) -> bool:
    """Whether a parameter is Muon's: the transformers' and the convolutions' kernels.

    Embeddings (sinks, positions) are rows of their own, so they are Adam's.
    """
    embedding = any(name in jax.tree_util.keystr(path) for name in ("sinks", "positions"))
    if x.ndim == 2:
        return min(x.shape) >= SMALLEST_MATRIX and not embedding
    return x.ndim == 4 and min(x.shape[2:]) >= SMALLEST_MATRIX


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What is fixed before the first batch: model, optimiser, mesh, and where each array lives."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    template: HeadTemplate
    optimizer: optax.GradientTransformation

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, mesh: Mesh, template: HeadTemplate
    ) -> TrainProgram:
        """
        Raises:
          UserError: the batch cannot be split over the mesh.
        """
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
        if config.batch % shards:
            raise UserError(
                f"config.batch = {config.batch} must be a multiple of {shards} "
                "(mesh.data x mesh.fsdp x accumulate), so that every device gets whole examples"
            )
        return cls(config, mesh, template, make_optimizer(config))

    def _build(self) -> FlexAvatar:
        return FlexAvatar(self.config.model, self.template, rngs=nnx.Rngs(self.config.seed))

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(self._build))[0]

    def _initial(self) -> TrainState:
        params = nnx.state(self._build(), nnx.Param)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, self.optimizer.init(params), zero)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what compiling and restoring need."""
        shapes = jax.eval_shape(self._initial)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.state_sharding,
        )

    @functools.cached_property
    def state_sharding(self) -> TrainState:
        shapes = jax.eval_shape(self._initial)
        everywhere = replicated(self.mesh)
        params = parameter_shardings(self.mesh, shapes.params)
        by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])

        # Momenta are laid out as their parameters are; an optimizer may keep some of them only.
        def shardings(x: Any) -> Any:
            if isinstance(x, nnx.State):
                return jax.tree_util.tree_map_with_path(lambda path, _: by_path[path], x)
            return everywhere

        opt_state = jax.tree.map(
            shardings, shapes.opt_state, is_leaf=lambda x: isinstance(x, nnx.State)
        )
        return TrainState(everywhere, params, opt_state, everywhere)

    def init(self) -> TrainState:
        """A fresh state from `config.seed`, created in place on the mesh; the same on any mesh."""
        return jax.jit(self._initial, out_shardings=self.state_sharding)()

    def model(self, params: nnx.State) -> FlexAvatar:
        """The model with `params` in it."""
        return nnx.merge(self._graph, params)

    def gaussians(self, params: nnx.State, frozen: FrozenNetworks, batch: Batch) -> Gaussians:
        """The Gaussians [B, T, G, ...] of a finished batch's targets, made of its inputs."""
        model = self.model(params)
        features = None
        if frozen.dinov2_base is not None:
            examples = PartitionSpec(BATCH_AXES)
            look = jax.shard_map(
                dinov2.patch_features,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), examples),
                out_specs=examples,
                check_vma=False,
            )
            with jax.named_scope("features"):
                features = look(frozen.dinov2_base, batch.input_image)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for attention on TPUs
            code = model.encode(batch.input_image, batch.input_cam2head, batch.input_K, features)
            return model.decode(code, batch.target_expression, batch.source)

    def loss(
        self, params: nnx.State, frozen: FrozenNetworks, batch: Batch, *, perceptual: bool
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        """Mean training loss of a finished batch; its parts (scalars) and a preview (uint8 RGB)."""
        gaussians = self.gaussians(params, frozen, batch)
        on_shard = jax.shard_map(
            functools.partial(shard_losses, config=self.config, perceptual=perceptual),
            mesh=self.mesh,
            in_specs=(PartitionSpec(BATCH_AXES), PartitionSpec(), PartitionSpec(BATCH_AXES)),
            out_specs=PartitionSpec(BATCH_AXES),
            # With the check on, two processes that share the tensor axis abort in Gloo.
            check_vma=False,
        )
        loss, parts, preview = on_shard(gaussians, frozen, batch)
        return jnp.mean(loss), (jax.tree.map(jnp.mean, parts), preview)

    def step(
        self, state: TrainState, frozen: FrozenNetworks, batch: Batch, *, perceptual: bool = False
    ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
        """One step from a batch as the pipeline makes it (uint8 images).

        Returns the new state, metrics (scalars) and a preview: rows of input, target, prediction.
        The metric `bad` is 1 if this step was skipped, else 0; `skipped` counts all such steps.
        """
        bad_records = jnp.sum(batch.bad_records)
        with jax.named_scope("augmentation"):
            batch = finish_batch(batch)
        grad = jax.value_and_grad(functools.partial(self.loss, perceptual=perceptual), has_aux=True)
        accumulate = self.config.accumulate
        if accumulate == 1:
            (loss, (parts, preview)), gradient = grad(state.params, frozen, batch)
        else:
            # Neighbours go to different micro-batches, so each device keeps its own examples.
            micro = jax.tree.map(
                lambda x: rearrange(x, "(b a) ... -> a b ...", a=accumulate), batch
            )
            micro = jax.lax.with_sharding_constraint(
                micro, NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
            )

            def add(total, one):
                (loss, (parts, preview)), gradient = grad(state.params, frozen, one)
                return jax.tree.map(jnp.add, total, (loss, parts, gradient)), preview

            first = jax.tree.map(lambda x: x[0], micro)
            (loss, (parts, _)), gradient = jax.eval_shape(grad, state.params, frozen, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, parts, gradient))
            total, previews = jax.lax.scan(add, zeros, micro)
            loss, parts, gradient = jax.tree.map(lambda x: x / accumulate, total)
            preview = previews[0]
        skipped = state.skipped
        with jax.named_scope("optimizer"):
            state, norm = self._update(state, loss, gradient)
        metrics = {"loss": loss, **parts, "gradient_norm": norm, "bad_records": bad_records}
        metrics |= {"bad": state.skipped - skipped, "skipped": state.skipped}
        return state, metrics, preview

    def _update(
        self, state: TrainState, loss: jax.Array, gradient: nnx.State
    ) -> tuple[TrainState, jax.Array]:
        """The next state, with the old parameters if the step was bad, and the gradient's norm."""
        norm = optax.global_norm(gradient)
        limit = self.config.max_gradient_norm
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        good &= norm < limit if limit else True
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = state.skipped + jnp.where(good, 0, 1)
        return TrainState(state.step + 1, params, opt_state, skipped), norm

    def jitted_step(self, *, perceptual: bool = False) -> Callable:
        """`step` for the mesh, ready to call or lower; the old state's memory is reused."""
        everywhere, split = replicated(self.mesh), batch_sharding(self.mesh)
        return jax.jit(
            functools.partial(self.step, perceptual=perceptual),
            in_shardings=(self.state_sharding, everywhere, split),
            out_shardings=(self.state_sharding, everywhere, split),
            donate_argnums=0,
        )


def shard_losses(
    gaussians: Gaussians,
    frozen: FrozenNetworks,
    batch: Batch,
    *,
    config: ml_collections.ConfigDict,
    perceptual: bool,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Renders one device's examples and compares them with their targets.

    Gaussians are [B, T, G, ...], images [B, T, H, W, 3]; one background an example.

    Returns the loss [1] and its parts [1], to be averaged over devices, and the preview [b, H, 3W,
    3] of the first few examples.
    """
    targets = batch.target_image
    images = targets.shape[1]
    with jax.named_scope("rasterizer"):
        out = render_targets(gaussians, batch, config)
    judged, few = None, config.loss.perceptual_targets
    if perceptual and 0 < few < images:
        judged = draw_targets(batch.background, images, few)
    with jax.named_scope("losses"):
        pixels = None
        if config.loss.focus.weight:
            cameras = batch.target_cam2head, batch.target_K
            pixels = focus_weights(*cameras, targets.shape[2], config.loss.focus)
            pixels = rearrange(pixels, "b t h w -> (b t) h w")
        loss, parts = training_loss(
            rearrange(out.color, "b t h w c -> (b t) h w c"),
            rearrange(targets, "b t h w c -> (b t) h w c"),
            config.loss,
            frozen,
            perceptual=perceptual,
            judged=judged,
            pixels=pixels,
        )
    # An image's, as all parts are means: over devices and micro-batches too.
    parts = {**parts, "splat_overflow": jnp.mean(out.overflow, dtype=jnp.float32)}
    preview = preview_rows(batch, out.color, config)
    return loss[None], {name: value[None] for name, value in parts.items()}, preview
