"""What Jupyter and its like show of an object, as an HTML fragment.

In: what a finding of `explain.py` or `trace.py` wants shown. Out: the fragment that its
`_repr_html_` returns: no script, below 200 KB, readable on a light page and on a dark one. How it
looks is in `templates/notebook/`.
"""

from typing import Any

import jinja2

from minilm.report import shortened

__all__ = ["clipped", "environment", "fragment"]

# In characters. A word may be as long as its text, as one unknown token; a notebook keeps each
# output in its file.
_LONGEST = {"text": 200, "label": 24}


def clipped(text: str, kind: str) -> str:
    """A text as a notebook shows it: "text" in at most 200 characters, "label" in at most 24."""
    return shortened(text, _LONGEST[kind])


def environment(**options: Any) -> jinja2.Environment:
    """What reads `templates/`; what is put in is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("minilm.interpret"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        **options,
    )


def fragment(template: str, **context: Any) -> str:
    """Fill in a template of `templates/notebook/`."""
    reader = environment()
    reader.filters["clipped"] = clipped
    return reader.get_template(f"notebook/{template}").render(context)
