"""The documentation site: `make docs` builds it into build/docs."""

import re
from typing import Any

import fused_rope

project = "fused-rope"
author = "The fused-rope authors"
project_copyright = "The fused-rope authors"
version = release = fused_rope.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns: list[str] = []
nitpicky = True
# Other projects' objects, whose resolving would need the network, and a protocol of their classes.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|transformers|dict\[).*"),
    ("py:class", r"fused_rope\.compat\.diffusers\.patching\.Pipeline"),
]
default_role = "code"  # docstrings write `name`

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"fused-rope {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def show_indented_code(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings of modules show code by indentation alone, which is a quotation to docutils."""
    if what != "module":
        return
    shown: list[str] = []
    for line in lines:
        starts = line.startswith("    ") and len(shown) > 1 and not shown[-1]
        if starts and not shown[-2].startswith("    ") and not shown[-2].endswith(":"):
            language = "python" if re.search(r"import |\(", line) else "text"
            shown += [f".. code-block:: {language}", ""]
        shown.append(line)
    lines[:] = shown


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", show_indented_code)
