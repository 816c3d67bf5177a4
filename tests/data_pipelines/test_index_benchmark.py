"""The benchmark of a large index measures what it says, on a small one."""

import re

from data_pipelines.errors import GIVE_UP
from data_pipelines.index_benchmark import main


def test_workers_share_the_index_and_draw_from_it(tmp_path, capsys):
    assert main(["--frames=3e6", "--clips=6e3", "--workers=1", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "index of 3000000 frames in 6000 clips: 0.06 GiB on disk" in out
    own = re.search(r"1 workers: each opened it .* has (-?\d+) MiB more of its own", out)[1]
    assert int(own) < 20  # of 57
    assert 0 < int(re.search(r"frames are drawn in (\d+) us", out)[1]) < 10_000
    assert not list(tmp_path.iterdir())


def test_numbers_that_make_no_index_are_named(capsys):
    assert main(["--frames=10", "--clips=20"]) == GIVE_UP
    assert "error: expected --frames of at least --clips" in capsys.readouterr().err
