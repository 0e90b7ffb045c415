"""How the documentation is built. Nothing here, and nothing that comes out of it, loads anything from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

from sagaloom import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sagaloom"
copyright = "the sagaloom authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings"]
exclude_patterns = ["_ext"]
default_role = "code"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as written: the value of one of them is the whole environment
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = f"sagaloom {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_static_path = []
pygments_style = "default"
