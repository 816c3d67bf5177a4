"""The frame of the pages that evaluations write: for screens of any width, nothing from outside."""

from __future__ import annotations

import html


def html_page(title: str, body: str) -> str:
    """A page with a heading; `body` is HTML, `title` is text."""
    return _PAGE.format(title=html.escape(title), body=body)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 1em; }}
.row {{ display: flex; gap: 1em; flex-wrap: wrap; }} figure {{ margin: 0; max-width: 100%; }}
img, svg {{ max-width: 100%; height: auto; }} figcaption {{ text-align: center; color: #666; }}
.wide {{ flex: 1 1 480px; min-width: min(100%, 320px); }}
iframe {{ width: 100%; height: 530px; border: 1px solid #ddd; }}
@media (max-width: 700px) {{ iframe {{ height: 85vh; }} td, th {{ padding: .2em .4em; }} }}
td, th {{ padding: .2em .7em; text-align: right; white-space: nowrap; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
tr + tr {{ border-top: 1px solid #ddd; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
