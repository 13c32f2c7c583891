"""The manners of the command line: help that begins with examples and groups options, mistakes told in one line.

Plain text of 80 columns, without rich: it is there at once, and it can be pasted. Docstrings of commands hold their
examples as paragraphs that begin with `Example: `; `rich_help_panel` of a command or an option names its group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from iama.errors import ConfigError
from iama.nearest import closest, nearest

HELP = ("-h", "--help")
"""The flags that show how a command is used."""
UsageError: Any = typer.BadParameter.__mro__[1]
"""Of click, which some releases of typer bring with them."""
WIDTH = 80
F = TypeVar("F", bound=Callable[..., Any])
EXAMPLE = "Example: "


# What is shown. -----------------------------------------------------------------------------------------


def parts_of(text: str) -> tuple[list[str], str]:
    """The examples in a docstring, one command each, and the rest of it."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    examples = [part.removeprefix(EXAMPLE) for part in paragraphs if part.startswith(EXAMPLE)]
    return examples, "\n\n".join(part for part in paragraphs if part and not part.startswith(EXAMPLE))


def pasted(command: str, width: int = WIDTH) -> list[str]:
    """A shell command in lines of at most `width` characters, which can be pasted; an option stays with its value."""
    lines = [""]
    word = r"""(?:[^\s"']|"[^"]*"|'[^']*')+"""
    words = re.findall(rf"-\S+(?: (?!-){word})?|{word}", command)
    for i, word in enumerate(words):
        last = i == len(words) - 1
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) + (0 if last else 2) > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _write_help(self: Any, ctx: Any, formatter: Any) -> None:
    """Usage, examples, what it does, options by group."""
    self.format_usage(ctx, formatter)
    examples, text = parts_of(self.help or "")
    if examples:
        with formatter.section("Examples"):
            for example in examples:
                for line in pasted(example, formatter.width - 2):
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
    if text:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
    self.format_options(ctx, formatter)
    self.format_epilog(ctx, formatter)


def _groups(items: Iterable[tuple[Any, Any]], default: str) -> dict[str, list[Any]]:
    """Items by their group, in the order in which groups appear; those of none come last."""
    groups: dict[str, list[Any]] = {}
    rest: list[Any] = []
    for group, item in items:  # where nothing is said typer holds a placeholder
        (groups.setdefault(group, []) if isinstance(group, str) else rest).append(item)
    return {**groups, **({default: rest} if rest else {})}


def _write_options(self: Any, ctx: Any, formatter: Any) -> None:
    """Arguments, then options, each group under its name."""
    records: list[tuple[Any, Any]] = []
    for parameter in self.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            records.append(("Arguments" if is_argument else getattr(parameter, "rich_help_panel", None), record))
    order = {name: i for i, name in enumerate(dict.fromkeys(["Arguments", *getattr(self, "panels", {}).values()]))}
    for name, group in sorted(_groups(records, "Options").items(), key=lambda item: order.get(item[0], len(order))):
        with formatter.section(name):
            formatter.write_dl(group)


class Command(TyperCommand):
    """A command with help in groups, whose wrong options are told in one line."""

    panels: ClassVar[Mapping[str, str]] = {}
    """Groups of options, by the name of the parameter; the rest stand under `Options`."""
    format_help = _write_help
    format_options = _write_options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("help_option_names", list(HELP))
        for parameter in self.params:
            if parameter.name in self.panels and not isinstance(getattr(parameter, "rich_help_panel", None), str):
                parameter.rich_help_panel = self.panels[parameter.name]  # type: ignore[attr-defined]

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of one call; raises `ConfigError` for options that are wrong."""
        with one_line():
            return super().make_context(*args, **kwargs)


class Group(TyperGroup):
    """Commands in groups; a wrong name is told in one line, with the nearest."""

    format_help = _write_help

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("help_option_names", list(HELP))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands by group, then the options of all."""
        shown = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(getattr(c, "rich_help_panel", None), (name, c)) for name, c in shown if c is not None and not c.hidden]
        limit = formatter.width - 6 - max((len(name) for name, _ in shown), default=0)
        for group, commands in _groups(rows, "Commands").items():
            with formatter.section(group):
                formatter.write_dl([(name, command.get_short_help_str(limit)) for name, command in commands])
        _write_options(self, ctx, formatter)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of one call; raises `ConfigError` for options that are wrong."""
        with one_line():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        """The command of the first argument; raises `ConfigError` where there is none of that name."""
        name, known = args[0], self.list_commands(ctx)
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = closest(name, known)[:1]
            hint = f"did you mean '{close[0]}'?" if close else f"'{ctx.command_path} --help' lists them"
            raise ConfigError(f"{ctx.command_path} has no command {name!r}; {hint}")
        with one_line():
            return super().resolve_command(ctx, args)


class App(typer.Typer):
    """A command line of such commands."""

    def __init__(self, group: type[Group] = Group, command: type[Command] = Command, **kwargs: Any) -> None:
        super().__init__(
            cls=group, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **kwargs
        )
        self._command = command

    def command(self, name: str | None = None, **kwargs: Any) -> Callable[[F], F]:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": self._command, **kwargs})


# What is refused. ---------------------------------------------------------------------------------------


@contextmanager
def one_line() -> Iterator[None]:
    """Turn click's page about a wrong option into a `ConfigError` with the nearest right one."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        raise ConfigError(_refused(error)) from error


def _refused(error: Any) -> str:
    command = error.ctx.command_path if error.ctx is not None else "this command"
    see = f"see {command} --help"
    kind, parameter = type(error).__name__, getattr(error, "param", None)
    if kind == "NoSuchOption":
        known = [] if error.ctx is None else _options(error.ctx.command.params)
        name = str(error.option_name)
        hint = nearest(name, known) if closest(name, known) else see
        return f"{command} has no option {name!r}; {hint}"
    if kind == "MissingParameter" and parameter is not None:
        is_option = parameter.param_type_name == "option"
        argument = parameter.metavar or str(parameter.name).upper()  # as the help has it
        lacking = max(parameter.opts, key=len) if is_option else f"the argument {argument}"
        return f"{command} needs {lacking}; {see}"
    said = error.format_message().strip().rstrip(".")
    return f"{command}: {said[:1].lower()}{said[1:]}; {see}"


def _options(parameters: Sequence[Any]) -> list[str]:
    return [name for p in parameters if not getattr(p, "hidden", False) for name in p.opts if name.startswith("--")]
