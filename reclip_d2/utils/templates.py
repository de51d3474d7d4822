"""Pages from Jinja templates in the folder ``templates`` of a package."""

from __future__ import annotations

import functools
from typing import Any

import jinja2


def render(package: str, template: str, **values: Any) -> str:  # noqa: ANN401
    """Fill in a template.

    Args:
        package: the package with the folder ``templates``, such as ``reclip_d2.experiments``.
        template: file name; values are escaped only if it ends in ``.html.jinja``.
        values: the template's variables; missing ones are errors.
    """
    return _environment(package).get_template(template).render(values)


@functools.cache
def _environment(package: str) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
