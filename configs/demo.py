"""The demo: a small FlexAvatar on procedural heads.

    python -m flexavatar_jax.train --config configs/demo.py --workdir runs/demo

`make demo` makes the data before and the report after. A few minutes on two CPU cores; on people
who are not in the training data it reaches 18.4 dB PSNR, where the best constant has 12.6 dB.
"""

from ml_collections import ConfigDict

from configs import flex1


def get_config() -> ConfigDict:
    config = flex1.get_config()
    config.batch = 12
    config.steps = 800

    config.model.update(
        dict(
            image_size=64,
            patch_size=8,
            width=128,
            num_heads=2,
            encoder_depth=2,
            decoder_depth=2,
            head_resolution=12,
            expression_hidden=64,
            upsampler_channels=(32,),
            uv_resolution=48,
            gaussian_resolution=48,
            max_scale=0.02,
            dino=False,
            dtype="float32",
            remat=0.0,
        )
    )
    # Many people a step, one target each: telling people apart is what a short run learns last.
    config.data.update(dict(root="data/procedural", targets=1, workers=0))
    config.data.mixture = ConfigDict(dict(procedural_monocular=0.5, procedural_multiview=0.5))
    config.data.jitter.probability = 0.0
    # Mostly the mean square: a run this short leaves much unsure, and the median that L1 aims for
    # then drops what fewer than half of the heads have, such as long hair.
    config.loss.update(dict(l1=0.2, mse=5.0, dino=0.0, sam=0.0))
    # Irises are two pixels wide at this size, and would be left as a mean of all gazes.
    config.loss.focus.weight = 20.0
    # Muon learns in 150 steps what Adam does in 600: docs/experiments.md.
    config.optimizer.update(
        dict(
            name="muon",
            muon_learning_rate=5e-3,
            learning_rate=1.5e-3,
            warmup_steps=50,
            decay_steps=800,
            b2=0.98,
            clip_norm=1.0,
        )
    )
    config.checkpoint.update(dict(every=200, keep=2))
    config.log.update(dict(every=50, images_every=200))
    config.eval.update(dict(dataset="procedural_test", people=16, images_per_person=16))
    return config
