"""The model once more, in NumPy and float64, written from the published state dict's side.

Slow and by definition: loops where the package has matrix products, gathers where it has them
folded away. It shares nothing with the package but the names of the published tensors.
"""

import math

import numpy as np

GAIN = math.sqrt(2)
ERF = np.vectorize(math.erf)


class Reference:
    """A model of a state dict with published names; `config` is `config.model`."""

    def __init__(self, state_dict, config, vertices, uvs, faces, face_uvs):
        self.w = {name: tensor.astype(np.float64) for name, tensor in state_dict.items()}
        self.config = config
        self.mesh = vertices, uvs, faces, face_uvs

    def encode(self, image, cam2head, K, features=None):
        """[N, D] avatar code of one image [h, w, 3]."""
        c = self.config
        patch, side = c.patch_size, c.image_size // c.patch_size
        pixels = np.concatenate([image, plucker(cam2head, K, *image.shape[:2])], -1)
        kernel = self.w["_conv_patchify.weight"]
        tokens = np.zeros((side * side, c.width))
        for y in range(side):
            for x in range(side):
                window = pixels[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                tokens[y * side + x] = np.einsum("hwi,oihw->o", window, kernel)
        gpt = "_transformer_encoder.transformer"
        tokens = tokens + self.w[f"{gpt}.wpe.weight"]
        for i in range(c.vit_depth):
            name = f"{gpt}.h.{i}"
            y = self.norm(f"{name}.ln_1", tokens, 1e-5)
            q, k, v = np.split(self.linear(f"{name}.attn.c_attn", y), 3, axis=-1)
            y = attention(*(heads(t, c.num_heads) for t in (q, k, v)), causal=True)
            tokens = tokens + self.linear(f"{name}.attn.c_proj", y)
            y = self.norm(f"{name}.ln_2", tokens, 1e-5)
            y = self.linear(f"{name}.mlp.c_fc", y)
            y = y * (1 + ERF(y / math.sqrt(2))) / 2
            tokens = tokens + self.linear(f"{name}.mlp.c_proj", y)
        tokens = self.norm(f"{gpt}.ln_f", tokens, 1e-5)
        if c.dino:
            at = np.linspace(-1, 1, side)
            sampled = [bilinear(features, u, v) for v in at for u in at]
            tokens = self.linear("_feature_projection", np.concatenate([tokens, sampled], -1))

        points = uv_position_map(*self.mesh, c.head_resolution)[0].reshape(-1, 3)
        phases = [points[:, axis] * 2**k * np.pi for axis in range(3) for k in range(8)]
        embedded = np.stack([*np.sin(phases), *np.cos(phases), *points.T], axis=-1)
        embedder = "_head_transformer._query_point_embedder"
        queries = self.norm(f"{embedder}.norm", self.linear(f"{embedder}.mlp", embedded), 1e-5)
        return self.joint_transformer(
            "_head_transformer._transformer", queries, tokens, c.encoder_depth
        )

    def decode(self, code, expression, source):
        """Gaussians of one avatar under one expression, by the names of the parity data."""
        c = self.config
        hidden = expression
        for number in (0, 3):
            hidden = self.linear(f"_head_transformer._expression_mlp.{number}", hidden)
            hidden = np.maximum(hidden, 0)
        tokens = self.linear("_head_transformer._expression_mlp.6", hidden)
        tokens = tokens.reshape(c.expression_tokens, c.width)
        sink = self.w["_head_transformer._dataset_embedding.weight"][source]
        out = self.joint_transformer(
            "_head_transformer._expression_transformer",
            code,
            np.concatenate([sink[None], tokens]),
            c.decoder_depth,
        )
        x = skip = out.reshape(c.head_resolution, c.head_resolution, c.width)
        for i in range(len(c.upsampler_channels)):
            x, skip = self.upsampler_block(
                f"_gaussian_decoder._stylegan_upsampler.blocks.{i}", x, skip
            )
        return self.gaussians(skip)

    def gaussians(self, features):
        c = self.config
        positions, covered = uv_position_map(*self.mesh, c.uv_resolution)
        found = {name: [] for name in ("positions", "scales", "rotations", "colors", "opacities")}
        head = "_gaussian_decoder._mlp_decoder.out_layers"
        at = np.linspace(-1, 1, c.gaussian_resolution)
        for v in at:
            for u in at:
                if bilinear(covered[..., None].astype(float), u, v)[0] <= 0.99:
                    continue
                f = bilinear(features, u, v)
                offset = sigmoid(self.linear(f"{head}.xyz", f)) - 0.5
                found["positions"].append(bilinear(positions, u, v) + c.offset_range * offset)
                scale = np.exp(self.linear(f"{head}.scaling", f))
                found["scales"].append(np.clip(scale, 0, c.max_scale))
                rotation = self.linear(f"{head}.rotation", f)
                found["rotations"].append(rotation / np.linalg.norm(rotation))
                found["colors"].append(self.linear(f"{head}.shs", f))
                found["opacities"].append(sigmoid(self.linear(f"{head}.opacity", f)))
        return {name: np.array(values) for name, values in found.items()}

    def joint_transformer(self, name, x, context, depth):
        context = self.linear(f"{name}.linear_cond_proj", context)
        for i in range(depth):
            x, context = self.joint_block(f"{name}.layers.{i}", x, context, last=i == depth - 1)
        return self.norm(f"{name}.norm", x, 1e-6)

    def joint_block(self, name, x, context, last):
        h, n = self.config.num_heads, len(x)
        a = self.norm(f"{name}.norm1", x, 1e-5)
        b = self.norm(f"{name}.norm1_context", context, 1e-5)

        def both(of_x, of_context, norm=None):
            parts = []
            scales = f"norm_{norm}", f"norm_added_{norm}"
            for y, layer, scale in zip((a, b), (of_x, of_context), scales, strict=True):
                y = heads(self.linear(f"{name}.attn.{layer}", y), h)
                if norm:
                    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6)
                    y = y * self.w[f"{name}.attn.{scale}.weight"]
                parts.append(y)
            return np.concatenate(parts, axis=1)

        y = attention(
            both("to_q", "add_q_proj", "q"),
            both("to_k", "add_k_proj", "k"),
            both("to_v", "add_v_proj"),
        )
        x = x + self.linear(f"{name}.attn.to_out.0", y[:n])
        x = x + self.feed_forward(f"{name}.ff", x)
        if not last:
            context = context + self.linear(f"{name}.attn.to_add_out", y[n:])
            context = context + self.feed_forward(f"{name}.ff_context", context)
        return x, context

    def feed_forward(self, name, x):
        y = self.linear(f"{name}.net.0.proj", standardise(x, 1e-6))
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return self.linear(f"{name}.net.2", y)

    def upsampler_block(self, name, x, skip):
        """[h, w, c] maps; convolutions texel by texel."""
        kernel = self.demodulated(f"{name}.conv0")
        h, w, _ = x.shape
        # Two texels of margin: one for the transposed convolution's overhang, one to filter.
        up = np.zeros((2 * h + 3, 2 * w + 3, len(kernel)))
        for i in range(h):
            for j in range(w):
                up[1 + 2 * i : 4 + 2 * i, 1 + 2 * j : 4 + 2 * j] += np.einsum(
                    "i,oiab->abo", x[i, j], kernel
                )
        filter_ = 4 * self.w[f"{name}.conv0.resample_filter"]
        x = np.zeros((2 * h, 2 * w, len(kernel)))
        for i in range(2 * h):
            for j in range(2 * w):
                x[i, j] = np.einsum("ab,abo->o", filter_, up[i : i + 4, j : j + 4])
        x = activate(x + self.w[f"{name}.conv0.bias"])

        kernel = self.demodulated(f"{name}.conv1")
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        y = np.zeros((*x.shape[:2], len(kernel)))
        for i in range(2 * h):
            for j in range(2 * w):
                y[i, j] = np.einsum("abi,oiab->o", padded[i : i + 3, j : j + 3], kernel)
        x = activate(y + self.w[f"{name}.conv1.bias"])

        weight = self.w[f"{name}.torgb.weight"][:, :, 0, 0] * self.w[f"{name}.torgb.affine.bias"]
        rgb = x @ (weight / math.sqrt(weight.shape[1])).T + self.w[f"{name}.torgb.bias"]
        shuffled = np.zeros((2 * h, 2 * w, skip.shape[2] // 4))
        for dy in range(2):
            for dx in range(2):
                shuffled[dy::2, dx::2] = skip[:, :, 2 * dy + dx :: 4]
        return x, shuffled + np.clip(rgb, -256, 256)

    def demodulated(self, name):
        weight = self.w[f"{name}.weight"] * self.w[f"{name}.affine.bias"][None, :, None, None]
        return weight / np.sqrt(np.sum(weight**2, axis=(1, 2, 3), keepdims=True) + 1e-8)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x, epsilon):
        return standardise(x, epsilon) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]


def plucker(cam2head, K, height, width):
    rays = np.zeros((height, width, 6))
    origin = cam2head[:3, 3]
    for i in range(height):
        for j in range(width):
            x, y = j / (width - 1), i / (height - 1)
            ray = cam2head[:3, :3] @ [(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], 1.0]
            ray = ray / np.linalg.norm(ray)
            rays[i, j] = [*np.cross(origin, ray), *ray]
    return rays


def uv_position_map(vertices, uvs, faces, face_uvs, resolution):
    """Positions [r, r, 3] and coverage [r, r]; each texel asks every face, in their order."""
    positions = np.zeros((resolution, resolution, 3))
    covered = np.zeros((resolution, resolution), bool)
    a, b, c = (uvs[face_uvs[:, k]] for k in range(3))
    area = cross(b - a, c - a)
    for i in range(resolution):
        for j in range(resolution):
            p = np.array([(j + 0.5) / resolution, (i + 0.5) / resolution])
            with np.errstate(divide="ignore", invalid="ignore"):
                v, w = cross(p - a, c - a) / area, cross(b - a, p - a) / area
            u = 1 - v - w
            inside = np.flatnonzero((u >= 0) & (v >= 0) & (w >= 0))
            if len(inside):
                f = inside[0]
                covered[i, j] = True
                positions[i, j] = np.array([u[f], v[f], w[f]]) @ vertices[faces[f]]
    return positions, covered


def cross(p, q):
    return p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]


def bilinear(texture, u, v):
    """A [h, w, c] map at (u, v) in [-1, 1], whose ends are the map's outer edges; zeros beyond."""
    h, w, channels = texture.shape
    x, y = ((u + 1) * w - 1) / 2, ((v + 1) * h - 1) / 2
    total = np.zeros(channels)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * texture[i, j]
    return total


def heads(x, count):
    return np.stack(np.split(x, count, axis=-1))


def attention(q, k, v, causal=False):
    """[heads, N, C] to [N, heads * C]."""
    logits = q @ np.swapaxes(k, 1, 2) / math.sqrt(q.shape[-1])
    if causal:
        logits = np.where(np.tri(len(logits[0]), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.concatenate(list(weights / weights.sum(-1, keepdims=True) @ v), axis=-1)


def activate(x):
    return np.clip(np.where(x > 0, x, 0.2 * x) * GAIN, -256, 256)


def standardise(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
