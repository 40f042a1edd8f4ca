"""Conversations, as chat data sets hold them: lists of messages, which a tokenizer's chat template turns into text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation", "Document", "message_texts", "render"]

Conversation = Sequence[Mapping[str, Any]]
"""Messages in their order, each with a "role" and a "content"."""

Document = str | Conversation
"""A text, or a conversation."""


def message_texts(name: str, index: int, conversation: Any) -> list[str]:
    """The contents of a conversation's messages.

    Args:
        name: the source, for an error.
        index: number of the conversation in it.
        conversation: what the source holds.

    Raises:
        CalibrationError: it is no list of messages with a role and a text.
    """
    wanted = f'{name}: expected conversation {index} to be a list of messages, each with a "role" and a "content"'
    if not isinstance(conversation, list | tuple):
        raise CalibrationError(f"{wanted}, found {type(conversation).__name__}")
    for message in conversation:
        if not isinstance(message, Mapping):
            raise CalibrationError(f"{wanted}, found a message of type {type(message).__name__}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise CalibrationError(
                    f'{wanted}, found a message whose "{field}" is {type(message.get(field)).__name__}, not text'
                )
    return [message["content"] for message in conversation]


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a conversation by the tokenizer's chat template, which transformers runs in a sandbox.

    Raises:
        CalibrationError: the tokenizer has no chat template, or its template refuses the conversation.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{name} has no chat template to turn conversations into text: use the tokenizer of the chat model, or "
            'give the text itself ("text" in place of "messages")'
        )
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in conversation[:8])
        raise CalibrationError(
            f"the chat template of {name} refuses a conversation of {roles}: {error}; change it or leave it out"
        ) from error
