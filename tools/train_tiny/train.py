"""The training stages: dense, indexer alone, then sparse with every part live, last on a narrower mixture.

Does not generate data, export or score. Invariant: a stage changes only the parameters it names; a checkpoint holds the
weights, the optimizer state, the stage and the step, so a run may stop after any step.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.train_tiny.batches import Batch
from tools.train_tiny.chat import PAD_ID
from tools.train_tiny.config import RecipeConfig, StageConfig
from tools.train_tiny.model import ForwardPlan, MoE, TinyModel

_LOG_EVERY = 50


def train_stage(
    model: TinyModel,
    recipe: RecipeConfig,
    stage: StageConfig,
    batches: Iterator[Batch],
    device: torch.device,
    limit_s: float = math.inf,
) -> int:
    """Runs one stage in place and prints its progress; returns the number of steps.

    With a time limit the learning rate follows the clock where that is ahead of the steps, so the stage ends in time.
    """
    optimizer = build_optimizer(model, recipe, stage)
    generator = torch.Generator().manual_seed(len(stage.name))
    meter = _Meter(stage)
    model.train()
    start_s, step = math.inf, 0
    while step < stage.num_steps:
        ids, weights = (t.to(device, non_blocking=True) for t in next(batches))
        start_s = min(start_s, time.perf_counter())  # the clock starts with the first batch
        elapsed_share = (time.perf_counter() - start_s) / limit_s
        if elapsed_share >= 1.0:
            break
        progress = max(step, elapsed_share * stage.num_steps)
        set_learning_rate(optimizer, stage, step, progress)
        plan = build_plan(recipe, stage, step, ids, generator)
        losses = _train_step(model, recipe, stage, optimizer, ids, weights, plan)
        meter.update(step, losses, ids.numel(), optimizer.param_groups[0]["lr"])
        step += 1
    return step


def build_optimizer(model: TinyModel, recipe: RecipeConfig, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not; indexers have their own rate. Frozen parameters are left out."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_index = ".indexer." in name
        parameter.requires_grad_(is_index or stage.name != "indexer")
        is_frozen = not parameter.requires_grad or (is_index and stage.name == "dense")
        if not is_frozen:
            groups.setdefault((is_index, parameter.dim() >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "lr_scale": recipe.index_lr_scale if is_index else 1.0,
            }
            for (is_index, decays), parameters in sorted(groups.items())
        ],
        lr=stage.lr_start,
        betas=recipe.adam_betas,
        fused=next(model.parameters()).is_cuda,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: StageConfig, step: int, progress: float) -> None:
    """Warm-up by `step`; flat, then a straight line down to lr_end by `progress`, counted in steps."""
    warmup = min(1.0, (step + 1) / max(1, stage.num_warmup_steps))
    tail = max(1, stage.num_steps - stage.num_flat_steps)
    share = min(1.0, max(0.0, (progress - stage.num_flat_steps) / tail))
    rate = warmup * (stage.lr_start + (stage.lr_end - stage.lr_start) * share)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _train_step(
    model: TinyModel,
    recipe: RecipeConfig,
    stage: StageConfig,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    weights: Tensor,
    plan: ForwardPlan,
) -> dict[str, Tensor]:
    """One forward, backward and update; returns detached losses."""
    autocast = torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda)
    with autocast, torch.set_grad_enabled(stage.name != "indexer"):
        losses = language_losses(model, ids, weights, plan)
    if plan.kl_terms:
        losses["kl"] = torch.stack(plan.kl_terms).mean()
    total = losses["kl"] if stage.name == "indexer" else losses["main"] + recipe.mtp_loss_weight * losses["mtp"]
    if stage.name != "indexer" and plan.kl_terms:
        total = total + losses["kl"]
    total.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses["norm"] = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if stage.name != "indexer":
        balance_routers(model, recipe.router_bias_rate)
    return {name: value.detach() for name, value in losses.items()}


def build_plan(
    recipe: RecipeConfig, stage: StageConfig, step: int, ids: Tensor, generator: torch.Generator
) -> ForwardPlan:
    """What the forward pass of a stage does."""
    plan = ForwardPlan(is_sparse=stage.name in ("sparse", "polish"), valid=ids != PAD_ID)
    if stage.name != "dense" and step % stage.kl_every == 0:
        count = max(4, recipe.num_kl_rows // ids.shape[0])
        rows = torch.randperm(ids.shape[1], generator=generator)[:count].sort().values
        plan.kl_rows = rows.to(ids.device)
    return plan


def language_losses(model: TinyModel, ids: Tensor, weights: Tensor, plan: ForwardPlan) -> dict[str, Tensor]:
    """Weighted cross-entropy of the next token (main) and of the one after (mtp)."""
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    hidden = model.hidden_states(ids, positions, plan)
    losses = {"main": _cross_entropy(model, hidden[:, :-1], ids[:, 1:], weights[:, 1:])}
    next_ids = functional.pad(ids[:, 1:], (0, 1))
    drafted = model.mtp_hidden_states(hidden, next_ids, positions, plan)
    losses["mtp"] = _cross_entropy(model, drafted[:, :-2], ids[:, 2:], weights[:, 2:])
    return losses


def compile_parts(model: TinyModel) -> None:
    """Compiles the parts whose shapes hardly vary: MLPs see a fixed number of tokens, head sums are elementwise."""
    torch._dynamo.config.recompile_limit = 64  # two shapes, two kinds of MLP, with and without gradients
    for layer in model.model.layers:
        layer.mlp.compile()
        layer.self_attn.indexer.head_sum.compile(dynamic=True)


@torch.no_grad()
def balance_routers(model: TinyModel, rate: float) -> None:
    """Raises the bias of experts that got fewer tokens than the mean, lowers the others; clears the counts."""
    for module in model.modules():
        if isinstance(module, MoE):
            gate = module.gate
            gate.e_score_correction_bias += rate * torch.sign(gate.load.mean() - gate.load)
            gate.load.zero_()


def save_checkpoint(model: TinyModel, path: Path, num_finished_stages: int) -> None:
    """Weights in fp32 and how many stages are done; a stage always starts with a fresh optimizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "num_finished_stages": num_finished_stages}, path)


def load_checkpoint(model: TinyModel, path: Path) -> int:
    """Loads our own checkpoint; returns the number of finished stages."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    return state["num_finished_stages"]


def _cross_entropy(model: TinyModel, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = model.lm_head(hidden).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


class _Meter:
    """Prints mean losses and speed now and then.

    NOTE(sync): losses are read once per `_LOG_EVERY` steps.
    """

    def __init__(self, stage: StageConfig) -> None:
        self._stage = stage
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._tokens = 0
        self._start_s = time.perf_counter()

    def update(self, step: int, losses: dict[str, Tensor], num_tokens: int, rate: float) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._tokens += num_tokens
        if (step + 1) % _LOG_EVERY and step + 1 != self._stage.num_steps:
            return
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        if not all(math.isfinite(v) for v in means.values()):
            raise RuntimeError(
                f"stage {self._stage.name} diverged by step {step + 1}: {means}; lower lr_start {self._stage.lr_start}"
            )
        elapsed_s = time.perf_counter() - self._start_s
        text = " ".join(f"{name}={value:.4f}" for name, value in means.items())
        place = f"{self._stage.name} {step + 1}/{self._stage.num_steps}"
        print(f"{place} {text} lr={rate:.2e} {self._tokens / elapsed_s:.0f} tok/s", flush=True)
        self._sums, self._counts, self._tokens, self._start_s = {}, {}, 0, time.perf_counter()
