"""`python -m tools.train_tiny`: builds tokenizer and questions, trains, exports and scores `argosy-tiny`.

Each command can run alone on the folder of an earlier one. Invariant: `--seed` decides everything but rounding.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from tools.train_tiny.batches import BatchGroups, iterate_batches
from tools.train_tiny.config import TOKENIZER_ENTRIES, RecipeConfig, TinyConfig, full_recipe, micro_recipe
from tools.train_tiny.decode import DecodeConfig
from tools.train_tiny.evaluate import Score, randomise_indexers, score_questions, timed
from tools.train_tiny.export import export_checkpoint, load_exported
from tools.train_tiny.model import TinyModel
from tools.train_tiny.questions import (
    build_long_needles,
    build_questions,
    held_out_prompts,
    read_questions,
    write_questions,
)
from tools.train_tiny.tokenizer import load_tokenizer, save_tokenizer, token_counter
from tools.train_tiny.tokenizer_training import train_tokenizer
from tools.train_tiny.train import compile_parts, load_checkpoint, save_checkpoint, train_stage

_COMMANDS = ("all", "prepare", "train", "evaluate")


def main() -> None:
    """Parses the command line and runs one command."""
    arguments = _parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    if arguments.command in ("all", "prepare"):
        prepare(arguments.out, arguments.questions, arguments.seed)
    if arguments.command in ("all", "train"):
        recipe = micro_recipe() if arguments.micro else full_recipe()
        train(arguments, recipe)
    if arguments.command in ("all", "evaluate"):
        evaluate(arguments)


def prepare(folder: Path, questions_path: Path, seed: int) -> None:
    """Trains the tokenizer and writes the held-out questions."""
    config = TinyConfig()
    tokenizer = train_tokenizer(seed, TOKENIZER_ENTRIES, num_examples=60_000)
    save_tokenizer(tokenizer, folder, config.max_position_embeddings)
    write_questions(build_questions(seed, token_counter(tokenizer)), questions_path)


def train(arguments: argparse.Namespace, recipe: RecipeConfig) -> None:
    """Runs the stages that are not finished yet; writes a checkpoint and an export after each."""
    device = torch.device(arguments.device)
    model, num_finished = TinyModel(TinyConfig()), 0
    state_path = arguments.state / "checkpoint.pt"
    if state_path.exists():
        num_finished = load_checkpoint(model, state_path)
    elif arguments.resume_export:
        model, num_finished = load_exported(arguments.out, TinyConfig()), arguments.resume_export
    model.to(device)
    if device.type == "cuda":
        compile_parts(model)
    held_out = held_out_prompts(read_questions(arguments.questions))
    for number, stage in enumerate(recipe.stages):
        if number < num_finished or number >= arguments.stop_after:
            continue
        start_s = time.perf_counter()
        groups = BatchGroups(arguments.out, arguments.seed, recipe, stage.mixture, held_out)
        batches = iterate_batches(groups, arguments.workers, first_group=number * 10**6)
        num_steps = train_stage(model, recipe, stage, batches, device, arguments.stage_limit)
        save_checkpoint(model, state_path, number + 1)
        export_checkpoint(model, arguments.out)
        print(f"stage {stage.name}: {num_steps} steps took {time.perf_counter() - start_s:.1f} s", flush=True)


def evaluate(arguments: argparse.Namespace) -> None:
    """Scores the exported weights; writes scores.json beside the training state."""
    device, tokenizer = torch.device(arguments.device), load_tokenizer(arguments.out)
    model = load_exported(arguments.out, TinyConfig()).to(device)
    questions = read_questions(arguments.questions)
    long_needles = build_long_needles(arguments.seed, arguments.needles, 2048, token_counter(tokenizer))
    sparse, dense = DecodeConfig(), DecodeConfig(is_sparse=False)
    results: dict[str, Score] = {}
    runs = [("sparse", questions, sparse), ("needles at 2048", long_needles, sparse)]
    if not arguments.quick:
        runs.append(("dense", questions, dense))
    for label, asked, config in runs:
        results[label] = _run(label, model, tokenizer, asked, config, arguments)
    if arguments.quick:
        _write_scores(results, arguments.state / "scores.json")
        return
    worked = [q for q in questions if q.category in ("gsm", "word_problems", "arithmetic")][::2]
    results["thinking"] = _run("thinking", model, tokenizer, worked, sparse, arguments, is_thinking=True)
    randomise_indexers(model, arguments.seed)
    results["random indexer"] = _run("random indexer", model, tokenizer, questions, sparse, arguments)
    results["random indexer, needles at 2048"] = _run(
        "random indexer, needles", model, tokenizer, long_needles, sparse, arguments
    )
    _write_scores(results, arguments.state / "scores.json")


def _run(label, model, tokenizer, questions, config, arguments, is_thinking=False) -> Score:
    start_s = time.perf_counter()
    score = score_questions(model, tokenizer, questions, config, arguments.batch_tokens, is_thinking)
    print(timed(label, score, start_s), flush=True)
    return score


def _write_scores(results: dict[str, Score], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        label: {
            "exact_match": s.exact_match,
            "acceptance_rate": s.acceptance_rate,
            "right": dict(s.right),
            "total": dict(s.total),
            "misses": s.misses,
        }
        for label, s in results.items()
    }
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny", description=__doc__)
    parser.add_argument("command", choices=_COMMANDS, nargs="?", default="all")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--out", type=Path, default=Path("argosy/assets/argosy-tiny"), help="checkpoint folder")
    parser.add_argument("--questions", type=Path, default=Path("argosy/assets/questions.jsonl"))
    parser.add_argument("--state", type=Path, default=Path("build/train_tiny"), help="training state and scores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="data processes")
    parser.add_argument("--batch-tokens", type=int, default=120_000, help="prompt tokens of one evaluation batch")
    parser.add_argument("--needles", type=int, default=100, help="size of the separate set of long needles")
    parser.add_argument(
        "--stage-limit", type=float, default=math.inf, help="seconds a stage may take; inf for the full recipe"
    )
    parser.add_argument(
        "--resume-export", type=int, default=0, help="start from the exported weights, this many stages done"
    )
    parser.add_argument("--stop-after", type=int, default=5, help="train only the first N stages; a later call goes on")
    parser.add_argument("--quick", action="store_true", help="score only questions and long needles, sparse")
    parser.add_argument("--micro", action="store_true", help="three steps a stage: tests the code")
    return parser.parse_args()


if __name__ == "__main__":
    main()
