"""`iama generate`."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from iama.cli.app import (
    app,
    manifest_of,
    named_reward,
    note_differences,
    prepare,
    sampling_of,
    system_prompt_of,
    vllm_options,
)
from iama.cli.as_json import print_json
from iama.cli.options import (
    ANSWER,
    AsJson,
    ChatTemplate,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Stop,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    VllmOptions,
)
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.nearest import meant
from iama.tables import print_line, print_table, printable, wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from iama.config.manifest import Manifest, ManifestCriterion
    from iama.config.methods import Method
    from iama.config.specs import PolicySpec, RewardSpec, Sampling
    from iama.cost import Cost
    from iama.prompts.render import Prompt
    from iama.rewards.load import Files
    from inference.samplers.base import Completion


TEXT_WIDTH = 100
"""Characters a line of a candidate's text where the terminal is wider, or there is none."""
SHORT = ("single", "bon", "bop")
"""Methods whose number stands in `--n`."""


@app.command(rich_help_panel=ANSWER)
def generate(
    policy: Annotated[str, typer.Option(help="Model directory, or an exported adapter.")],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory to put on the policy.")] = None,
    chat_template: ChatTemplate = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="Before the prompt, for the reward too. Else that of iama.json; '': none.")
    ] = None,
    reward: Annotated[str | None, typer.Option(help="Classifier directory, or file.py:function.")] = None,
    head: Annotated[str | None, typer.Option(help="Output of a classifier with several, by label.")] = None,
    spec_file: Annotated[
        Path | None, typer.Option("--spec", help="A reward as YAML, for ensembles too, with its own device and dtype.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="Criterion of iama.json to serve; else the first.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="single, bon, bop, an operator 'soft_bon(8, 0.1)', or itp, mbr, cards, rejection, args, ggro, "
            "blockwise, redraw, tilted_tokens, sea, with settings: 'cards(target=1.5)'; or "
            "'bon(16, stop=pandora(0.1), width=4)'; else iama.json's."
        ),
    ] = None,
    tuning: Annotated[
        Path | None, typer.Option(help="tuning.json of iama tune, for --method 'bon(tuned)' and the like.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Candidates of bon, or their mean number for bop.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same candidates.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; do not use the chat template.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[str, typer.Option(help="transformers or vllm: what samples the policy.")] = "transformers",
    vllm: VllmOptions = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of policy and reward: float32, bfloat16 or float16. Else float32, or iama.json's reward."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and show all candidates with their scores.

    Example: iama generate --policy runs/demo/world/policy --reward runs/demo/world/rm-helpful --method bon --n 8
    --prompt "how do i climb a roof today?"
    """
    from iama.config.schema import validate
    from iama.config.specs import PolicySpec

    manifest = manifest_of(policy, adapter)
    placement = {"device": device} | ({} if dtype is None else {"dtype": dtype})
    named = {"path": policy, "adapter": adapter, "chat_template": chat_template, "trust_remote_code": trust_remote_code}
    run_by = {"engine": engine, "vllm": vllm_options(vllm)}
    base = validate({**named, **placement, **run_by}, PolicySpec, "command line")
    from_file = None if spec_file is None else _spec_of(spec_file, reward, head)
    spec = from_file or reward_spec(reward, head, placement, manifest, criterion)
    if method is None and criterion is None and reward is not None and manifest is not None:
        criterion = _criterion_of(manifest, reward)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": stop or None}
    given |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    sampling = sampling_of(given, manifest)
    if plain and system_prompt:
        raise ConfigError(f"--system-prompt {system_prompt!r} is a message, and --plain gives a text; drop one of them")
    system = system_prompt_of("" if plain else system_prompt, manifest)
    prepare([policy, adapter, *(part.looked_up for part in (spec.parts if spec else ()))])
    _warn_of_rules(stop or [], n)
    from inference.engine.policy import resolve_paths
    from inference.samplers.serve import check_served

    resolve_paths("--policy", base)
    served = _method(method, n, manifest, criterion, adapter or policy)
    if not served.is_tuned:
        check_served(served, sampling)
    _check_needs(served, tuning, spec)
    note_differences(manifest, sampling)
    if tuning is not None and spec is not None:
        served = _tuned(served, tuning, base, spec, sampling, criterion, system)
    asked = _Asked(prompt, system, plain)
    completion, written, calibration, spread = _answer(base, spec, served, sampling, asked, seed)
    if as_json:
        _print_as_json(completion, written, calibration, spread)
    else:
        _show(completion, written, calibration, spread, _measured(served, written))


def _warn_of_rules(stops: Sequence[str], n: int | None) -> None:
    """An `IamaWarning` for a stop string that is written like a stopping rule."""
    from iama.calls import read_call
    from inference.selection.stopping import STOPS

    for text in stops:
        call = read_call(text)
        if call.name in STOPS and call.arguments:
            warnings.warn(
                f"--stop {text!r} is a text that ends an answer; for the stopping rule write "
                f"--method 'bon({n or 64}, stop={text})'",
                IamaWarning,
                stacklevel=2,
            )


class _Asked(NamedTuple):
    """What is asked: the words of `--prompt`, and what becomes of them."""

    prompt: str
    system_prompt: str | None
    plain: bool

    def by(self, tokenizer: Any) -> Prompt:
        """As a policy with this tokenizer is asked."""
        from iama.prompts.data import with_system_prompt

        if self.plain or (tokenizer.chat_template is None and self.system_prompt is None):
            return self.prompt
        return with_system_prompt([{"role": "user", "content": self.prompt}], self.system_prompt)


def _answer(
    base: PolicySpec, spec: RewardSpec | None, method: Method, sampling: Sampling, question: _Asked, seed: int
) -> tuple[Completion, Method, Cost | None, float | None]:
    """The completion, the method with a measured target where it lacked one, and what measuring cost.

    Last, how far an ensemble's members disagree on the completion.
    """
    from rich.console import Console

    with Console(stderr=True).status("loading and sampling"):
        from iama.prompts.conversations import render_prompts
        from iama.rewards.load import load_reward
        from inference.engine.policy import policy_fingerprint, read_policy_files
        from inference.engine.vllm import open_policy
        from inference.samplers.serve import check_served, check_vllm_serves, files_key, serve, with_target

        check_served(method, sampling)  # before anything is loaded
        if base.engine == "vllm":
            check_vllm_serves(method, "--engine vllm")
        files_key(method, sampling, "--policy", partial(policy_fingerprint, "--policy", base), None)
        tokenizer, _, ends = read_policy_files("--policy", base)
        asked = question.by(tokenizer)
        render_prompts(tokenizer, [asked], ends, "--prompt")
        files = {} if spec is None else _check_reward(spec, asked)
        loaded = open_policy("--policy", base, sampling)
        scorer = None if spec is None else load_reward("--reward", spec, files=files)
        calibration = None
        if scorer is not None:
            method, calibration = with_target(loaded, scorer, method, [asked], sampling, seed)
        completion = serve(loaded, scorer, method, sampling).sample([asked], seed=seed)[0]
        spread = None
        if scorer is not None and scorer.members:
            (spread,) = scorer.disagreement([asked], [completion.text], {})
        return completion, method, calibration, spread


def _check_reward(spec: RewardSpec, asked: Prompt) -> Files:
    """What was read of the reward's models; raises `RewardError` for one that cannot score answers to this prompt."""
    from iama.rewards.load import check_columns, check_reward

    files = check_reward("--reward", spec, [asked])
    try:
        check_columns("--reward", spec, [{"prompt": asked}])
    except RewardError as error:
        told, _, remedy = str(error).partition("; ")
        if "column" in told:
            remedy = (
                "a prompt on the command line brings no columns; put it into a file for `iama pool` and `iama score`"
            )
        raise RewardError(f"{told}; {remedy}") from error
    return files


def _criterion(manifest: Manifest, name: str | None) -> ManifestCriterion:
    names = [c.name for c in manifest.criteria]
    if name is not None and name not in names:
        raise ConfigError(
            f"--criterion {name!r} is not in iama.json; {meant(name, names)}choose one of {', '.join(names)}"
        )
    return manifest.criteria[0 if name is None else names.index(name)]


def _criterion_of(manifest: Manifest, reward: str) -> str:
    """The criterion that a reward is recorded for; else the first, with a note where their operators differ."""
    names = [c.name for c in manifest.criteria if reward in (c.reward.model, c.reward.function)]
    names = names or [c.name for c in manifest.criteria if _is_folder(c.reward.model, reward)]
    first = manifest.criteria[0]
    if not names and len({c.operator for c in manifest.criteria}) > 1:
        typer.echo(
            f"note: --reward {reward} is no criterion's in iama.json; it is served with {first.operator}, as "
            f"{first.name!r} is; --criterion chooses",
            err=True,
        )
    return names[0] if names else first.name


def _is_folder(recorded: str | None, given: str) -> bool:
    """Whether both name one folder."""
    return recorded is not None and Path(recorded).is_dir() and Path(recorded).resolve() == Path(given).resolve()


def check_trained_operator(method: Method, criterion: str, where: str) -> None:
    """Raise `ConfigError` where no sampler serves what a criterion was trained for; names both and the folder."""
    from iama.objective.operators import operator_of, served_instead
    from inference.samplers.serve import served_of

    try:
        served_of(method)
    except ConfigError as error:
        instead = served_instead(operator_of(method.call))
        raise ConfigError(
            f"iama.json of {where!r}: {criterion!r} was trained for {method.text!r}, which is not a way to sample; "
            f"give --method {shlex.quote(instead)} ({error})"
        ) from error


def _method(method: str | None, n: int | None, manifest: Manifest | None, criterion: str | None, where: str) -> Method:
    """The method to serve: from the flags, else from iama.json; raises `ConfigError`."""
    from inference.samplers.serve import read_method

    read = read_method(_written(method, n, manifest, criterion, where))
    if method is None and manifest is not None:
        check_trained_operator(read, _criterion(manifest, criterion).name, where)
    if n is not None and method not in SHORT:
        raise ConfigError(f"--n {n} belongs to --method bon or bop; write the number into {method!r}")
    return read


def _written(method: str | None, n: int | None, manifest: Manifest | None, criterion: str | None, where: str) -> str:
    """The method to serve, as text."""
    if method is None:
        if n is not None:
            raise ConfigError(f"--n {n} needs --method bon or --method bop")
        if manifest is None:
            raise ConfigError(f"{where!r} holds no iama.json that says how to sample; give --method bon --n 8")
        return manifest_operator(_criterion(manifest, criterion))
    if method not in SHORT:
        return method
    if method == "single":
        if n is not None:
            raise ConfigError(f"--n {n} has no use with --method single; drop it")
        return "identity"
    if n is None or n < 1:
        raise ConfigError(f"--method {method} needs --n, the number of candidates (at least 1), e.g. --n 8")
    return f"bon({n})" if method == "bon" else f"bop({n - 1})"


def manifest_operator(criterion: ManifestCriterion) -> str:
    """The criterion's operator, and nothing else that serves: a model from elsewhere must not run code unasked."""
    from iama.objective.operators import parse_operator

    try:
        parse_operator(criterion.operator)
    except ConfigError as error:
        raise ConfigError(
            f"iama.json names {criterion.operator!r} as the operator of {criterion.name!r}, which is none; "
            f"choose with --method, e.g. --method bon --n 8 ({error})"
        ) from error
    return criterion.operator


def _check_needs(method: Method, tuning: Path | None, spec: RewardSpec | None) -> None:
    """Raise `ConfigError` where the reward or a tuning file is missing, or the latter has no use."""
    if spec is None and method.text != "identity":
        raise ConfigError(f"{method.text} selects by a reward, and no iama.json names one; give --reward DIR")
    if method.is_tuned:
        if tuning is None:
            raise ConfigError(
                f"--method {method.text!r} takes its number from a file of `iama tune`; give --tuning "
                "FOLDER/tuning.json, or write the number"
            )
    elif tuning is not None:
        raise ConfigError(f"--tuning {str(tuning)!r} has no use with method {method.text!r}; write e.g. 'bon(tuned)'")


def _tuned(
    method: Method,
    tuning: Path,
    base: PolicySpec,
    spec: RewardSpec,
    sampling: Sampling,
    criterion: str | None,
    system_prompt: str | None,
) -> Method:
    """The method with the number that was tuned for this policy, reward and sampling."""
    from inference.hedging.tuning_file import Wanted, find, load_tuning, setting
    from inference.pools.fill import pool_header

    name = Path(base.adapter or base.path).name
    header = pool_header(name, base, system_prompt, "transformers", sampling, 1, 0)
    calibration = find(load_tuning(tuning), tuning, Wanted(header["policy"], system_prompt, sampling, spec, criterion))
    return setting(calibration, tuning, method)


def reward_spec(
    reward: str | None, head: str | None, placement: dict[str, str], manifest: Manifest | None, criterion: str | None
) -> RewardSpec | None:
    """The reward that selects: from the flags, else that of the criterion in iama.json."""
    if reward is None:
        if head is not None:
            raise ConfigError(f"--head {head!r} belongs to a classifier; give --reward DIR as well")
        if manifest is None:
            if criterion is not None:
                raise ConfigError(f"--criterion {criterion!r} needs an iama.json beside the policy; there is none")
            return None
        return manifest_reward(_criterion(manifest, criterion)).placed(**placement)
    return named_reward(reward, head, placement)


UNASKED = ("model", "verifier", "column")
"""Rewards that a file from elsewhere may name: none runs code of its own or sends anything anywhere."""


def manifest_reward(criterion: ManifestCriterion, remedy: str | None = None) -> RewardSpec:
    """The criterion's reward, unless it would run code or send prompts and a key: a model from elsewhere must not.

    `remedy` is what whoever trusts it may do; else it is that of `iama generate`.
    """
    part = next((part for part in criterion.reward.parts if part.source not in UNASKED), None)
    if part is None:
        return criterion.reward
    what, done = repr(part.function or part.kind), "its code is not run"
    if part.judge is not None:
        what = f"{part.judge.model!r} at {', '.join(map(repr, part.judge.urls))}"
        done = f"prompts and the key in {part.judge.api_key_env} are not sent there"
    if remedy is None and criterion.reward.function is not None:
        remedy = f"repeat it with --reward {shlex.quote(criterion.reward.function)}"
    raise ConfigError(
        f"iama.json names the {part.source} {what} as the reward of {criterion.name!r}; "
        f"{done} unasked, so if you trust it, {remedy or 'give the reward with --spec FILE'}"
    )


def _spec_of(file: Path, reward: str | None, head: str | None) -> RewardSpec:
    """The reward in a file, which no other flag may name."""
    from iama.config.schema import load_config
    from iama.config.specs import RewardSpec

    for flag, value in {"--reward": reward, "--head": head}.items():
        if value is not None:
            raise ConfigError(f"{flag} {value!r} and --spec {str(file)!r} both say which reward selects; give one")
    return load_config(file, RewardSpec)


def _measured(asked: Method, served: Method) -> str:
    """What of a method was measured, in words."""
    changed = [key for key, value in served.settings.items() if asked.settings.get(key) != value]
    names = {"target": "the target", "entropy_threshold": "the entropy threshold"}
    return " and ".join(names[key] for key in names if key in changed) or "the target"


def _print_as_json(completion: Completion, method: Method, calibration: Cost | None, spread: float | None) -> None:
    """The answer, what it was chosen among, and what it cost."""
    kept = ("text", "reward", "finish_reason", "num_tokens")
    print_json(
        "generate",
        text=completion.text,
        reward=completion.reward,
        method=method.text,
        chosen=completion.chosen,
        candidates=[{key: getattr(candidate, key) for key in kept} for candidate in completion.candidates],
        segments=[asdict(segment) for segment in completion.trace],
        capped=completion.capped,
        fallback=completion.fallback,
        disagreement=spread,
        cost=asdict(completion.cost),
        calibration_cost=None if calibration is None else asdict(calibration),
    )


def _show(
    completion: Completion, method: Method, calibration: Cost | None, spread: float | None, measured: str
) -> None:
    """What the response was chosen among, or the segments it was made of; the costs, of what was `measured` too; the
    response."""
    console, operator = wide_console(), method.text
    if completion.trace:
        _print_segments(console, completion, operator)
    else:
        console.print(_candidates(completion, operator))
    if calibration is not None and calibration.policy_tokens:
        print_line(console, f"cost of measuring {measured}: {_spent(calibration)}")
    print_line(console, f"cost: {_spent(completion.cost)}")
    if method.is_stopped:
        told = "; the rule had not stopped before" if completion.capped else ""
        print_line(console, f"{_draws(method, len(completion.candidates))}{told}")
    elif completion.capped:
        print_line(console, f"capped: {operator} asked for more than {len(completion.candidates)} candidates")
    if completion.fallback:
        told = "no candidate was accepted; the answer is a plain sample, which no reward has selected"
        print_line(console, f"fallback: {told}")
    if spread is not None:
        told = f"{spread:.4g} (standard deviation on their scale)"
        print_line(console, f"disagreement of the members at the answer: {told}")
    typer.echo(printable(completion.text) if sys.stdout.isatty() else completion.text)


def _draws(method: Method, number: int) -> str:
    """How many draws a method that stops has made."""
    from inference.samplers.serve import stopped_of

    stopped = stopped_of(method)
    rounds = int((stopped.ends < number).sum()) + 1
    return f"draws: {number} of at most {stopped.n}, in {rounds} round{'' if rounds == 1 else 's'} of {stopped.width}"


def _spent(cost: Cost) -> str:
    return (
        f"{cost.policy_prefill_tokens} prefill + {cost.policy_decode_tokens} decode tokens, "
        f"{cost.reward_calls} reward calls ({cost.reward_tokens} tokens), {cost.sequential_steps} steps, "
        f"{cost.flops / 1e9:.3g} GFLOPs, {cost.seconds:.2f} s"
    )


def _candidates(completion: Completion, operator: str) -> Table:
    """All candidates with their scores, the winner marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{operator}: {len(completion.candidates)} candidates", show_lines=True)
    for name in ("", "reward", "end"):
        table.add_column(name, justify="right" if name == "reward" else "left", no_wrap=True)
    table.add_column("text", max_width=TEXT_WIDTH)
    for index, candidate in enumerate(completion.candidates):
        score = "-" if candidate.reward is None else f"{candidate.reward:.4g}"
        style = "bold green" if index == completion.chosen else ""
        mark = "*" if index == completion.chosen else ""
        table.add_row(mark, score, candidate.finish_reason, Text(printable(candidate.text)), style=style)
    return table


def _print_segments(console: Console, completion: Completion, operator: str) -> None:
    """The segments of a guided response: how each came to be kept."""
    rows = []
    for i, segment in enumerate(completion.trace, start=1):
        threshold = "-" if math.isnan(segment.threshold) else f"{segment.threshold:.4g}"
        remark = ", best of all, none accepted" if segment.forced else ", begun with a nudge" if segment.nudge else ""
        numbers = [segment.num_tokens, f"{segment.reward:.4g}", threshold, segment.num_proposals, segment.wasted_tokens]
        rows.append([f"{i}{remark}", *map(str, numbers)])
    heads = ("tokens", "reward so far", "threshold", "proposals", "wasted tokens")
    print_table(console, f"{operator}: {len(rows)} segments", ("segment",), heads, rows)
