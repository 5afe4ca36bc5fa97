"""How Sphinx builds this documentation: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for generate and mathml

import generate

from eclosion import __version__

project = "eclosion"
author = "the eclosion authors"
copyright = "the eclosion authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
html_math_renderer = "mathml"
exclude_patterns = [
    "_build",
    "benchmarks_table.md",
    "benchmarks_notes.md",
    "examples/clipart_numbers.md",
    "examples/degradations_numbers.md",
    "explanation/uncertainty_numbers.md",
]

myst_enable_extensions = ["attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"eclosion {release}"
html_static_path: list[str] = ["_static"]
html_css_files = ["names.css"]
html_theme_options = {"navigation_with_keys": True}

# Docstrings write `name` for code, as everywhere.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app: object) -> None:
    """Put what is read from the code into the pages that ask for it."""
    app.connect("source-read", generate.fill)  # type: ignore[attr-defined]
    app.connect("env-get-outdated", generate.outdated)  # type: ignore[attr-defined]
