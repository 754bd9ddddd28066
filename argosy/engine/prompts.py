"""The forms a prompt may take, and the checks that need the tokenizer and the model's limits.

Invariant: token ids that leave this file can be computed: not empty, in range, and short enough to leave room for
output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from argosy.engine.tokenizer import Tokenizer
from argosy.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, object]
_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """A prompt ready for the engine."""

    text: str | None
    token_ids: list[int]


class PromptChecker:
    """Turns prompts into token ids, or says why not."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    def check(self, prompt: Prompt, params: SamplingParams) -> CheckedPrompt:
        """Raises ValueError naming the value, the rule and the remedy."""
        text, token_ids = self._read(prompt)
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one character or token id")
        self._check_length(len(token_ids))
        self._tokenizer.check_token_ids(params.stop_token_ids, "stop_token_ids")
        self._tokenizer.check_token_ids(tuple(params.logit_bias or ()), "logit_bias")
        structured = params.structured_outputs
        if structured is not None and structured.starts_after_token_id is not None:
            self._tokenizer.check_token_ids([structured.starts_after_token_id], "starts_after_token_id")
        return CheckedPrompt(text, token_ids)

    def check_text_length(self, text: str) -> None:
        """Without tokenizing it: raises ValueError if ``text`` cannot but be too long."""
        self._check_length(self._tokenizer.count_at_least(text), "at least ")

    def _check_length(self, num_tokens: int, how: str = "") -> None:
        if num_tokens >= self._max_model_len:
            raise ValueError(
                f"the prompt has {how}{num_tokens} tokens, but max_model_len is {self._max_model_len} for prompt and "
                "output together; shorten the prompt or raise --max-model-len"
            )

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        bare = _unwrap(prompt) if isinstance(prompt, Mapping) else prompt
        if not isinstance(bare, Sequence):
            raise ValueError(
                f"a prompt must be a string, a list of token ids or an object, got {type(bare).__name__}: {bare!r:.80}"
            )
        if isinstance(bare, str):
            self.check_text_length(bare)
            return bare, self._tokenizer.encode_prompt(bare) if bare else []
        self._check_length(len(bare))
        self._tokenizer.check_token_ids(bare, "prompt_token_ids")
        return None, list(bare)


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of one; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompt_list = list(prompts)
    if prompt_list and all(isinstance(item, int) for item in prompt_list):
        return [prompt_list]  # type: ignore[list-item]
    return prompt_list  # type: ignore[return-value]


def as_params_list(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    params_list = list(sampling_params)
    if len(params_list) != num_prompts:
        raise ValueError(
            f"{len(params_list)} sampling_params for {num_prompts} prompts; give one for all, or one for each prompt"
        )
    return params_list


def _unwrap(prompt: Mapping[str, object]) -> str | Sequence[int]:
    """The one prompt inside a prompt object."""
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if set(prompt) - set(_KEYS) or (text is None) == (token_ids is None):
        raise ValueError(f"a prompt object needs exactly one of 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
    if text is not None:
        if not isinstance(text, str):
            raise ValueError(f"prompt must be a str, got {type(text).__name__}")
        return text
    if not isinstance(token_ids, list):
        raise ValueError(f"prompt_token_ids must be a list, got {type(token_ids).__name__}")
    return token_ids
