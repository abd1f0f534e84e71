"""An index page of the reports of several scans."""

import glob
import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from diffdiscover3d.reporting.label_maps import is_result_of
from diffdiscover3d.reporting.page import csp_hash
from diffdiscover3d.utils.files import read_json, write_text
from diffdiscover3d.utils.terminal import printable

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src {style_hash}; img-src 'self' file:; base-uri 'none'; form-action 'none'">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><p class="soft">{count} scans; choose one to open its report.</p><ul>
{items}
</ul></body></html>
"""
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.25rem; } .soft { color: #888; }
ul { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); list-style: none; padding: 0; }
a { color: inherit; display: block; overflow-wrap: anywhere; text-decoration: none; }
a:hover { text-decoration: underline; }
img { background: #000; display: block; height: 180px; object-fit: contain; width: 100%; }
"""


def write_index(path: str | Path, reports: Sequence[str | Path], *, title: str = "Parts found") -> None:
    """Write a page that links to every report, with its preview picture if there is one beside it.

    Args:
        path: the HTML file.
        reports: `<stem>_report.html` files; links are relative, so that the folder can be moved as a whole. If some
            have one name, all are shown with their folders.
    """
    path, reports = Path(path), [Path(report) for report in reports]
    common = Path(os.path.commonpath([report.absolute().parent for report in reports])) if reports else path
    ambiguous = len({report.name for report in reports}) < len(reports)
    items = []
    for report in reports:
        stem = report.name.removesuffix("_report.html")
        shown = (report.absolute().parent.relative_to(common) / stem).as_posix() if ambiguous else stem
        picture = report.with_name(f"{stem}_dseg.png")
        image = f'<img src="{_link(picture, path)}" alt="" loading="lazy">' if picture.exists() else ""
        sizes = _sizes(report, stem)
        name = html.escape(printable(shown))
        items.append(f'<li><a href="{_link(report, path)}">{image}{name}</a><div class="soft">{sizes}</div></li>')
    page = _PAGE.format(
        title=html.escape(title), count=len(items), items="\n".join(items), style=_STYLE, style_hash=csp_hash(_STYLE)
    )
    write_text(path, page)


def _link(target: Path, page: Path) -> str:
    return quote(os.fsencode(Path(os.path.relpath(target, page.parent)).as_posix()))


def _sizes(report: Path, stem: str) -> str:
    """The shares of the parts, from the sidecars beside the report."""
    found = []
    for sidecar in sorted(report.parent.glob(f"{glob.escape(stem)}_*dseg.json")):
        if not is_result_of(sidecar, stem):  # of a scan whose name begins with that of this one
            continue
        try:
            parts = read_json(sidecar)["parts"]
            shares = ", ".join(f"{100 * part['fraction']:.0f} %" for part in parts)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(html.escape(f"{len(parts)} parts: {shares}"))
    return "<br>".join(found)
