"""Console: results on standard output, everything else on standard error, and text stays text."""

from __future__ import annotations

import io
import json
import sys

import pytest

from editunlearn.console import Console
from editunlearn.errors import NumericalError

Captured = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock to set by hand: ``ticking[0] = seconds``."""
    now = [0.0]
    monkeypatch.setattr("editunlearn.console.time.monotonic", lambda: now[0])
    return now


def speak(console: Console) -> None:
    console.header(["header 1", "header 2"])
    console.info("stage")
    console.detail("detail")
    console.detail("step", level=2)
    console.warn("careful")
    console.error("bad\nworse")
    console.result("listing")
    console.table("Scores", ["metric", "base"], [["leak", 0.5]])
    console.result_json({"leak": 0.5})
    console.next_step(["editunlearn", "report", "--runs", "my run"])


def test_normal_run(capsys: Captured) -> None:
    speak(Console())
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "header 1",
        "header 2",
        "stage",
        "warning: careful",
        "error: bad",
        "error: worse",
        "next: editunlearn report --runs 'my run'",
    ]
    assert [line.strip() for line in out.splitlines() if line.strip()] == [
        "listing",
        "Scores",
        "metric  base",
        "leak     0.5",
    ]


def test_quiet_keeps_results_warnings_and_errors(capsys: Captured) -> None:
    console = Console(quiet=True, verbose=2)
    speak(console)
    out, err = capsys.readouterr()
    assert err.splitlines() == ["warning: careful", "error: bad", "error: worse"]
    assert "leak" in out
    assert console.warnings == ["careful"]


def test_verbosity(capsys: Captured) -> None:
    Console(verbose=0).detail("a")
    Console(verbose=1).detail("b")
    Console(verbose=1).detail("c", level=2)
    Console(verbose=2).detail("d", level=2)
    assert capsys.readouterr().err == "b\nd\n"


def test_json_is_all_of_standard_output(capsys: Captured) -> None:
    speak(Console(json=True))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"leak": 0.5}
    assert "listing" in err and "leak     0.5" in err


def test_json_is_valid_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console(json=True).result_json({"name": "Élodie \ud800"})
    assert json.loads(raw.getvalue()) == {"name": "Élodie \ud800"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_are_not_finite(capsys: Captured, number: float) -> None:
    with pytest.raises(NumericalError, match=r"result scores\.leak\[1\] is (nan|inf)"):
        Console(json=True).result_json({"scores": {"leak": [0.0, number]}})
    assert capsys.readouterr().out == ""


def test_table_without_terminal_is_never_cut_or_wrapped(capsys: Captured) -> None:
    long = "word " * 100
    Console().table("", ["prompt", "n"], [[long, 1], ["b", None], ["c", 1234567.891]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and long.strip() in lines[1]
    assert lines[2].endswith(" -") and lines[3].endswith("1.235e+06")
    assert all(line == line.rstrip() for line in lines)


def test_table_with_terminal_fits_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    Console().table("Scores", ["prompt"], [["word " * 40]])
    assert "─" in stream.getvalue()
    assert stream.getvalue().count("word") == 40
    plain = stream.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "")
    assert max(len(line) for line in plain.splitlines()) <= 60


def test_empty_table(capsys: Captured) -> None:
    Console().table("Nothing", ["a", "b"], [])
    assert "a  b" in capsys.readouterr().out


def test_table_with_wrong_number_of_cells() -> None:
    with pytest.raises(ValueError, match="table 'T': 1 cells for 2 columns"):
        Console().table("T", ["a", "b"], [["only one"]])


def test_text_is_text(capsys: Captured) -> None:
    console = Console()
    console.table("[bold]T[/bold]", ["[red]c"], [["[/nonsense] {} :smile: \x1b[31m\r\nx"]])
    console.info("\x1b]0;title\x07 [bold]")
    out, err = capsys.readouterr()
    assert "[bold]T[/bold]" in out and "[red]c" in out
    assert r"[/nonsense] {} :smile: \x1b[31m\r\nx" in out
    assert err == "\\x1b]0;title\\x07 [bold]\n"


def test_a_stream_that_cannot_show_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    Console().info("naïve")
    assert raw.getvalue() == b"na\\xefve\n"


def test_plain_progress_every_thirty_seconds(capsys: Captured, ticking: list[float]) -> None:
    with Console().progress(range(10), "values") as bar:
        seen = []
        for item in bar:
            seen.append(item)
            ticking[0] += 10
    assert seen == list(range(10))
    # Items count as done when the loop comes back, so at 30 s three are done.
    assert capsys.readouterr().err.splitlines() == [
        "values: 3/10, 0:30 so far, about 1:10 left",
        "values: 6/10, 1:00 so far, about 0:40 left",
        "values: 9/10, 1:30 so far, about 0:10 left",
    ]


def test_plain_progress_from_totals_and_unknown_lengths(capsys: Captured, ticking: list[float]) -> None:
    with Console().progress(4, "steps") as bar:
        ticking[0] = 4000
        bar.note("loss 3")
        bar.update(0)
        ticking[0] = 8000
        bar.update(2)
    with Console().progress(iter("abc"), "stream") as bar:
        for _ in bar:
            ticking[0] += 31
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "steps: 0/4, 1:06:40 so far, time left unknown"
    assert err[1] == "steps: 2/4, 2:13:20 so far, about 2:13:20 left"
    assert err[2] == "stream: 1, 0:31 so far"


def test_progress_is_silent_when_quiet_or_inside_another(capsys: Captured, ticking: list[float]) -> None:
    with Console(quiet=True).progress(2, "a") as bar:
        ticking[0] += 60
        bar.update()
    console = Console()
    with console.progress(2, "outer"), console.progress(2, "inner") as inner:
        ticking[0] += 60
        inner.update()
    assert capsys.readouterr().err == ""
    with console.progress(2, "next") as bar:  # the nesting has ended
        ticking[0] += 60
        bar.update()
    assert capsys.readouterr().err.startswith("next: 1/2")


def test_progress_ends_after_an_exception(ticking: list[float]) -> None:
    console = Console()
    with pytest.raises(KeyError), console.progress(2, "a"):
        raise KeyError
    assert not console._bar_shown


def test_a_total_cannot_be_iterated() -> None:
    with Console(quiet=True).progress(3, "a") as bar, pytest.raises(TypeError, match="made from a total"):
        list(bar)


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console()
    with console.progress([1, 2], "values") as bar:
        for _ in bar:
            bar.note("loss 0.5")
            console.info("a line above the bar")
    text = stream.getvalue()
    assert "values:" in text and "a line above the bar\n" in text and "%" in text
