"""A model worth showing: procedural heads at 128x128, of 6,000 people.

    python -m data_pipelines.prepare procedural --out data/procedural_128 --size 128 \\
        --monocular-people 4000 --monocular-timesteps 2 --multiview-people 2000 \\
        --multiview-timesteps 2 --num-cameras 8 --test-people 16
    python -m flexavatar_jax.train --config configs/procedural.py --workdir runs/procedural

95 minutes of two CPU cores; on people who are not in the training data it reaches 19.5 dB PSNR and
SSIM 0.784, where the best constant has 12.3 dB and 0.537. The weights in `pretrained/procedural`
were trained on from there, to 20.2 dB and 0.799: docs/experiments.md.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    """The demo, sharper and for longer."""
    config = demo.get_config()
    config.steps = config.optimizer.decay_steps = 5000
    config.optimizer.warmup_steps = 100
    config.model.update(
        dict(
            image_size=128,
            patch_size=16,
            width=192,
            num_heads=3,
            upsampler_channels=(64, 32),
            uv_resolution=64,
            gaussian_resolution=64,
            max_scale=0.015,
        )
    )
    # Irises are twice as wide here as in the demo's pictures.
    config.loss.focus.weight = 10.0
    config.data.root = "data/procedural_128"
    config.checkpoint.update(dict(every=250, keep=2))
    config.log.update(dict(every=50, images_every=500))
    config.eval.update(dict(every=1000, people=16, images_per_person=16))
    return config
