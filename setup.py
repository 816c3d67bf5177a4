"""Package definition of flexavatar-jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

REQUIREMENTS = [
    "absl-py>=2.1",
    "array-record>=0.7",
    "clu>=0.0.12",
    "einops>=0.8",
    "etils[epath,epy]>=1.10",
    "flax>=0.12",
    "fsspec>=2024.6",
    "grain>=0.2.12",
    "imageio>=2.35",
    "imageio-ffmpeg>=0.5",
    # tensorflow-datasets imports importlib_resources without declaring it.
    "importlib_resources>=6.4",
    "jax>=0.10",
    "jaxtyping>=0.2.34",
    "ml-collections>=1.0",
    "ml-dtypes>=0.4",
    "numpy>=1.26",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.33",
    "packaging>=23.2",
    "pillow>=11.3",  # reads AVIF
    "safetensors>=0.4.5",
    "scipy>=1.13",
    "tensorboard>=2.17",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.7",
    "tqdm>=4.66",
]

EXTRAS = {
    "cuda": ["jax[cuda12]>=0.10"],
    # Both for gs:// paths: gcsfs for checkpoints and logs, google-cloud-storage for tensorboardX.
    "tpu": ["jax[tpu]>=0.10", "gcsfs>=2024.6", "google-cloud-storage>=2.10"],
    "faces": ["onnx>=1.16", "onnxruntime>=1.20"],
    "view": ["viser>=1.1"],
    "spz": ["gsply>=0.4.6", "zstandard>=0.23"],
    "test": [
        "beartype>=0.21",
        "flask>=2.2",  # for moto's server, whose own extra brings AWS's other services too
        "flask-cors>=4.0",
        "gcp-storage-emulator>=2026.7",
        "gcsfs>=2024.6",
        "gsply>=0.4.6",
        "hypothesis>=6.100",
        "jax[tpu]>=0.10",
        "moto>=5.0",
        "onnx>=1.16",
        "onnxruntime>=1.20",
        "playwright>=1.50",
        "plyfile>=1.1",
        "pygltflib>=1.16",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",
        "pyyaml>=6.0",
        "ruff>=0.14",
        "s3fs>=2024.6",
        "viser>=1.1",
        "zstandard>=0.23",
    ],
}

setup(
    name="flexavatar-jax",
    version="0.1.0",
    description="One portrait to an animatable 3D Gaussian head, trained in JAX on TPUs and GPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(  # data_pipelines/inspect is a folder without __init__.py
        include=["flexavatar_jax*", "configs*", "data_pipelines*", "kernels*"]
    ),
    package_data={
        "data_pipelines": ["figures.json"],
        "flexavatar_jax": ["avatars/export/page/*"],
        "kernels": ["cuda/*.cc", "cuda/*.cu", "cuda/*.h"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
