"""Chat templates: where they lie in a Hugging Face directory, and how they are rendered."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

TODAY = (2024, 7, 26)  # to a template: prompts never change by day


def find_template(directory: epath.Path, config: Mapping[str, Any]) -> str:
    """The default template: of its own file, else of the files' content, ``config``.

    Raises:
      ValueError: its file is no text.
    """
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (path := directory / name).exists():
            try:
                return path.read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is no template: {error}") from None
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}
    return template.get("default", "") if isinstance(template, dict) else template


def render(template: str, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
    """Render a chat template in a sandbox that knows what ``transformers`` offers to templates.

    Raises:
      ValueError: the template is broken, or refuses the messages.
    """
    try:
        return _compiled(template).render({**variables, "messages": list(messages)})
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"the chat template refuses the messages: {error}") from error


@functools.cache  # compiling takes a hundred times as long as rendering
def _compiled(template: str) -> Any:
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words; it leaves them as they are."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.datetime(*TODAY).strftime
    return environment.from_string(template)
