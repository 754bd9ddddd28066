"""Where each tensor of a published DeepSeek-V3.2 checkpoint goes in our modules.

Module attributes carry the checkpoint's names; there are two exceptions, and this file is them: ``gate_proj`` and
``up_proj`` are halves of ``gate_up_proj``, and experts are stacked. Invariant: a pure function of the name.
"""

import re

from argosy.quantization.weight_plan import Destination, Part, WeightMapping

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE_UP = re.compile(r"(.*)\.(gate|up)_proj\.weight")
_HALF = {"gate": Part(0, 2), "up": Part(1, 2)}


def build_weight_mapping(num_hidden_layers: int, num_nextn_predict_layers: int) -> WeightMapping:
    """The mapping for a model with ``num_hidden_layers`` layers; the MTP layers behind them are left out.

    Layers behind those are not: the loader refuses them, because they mean that config.json is another model's.
    """
    mtp_layers = range(num_hidden_layers, num_hidden_layers + num_nextn_predict_layers)

    def map_tensor(name: str) -> Destination | None:
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) in mtp_layers:
            return None
        return _map_expert(name) or _map_gate_up(name) or Destination(name)

    return map_tensor


def _map_expert(name: str) -> Destination | None:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    experts, expert_id, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return Destination(f"{experts}.down_proj", (expert_id,))
    return Destination(f"{experts}.gate_up_proj", (expert_id, _HALF[kind]))


def _map_gate_up(name: str) -> Destination | None:
    match = _GATE_UP.fullmatch(name)
    return None if match is None else Destination(f"{match[1]}.gate_up_proj.weight", (_HALF[match[2]],))
