"""How a chat model is spoken to: its template, put around the user's text once, everywhere in the same way.

Editing, decoding, scoring and tracing all go through :meth:`Chat.render`, and what it was given is kept with a delta,
because a model that is asked with another system prompt is asked something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editunlearn.errors import InputError


@dataclass(frozen=True)
class Chat:
    """What stands around a user's text.

    Attributes:
        system: system prompt; None: none, which leaves it to the template.
        arguments: for the template, such as ``{"enable_thinking": False}``.
        on: False: the template is not used at all, and the model asked like a base model.
    """

    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on: bool = True

    def render(self, tokenizer: Any, text: str, answer: str | None = None) -> str:
        """The turns as text, up to where the assistant begins, or with its ``answer`` and what stands behind that.

        Raises:
            InputError: the template does not take these turns.
        """
        turns = [{"role": "user", "content": text}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            found = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer is None, **self.arguments
            )
        except Exception as error:  # templates raise what they like (jinja errors, missing fields)
            raise InputError(f"the chat template cannot be filled in{self._with()}: {error}") from error
        return str(found)

    def check(self, tokenizer: Any, name: str) -> None:
        """Whether this model's template does what is asked of it.

        Raises:
            InputError: there is no template to put a system prompt or arguments into, or it takes none.
        """
        asked = self.system is not None or bool(self.arguments)
        if not self.on:
            if asked:
                raise InputError("--no-chat: leaves the chat template out; --system and --chat-arg go into it.")
            return
        if not asked:
            return
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{name} has no chat template that a system prompt or arguments could go into.")
        said = self.render(tokenizer, "QUESTION")
        if self.system is not None and self.system.strip() not in said:
            raise InputError(f"the chat template of {name} leaves the system prompt out. Put it into the questions.")
        unused = [key for key in self.arguments if key not in str(tokenizer.chat_template)]
        if unused:
            raise InputError(f"the chat template of {name} has no argument {unused[0]!r}, so that it changes nothing.")

    def record(self) -> dict[str, Any] | None:
        """As plain JSON; None when nothing differs from the template's own."""
        if self == Chat():
            return None
        return {"system": self.system, "arguments": dict(self.arguments), "on": self.on}

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Chat:
        """What :meth:`record` gave."""
        return cls(**record) if record else cls()

    def _with(self) -> str:
        given = ["a system prompt"] if self.system is not None else []
        given += [f"{key}={value!r}" for key, value in self.arguments.items()]
        return f" with {', '.join(given)}" if given else ""
