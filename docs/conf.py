"""How Sphinx makes the documentation: `make docs`."""

from lightning_trak import __version__

project = "lightning_trak"
author = "the lightning_trak authors"
copyright = "the lightning_trak authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True  # attributes of a docstring are documented once

html_theme = "furo"
html_title = f"lightning_trak {__version__}"
