"""FLEX-1: the published model (182.41 M parameters, 58,361 Gaussians) and its training.

    python -m flexavatar_jax.train --config configs/flex1.py --workdir runs/flex1

A million steps of 20 examples; the authors report some three weeks on one A100 and, on VFHQ-Test,
23.32 dB PSNR in self-reenactment. It was never trained to the end here: its layers are held to the
published ones (`check_parity`), its step is compiled for TPU pods (`compile_ahead`).

Every field that training knows is here with its meaning, what it may be is in
`flexavatar_jax/training/config_check.py`. Other experiments start from this file and change what
they are about.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # folder of a run or of an import, whose weights training starts with
    config.batch = 20  # examples a step, over all devices
    config.accumulate = 1  # micro-batches a step
    config.steps = 1_000_000

    config.model = ConfigDict(
        dict(
            image_size=512,
            patch_size=16,
            width=768,
            num_heads=4,
            vit_depth=1,  # causal transformer blocks on the image tokens
            encoder_depth=4,  # joint blocks: head tokens with image tokens
            decoder_depth=8,  # joint blocks: head tokens with expression tokens
            head_resolution=32,  # side of the head's UV map of tokens
            expression_hidden=256,
            expression_tokens=4,
            bias_sinks=True,  # one a data source; False: one and the same for all
            upsampler_channels=(512, 256),  # one doubling each
            uv_resolution=256,
            gaussian_resolution=256,  # side of the grid of Gaussians on the UV map
            max_scale=0.01,  # metres
            offset_range=0.2,  # metres, from end to end
            template="",  # an OBJ with UVs; empty: the project's own head
            dino=True,  # frozen DINOv2 features beside the patches
            dtype="bfloat16",  # of the transformers; the rest is float32
            remat=1.0,  # share of blocks that the backward pass computes again: memory for time
        )
    )

    config.frozen = ConfigDict(
        # Local paths of Hugging Face safetensors files (or their folders).
        dict(
            dinov2_base="",  # facebook/dinov2-with-registers-base, for model.dino
            dinov2_small="",  # facebook/dinov2-small, for loss.dino
            sam2="",  # facebook/sam2.1-hiera-small, for loss.sam
        )
    )

    config.data = ConfigDict(
        dict(
            root="data",
            mixture=ConfigDict(
                # data set -> weight; the paper gives no weights: equal parts of both sources
                dict(nersemble=0.25, ava256=0.25, celebv_hq=0.2, celebv_text=0.15, hello3=0.15)
            ),
            image_size=config.model.get_ref("image_size"),  # the same field
            targets=5,  # target images an example
            jaw_temperature=3.0,  # how much open jaws are favoured
            jitter=ConfigDict(
                # colour jitter of multi-view captures
                dict(
                    probability=0.8,
                    brightness=(0.6, 1.5),
                    contrast=(0.6, 2.5),
                    saturation=(0.5, 2.5),
                    hue=(-0.1, 0.1),
                )
            ),
            bad_records="raise",  # or "skip": count them, and stop beyond max_bad_fraction
            max_bad_fraction=0.001,
            workers=8,  # processes that read and decode
        )
    )

    config.loss = ConfigDict(
        dict(
            l1=0.8,
            mse=0.0,
            ssim=0.2,  # of 1 - SSIM
            dino=1.0,
            sam=1.0,
            perceptual_start=400_000,  # step at which dino and sam set in
            perceptual_targets=0,  # dino and sam see a random so many of the targets; 0: all
            focus=ConfigDict(
                # pixels about these points of the head, in metres, count 1 + weight in l1 and mse
                dict(
                    weight=0.0,
                    radius=0.012,
                    points=((0.0315, 0.022, 0.05), (-0.0315, 0.022, 0.05)),  # the eyes
                )
            ),
        )
    )

    config.optimizer = ConfigDict(
        dict(
            name="adam",  # or "muon": Adam, but for the matrices
            learning_rate=1e-4,
            final_learning_rate=0.0,
            warmup_steps=0,
            decay_steps=0,  # cosine decay over so many steps; 0: constant
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            muon_learning_rate=1e-3,  # of matrices, under the same schedule
            muon_beta=0.95,
            clip_norm=0.0,  # global gradient norm; 0: not clipped
        )
    )
    config.bad_step = "skip"  # a loss or gradient that is not finite: "skip" (counted) or "stop"
    config.max_bad_steps = 100  # so many in a row end the run: it has diverged
    config.max_gradient_norm = 0.0  # a larger one is a bad step too; 0: any finite norm is good
    config.rasterizer = "auto"  # kernels.rasterize's backend
    config.splat_capacity = 0  # room for an image's intersections of Gaussians with tiles; 0: ample

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the devices that are left
    config.checkpoint = ConfigDict(dict(every=2000, keep=3))
    config.log = ConfigDict(dict(every=50, images_every=2000, images=4))
    config.eval = ConfigDict(
        dict(
            dataset="vfhq_test",
            every=0,  # steps between evaluations while training; 0: none
            people=50,
            images_per_person=50,
            portrait_size=1.0,  # how large the input's tracking takes heads, over what they are
            constant_images=500,  # training images a sector's mean is taken of
        )
    )
    return config
