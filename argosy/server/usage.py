"""Tokens that a request has cost so far, in OpenAI's shape."""

from argosy.messages import RequestOutput


class Usage:
    """``num_prompt_tokens`` by prompt. Outputs are taken as they come: deltas, or one whole output a prompt."""

    def __init__(self, num_prompt_tokens: list[int]) -> None:
        self._num_prompt_tokens = sum(num_prompt_tokens)
        self._num_cached_tokens = [0] * len(num_prompt_tokens)
        self._num_output_tokens = 0

    def add(self, position: int, output: RequestOutput) -> None:
        for completion in output.outputs:
            self._num_output_tokens += len(completion.token_ids)
        self._num_cached_tokens[position] = output.num_cached_tokens

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }
