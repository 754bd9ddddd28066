"""Tokens per second of Argosy and of ``transformers`` on the same weights, interleaved in one process.

    python benchmarks/against_transformers.py [--model DIR] [--device cpu|cuda] [--dtype float32|bfloat16]

Decode: greedy, end-of-sequence ignored; the time of the prefill is measured apart and taken off. Both sides must
produce the same tokens (float32) before a number is printed; in bfloat16 the share of equal tokens is reported instead.
Prints a card for people, then one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import DeepseekV32ForCausalLM
from transformers.utils import logging

from argosy import LLM, RequestOutput, SamplingParams
from argosy.cli.code_version import read_commit
from argosy.engine.model_directory import resolve_model_directory

DECODES = ((1, 128), (8, 128), (32, 128), (1, 512), (8, 512))  # (batch size, prompt length)
CHECK_LENGTH = 128
PREFILL_LENGTH = 1024
NUM_TOKENS = 48
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    argosy_tok_s: float
    transformers_tok_s: float
    ratio: float
    spread: float  # (max - min) / median of the per-round ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="argosy-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)

    llm = LLM(arguments.model, device=arguments.device, dtype=arguments.dtype, enable_prefix_caching=False)
    theirs = DeepseekV32ForCausalLM.from_pretrained(
        resolve_model_directory(arguments.model), dtype=getattr(torch, arguments.dtype)
    )
    theirs = theirs.eval().to(llm.built.device)
    equal_share = check_tokens(llm, theirs, arguments.dtype)
    rows = [measure_decode(llm, theirs, *decode, arguments.rounds) for decode in DECODES]
    rows.append(measure_prefill(llm, theirs, arguments.rounds))
    report(rows, llm, equal_share)


def random_prompts(llm: LLM, batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(10, llm.vocab_size - 10, (batch_size, length))


def run_ours(llm: LLM, prompts: torch.Tensor, num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    results = llm.generate(prompts.tolist(), params, use_tqdm=False)
    return [result.outputs[0].token_ids for result in results if isinstance(result, RequestOutput)]


@torch.inference_mode()
def run_theirs(
    model: DeepseekV32ForCausalLM, prompts: torch.Tensor, num_tokens: int, vocab_size: int
) -> list[list[int]]:
    """``vocab_size``: the tokenizer's; ids above are padding, which ours masks."""
    prompts = prompts.to(model.device)
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(range(vocab_size, model.config.vocab_size)) or None,
    )
    return generated[:, prompts.shape[1] :].tolist()


def check_tokens(llm: LLM, theirs: DeepseekV32ForCausalLM, dtype: str) -> float:
    """The share of equal tokens; anything but all of them stops a float32 run."""
    prompts = random_prompts(llm, 8, CHECK_LENGTH)
    ours, expected = run_ours(llm, prompts, NUM_TOKENS), run_theirs(theirs, prompts, NUM_TOKENS, llm.vocab_size)
    pairs = [a == b for row, other in zip(ours, expected, strict=True) for a, b in zip(row, other, strict=True)]
    share = sum(pairs) / len(pairs)
    if dtype == "float32" and share < 1.0:
        sys.exit(f"tokens differ from transformers ({share:.1%} equal): no number is worth printing")
    return share


def measure_decode(llm: LLM, theirs: DeepseekV32ForCausalLM, batch_size: int, length: int, rounds: int) -> Row:
    def seconds(run: Callable[[int], object]) -> float:
        """NUM_TOKENS decode steps: a long run minus a run of one token, which is the prefill."""
        first, whole = timed(llm, lambda: run(1)), timed(llm, lambda: run(1 + NUM_TOKENS))
        if whole <= first:
            sys.exit(f"prefill took {first:.2f} s, prefill and decode {whole:.2f} s: too busy a machine to measure")
        return whole - first

    pairs = []
    for _ in range(rounds):
        prompts = random_prompts(llm, batch_size, length)
        ours_s = seconds(lambda n, p=prompts: run_ours(llm, p, n))
        theirs_s = seconds(lambda n, p=prompts: run_theirs(theirs, p, n, llm.vocab_size))
        pairs.append((batch_size * NUM_TOKENS / ours_s, batch_size * NUM_TOKENS / theirs_s))
    return summarise(f"decode, batch {batch_size}, context {length}", pairs)


def measure_prefill(llm: LLM, theirs: DeepseekV32ForCausalLM, rounds: int) -> Row:
    pairs = []
    for _ in range(rounds):
        prompts = random_prompts(llm, 1, PREFILL_LENGTH)
        ours_s = timed(llm, lambda p=prompts: run_ours(llm, p, 1))
        theirs_s = timed(llm, lambda p=prompts: run_theirs(theirs, p, 1, llm.vocab_size))
        pairs.append((PREFILL_LENGTH / ours_s, PREFILL_LENGTH / theirs_s))
    return summarise(f"prefill, {PREFILL_LENGTH} tokens", pairs)


def timed(llm: LLM, run: Callable[[], object]) -> float:
    llm.built.platform.synchronize()
    start_s = time.perf_counter()
    run()
    llm.built.platform.synchronize()
    return time.perf_counter() - start_s


def summarise(name: str, pairs: list[tuple[float, float]]) -> Row:
    ratios = [ours / theirs for ours, theirs in pairs]
    median = statistics.median(ratios)
    return Row(
        name,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        median,
        (max(ratios) - min(ratios)) / median,
    )


def report(rows: list[Row], llm: LLM, equal_share: float) -> None:
    print(f"{llm.device_name}, {llm.dtype_name}, {llm.config.model}; tokens equal to transformers: {equal_share:.1%}\n")
    print(f"{'':32}{'argosy tok/s':>14}{'transformers':>14}{'ratio':>8}{'spread':>8}")
    for row in rows:
        print(f"{row.name:32}{row.argosy_tok_s:14.0f}{row.transformers_tok_s:14.0f}{row.ratio:8.2f}{row.spread:8.0%}")
    record = {
        "benchmark": "against_transformers",
        "hardware": llm.device_name,
        "commit": read_commit(),
        "command": " ".join(sys.argv),
        "dtype": llm.dtype_name,
        "equal_share": equal_share,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
