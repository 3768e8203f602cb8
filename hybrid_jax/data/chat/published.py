"""Templates as transformers and servers read them: `chat_template.jinja` beside the weights."""

import re

from hybrid_jax.data.chat.render import FILES, TEMPLATES

# Marks for training, which no other reader knows.
_MARKS = re.compile(r" \| verbatim|\s*\{%- filter learned %\}|\s*\{%- endfilter %\}")


def published(template: str) -> str:
    """What turns `messages`, `tools` and `add_generation_prompt` into the text of `render`.

    `template` is one of `CONTROL`. Arguments of calls are objects there, not JSON in a text.
    """
    own = (TEMPLATES / FILES[template]).read_text(encoding="utf-8")
    before = (TEMPLATES / "messages.jinja").read_text(encoding="utf-8")
    # `tojson` escapes nothing with them, as ours; Jinja's own would escape for HTML.
    return before + _MARKS.sub("", own).replace("| json", "| tojson")
