"""A config as a user has it: a Python file that commands are given."""

from pathlib import Path

from ml_collections import ConfigDict


def write_experiment(config: ConfigDict, folder: Path) -> Path:
    """Writes `config` as `folder`/experiment.py, for `--config`."""
    path = folder / "experiment.py"
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    return path
