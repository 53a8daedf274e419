"""The only writer to the terminal.

Standard output carries results and nothing else, so that it can be piped; headers, stages, warnings and
progress go to standard error. With ``json=True`` standard output is exactly one JSON document. Text from
facts and models is shown as text: no markup is read in it and no control character reaches the terminal.
"""

from __future__ import annotations

import json as json_module
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, TextIO

from editunlearn.errors import NumericalError

PLAIN_INTERVAL = 30.0  # seconds between progress lines when there is no terminal


class Console:
    """Where a run reports to.

    Library code uses ``info``, ``detail``, ``warn`` and ``progress`` only and takes ``Console(quiet=True)``
    as its silent default; commands also show results.

    Args:
        quiet: only results, warnings and errors.
        verbose: 1 shows details, 2 shows details of details (per step).
        json: standard output is for ``result_json`` alone; tables go to standard error.
        silent: nothing but errors: of several processes at one run only the first speaks.

    Attributes:
        warnings: every warning so far, for the manifest and the model card.
    """

    def __init__(self, quiet: bool = False, verbose: int = 0, json: bool = False, *, silent: bool = False) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self.verbose = verbose
        self.json = json
        self.warnings: list[str] = []
        self._bar_shown = False

    def header(self, lines: Iterable[str]) -> None:
        """What was chosen and why, before anything runs."""
        for line in lines:
            self.info(line)

    def info(self, message: str) -> None:
        """One line about a stage."""
        if not self.quiet:
            self._err(message)

    def detail(self, message: str, level: int = 1) -> None:
        """A line for ``-v`` (level 1) or ``-vv`` (level 2)."""
        if self.verbose >= level:
            self.info(message)

    def warn(self, message: str) -> None:
        """Something the user should act on; shown even when quiet, and kept in ``warnings``."""
        self.warnings.append(message)
        if not self.silent:
            self._err(f"warning: {message}")

    def error(self, message: str) -> None:
        """Why the run ends; each line of the message is complete in itself."""
        for line in message.splitlines() or [""]:
            self._err(f"error: {line}")

    def next_step(self, command: str | Sequence[str]) -> None:
        """The command to run next, as the last line; a sequence is quoted for the shell."""
        self.info(f"next: {command if isinstance(command, str) else shlex.join(command)}")

    def result(self, text: str) -> None:
        """Text that is a result (a listing, a plan): standard output, or standard error with ``json``."""
        if not self.silent:
            _write(self._results, _clean(text))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table of results. Without a terminal it is plain and never cut or wrapped, one line a row.

        Args:
            title: shown above the table; may be empty.
            columns: headings.
            rows: one cell per column; None shows as ``-``, floats with 4 significant digits.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        if self.silent:
            return
        from rich.table import Table
        from rich.text import Text

        body = [list(row) for row in rows]
        for row in body:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: {len(row)} cells for {len(columns)} columns: {row!r}")
        terminal = self._results.isatty()
        grid = Table(box=_box(self._results), pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(body) and all(isinstance(row[index], int | float | None) for row in body)
            justify: Literal["left", "right"] = "right" if numeric else "left"
            name = Text(_clean(column, one_line=True))
            grid.add_column(name, justify=justify, no_wrap=not terminal, overflow="fold")
        for row in body:
            grid.add_row(*(Text(_clean(_cell(cell), one_line=True)) for cell in row))
        if title:  # not rich's own, which is cut into lines as narrow as the table
            _write(self._results, _clean(title))
        _write(self._results, _rendered(grid, terminal).rstrip("\n"))

    def result_json(self, obj: Any) -> None:
        """Print ``obj`` as JSON on standard output, if ``json`` was asked for; otherwise do nothing.

        Raises:
            NumericalError: a number is not finite; a missing number is ``null`` with a reason beside it.
        """
        if not self.json or self.silent:
            return
        _check_finite(obj, "")
        text = json_module.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
        if not _can_show(sys.stdout, text):
            text = json_module.dumps(obj, indent=2, ensure_ascii=True, allow_nan=False)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    @contextmanager
    def progress(self, work: int | Iterable[Any], desc: str) -> Iterator[Progress]:
        """One bar with ETA on standard error; iterate over what it gives, or call ``update``.

        Without a terminal a plain line is written every 30 s instead. A bar inside a bar is not shown.

        Args:
            work: what to iterate over, or a total for calls of ``bar.update(n)``.
            desc: what is being done.
        """
        shown = not self.quiet and not self._bar_shown
        if isinstance(work, int):
            total: int | None = work
        else:
            total = len(work) if isinstance(work, Sized) else None
        bar = None
        if shown and sys.stderr.isatty():
            bar = _tqdm()(
                total=total,
                desc=_clean(desc, one_line=True),
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
            )
        items = None if isinstance(work, int) else work
        self._bar_shown = self._bar_shown or shown
        try:
            yield Progress(self, items, total, desc, bar, plain=shown and bar is None)
        finally:
            self._bar_shown = self._bar_shown and not shown
            if bar is not None:
                bar.close()

    @property
    def _results(self) -> TextIO:
        return sys.stderr if self.json else sys.stdout

    def _err(self, message: str) -> None:
        text = _clean(message)
        if self._bar_shown and sys.stderr.isatty():
            with _tqdm().external_write_mode(file=sys.stderr):  # lifts the bar, writes, draws it again
                _write(sys.stderr, text)
        else:
            _write(sys.stderr, text)


class Progress:
    """Handle of one progress display; made by :meth:`Console.progress`."""

    def __init__(
        self,
        console: Console,
        items: Iterable[Any] | None,
        total: int | None,
        desc: str,
        bar: Any,
        plain: bool,
    ) -> None:
        self._console, self._items, self._total, self._desc = console, items, total, desc
        self._bar, self._plain = bar, plain
        self._done = 0
        self._start = self._last = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        if self._items is None:
            raise TypeError("this progress was made from a total; iterate yourself and call update()")
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if self._plain and now - self._last >= PLAIN_INTERVAL:
            self._last = now
            self._console.info(self._line(now - self._start))

    def expect(self, total: int) -> None:
        """There will be ``total`` of them after all."""
        self._total = total
        if self._bar is not None and self._bar.total != total:
            self._bar.total = total
            self._bar.refresh()

    def note(self, text: str) -> None:
        """Short text behind the bar (a loss, a count); not shown without a terminal."""
        if self._bar is not None:
            self._bar.set_postfix_str(_clean(text, one_line=True))

    def _line(self, elapsed: float) -> str:
        if not self._total:
            return f"{self._desc}: {self._done}, {_clock(elapsed)} so far"
        left = elapsed / self._done * (self._total - self._done) if self._done else math.inf
        eta = f"about {_clock(left)} left" if math.isfinite(left) else "time left unknown"
        return f"{self._desc}: {self._done}/{self._total}, {_clock(elapsed)} so far, {eta}"


def _tqdm() -> Any:
    """The tqdm class, imported when a bar is first shown."""
    return import_module("tqdm").tqdm


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clean(text: str, one_line: bool = False) -> str:
    """Control characters as escapes: text of facts and models must not drive the terminal."""
    keep = "" if one_line else "\n\t"
    return "".join(c if (c >= " " and not "\x7f" <= c <= "\x9f") or c in keep else repr(c)[1:-1] for c in text)


def _can_show(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _box(stream: TextIO) -> Any:
    from rich import box

    return box.SIMPLE_HEAD if stream.isatty() and _can_show(stream, "─") else None


def _rendered(grid: Any, terminal: bool) -> str:
    """The table as text: as wide as the terminal, or as wide as its content where there is none."""
    import io

    from rich.console import Console as RichConsole

    buffer = io.StringIO()
    if terminal:
        RichConsole(file=buffer, force_terminal=True, markup=False, highlight=False).print(grid)
        return buffer.getvalue()
    plain = RichConsole(
        file=buffer, force_terminal=False, color_system=None, markup=False, highlight=False, width=1_000_000
    )
    plain.print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _check_finite(obj: Any, path: str) -> None:
    if isinstance(obj, float) and not math.isfinite(obj):
        raise NumericalError(f"result {path or 'value'} is {obj}; nothing was printed.")
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            _check_finite(value, f"{path}.{key}" if path else str(key))
    elif isinstance(obj, list | tuple):
        for index, value in enumerate(obj):
            _check_finite(value, f"{path}[{index}]")
