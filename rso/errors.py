"""Errors that the user can correct: printed without a stack trace, with exit code 2."""

import re


class UserError(ValueError):
    """A mistake in a config, an input or the environment; the message also says what to do."""


class PromptError(UserError):
    """A mistake at one prompt; the code that raises it knows the prompt's text and not its id."""

    def __init__(self, prompt: str, message: str) -> None:
        super().__init__(message)
        self.prompt = prompt


def first_sentence(text: str, most: int = 400) -> str:
    """Return the first sentence of a library's message, at most `most` characters of it."""
    return re.split(r"\.\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0][:most].rstrip(".")
