"""The same model in W8A8 or FP8 blocks, quantised in memory, and what each of its modules makes of the plain one's
inputs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.quantization.checkpoint_format import CheckpointQuantization
from argosy.quantization.fp8_linear import FP8BlockExperts, FP8BlockLinear
from argosy.quantization.quantize_weight import quantize_per_channel
from argosy.quantization.stored_tensors import scale_inv_shape
from argosy.quantization.w8a8_grouped_gemm import W8A8Experts
from argosy.quantization.w8a8_linear import W8A8Linear

W8A8 = CheckpointQuantization(kind="w8a8")
FP8 = CheckpointQuantization(kind="fp8_block", has_ue8m0_scales=True)
_QUANTIZED = (W8A8Linear, W8A8Experts, FP8BlockLinear, FP8BlockExperts)


def build_quantized_twin(
    plain: DeepseekV32Model, config: ModelConfig, quantization: CheckpointQuantization
) -> DeepseekV32Model:
    dtype = plain.lm_head.weight.dtype
    twin = DeepseekV32Model(config, dtype, quantization=quantization)
    tensors = twin.state_dict()
    with torch.inference_mode():
        for name, weight in plain.state_dict().items():
            if tensors[name].dtype == torch.int8:
                quantized, scale = quantize_per_channel(weight.flatten(0, -2))
                tensors[name + "_scale"].copy_(scale.view(tensors[name + "_scale"].shape))
            elif tensors[name].dtype == torch.float8_e4m3fn:
                quantized, scale = quantize_blocks(weight)
                tensors[name + "_scale_inv"].copy_(scale)
            else:
                quantized = weight
            tensors[name].copy_(quantized.view(weight.shape))
    return twin.eval()


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight: [..., N, K]``, K in whole blocks -> e4m3 and the scales of blocks of 128 x 128."""
    num_rows, num_columns = weight.shape[-2:]
    num_row_blocks, num_column_blocks = scale_inv_shape((num_rows, num_columns), (128, 128))
    padded = F.pad(weight.float(), (0, 0, 0, num_row_blocks * 128 - num_rows))
    blocks = padded.view(*weight.shape[:-2], num_row_blocks, 128, num_column_blocks, 128)
    scale = blocks.abs().amax(dim=(-3, -1), keepdim=True) / 448
    quantized = (blocks / scale).to(torch.float8_e4m3fn).view(padded.shape)
    return quantized[..., :num_rows, :], scale.squeeze(-1).squeeze(-2)


def compare_modules(plain: nn.Module, twin: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Cosine of every quantised module's output with its plain twin's, on the inputs that the plain one gets in
    ``run``; of every expert by itself."""
    cosines: dict[str, float] = {}
    quantized = {name: module for name, module in twin.named_modules() if isinstance(module, _QUANTIZED)}

    def listen(name: str) -> Callable[[nn.Module, tuple[object, ...], torch.Tensor], None]:
        def compare(module: nn.Module, args: tuple[object, ...], expected: torch.Tensor) -> None:
            (x,) = args
            assert not isinstance(x, DispatchedTokens) or x.expert_weights is None, "more tokens are needed"
            actual = quantized[name](x)
            if isinstance(x, DispatchedTokens):
                counts = x.num_tokens_per_expert.tolist()
                parts = zip(actual.split(counts), expected.split(counts), strict=True)
                for expert, (part, expected_part) in enumerate(parts):
                    if counts[expert]:
                        cosines[f"{name}.{expert}"] = cosine(part, expected_part)
            else:
                cosines[name] = cosine(actual, expected)

        return compare

    hooks = [plain.get_submodule(name).register_forward_hook(listen(name)) for name in quantized]
    with torch.inference_mode():
        run()
    for hook in hooks:
        hook.remove()
    return cosines


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return F.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0).item()
