"""The ranker in vLLM, for decoder-only models.

Each comparison is a prompt of vLLM, after which it draws one token. The ranker reads the
log-probabilities of the two labels there. Prefix caching computes context and baseline once. The
output projection runs in float32: in bfloat16 the difference of two logits would be a multiple of
0.06 or more.
"""

import threading
from collections.abc import Sequence

import numpy as np

from rso.aliases import Float32s
from rso.decoding import vllm_engine
from rso.prefix import PrefixRow
from rso.progress import progress as Bar
from rso.ranking import RowRanker
from rso.templates import RankerEncoder


class VllmRanker(RowRanker):
    """A `Ranker` over `vllm.LLM`.

    Raises:
        UserError: vLLM cannot start with the model.
    """

    def __init__(self, directory: str, encoder: RankerEncoder, *, dtype: str) -> None:
        self._llm, self._adapter = vllm_engine.start(
            directory,
            dtype,
            setting="compute.ranker_engine",
            hf_overrides={"head_dtype": "float32"},
        )
        # The drawn token takes one place of the context.
        super().__init__(encoder, self._llm.llm_engine.model_config.max_model_len - 1)
        self._lock = threading.Lock()

    def label_logits(self, rows: Sequence[PrefixRow], progress: Bar | None) -> list[Float32s]:
        """Return logit_A - logit_B after each branch: [branches] for each row, in the given order.

        `progress` advances by one per branch.
        """
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(self._encoder.labels),
            detokenize=False,
        )
        a, b = self._encoder.labels
        prompts = [row.prefix + branch for row in rows for branch in row.branches]
        if not prompts:
            return [np.empty(0, np.float32)] * len(rows)
        found: dict[int, float] = {}
        with self._lock:
            for number, (output,) in vllm_engine.run_engine(
                self._llm, prompts, parameters, self._adapter
            ):
                # Log-probs share their normaliser, so they differ by as much as the logits.
                of = output.logprobs[0]
                found[number] = of[a].logprob - of[b].logprob
                if progress is not None:
                    progress.advance()
        assert len(found) == len(prompts)
        flat = np.array([found[number] for number in sorted(found)], np.float32)
        ends = np.cumsum([len(row.branches) for row in rows])
        return np.split(flat, ends[:-1])

    def close(self) -> None:
        """Stop the engine and free its memory."""
        vllm_engine.stop(self._llm)
        del self._llm
