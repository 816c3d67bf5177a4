"""Head templates as files: what is written comes back, and what is broken is named."""

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.head_mesh import template_mesh
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.runs.templates import format_obj, load_template, parse_obj

SQUARE = """
v 0 0 0
v 1 0 0
v 1 1 5
v 0 1 5
vt 0 0
vt 1 0
vt 1 1
vt 0 1
f 1/1 2/2 3/3
f 1/1 3/3 4/4
"""


def test_obj_text_comes_back_as_the_same_mesh():
    mesh = template_mesh(columns=8, rows=6)
    read = parse_obj(format_obj(HeadTemplate(*mesh)), "x")
    for name, expected in mesh._asdict().items():
        np.testing.assert_array_equal(getattr(read, name), expected)


def test_obj_statements_that_exporters_write():
    text = (
        "mtllib a.mtl\no head\nvn 0 0 1\n"
        + SQUARE.split("f ")[0]
        + "s off # comment\nf -4/1/1 -3/2/1 -2/3/1 -1/4/1\n"
    )
    mesh = parse_obj(text, "quad")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert mesh.face_uvs.tolist() == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (SQUARE + "f 1 2 3\n", "line 12: 'f 1 2 3'"),
        (SQUARE + "f 1/1 2/2 9/1\n", "line 12"),
        (SQUARE + "f 0/1 2/2 3/1\n", "line 12"),
        ("v 1 2\n", "line 1"),
        ("v 1 2 nan\nvt 0 0\nf 1/1 1/1 1/1\n", "not finite"),
        ("v 1 2 3\n", "no faces"),
        ("", "no faces"),
    ],
)
def test_a_broken_obj_is_named(tmp_path, text, sentence):
    path = tmp_path / "head.obj"
    path.write_text(text)
    with pytest.raises(UserError, match=r"head\.obj") as error:
        load_template(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.obj.*config\.model\.template"):
        load_template(tmp_path / "nowhere.obj")
    (tmp_path / "picture.obj").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="not text"):
        load_template(tmp_path / "picture.obj")
