"""``argosy quantize``: flags, report, exit codes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from argosy.assets import builtin_model_directory
from argosy.cli.main import main
from argosy.cli.quantize_report import build_error_table, build_kept_table, relative_error
from argosy.cli.terminal import Terminal
from argosy.quantization.checkpoint_format import load_checkpoint_quantization
from argosy.quantization.conversion_plan import Action
from argosy.quantization.convert import TensorReport
from argosy.quantization.convert_rows import ErrorSums
from argosy.quantization.safetensors_headers import read_headers


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*arguments: str, is_terminal: bool = False) -> tuple[int, str, str]:
    terminal = Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=Screen() if is_terminal else io.StringIO())
    exit_code = main(["quantize", *arguments], terminal=terminal)
    return exit_code, terminal.stdout.getvalue(), terminal.stderr.getvalue()  # type: ignore[attr-defined]


def test_built_in_model_is_converted_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    exit_code, report, log = run("argosy-tiny", str(out), "--scheme", "w8a8", "--num-threads", "2")
    assert exit_code == 0, log
    source, converted = read_headers(builtin_model_directory("argosy-tiny")), read_headers(out)
    scales = {name for name in converted if name.endswith(".weight_scale")}
    assert converted.keys() - scales == source.keys()
    assert len(scales) == 429 and {converted[name.removesuffix("_scale")].dtype for name in scales} == {"I8"}
    assert load_checkpoint_quantization(out).kind == "w8a8"
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 256
    assert "429 of 601 tensors quantised, 30.6 -> 22.0 MiB" in report
    assert "routed experts" in report and "self_attn.o_proj" in report  # the worst of layer 1
    assert "model.layers.*.self_attn.kv_b_proj.weight" in report  # kept
    assert "2 threads" in log and "MiB/s" in log
    exit_code, again, log = run("argosy-tiny", str(out))
    assert exit_code == 0 and again == report
    assert "30.6 MiB were converted by an earlier run" in log


def test_options_quantise_more(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    assert run("argosy-tiny", str(out), "--quantize-kv-b", "--quantize-mtp")[0] == 0
    headers = read_headers(out)
    dtypes = {name: headers[f"model.layers.{name}.weight"].dtype for name in (
        "0.self_attn.kv_b_proj", "5.self_attn.kv_b_proj", "5.mlp.experts.0.up_proj", "5.eh_proj", "5.shared_head.head",
    )}  # fmt: skip
    assert list(dtypes.values()) == ["I8", "I8", "I8", "BF16", "BF16"]


def test_progress_shows_bytes_and_rate_on_a_terminal(tmp_path: Path) -> None:
    exit_code, _, log = run("argosy-tiny", str(tmp_path / "int8"), is_terminal=True)
    assert exit_code == 0
    assert "w8a8" in log and "MiB" in log and "/s" in log


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give a source and a destination"),
        (("argosy-tiny",), "give a source and a destination"),
        (("no-such-model", "out"), "no such model: 'no-such-model'"),
        (("argosy-tiny", "out", "--num-threads", "0"), "num_threads (0) must be at least 1; set --num-threads"),
        (("argosy-tiny", "out", "--max-shard-bytes", "0"), "max_shard_bytes (0) must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exit_code, report, log = run(*arguments)
    assert (exit_code, report) == (2, "")
    assert complaint in log and log.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_scheme_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run("argosy-tiny", str(tmp_path / "out"), "--scheme", "w4a4")
    assert error.value.code == 2
    assert "w4a4" in (shown := capsys.readouterr().err) and "w8a8" in shown


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "llama"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    exit_code, _, log = run(str(source), str(tmp_path / "out"))
    assert exit_code == 2 and "'llama'" in log


# --- the report -------------------------------------------------------------------------------------------------------


def tensor(name: str, errors: ErrorSums | None, dtype: str = "BF16") -> TensorReport:
    action = Action.COPY if errors is None else Action.QUANTIZE
    return TensorReport(f"model.layers.{name}.weight", action, dtype, 2 * 2**20, 2**20, errors)


def show(table: object) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_errors_add_up_over_tensors_of_unequal_size() -> None:
    tensors = [
        tensor("0.self_attn.o_proj", ErrorSums(100.0, 4.0)),
        tensor("0.self_attn.indexer.wk", ErrorSums(300.0, 12.0)),
        tensor("10.mlp.down_proj", ErrorSums(400.0, 0.0)),
        tensor("10.mlp.up_proj", ErrorSums(0.0, 0.0)),
        tensor("10.mlp.gate", None),
    ]
    assert relative_error(tensors) == pytest.approx((16 / 800) ** 0.5)
    assert relative_error(tensors[3:]) is None
    rows = [line.split() for line in show(build_error_table(tensors)) if line.startswith(("│", "|"))]
    assert [row[1] for row in rows] == ["0", "10", "all"]
    assert "20.00" in rows[0] and "0.00" in rows[1] and "14.14" not in rows[0]


def test_kept_tensors_are_counted_by_kind() -> None:
    tensors = [tensor(f"{i}.mlp.experts.{j}.up_proj", None) for i in range(3) for j in range(4)]
    tensors += [tensor("0.self_attn.kv_b_proj", None, "F8_E4M3"), tensor("0.mlp.up_proj", ErrorSums(1.0, 0.0))]
    lines = "\n".join(show(build_kept_table(tensors)))
    assert "model.layers.*.mlp.experts.*.up_proj.weight │    12 │" in lines and "12.0" in lines
    assert "BF16, was F8_E4M3" in lines
    assert "layers.*.mlp.up_proj" not in lines
