"""`iama doctor`: what is installed and what this machine has, for people and for reports of faults."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import typer

from iama import __version__
from iama.cli.app import app, prepare
from iama.cli.as_json import print_json
from iama.cli.options import MACHINE, AsJson
from iama.environment import cores, threads_per_process
from iama.errors import without_secrets
from iama.tables import print_line, print_table, wide_console

EXTRAS = {
    "deepspeed": "ZeRO: training that is shared out over several processes or GPUs",
    "plots": "plots.svg of each training run, and the figures of the experiments",
    "quantization": "bases in 4 bits (QLoRA), on GPUs",
    "remote": "judges behind an OpenAI-compatible URL, and iama pool --engine openai",
    "serve": "iama serve",
    "vllm": "engine: vllm, for sampling and for rewards; it has versions of its own, so install it apart",
    "math": "the verifier of mathematical answers",
    "ray": "iama evaluate --ray and iama pool --ray: work on a Ray cluster",
    "real": "make real: the study on a real model",
}
"""What each extra adds; `dev` and `docs`, which add tools for working on iama itself, are left out."""
VARIABLES = {
    "OMP_NUM_THREADS": "threads of a process; iama sets cores / processes",
    "OMP_WAIT_POLICY": "iama sets PASSIVE: threads that spin take the cores from other processes",
    "KMP_BLOCKTIME": "iama sets 0, for the same reason",
    "TOKENIZERS_PARALLELISM": "iama sets false",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "PYTORCH_CUDA_ALLOC_CONF": "how GPU memory is cut up",
    "DS_ACCELERATOR": "what DeepSpeed runs on; cpu spares its warning on a host without a GPU",
    "HF_HOME": "where models and datasets of the hub are kept",
    "HF_HUB_OFFLINE": "1: nothing is downloaded; iama sets it where every model is a folder and no reward is your code",
    "HF_TOKEN": "key of the hub",
    "TRANSFORMERS_VERBOSITY": "iama sets error",
    "WORLD_SIZE": "number of processes, set by launchers alone",
    "RAY_ADDRESS": "head of a Ray cluster",
    "OPENAI_API_KEY": "key of judges and servers",
}
"""Variables that change what iama does, and how."""
SECRETS = ("HF_TOKEN", "OPENAI_API_KEY")
GIB = 2**30
LITTLE_DISK = 5 * GIB
"""Bytes below which a run's checkpoints may not have room."""


@app.command(short_help="Tell versions, extras, devices and settings of this machine.", rich_help_panel=MACHINE)
def doctor(as_json: AsJson = False) -> None:
    """Tell what is installed, what each missing extra would add, and what this machine has; 1 if something is wrong.

    Reports of faults begin with its output. Keys are not shown. Whether it all works: iama selftest.

    Example: iama doctor

    Example: iama doctor --json
    """
    found = examine()
    if as_json:
        print_json("doctor", **found)
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that is told, as docs/reference/json.md describes it."""
    variables = {name: _shown(name) for name in VARIABLES}  # before iama sets its own
    prepare([])
    packages, extras = _packages()
    devices, disk = _devices(), _disk()
    return {
        "problems": _problems(packages, disk),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "extras": extras,
        "devices": devices,
        "environment": variables,
        "disk": disk,
    }


def _shown(name: str) -> str | None:
    value = os.environ.get(name)
    return "set, not shown" if value and name in SECRETS else None if value is None else without_secrets(value)


# What is installed. -------------------------------------------------------------------------------------


def _packages() -> tuple[dict[str, Any], dict[str, Any]]:
    """What iama's own metadata asks for: required packages, and extras with theirs."""
    packages: dict[str, Any] = {}
    extras: dict[str, Any] = {
        name: {"installed": True, "missing": [], "adds": adds, "install": f"pip install 'iama[{name}]'"}
        for name, adds in EXTRAS.items()
    }
    for text in _requirements():
        wanted, _, marker = (part.strip() for part in text.partition(";"))
        name, bounds = _parted(wanted)
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if named is not None and named[1] not in EXTRAS:
            continue
        has = _version(name)
        extra = None if named is None else named[1]
        packages[name] = {"installed": has, "wanted": bounds, "fits": has and _fits(has, bounds), "extra": extra}
        if extra is not None and has is None:
            extras[extra]["installed"] = False
            extras[extra]["missing"].append(name)
    return packages, extras


def _requirements() -> list[str]:
    try:
        return requires("iama") or []
    except PackageNotFoundError:  # run from its sources, never installed
        return []


def _parted(wanted: str) -> tuple[str, str]:
    found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", wanted)
    assert found is not None, wanted
    return found[1], found[2].strip("() ")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(has: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet  # a dependency of transformers

    return SpecifierSet(bounds).contains(has, prereleases=True)


# What the machine has. ----------------------------------------------------------------------------------


def _devices() -> dict[str, Any]:
    import torch

    from trainers.run.memory import free_memory

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    cpu = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_of_this_process": cores(),
        "threads_of_a_process": threads_per_process(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_memory_bytes": int(free_memory()),
    }
    return {"cpu": cpu, "gpus": gpus}


def _disk() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"working_folder": Path.cwd(), "hugging_face": home}
    return {name: {"path": str(path), "free_bytes": _free(path)} for name, path in places.items()}


def _free(path: Path) -> int:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _problems(packages: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    """What cannot work, each with what to do."""
    told = []
    if not packages:
        told.append(
            "iama is run from its sources and not installed, so its requirements are not known; pip install -e ."
        )
    for name, package in packages.items():
        if package["installed"] is None:
            if package["extra"] is None:
                told.append(f"{name} is not installed; pip install '{name}{package['wanted']}'")
        elif not package["fits"]:
            told.append(
                f"{name} {package['installed']} is not {package['wanted']}; pip install '{name}{package['wanted']}'"
            )
    told += [
        f"{place['path']}: {place['free_bytes'] / GIB:.1f} GiB are free; checkpoints may need more, so make room"
        for place in disk.values()
        if place["free_bytes"] < LITTLE_DISK
    ]
    return list(dict.fromkeys(told))


# What is shown. -----------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    console = wide_console()
    print_line(console, f"iama {__version__}, Python {found['python']}, {found['system']}")
    rows = [
        (name, package["installed"] or "missing", package["wanted"], "" if package["fits"] else "!")
        for name, package in found["packages"].items()
        if package["installed"] is not None or package["extra"] is None
    ]
    print_table(console, "\nVersions", ("package", "installed", "wanted", ""), (), rows)
    extras = [
        (name, "installed" if extra["installed"] else f"lacks {', '.join(extra['missing'])}", extra["adds"])
        for name, extra in found["extras"].items()
    ]
    print_table(console, "Extras: pip install 'iama[NAME]'", ("extra", "here", "adds"), (), extras)
    print_table(console, "Devices", ("device", "what it has"), (), _device_rows(found["devices"]))
    given = {name: value for name, value in found["environment"].items() if value is not None}
    if given:
        variables = [(name, value, VARIABLES[name]) for name, value in given.items()]
        print_table(console, "Environment", ("variable", "value", "what it does"), (), variables)
    print_line(console, f"Not set: {', '.join(name for name in VARIABLES if name not in given)}\n")
    disk = [(place["path"], f"{place['free_bytes'] / GIB:.1f} GiB") for place in found["disk"].values()]
    print_table(console, "Disk", ("folder",), ("free",), disk)
    for problem in found["problems"]:
        print_line(console, f"wrong: {problem}")
    print_line(
        console, "something is wrong: see above" if found["problems"] else "nothing is wrong; iama selftest tries it"
    )


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = devices["cpu"]
    memory = f"{cpu['free_memory_bytes'] / GIB:.1f} of {cpu['memory_bytes'] / GIB:.1f} GiB free"
    cores = f"{cpu['cores_of_this_process']} of {cpu['cores']} cores"
    rows = [("CPU", f"{cpu['instructions']}, {cores}, {memory}")]
    for index, gpu in enumerate(devices["gpus"]):
        rows.append((f"GPU {index}", f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB, {gpu['capability']}"))
    return rows if devices["gpus"] else [*rows, ("GPU", "none that torch sees")]
