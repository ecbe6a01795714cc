"""The one error class that is the user's to mend: printed without a stack trace, exit code 2."""

import re


class UserError(ValueError):
    """A mistake in a config, an input or an environment, told in one sentence with its remedy."""


class PromptError(UserError):
    """Something is wrong at one prompt, which is known here by its text alone."""

    def __init__(self, prompt: str, message: str) -> None:
        super().__init__(message)
        self.prompt = prompt


def first_sentence(text: str, most: int = 400) -> str:
    """Return what a library's message says first, without the advice and lists after it."""
    return re.split(r"\.\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0][:most].rstrip(".")
