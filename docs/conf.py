"""Settings of Sphinx: ``make docs`` builds the pages into ``docs/_build``, with the reference from the docstrings."""

from sphinx.application import Sphinx

import piadm

project = "piadm"
author = "The piadm authors"
copyright = author
release = version = piadm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"piadm {release}"

myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


def equations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the lines of a docstring's equations, which are indented paragraphs outside its sections, as they are."""
    section, kept, quoted = "", [""], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not kept[-1] and not section.endswith(":") and not quoted:
            kept += ["::", ""]
        quoted = indented or (not line and quoted)
        section = line if line and not indented else section
        kept.append(line)
    lines[:] = kept[1:]


def setup(app: Sphinx) -> None:
    """Read the docstrings before the extension that reads their sections does."""
    app.connect("autodoc-process-docstring", equations, priority=400)
