"""Prompt and ranker texts to token ids: the only place that tokenises text.

In text of users, special tokens are tokenised as ordinary text, so that a prompt with `<eos>` in it
can neither end nor forge a turn. Where a tokenizer cannot do this, the special token gets a space
(`< eos>`). Prompt and response ids are concatenated, never tokenised together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rso.config import Templates
from rso.errors import UserError

SENTINEL = "\ufdd0prompt\ufdd0"


class RankerContext(NamedTuple):
    """The ids of a ranker context, and the number of ids that were cut from its right end."""

    ids: list[int]
    num_cut: int


class LabelIds(NamedTuple):
    """The two label tokens of a ranker."""

    a: int
    b: int


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, templates: Templates, prompt: str
) -> list[int]:
    """Return the ids of the prompt in its template.

    They are those of the whole rendered template, except that special tokens in the prompt stay
    text. A text template begins with one beginning-of-sequence token if the tokenizer puts one, and
    ends with T5's end-of-sequence token. To a chat template neither is added.

    Raises:
        UserError: {prompt} does not occur exactly once in a template, the tokenizer has no chat
            template, or its chat template does not show the message exactly once.
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
    """Return the ids of `response_prefix` and a response, then end-of-sequence if `eos`.

    Do not call this for decoded responses: they have ids of their own.
    """
    (ids,) = _encode_texts(tokenizer, [templates.response_prefix + text])
    return [*ids, int(tokenizer.eos_token_id)] if eos else ids


def judged_text(templates: Templates, response: str) -> str:
    """Return a response as judges read it: without `response_prefix` and outer white space.

    Decoded responses begin with the prefix and human texts do not, so the prefix must not decide a
    comparison. Call this only once per response: a second call would also remove a prefix that
    belongs to the response.
    """
    return response.removeprefix(templates.response_prefix).strip()


@dataclass(frozen=True)
class RankerEncoder:
    """The pieces of a ranker's input.

    The input is context + side("A", y1) + side("B", y2) + suffix, and the target is a label token.
    T5's suffix ends with the end-of-sequence token that its encoder expects.

    Raises:
        UserError: a placeholder does not occur exactly once in its template, or `label_ids` refuses
            the labels.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    labels: LabelIds = field(init=False)
    suffix: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Check labels and templates, so that a mistake shows before any work."""
        object.__setattr__(self, "labels", label_ids(self.tokenizer, self.templates))
        suffix = _encode_template(self.tokenizer, self.templates.ranker_suffix)
        object.__setattr__(self, "suffix", _encoder_end(self.tokenizer, suffix))
        self.context("x"), self.branch("x", "x")

    def context(self, prompt: str) -> RankerContext:
        """Return the ids before the responses: the first `max_context_tokens` of them."""
        before, after = _frame("templates.ranker_context", self.templates.ranker_context, "prompt")
        ids = _one_bos(self.tokenizer, _encode_within(self.tokenizer, before, [prompt], after)[0])
        limit = self.templates.max_context_tokens
        return RankerContext(ids[:limit], max(0, len(ids) - limit))

    def sides(self, slot: Literal["A", "B"], responses: Sequence[str]) -> list[list[int]]:
        """Return, for each response, the ids of its `judged_text` in the slot; none is cut."""
        name = "ranker_a" if slot == "A" else "ranker_b"
        before, after = _frame(f"templates.{name}", getattr(self.templates, name), "response")
        texts = [judged_text(self.templates, response) for response in responses]
        return _encode_within(self.tokenizer, before, texts, after)

    def side(self, slot: Literal["A", "B"], response: str) -> list[int]:
        """Return the ids of one response in the slot, as `sides`."""
        return self.sides(slot, [response])[0]

    def branch(self, first: str, second: str) -> list[int]:
        """Return the ids after the context: `first` in slot A, `second` in slot B, the suffix."""
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
    """Return, for each text, the ids of before + text + after; special tokens in it stay text.

    The part between the special tokens that are nearest to the text is tokenised as a whole. So
    merges across the edges of the text are those of the rendered template.
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
    """Return the ids of texts whose special tokens are text; one call for many uses all cores."""
    encoded = _plain_ids(tokenizer, texts)
    special = _special_pattern(tokenizer)
    if special is None:
        return encoded
    reserved = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    # Unigram tokenizers (T5) still find special tokens: these are ordinary vocabulary pieces.
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
    """Put the beginning-of-sequence token first if the tokenizer does so; it is never doubled."""
    bos = tokenizer.bos_token_id
    if bos is None or list(tokenizer("")["input_ids"])[:1] != [bos] or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def _encoder_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Put the end-of-sequence token last if the tokenizer is an encoder's; it is never doubled.

    T5's tokenizers add it to the end of every text, and have no beginning-of-sequence token. The
    tokenizers of decoders add a token only to the beginning, if any. It may be the same one (OPT).
    """
    eos = tokenizer.eos_token_id
    is_encoders = tokenizer.bos_token_id is None and list(tokenizer("")["input_ids"]) == [eos]
    return [*ids, eos] if is_encoders and ids[-1:] != [eos] else ids
