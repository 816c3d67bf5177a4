"""A page of several runs side by side: measurements, and avatars to be turned by hand."""

from __future__ import annotations

import html
from urllib.parse import quote

from etils import epath

from data_pipelines.files import write
from flexavatar_jax.evaluation.matrix import Results, commit, table
from flexavatar_jax.evaluation.page import html_page
from flexavatar_jax.evaluation.report import AVATAR_PAGE


def write_page(
    folder: epath.Path, results: Results, sheets: list[str], runs: dict[str, epath.Path]
) -> None:
    """Writes `folder`/index.html, and beside it the avatar page of each run's report.

    Args:
      folder: where curves.svg, poses.png and `sheets`, pictures of a test person each, are.
      results: of which the table is made.
      runs: folder of an evaluated run each; its report's avatar is of the first test person.
    """
    figures = []
    for name, workdir in runs.items():
        page = f"avatar_{name}.html"
        write(folder / page, (workdir / "report" / AVATAR_PAGE).read_text())
        label = html.escape(name)
        figures.append(
            f'<figure class="wide"><iframe src="{quote(page)}" loading="lazy" '
            f'title="{label}: its avatar of the first test person, with sliders"></iframe>'
            f"<figcaption>{label}</figcaption></figure>"
        )
    titles, *rows = table(results)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr><th>{html.escape(cells[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for cells in rows
    )
    pictures = "".join(
        f'<p><img src="{sheet}" alt="test person {number}: the input, the avatars of each run '
        'from all round, and the truth below"></p>'
        for number, sheet in enumerate(sheets)
    )
    page = _BODY.format(
        pictures=pictures,
        figures="".join(figures),
        table=f"<table><tr>{head}</tr>{body}</table>",
        commit=html.escape(commit()),
    )
    write(folder / "index.html", html_page(", ".join(runs), page))


_BODY = """<h2>People never seen in training, from one picture</h2>{pictures}
<h2>Only the code's head pose turns, then only the camera</h2>
<p>Cameras are given in the head frame, so nothing should change in the first four pictures after
the input.</p><p><img src="poses.png" alt="the first person's avatars as only the head pose in the
code turns from side to side, then as only the camera does"></p>
<h2>The first of them, to turn yourself</h2>
<p>Drag to turn, move the sliders, or play what was filmed; the truth is in the first picture.</p>
<div class="row">{figures}</div>
<h2>Measured</h2>{table}
<p>Mean and standard deviation over seeds. Code: {commit}.</p>
<p><img src="curves.svg" alt="training loss of each run over its steps"></p>"""
