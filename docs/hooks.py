"""Of the roles in docstrings, :func:`~package.name`, the site shows the name."""

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod):\s*<code>~?(?:[\w.]*\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"<code>\1</code>", html)
