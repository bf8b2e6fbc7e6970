"""HTML pages that open from disk: one layout, one style, no network, and every text escaped unless it is markup of ours.

Model output is untrusted. Templates escape by default, and the page's content policy runs no script but the one whose
hash it names, so a completion that holds <script> is shown and never run.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = (TEMPLATES / "sort.js").read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page from analysis/templates. A name the template uses and `values` lacks is an error."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(SCRIPT), script_hash=digest, **values)


def embedded(svg: Path) -> str:
    """A picture as a data URL. As an image, its ids and styles stay its own."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
