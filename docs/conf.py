"""The documentation site: `make docs` builds it into docs/site, without network. docs/generated.py fills its tables."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generated  # noqa: E402

import mlcm_rl  # noqa: E402

NAVIGATION = (ROOT / "docs" / "navigation.md").read_text(encoding="utf-8")

project = "mlcm_rl"
version = release = mlcm_rl.__version__
html_title = f"mlcm_rl {release}"
copyright = "the authors of mlcm_rl, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "recipes/*/*.md", "reward_models/*.md"]
exclude_patterns = [
    ".*",
    "**/.*",
    "docs/navigation.md",
    "docs/site",
    "runs",
    "data",
    "build",
    "dist",
    "mlcm_rl",
    "tests",
]
default_role = "literal"  # docstrings write code between single backticks
myst_heading_anchors = 4
smartquotes = False  # options begin with two dashes
nitpicky = False  # signatures name types of torch and Python, whose pages would have to be fetched

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["."]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "native"


def setup(app):
    """Fill the generated parts of a page before it is parsed; the first page has the navigation too."""

    def fill(app, page, text):
        text[0] = generated.whole(text[0] + (f"\n\n{NAVIGATION}" if page == root_doc else ""))

    def plain(app, what, name, thing, options, lines):
        """Make a docstring in plain sentences one in reStructuredText: indented lines are code, signs are signs."""
        text = "\n".join(lines)
        text = re.sub(r"`[^`\n]*`|[*|]", lambda piece: piece[0] if len(piece[0]) > 1 else f"\\{piece[0]}", text)
        lines[:] = re.sub(r"(?m)^(\S.*)\n+(?=    )", r"\1\n\n::\n\n", text).splitlines()

    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", plain)
