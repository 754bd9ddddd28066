"""Flags come from config fields, with their comments as help and the dataclass's own errors."""

import subprocess
import sys
from dataclasses import fields

import pytest

from argosy.cli.flags import build_config, build_flag_class, read_field_comments
from argosy.cli.main import COMMANDS, GENERATE_OMITS, main, parse_arguments
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams
from tests.helpers.fake_language_model import FakeLanguageModel, fake_terminal, written


def test_every_engine_setting_is_a_flag_with_its_comment_as_help() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "argosy", "generate", "--help"], capture_output=True, text=True, check=True
    )
    words = " ".join(completed.stdout.replace("│", " ").split())
    for config_class in (EngineConfig, SamplingParams):
        comments = read_field_comments(config_class)
        for spec in fields(config_class):
            if spec.name == "structured_outputs":  # of input lines only
                continue
            assert f"--{spec.name.replace('_', '-')}" in words
            if (config_class, spec.name) != (SamplingParams, "seed"):  # there is one --seed, the engine's
                assert comments[spec.name] in words, spec.name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments([*command.split(), "--help"])
    assert exit_info.value.code == 0
    assert COMMANDS[command].options_class.__doc__ in " ".join(capsys.readouterr().out.split())


def test_help_imports_no_torch() -> None:
    # Exit code 0 comes from --help itself; the hook runs after it.
    program = """
import atexit, os, sys
from argosy.cli.main import parse_arguments
atexit.register(lambda: os._exit(int("torch" in sys.modules or "transformers" in sys.modules)))
parse_arguments(sys.argv[1:])
"""
    for arguments in (["--help"], ["generate", "--help"]):
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_flags_reach_the_configs() -> None:
    arguments = ["generate", "Hi", "--block-size", "32", "--no-enable-prefix-caching", "--top-p", "0.5"]
    name, parsed = parse_arguments(
        [*arguments, "--stop", "a", "b", "--logit-bias", "3", "-2.5", "--max-model-len", "99"]
    )
    config = build_config(EngineConfig, parsed.engine)
    params = build_config(SamplingParams, parsed.sampling, omit=GENERATE_OMITS)
    assert name == "generate"
    assert config == EngineConfig(block_size=32, enable_prefix_caching=False, max_model_len=99)
    expected = SamplingParams(temperature=0.0, max_tokens=256, top_p=0.5, stop=("a", "b"), logit_bias={3: -2.5})
    assert params == expected


@pytest.mark.parametrize(("short", "name"), [("--tp", "tp_size"), ("--dp", "dp_size"), ("--ep", "ep_size")])
def test_parallel_sizes_have_a_short_and_a_long_flag(short: str, name: str) -> None:
    for flag in (short, f"--{name.replace('_', '-')}"):
        _, parsed = parse_arguments(["generate", "Hi", flag, "2"])
        assert build_config(EngineConfig, parsed.engine) == EngineConfig(**{name: 2})  # type: ignore[arg-type]


def test_sixteen_ranks_on_two_nodes_from_flags() -> None:
    sizes = ["--tp", "8", "--dp", "2", "--ep", "16", "--ep-mode", "high_throughput"]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    _, parsed = parse_arguments(["generate", "Hi", *sizes, *nodes, "--collective-timeout-s", "5"])
    expected = EngineConfig(
        tp_size=8,
        dp_size=2,
        ep_size=16,
        ep_mode="high_throughput",
        nnodes=2,
        node_rank=1,
        master_addr="10.0.0.1",
        master_port=29500,
        collective_timeout_s=5.0,
    )
    assert build_config(EngineConfig, parsed.engine) == expected


def test_alias_is_one_flag_with_its_long_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["generate", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--tp INT, --tp-size INT ranks that share each layer of a replica" in words


def test_sizes_that_cannot_be_are_one_line_and_exit_code_2() -> None:
    llm, terminal = FakeLanguageModel(str.upper), fake_terminal()
    assert main(["generate", "Hi", "--tp", "0"], build_llm=llm.build, terminal=terminal) == 2
    assert written(terminal.stderr) == "argosy: error: tp_size must be an integer >= 1, got 0; set --tp-size\n"


def test_flag_defaults_are_the_field_defaults() -> None:
    for config_class in (EngineConfig, SamplingParams):
        assert build_config(config_class, build_flag_class(config_class)()) == config_class()


def test_bad_value_is_one_line_and_exit_code_2() -> None:
    llm, terminal = FakeLanguageModel(str.upper), fake_terminal()
    assert main(["generate", "Hi", "--temperature", "-3"], build_llm=llm.build, terminal=terminal) == 2
    assert written(terminal.stderr) == "argosy: error: temperature must be in [0, 100], got -3.0\n"
    assert written(terminal.stdout) == ""


@pytest.mark.parametrize("arguments", [[], ["swim"], ["generate", "Hi", "--block-siz", "3"], ["generate", "--n", "x"]])
def test_unparsable_flags_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(arguments)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("no such\n  model"), 2, "argosy: error: no such model\n"),
        (RuntimeError("out of memory"), 1, "argosy: error: out of memory\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "argosy: error: [Errno 2] No such file: 'x'\n"),
        (KeyError("k"), 1, "argosy: internal error: KeyError: 'k' (a bug; --debug shows where)\n"),
        (KeyboardInterrupt(), 130, "argosy: interrupted\n"),
    ],
)
def test_engine_error_is_one_line_with_its_exit_code(error: BaseException, code: int, text: str) -> None:
    def fail(config: EngineConfig) -> FakeLanguageModel:
        raise error

    terminal = fake_terminal()
    assert main(["generate", "Hi"], build_llm=fail, terminal=terminal) == code
    assert written(terminal.stderr) == text


def test_debug_shows_the_traceback() -> None:
    def fail(config: EngineConfig) -> FakeLanguageModel:
        raise RuntimeError("broken")

    terminal = fake_terminal()
    assert main(["generate", "Hi", "--debug"], build_llm=fail, terminal=terminal) == 1
    assert "Traceback" in written(terminal.stderr)


def test_version_names_the_package() -> None:
    terminal = fake_terminal()
    assert main(["version"], terminal=terminal) == 0
    assert written(terminal.stdout).startswith("argosy ")
