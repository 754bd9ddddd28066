"""INT8 products on an NVIDIA card at DeepSeek-V3.2's sizes: time, rate, bandwidth, and share of the roofline.

    python benchmarks/w8a8_gpu.py

Every line is checked against torch's own integer product first. The last line is JSON. Uniform random routing with a
spread such that the busiest of 256 experts gets about twice the mean at 4,096 tokens.
"""

import json
import sys
from dataclasses import asdict, dataclass

import torch
import triton

from argosy.cli.code_version import read_version
from argosy.kernels.triton.quantize import quantize_per_token
from argosy.kernels.triton.w8a8_gemm import w8a8_grouped_gemm

HIDDEN_SIZE, EXPERT_WIDTH, NUM_EXPERTS, TOP_K = 7168, 2048, 256, 8
# What a card of this kind reaches elsewhere: bytes/s of a copy, operations/s of a published INT8 product.
PEAK_BYTES_S, PEAK_OPS_S = 4.3e12, 1.366e15
ROUTING_SPREAD = 0.33
LINEARS = ((7168, 4096), (1536, 24576), (16384, 7168))  # (in, out)
WARM_UP_MS, REPEAT_MS = 20, 80
MAX_ERROR = 4e-3  # of bfloat16 results: norm of the difference over the norm


@dataclass(frozen=True)
class Line:
    """One measured product."""

    name: str
    rows: int
    us: float
    p10_us: float
    p90_us: float
    tera_ops_s: float
    giga_bytes_s: float
    roofline_share: float


def main() -> int:
    if not torch.cuda.is_available():
        print("needs an NVIDIA card", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {read_version()}")
    print(f"{'product':34} {'rows':>6} {'us':>9} {'p10':>9} {'p90':>9} {'TOP/s':>6} {'GB/s':>6} {'roofline':>8}")
    lines = []
    for in_features, out_features in LINEARS:
        for rows in (1, 16, 64, 128, 4096):
            lines.append(
                measure(f"linear {in_features} -> {out_features}", torch.tensor([rows]), in_features, out_features)
            )
    for name, counts in routings():
        lines.append(measure(f"gate, up, silu {name}", counts, HIDDEN_SIZE, 2 * EXPERT_WIDTH, is_gated=True))
        lines.append(measure(f"down {name}", counts, EXPERT_WIDTH, HIDDEN_SIZE))
    for rows in (1, 128, 4096):
        lines.append(measure_quantize(rows))
    print(json.dumps([asdict(line) for line in lines]))
    return 0


def routings() -> list[tuple[str, torch.Tensor]]:
    """How many rows each expert gets."""
    named = [("16 x 2,048", torch.full((16,), 2048))]
    for tokens in (1, 16, 64, 128, 256, 8192):
        named.append((f"256, {tokens} tokens", draw_routing(tokens)))
    return named


def draw_routing(num_tokens: int) -> torch.Tensor:
    logits = torch.randn(NUM_EXPERTS) * ROUTING_SPREAD
    noise = -torch.log(-torch.log(torch.rand(num_tokens, NUM_EXPERTS)))
    return torch.bincount((logits + noise).topk(TOP_K, dim=1)[1].flatten(), minlength=NUM_EXPERTS)


def measure(name: str, counts: torch.Tensor, in_features: int, out_features: int, *, is_gated: bool = False) -> Line:
    rows, experts = int(counts.sum()), len(counts)
    x = torch.randint(-127, 128, (rows, in_features), dtype=torch.int8, device="cuda")
    x_scale = torch.rand(rows, 1, device="cuda") * 1e-2 + 1e-3
    weight = torch.randint(-127, 128, (experts, out_features, in_features), dtype=torch.int8, device="cuda")
    weight_scale = torch.rand(experts, out_features, 1, device="cuda") * 1e-3 + 1e-5
    device_counts = None if experts == 1 else counts.to("cuda", torch.int32)

    def run() -> torch.Tensor:
        return w8a8_grouped_gemm(x, x_scale, weight, weight_scale, device_counts, torch.bfloat16, is_gated=is_gated)

    expected = compute_expected(x, x_scale, weight, weight_scale, counts, is_gated=is_gated)
    error = ((run().float() - expected).norm() / expected.norm()).item()
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name}, {rows} rows: relative error {error:.2e}, no time is printed")
    num_columns = out_features // 2 if is_gated else out_features
    num_bytes = int((counts > 0).sum()) * out_features * in_features + rows * (in_features + 2 * num_columns)
    return report(name, rows, run, 2 * rows * out_features * in_features, num_bytes)


def compute_expected(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    *,
    is_gated: bool,
) -> torch.Tensor:
    """One ``torch._int_mm`` an expert, float32."""
    parts = []
    for expert, (rows, scale) in enumerate(zip(x.split(counts.tolist()), x_scale.split(counts.tolist()), strict=True)):
        if not len(rows):
            continue
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(0, 32 - len(rows)) + -len(rows) % 8))
        product = torch._int_mm(padded, weight[expert].t())[: len(rows)].float() * scale * weight_scale[expert].t()
        if is_gated:
            gate, up = product.chunk(2, dim=1)
            product = torch.nn.functional.silu(gate) * up
        parts.append(product)
    return torch.cat(parts)


def measure_quantize(rows: int) -> Line:
    x = torch.randn(rows, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
    num_bytes = 3 * x.numel()
    return report("quantise bf16 rows of 7168", rows, lambda: quantize_per_token(x), 0, num_bytes)


def report(name: str, rows: int, run: object, num_ops: int, num_bytes: int) -> Line:
    p10, median, p90 = triton.testing.do_bench(run, warmup=WARM_UP_MS, rep=REPEAT_MS, quantiles=[0.1, 0.5, 0.9])
    us = median * 1e3
    floor_us = max(num_ops / PEAK_OPS_S, num_bytes / PEAK_BYTES_S) * 1e6
    line = Line(name, rows, us, p10 * 1e3, p90 * 1e3, num_ops / us / 1e6, num_bytes / us / 1e3, floor_us / us)
    print(
        f"{name:34} {rows:6d} {us:9.1f} {line.p10_us:9.1f} {line.p90_us:9.1f} {line.tera_ops_s:6.0f} "
        f"{line.giga_bytes_s:6.0f} {line.roofline_share:8.0%}",
        flush=True,
    )
    return line


if __name__ == "__main__":
    sys.exit(main())
