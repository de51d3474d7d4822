"""Pages from templates: escaping, and missing values."""

import jinja2
import pytest

from reclip_d2.utils import templates


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with two templates."""
    folder = tmp_path / "package_of_templates" / "templates"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("page.html.jinja", "page.md.jinja"):
        (folder / name).write_text("{% if title %}\n  {{ title }}\n{% endif %}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "package_of_templates"


def test_values_are_escaped_in_html_alone(package):
    assert templates.render(package, "page.html.jinja", title='<a href="x">') == "  &lt;a href=&#34;x&#34;&gt;\n"
    assert templates.render(package, "page.md.jinja", title="a > b & c") == "  a > b & c\n"


def test_a_value_that_is_missing_is_an_error(package):
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        templates.render(package, "page.md.jinja")
