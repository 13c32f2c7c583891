"""The command line itself, and what its commands share."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iama import __version__
from iama.cli.as_json import print_json
from iama.cli.options import COMMANDS, PANELS
from iama.errors import ConfigError, IamaError, IamaWarning
from iama.exits import check_arguments, told_in_one_line
from iama.help import App, Command, Group
from iama.installation import check_packages
from iama.stderr import show_warnings

if TYPE_CHECKING:  # each command imports what it needs when it runs
    from iama.config.manifest import Manifest
    from iama.config.specs import RewardSpec, Sampling
    from iama.machines import RayCluster, Spread
    from inference.engine.responses import Pool

_KEYS = re.compile(
    r"^(?:command line|--reward): (?P<written>\w+)(?:\.\d+)?(?=: )"
    r"|`(?P<set>\w+): (?P<value>[^`{}]+)`"
    r"|prompts\.columns(?:\.(?P<column>\w+)|: \{(?P<ours>\w+): (?P<theirs>\w+)\})?"
    r"|(?:\b(?:policy|sampling|prompts)\.(?P<key>\w+))"
    r"|`(?P<quoted>path|adapter)`"
)
"""Keys of configuration files, as messages name them."""
_OF_THE_POLICY = ("policy ", "command line: ", "--engine ", "engine: ")
"""How messages begin that tell of the policy, or of the command line itself."""
_FLAGS: ContextVar[Collection[str]] = ContextVar("flags", default=())
"""Those of the command that runs."""


FIVE_THINGS = """\
What people do with iama:

  Train     iama train --config qwen-1.5b-24gb --dry-run
  Answer    iama generate --policy DIR --prompt "how do i bake bread?"
  Serve     iama serve --policy DIR --reward helpful=DIR --method "bon(4)"
  Evaluate  iama evaluate --config FILE
  Share     iama export RUN --out DIR --base-model ORG/NAME

iama --help lists all commands, iama COMMAND --help shows how one is used, and
iama doctor tells what is installed here."""


class OwnCommand(Command):
    """A command whose options stand in the groups of `iama.cli.options`."""

    panels = PANELS


class Commands(Group):
    """Commands that name their own flags in messages, which come from code that reads files, too."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names by group, and within one as they were registered."""
        order = {name: number for number, name in enumerate(COMMANDS)}
        names = super().list_commands(ctx)
        return sorted(
            names, key=lambda name: order.get(str(getattr(self.commands[name], "rich_help_panel", "")), len(order))
        )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The command's arguments; without any, what people do is shown."""
        if not args:
            typer.echo(FIVE_THINGS)
            raise typer.Exit
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, which will run."""
        command = super().get_command(ctx, cmd_name)
        _FLAGS.set({name for option in (command.params if command else ()) for name in option.opts})
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except IamaError as error:
            raise type(error)(in_flags(str(error), _FLAGS.get())) from error


def in_flags(message: str, flags: Collection[str]) -> str:
    """A message that names a command's flags in place of the keys of a file; of one with `--set`, as it is."""

    def named(found: re.Match[str]) -> str:
        if found[0].startswith("prompts.columns"):
            renamed = f"{found['ours']}={found['theirs']}" if found["ours"] else found["column"] or ""
            column = f"--column {renamed}".rstrip()
            if "--prompts" in flags:
                return column
            return f"`iama pool {column}`" if "file" in flags else found[0]  # a pool file has what it was made with
        key = found["written"] or found["set"] or found["key"] or found["quoted"]
        flag = "--policy" if key == "path" else f"--{key.replace('_', '-')}"
        if flag in flags:
            return f"{flag} {found['value'] or ''}".rstrip()
        return f"{found[0]} in a file for --spec" if found["set"] and "--spec" in flags else found[0]

    if "--set" in flags:
        return message
    if "--engine" in flags and message.startswith(_OF_THE_POLICY):  # a reward's engine stands in a file
        message = re.sub(r"\bengine: (transformers|vllm)\b", r"--engine \1", message).replace("`vllm`", "--vllm")
    return _KEYS.sub(named, message)


app = App(
    Commands,
    OwnCommand,
    help=(
        "Inference-aware meta-alignment: train one policy so that Best-of-N and its variants need fewer samples.\n\n"
        "Example: iama train --config qwen-1.5b-24gb --dry-run\n\nExample: iama generate --help"
    ),
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"iama {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take what stands before the command's name."""


def main() -> None:
    """Run the command line; a mistake in the input is one line on stderr and exit code 2."""
    show_warnings(lambda message: in_flags(message, _FLAGS.get()))
    with told_in_one_line():
        check_arguments(sys.argv[1:])
        for argument in sys.argv[1:]:
            if found := re.fullmatch(r"(--[\w-]+)=(~/.*)", argument):
                home = Path(found[2]).expanduser()
                raise ConfigError(f"{argument}: the shell leaves ~ as it is behind =; write {found[1]} {home}")
        check_packages("inference", "trainers")
        app(_as_meant(sys.argv[1:]), prog_name="iama")


def _as_meant(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `auto` behind a `--ray` without an address, and without what DeepSpeed's launcher adds."""
    written: list[str] = []
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        written += [argument, "auto"] if argument == "--ray" and following.startswith("-") else [argument]
    return written


def given_options(context: typer.Context) -> dict[str, Any]:
    """The parameters that the user wrote, by name; those that have their defaults are left out."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name != "DEFAULT"}


def cluster_of(address: str | None, num_workers: int | None, gpus_per_worker: float | None) -> RayCluster | None:
    """The cluster of `--ray`, looked at before anything is loaded; None where all is done in this process."""
    from iama.machines import RayCluster, check_cluster

    if address is None:
        for flag, value in (("--ray-workers", num_workers), ("--ray-gpus-per-worker", gpus_per_worker)):
            if value is not None:
                raise ConfigError(f"{flag} {value:g} has no use without --ray; add --ray, or drop it")
        return None
    cluster = RayCluster(address, num_workers, gpus_per_worker)
    check_cluster(cluster)
    return cluster


@contextmanager
def spread_over(cluster: RayCluster | None) -> Iterator[Spread]:
    """Where models work: in this process, or on the cluster, about which some lines go to stderr."""
    from iama.machines import locally, ray_workers

    if cluster is None:
        yield locally
        return
    with ray_workers(cluster) as workers:
        sys.stderr.write(f"{workers.describe()}\n")
        yield workers
        sys.stderr.write("".join(f"{line}\n" for line in workers.report()))


def prepare(model_paths: list[str | None]) -> None:
    """Settings that must stand before torch is imported, and no loading bars of libraries."""
    from iama.environment import prepare_environment, quieten_libraries

    prepare_environment(model_paths)
    quieten_libraries()


def manifest_of(policy: str, adapter: str | None) -> Manifest | None:
    """What the adapter, or else the policy, was trained for."""
    from iama.config.manifest import load_manifest

    return load_manifest(Path(adapter or policy))


def note_differences(manifest: Manifest | None, sampling: Sampling, where: str = "") -> None:
    """One line on stderr if a policy is not sampled as it was trained."""
    from iama.config.specs import sampling_differences

    differences = [] if manifest is None else sampling_differences(manifest.sampling, sampling)
    if differences:
        sys.stderr.write(f"note: {where}sampling differs from training: {', '.join(differences)}\n")


def system_prompt_of(given: str | None, manifest: Manifest | None) -> str | None:
    """The text of `--system-prompt` ('' for none), else that of training, which a line on stderr tells."""
    trained = None if manifest is None else manifest.system_prompt
    if given is None and trained is not None:
        sys.stderr.write(f"note: system prompt as in iama.json: {trained!r}; --system-prompt '' leaves it out\n")
        return trained
    note_system_prompt(manifest, given or None)
    return given or None


def note_system_prompt(manifest: Manifest | None, given: str | None, where: str = "") -> None:
    """One line on stderr if a policy is not asked after the system prompt that it was trained after."""
    trained = None if manifest is None else manifest.system_prompt
    if trained is not None and given != trained:
        here = "none" if given is None else repr(given)
        sys.stderr.write(f"note: {where}the system prompt differs from training: {here} (trained with {trained!r})\n")


def sampling_of(given: dict[str, Any], manifest: Manifest | None) -> Sampling:
    """The flags over the settings of training, since a policy is best served as it was trained."""
    from iama.config.schema import validate
    from iama.config.specs import Sampling

    settings = (manifest.sampling if manifest is not None else Sampling()).model_dump()
    settings |= {key: value for key, value in given.items() if value is not None}
    warn_of_backslashes(given.get("stop") or (), "--stop {!r}", "in a shell write --stop $'{}'")
    return validate(settings, Sampling, "command line")


def vllm_options(texts: list[str] | None) -> dict[str, Any]:
    """What `--vllm KEY=VALUE` says; raises `ConfigError` for what has another form. Keys are checked later."""
    from iama.reading import parse_yaml

    given = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"--vllm {text!r}: write KEY=VALUE, e.g. gpu_memory_utilization=0.5")
        given[key] = parse_yaml(value, f"--vllm {text!r}")
    return given


def warn_of_backslashes(stops: Sequence[str], named: str, remedy: str) -> None:
    """An `IamaWarning` for what was meant as a line's end or a tab; both texts have a place for the stop string."""
    for text in stops:
        if "\\n" in text or "\\t" in text:
            message = f"{named.format(text)} holds a backslash and a letter, not a line's end or a tab"
            warnings.warn(f"{message}; {remedy.format(text)} for these", IamaWarning, stacklevel=3)


def named_reward(reward: str, head: str | None, placement: dict[str, str]) -> RewardSpec:
    """The reward of `--reward` and `--head`: a classifier's directory, or a function as file.py:name."""
    from iama.config.schema import validate
    from iama.config.specs import RewardSpec

    is_function = ":" in reward and not Path(reward).exists()
    if reward.endswith(".py"):
        raise ConfigError(f"--reward {reward!r} is a file of code; name the function in it: --reward {reward}:NAME")
    source = {"function": reward} if is_function else {"model": reward}
    number = int(head) if head is not None and head.isdigit() else head
    return validate({**source, "head": number, **placement}, RewardSpec, "--reward")


def scoring_spec(reward: str | None, head: str | None, spec: Path | None, placement: dict[str, str]) -> RewardSpec:
    """The reward that scores a pool, from the flags or the file."""
    from iama.config.schema import load_config
    from iama.config.specs import RewardSpec

    if (reward is None) == (spec is None):
        raise ConfigError("give --reward DIR or file.py:function, or --spec FILE (and not both)")
    if spec is not None:
        if head is not None:
            raise ConfigError(f"--head {head!r} belongs to --reward; write it into {spec}")
        wanted = load_config(spec, RewardSpec)
    else:
        assert reward is not None
        wanted = named_reward(reward, head, placement)
    if wanted.column is not None:
        raise ConfigError(f"{spec}: column {wanted.column!r} is no reward that can score; the file has it already")
    return wanted


def tell_pool(command: str, file: Path, pool: Pool, *, as_json: bool) -> None:
    """Print what was written: the pool's size, lengths as far as they are known, and what was cut."""
    from inference.pools.held import tables

    found = list(tables(pool))
    num_known = sum(int((table.num_tokens_S >= 0).sum()) for table in found)
    num_tokens = sum(int(table.num_tokens_S.clip(0).sum()) for table in found)
    cut = sum(table.num_cut for table in found)
    mean = num_tokens / num_known if num_known else None
    size = {"num_prompts": len(pool.prompts), "num_samples": pool.header["num_samples"]}
    if as_json:
        print_json(command, pool=file, **size, mean_tokens=mean, num_cut=cut)
        return
    length = "" if mean is None else f", {mean:.1f} tokens a sample"
    typer.echo(
        f"pool: {file}: {size['num_prompts']} prompts x {size['num_samples']} samples{length}, {cut} cut at "
        "max_new_tokens"
    )
