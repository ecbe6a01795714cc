"""Prompt and ranker texts to token ids: the one tokenising path.

Text that users supply is tokenised with special tokens as ordinary text, so that a prompt holding
`<eos>` can neither end nor forge a turn; where a tokenizer cannot, they are written with a space in
them (`< eos>`). Prompt and response ids are concatenated, never
re-tokenised together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rso.config import Templates
from rso.errors import UserError

SENTINEL = "\ufdd0prompt\ufdd0"


class Context(NamedTuple):
    """Ids of a ranker context and how many were cut from its right end."""

    ids: list[int]
    num_cut: int


class LabelIds(NamedTuple):
    """The two label tokens of a ranker."""

    a: int
    b: int


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, templates: Templates, prompt: str
) -> list[int]:
    """Return the ids of the prompt in its template, one beginning-of-sequence token at most.

    Equal to tokenising the rendered template whole, except that special tokens written in the
    prompt stay text; so a text template ends with T5's end-of-sequence token, and a chat template
    with what it says itself.

    Raises:
        UserError: a template lacks {prompt}, or the tokenizer has no chat template.
    """
    if templates.prompt == "chat":
        before, after = _chat_frame(tokenizer, templates.instruction)
        return _encode_within(tokenizer, before, [prompt], after)[0]
    before, after = _frame("templates.prompt", templates.prompt, "prompt")
    ids = _one_bos(tokenizer, _encode_within(tokenizer, before, [prompt], after)[0])
    return _encoder_end(tokenizer, ids)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, templates: Templates, text: str, *, eos: bool
) -> list[int]:
    """Return the ids of a response given as text, end-of-sequence appended if `eos`.

    Decoded responses have ids of their own and must not come through here.
    """
    (ids,) = _encode_texts(tokenizer, [templates.response_prefix + text])
    return [*ids, int(tokenizer.eos_token_id)] if eos else ids


def judged_text(templates: Templates, response: str) -> str:
    """Return a response as judges read it: without `response_prefix` and outer white space.

    Decodes begin with the prefix and human texts do not, so it must not decide a comparison. Apply
    it once: a response may itself begin with the prefix.
    """
    return response.removeprefix(templates.response_prefix).strip()


@dataclass(frozen=True)
class RankerEncoder:
    """The pieces of a ranker's input; concatenated, they are the whole input.

    context + side("A", y1) + side("B", y2) + suffix, with a label token as the target. T5's suffix
    has the end-of-sequence token that its encoder expects.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    labels: LabelIds = field(init=False)
    suffix: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Check labels and templates once, so that a mistake shows before any work."""
        object.__setattr__(self, "labels", label_ids(self.tokenizer, self.templates))
        suffix = _encode_template(self.tokenizer, self.templates.ranker_suffix)
        object.__setattr__(self, "suffix", _encoder_end(self.tokenizer, suffix))
        self.context("x"), self.branch("x", "x")

    def context(self, prompt: str) -> Context:
        """Return the ids before the responses, cut from the right to `max_context_tokens`."""
        before, after = _frame("templates.ranker_context", self.templates.ranker_context, "prompt")
        ids = _one_bos(self.tokenizer, _encode_within(self.tokenizer, before, [prompt], after)[0])
        limit = self.templates.max_context_tokens
        return Context(ids[:limit], max(0, len(ids) - limit))

    def sides(self, slot: Literal["A", "B"], responses: Sequence[str]) -> list[list[int]]:
        """Return the ids of responses, as `judged_text`, in their slot; they are never cut."""
        name = "ranker_a" if slot == "A" else "ranker_b"
        before, after = _frame(f"templates.{name}", getattr(self.templates, name), "response")
        texts = [judged_text(self.templates, response) for response in responses]
        return _encode_within(self.tokenizer, before, texts, after)

    def side(self, slot: Literal["A", "B"], response: str) -> list[int]:
        """Return the ids of one response in its slot."""
        return self.sides(slot, [response])[0]

    def branch(self, first: str, second: str) -> list[int]:
        """Return what follows the context: `first` in slot A, `second` in slot B, the suffix."""
        return self.side("A", first) + self.side("B", second) + self.suffix


def label_ids(tokenizer: PreTrainedTokenizerBase, templates: Templates) -> LabelIds:
    """Return the ids of the two label tokens.

    Raises:
        UserError: a label is not exactly one token, or both are the same.
    """
    ids = _encode_texts(tokenizer, [templates.label_a, templates.label_b])
    for name, label, found in zip("ab", (templates.label_a, templates.label_b), ids, strict=True):
        if len(found) != 1:
            raise UserError(
                f"templates.label_{name}: {label!r} is {len(found)} tokens of this tokenizer, "
                "expected one; choose a label such as ' A' that is a single token."
            )
    if ids[0] == ids[1]:
        raise UserError(
            f"templates.label_a and label_b: both are token {ids[0][0]}; choose two labels that "
            "differ."
        )
    return LabelIds(ids[0][0], ids[1][0])


def _chat_frame(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise UserError(
            "templates.prompt: `chat` needs a chat template and the tokenizer has none; write the "
            "text instead, with {prompt} in it."
        )
    _frame("templates.instruction", instruction, "prompt")
    content = instruction.replace("{prompt}", SENTINEL)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, *rest = str(text).split(SENTINEL)
    if len(rest) != 1:
        raise UserError(
            f"the tokenizer's chat template shows the user's message {len(rest)} times, expected "
            "once; set templates.prompt to a text with {prompt} in it."
        )
    return before, rest[0]


def _frame(name: str, template: str, placeholder: str) -> tuple[str, str]:
    before, *rest = template.split(f"{{{placeholder}}}")
    if len(rest) != 1:
        raise UserError(
            f"{name}: {{{placeholder}}} occurs {len(rest)} times in {template!r}, expected once."
        )
    return before, rest[0]


def _encode_within(
    tokenizer: PreTrainedTokenizerBase, before: str, texts: Sequence[str], after: str
) -> list[list[int]]:
    """Return ids of before + text + after where only the frame's special tokens are special.

    The stretch between the special tokens nearest to the text is tokenised as a whole, so that
    merges across the edges of the text are those of the plain rendered template.
    """
    special = _special_pattern(tokenizer)
    head, tail = 0, len(after)
    if special is not None:
        head = max((match.end() for match in special.finditer(before)), default=0)
        first = special.search(after)
        tail = first.start() if first else len(after)
    first_ids, last_ids = (
        _encode_template(tokenizer, part) for part in (before[:head], after[tail:])
    )
    stretches = [before[head:] + text + after[:tail] for text in texts]
    return [first_ids + ids + last_ids for ids in _encode_texts(tokenizer, stretches)]


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Longest first: one special token may begin with another.
    names.sort(key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names)) if names else None


def _encode_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts in which nothing is special; many at once use all cores."""
    encoded = _plain_ids(tokenizer, texts)
    special = _special_pattern(tokenizer)
    if special is None:
        return encoded
    reserved = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    # The special tokens of unigram tokenizers (T5) are pieces of the vocabulary like any others.
    forged = [
        place
        for place, (text, ids) in enumerate(zip(texts, encoded, strict=True))
        if special.search(text) and reserved & set(ids)
    ]
    spaced = [special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", texts[i]) for i in forged]
    for place, ids in zip(forged, _plain_ids(tokenizer, spaced), strict=True):
        encoded[place] = ids
    return encoded


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Put the beginning-of-sequence token first where the tokenizer does so, and never twice."""
    bos = tokenizer.bos_token_id
    if bos is None or list(tokenizer("")["input_ids"])[:1] != [bos] or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def _encoder_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Put the end-of-sequence token last where the tokenizer is an encoder's, and never twice.

    T5's tokenizers end every text so and begin none; decoders' tokenizers that add anything begin
    with it, be it the same token (OPT).
    """
    eos = tokenizer.eos_token_id
    is_encoders = tokenizer.bos_token_id is None and list(tokenizer("")["input_ids"]) == [eos]
    return [*ids, eos] if is_encoders and ids[-1:] != [eos] else ids
