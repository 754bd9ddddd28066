"""``argosy chat`` in a pipe: turns, slash commands, interruption, errors, end of input."""

from hypothesis import given
from hypothesis import strategies as st

from argosy.cli.main import main
from argosy.cli.reasoning import split_stream
from tests.helpers.fake_language_model import FakeLanguageModel, fake_terminal, written


def run_chat(stdin: str, llm: FakeLanguageModel, *arguments: str) -> tuple[int, str, str]:
    terminal = fake_terminal(stdin)
    code = main(["chat", *arguments], build_llm=llm.build, terminal=terminal)
    return code, written(terminal.stdout), written(terminal.stderr)


def answer_length(prompt: str) -> str:
    return f"{len(prompt)} 字"


def test_each_line_gets_one_answer_and_the_end_of_input_is_no_error() -> None:
    llm = FakeLanguageModel(lambda prompt: "yes")
    code, stdout, stderr = run_chat("one\n\ntwo", llm)
    assert (code, stdout) == (0, "yes\nyes\n")
    assert stderr.splitlines()[0] == "[prefill 9 tokens, 18 tok/s; decode 2 tokens, 10 tok/s]"
    assert llm.num_closed == 2


def test_conversation_is_resent_with_its_answers() -> None:
    llm = FakeLanguageModel(lambda prompt: "A" if prompt.count("<user>") == 1 else "B")
    run_chat("one\ntwo\n", llm, "--system", "be brief")
    assert llm.seen_prompts == [
        "<system>be brief<user>one",
        "<system>be brief<user>one<assistant>A<user>two",
    ]


def test_reset_forgets_all_but_the_system_message() -> None:
    llm = FakeLanguageModel(lambda prompt: "A")
    _, _, stderr = run_chat("one\n/reset\ntwo\n", llm, "--system", "be brief")
    assert llm.seen_prompts[1] == "<system>be brief<user>two"
    assert "a new conversation" in stderr


def test_exit_ends_the_program() -> None:
    llm = FakeLanguageModel(lambda prompt: "A")
    assert run_chat("/exit\none\n", llm)[:2] == (0, "")
    assert llm.seen_prompts == []


def test_reasoning_goes_to_stderr_and_is_not_resent() -> None:
    llm = FakeLanguageModel(lambda prompt: "because < of\n#### 1</think>A" if "<think>" in prompt else "B")
    _, stdout, stderr = run_chat("/thinking\none\n/thinking\ntwo\n", llm)
    assert llm.seen_prompts == ["<user>one<think>", "<user>one<assistant>A<user>two"]
    assert stdout == "A\nB\n"
    assert [line for line in stderr.splitlines() if "tok/s" not in line] == [
        "thinking is on",
        "because < of",
        "#### 1",
        "thinking is off",
    ]


def test_answer_without_reasoning_is_an_answer() -> None:
    llm = FakeLanguageModel(lambda prompt: "A")
    _, stdout, _ = run_chat("one\ntwo\n", llm, "--thinking")
    assert stdout == "A\nA\n"
    assert llm.seen_prompts[1] == "<user>one<assistant>A<user>two<think>"


def test_reasoning_that_is_cut_off_leaves_an_empty_answer() -> None:
    llm = FakeLanguageModel(lambda prompt: "abcdef", interrupt_after=3)
    _, stdout, stderr = run_chat("one\n", llm, "--thinking")
    assert stdout == "\n"
    assert stderr.splitlines()[:2] == ["abcd", "[the reasoning was cut off before an answer; --max-tokens allows more]"]


@given(st.text(alphabet="</think>x", max_size=30), st.sampled_from(["", "</think>"]), st.text(max_size=5))
def test_split_of_a_growing_text_only_grows(before: str, mark: str, after: str) -> None:
    whole = before + mark + after
    reasoning, answer = "", ""
    for size in range(len(whole) + 1):
        new_reasoning, new_answer = split_stream(whole[:size], is_finished=False)
        assert new_reasoning.startswith(reasoning)
        assert new_answer.startswith(answer)
        assert "</think>" not in new_reasoning
        reasoning, answer = new_reasoning, new_answer
    final = split_stream(whole, is_finished=True)
    assert "</think>".join(final) == whole if "</think>" in whole else final == (whole, "")
    assert final[0].startswith(reasoning)


def test_unknown_command_is_explained_and_not_sent() -> None:
    llm = FakeLanguageModel(lambda prompt: "A")
    code, _, stderr = run_chat("/help\n", llm)
    assert code == 0
    assert "unknown command /help: /reset starts anew" in stderr
    assert llm.seen_prompts == []


def test_interruption_stops_the_answer_not_the_program() -> None:
    llm = FakeLanguageModel(lambda prompt: "abcdef", interrupt_after=3)
    code, stdout, stderr = run_chat("one\ntwo\n", llm)
    assert code == 0
    assert stdout == "abcd\nabcd\n"
    assert stderr.startswith("[stopped, ")
    assert llm.seen_prompts[1] == "<user>one<assistant>abcd<user>two"
    assert llm.num_closed == 2  # both requests were aborted


def test_refused_turn_is_reported_and_taken_back() -> None:
    def answer(prompt: str) -> str:
        if "long" in prompt:
            raise ValueError("the prompt has 99 tokens, but max_model_len is 9")
        return "A"

    llm = FakeLanguageModel(answer)
    code, stdout, stderr = run_chat("long\nok\n", llm)
    assert (code, stdout) == (0, "A\n")
    assert "argosy: error: the prompt has 99 tokens, but max_model_len is 9 (/reset starts anew)" in stderr
    assert llm.seen_prompts[1] == "<user>ok"


def test_flags_reach_the_sampler() -> None:
    llm = FakeLanguageModel(answer_length)
    run_chat("one\n", llm, "--temperature", "0.5", "--max-tokens", "9")
    assert (llm.seen_params[0].temperature, llm.seen_params[0].max_tokens) == (0.5, 9)
