"""Gates that hold the engine to an independent implementation: ``transformers``' ``DeepseekV32ForCausalLM``."""

from argosy.validation.gates import GateResult, run_gates

__all__ = ["GateResult", "run_gates"]
