"""The W8A8 part of compressed-tensors' ``quantization_config``: parsed from a checkpoint, and written to one.

It knows the format's keys and no tensors; its package is not needed. Invariant: a config that parses means symmetric
INT8 weights with a scale per output channel and symmetric INT8 activations with a dynamic scale per token; every key
that could mean something else is refused by name.
"""

from collections.abc import Mapping, Sequence

from argosy.quantization.module_names import REGEX_PREFIX

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"
ALL_LINEARS = "Linear"  # the target that means every linear module

_WEIGHTS: Mapping[str, object] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
}  # fmt: skip
_ACTIVATIONS: Mapping[str, object] = {**_WEIGHTS, "strategy": "token", "dynamic": True}
# What the package assumes for a key that is absent.
_DEFAULTS: Mapping[str, object] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
# Keys that must be absent or null, because each would change what the numbers mean.
_MUST_BE_UNSET = ("group_size", "block_structure", "actorder")
_REMEDY = (
    "supported is W8A8: INT8 weights, symmetric, per channel, and INT8 activations, symmetric, dynamic, per token; "
    "convert the unquantised checkpoint with: argosy quantize SRC DST --scheme w8a8"
)


def build_config(ignored: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of a W8A8 checkpoint whose linears are all quantised but for ``ignored``."""
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": [ALL_LINEARS],
                "weights": dict(_WEIGHTS),
                "input_activations": dict(_ACTIVATIONS),
                "output_activations": None,
                "format": FORMAT,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def parse_config(settings: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Targets and ignored entries: full names of modules, ``re:`` patterns, or "Linear".

    Raises:
        ValueError: naming the key, its value and what is supported.
    """
    _check_equal("format", settings.get("format"), (FORMAT,))
    _check_equal("quantization_status", settings.get("quantization_status", "compressed"), ("compressed", "frozen"))
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        _check_unset(key, settings.get(key))
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{_where('config_groups')} must be an object with at least one group, got {groups!r}")
    targets: list[str] = []
    for name, group in groups.items():
        targets += _parse_group(f"config_groups.{name}", group)
    return tuple(targets), _parse_names("ignore", settings.get("ignore") or [])


def _parse_group(key: str, group: object) -> tuple[str, ...]:
    if not isinstance(group, Mapping):
        raise ValueError(f"{_where(key)} must be an object with targets, weights and activations, got {group!r}")
    _check_equal(f"{key}.format", group.get("format") or FORMAT, (FORMAT,))
    _check_arguments(f"{key}.weights", group.get("weights"), _WEIGHTS)
    _check_arguments(f"{key}.input_activations", group.get("input_activations"), _ACTIVATIONS)
    _check_unset(f"{key}.output_activations", group.get("output_activations"))
    targets = _parse_names(f"{key}.targets", group.get("targets"))
    if not targets:
        raise ValueError(f"{_where(key)}.targets is empty; it must name modules, or {ALL_LINEARS!r} for all")
    return targets


def _check_arguments(key: str, arguments: object, expected: Mapping[str, object]) -> None:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{_where(key)} is {arguments!r}; {_REMEDY}")
    for name, value in expected.items():
        _check_equal(f"{key}.{name}", arguments.get(name, _DEFAULTS.get(name)), (value,))
    for name in _MUST_BE_UNSET:
        # compressed-tensors also says "one group for the whole row" with -1.
        if arguments.get(name) != -1:
            _check_unset(f"{key}.{name}", arguments.get(name))


def _check_equal(key: str, value: object, supported: tuple[object, ...]) -> None:
    # To Python 1 equals True, but "symmetric": 1 is a mistake of some writer; so the types must agree too.
    if not any(type(value) is type(one) and value == one for one in supported):
        raise ValueError(f"{_where(key)} is {value!r}; this engine reads {supported[0]!r}. {_REMEDY}")


def _check_unset(key: str, value: object) -> None:
    if value is not None and value != {} and value is not False:
        raise ValueError(f"{_where(key)} is {value!r}; this engine reads checkpoints without it. {_REMEDY}")


def _parse_names(key: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_where(key)} must be a list of module names and '{REGEX_PREFIX}' patterns, got {names!r}")
    return tuple(names)


def _where(key: str) -> str:
    return f"config.json: quantization_config.{key}"
