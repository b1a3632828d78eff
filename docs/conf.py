"""How Sphinx makes the documentation: `make docs`."""

import pkgutil

import lightning as L
import torchmetrics

from lightning_trak import __version__

project = "lightning_trak"
author = "the lightning_trak authors"
copyright = "the lightning_trak authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
# autosummary writes a page in reStructuredText for each name of the API.
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Members of the API that are not described: those that classes of other packages
# define, and hooks of callbacks, which only the Trainer calls.
FOREIGN = {
    base
    for cls in (L.Callback, L.LightningModule, torchmetrics.Metric, Exception, tuple)
    for base in cls.__mro__
}
HOOKS = sorted(name for name in vars(L.Callback) if not name.startswith("_"))
autodoc_default_options = {
    "members": True,
    "inherited-members": ",".join(sorted(cls.__name__ for cls in FOREIGN)),
    "exclude-members": ",".join(HOOKS),
    "show-inheritance": True,
}
autosummary_context = {
    "foreign_members": {name for cls in FOREIGN for name in vars(cls)},
    "hooks": HOOKS,
}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True  # attributes of a docstring are documented once
toc_object_entries_show_parents = "hide"


def resolve_by_definition(app, env, node, contnode):
    """Link a name that a docstring imports from another place than the reference."""
    try:
        obj = pkgutil.resolve_name(node["reftarget"])
        target = f"{obj.__module__}.{obj.__qualname__}"
    except (AttributeError, ImportError, ValueError):
        return None
    place = env, node["refdoc"], app.builder, node["reftype"]
    return env.get_domain("py").resolve_xref(*place, target, node, contnode)


def setup(app):
    """Called by Sphinx."""
    app.connect("missing-reference", resolve_by_definition)


html_theme = "furo"
html_title = f"lightning_trak {__version__}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
