"""The chat template of a run: the tokenizer's own, one of ours, or a file; the tokenizer is saved with it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from shardtune.errors import ConfigError

FOLDER = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
"""The templates that we have; each marks the assistant's turns with generation tags."""

_END_OF_TURN = re.compile(r"set end_of_turn = '([^']*)'")
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Gives the tokenizer the chat template that `task.template` names; None leaves it its own.

    One of ours ends turns with its own token where the tokenizer has it, else with the tokenizer's end token. Raises
    ConfigError for an unknown name, a file that cannot be read, a template that is not valid, and where there is none.
    """
    where = "task.template: the tokenizer's own chat template"
    if template is not None:
        path = FOLDER / f"{template}.jinja" if template in NAMES else Path(template).expanduser()
        text = _read(template, path)
        found = _END_OF_TURN.search(text) if template in NAMES else None
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}  # of others, text could be merged
        if found and found[1] not in known:
            text = text.replace(found[0], "set end_of_turn = eos_token", 1)
        tokenizer.chat_template = text
        where = str(path)
    elif not tokenizer.chat_template:
        raise ConfigError(
            f"task.template: the tokenizer {tokenizer.name_or_path} has no chat template; "
            f"name one: {', '.join(NAMES)}, or a path ending in .jinja"
        )
    try:
        tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except TemplateSyntaxError as error:
        line = f":{error.lineno} task.template" if template is not None else f", line {error.lineno}"
        raise ConfigError(f"{where}{line}: not a valid Jinja template: {error.message}") from None
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError):
        pass  # it may want something of a conversation that this one has not


def _read(template: str, path: Path) -> str:
    if template not in NAMES and path.suffix != ".jinja":
        near = difflib.get_close_matches(template.lower(), NAMES, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"task.template: {template!r} is not one of {', '.join(NAMES)}, nor a path ending in .jinja{hint}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.jinja")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"task.template: {path}: there is no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"task.template: {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"task.template: {path}: cannot be read as UTF-8 text: {error}") from None
