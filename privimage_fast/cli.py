"""The ``privimage`` command. Parses, calls the pipeline, prints; every error a user can cause ends in one clear line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# torch, jsonargparse and the pipeline are imported by the commands that need them: `privimage budget` answers at once.

STAGES = ("query", "select", "pretrain", "warmup", "finetune", "label", "sample", "evaluate", "report")

USAGE = """\
usage: privimage COMMAND [options]

  run       the whole method:  privimage run --config FILE [--dotted.key VALUE] [--dry-run] [--resume]
  demo      the whole method on embedded real digits and letters:  privimage demo --out DIR
  compare   a grid of variants × settings × seeds:  privimage compare --config FILE [--dry-run]
  budget    what σ, how many steps, what does the query cost?  Needs no data
  data      look at an image set, or convert one; `data prepare NAME` makes one of a well-known set
  query select pretrain warmup finetune label sample evaluate report
            one stage of a run:  privimage STAGE --config FILE   (or --out DIR, for a run that was begun)
  keys      every configuration key with its default
  doctor    what was built, and what runs

`privimage COMMAND --help` says more. Keys are those of `privimage keys`, e.g. --privacy.epsilon 3 --model.preset small
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a refused request, 130 for an interruption."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # libgomp's threads spin for long at every barrier; with a neighbour on one core that made a step ten times slower.
    # A short spin costs a few per cent on an idle machine. Read when torch is loaded, so it has to be set before.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run, "demo": _demo, "budget": _budget, "data": _data, "doctor": _doctor, "keys": _keys,
        "compare": _compare,
        **{stage: lambda arguments, stage=stage: _stage(stage, arguments) for stage in STAGES},
    }  # fmt: skip
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        from privimage_fast import __version__

        print(__version__)
        return 0
    if argv[0] not in commands:
        import difflib

        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"privimage: unknown command {argv[0]!r}{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    from privimage_fast.stages.interrupt import terminating_interrupts

    try:
        with terminating_interrupts():
            commands[argv[0]](argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        note = ""
        if argv[0] in ("run", "demo", "compare", *STAGES):
            again = "the same command" if argv[0] in ("compare", *STAGES) else "the same command with --resume"
            note = (
                f". If its folder is there, {again} goes on from what was saved last; private steps after that, if any, are "
                "repeated and charged anew"
            )
        print(f"\nprivimage: interrupted{note}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `privimage … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit must not fail again
        return 141  # as of a process that SIGPIPE ends
    except (ValueError, RuntimeError, OSError) as error:
        # Deliberate errors are subclasses of these two, with messages for users; anything else shows its traceback.
        if not _is_for_users(error):
            raise
        print(f"privimage: error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_for_users(error: Exception) -> bool:
    own = type(error).__module__.startswith("privimage_fast")
    return own or isinstance(error, PermissionError | FileNotFoundError)


# ------------------------------------------------------------------------------------------------- configured runs


def _parse_run(command: str, argv: list[str], description: str, *, base: str | None = None) -> tuple[Any, argparse.Namespace]:
    """(RunConfig, flags) from ``--config FILE``, dotted overrides and flags; ``base`` is YAML beneath both (several documents:
    each over those before it)."""
    from privimage_fast.config import ConfigError, build_config, check_keys, load_config, load_yaml, nest, parse_value, read_text
    from privimage_fast.stages.folder import RunFolder

    parser = argparse.ArgumentParser(f"privimage {command}", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML; keys as in `privimage keys`")
    parser.add_argument("--out", metavar="DIR", help="the run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in the folder")
    parser.add_argument("--skip-bad", action="store_true", help="list and skip unreadable images")
    if command in ("run", "demo", "finetune"):
        what = "print σ, steps, memory, rough time and how each layer's gradients are had, and stop"
        parser.add_argument("--dry-run", action="store_true", help=what)
    if command == "query":
        what = "how far noise would change the choice of labels, by its share of the budget, on public stand-ins; spends nothing"
        parser.add_argument("--dry-run", action="store_true", help=what)
    if command in ("run", "demo", "evaluate"):
        parser.add_argument("--inception", metavar="FILE", help="Inception as TorchScript or ONNX, for FID")
    parser.epilog = "any configuration key: --privacy.epsilon 3 --data.public DIR … (`privimage keys` lists them)"
    flags, rest = parser.parse_known_args(argv)
    overrides: dict[str, Any] = {}
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"unexpected argument {token!r}; keys are written --key value")
        key, equals, value = token[2:].partition("=")
        check_keys([key], "command line")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        overrides[key] = parse_value(key, value)
    if flags.skip_bad:
        overrides["data.skip_bad"] = True
    if flags.out:
        overrides["out"] = flags.out
    if getattr(flags, "inception", None):
        overrides["evaluate.inception"] = flags.inception
    config = None
    for document in base.split("\n---\n") if base else ():
        config = build_config(load_yaml(document, "embedded configuration"), config)
    saved = RunFolder(flags.out) if flags.out else None
    if flags.config:
        path = Path(flags.config)
        if not path.is_file():
            raise ConfigError(f"--config: no file {path}")
        config = build_config(load_yaml(read_text(path), str(path)), config)
    elif saved is not None and saved.begun and (flags.resume or command in STAGES):
        config = load_config(saved.config)
    elif base is None and "data.private" not in overrides and command != "report":
        if saved is not None and (flags.resume or command in STAGES):
            raise ConfigError(f"{flags.out} holds no run; give the --out of one that was begun, or --config FILE")
        raise ConfigError(
            "give --config FILE, or --out DIR of a run that was begun, or at least --data.public and --data.private"
        )
    return build_config(nest(overrides), config), flags


def _run(argv: list[str], *, command: str = "run", base: str | None = None) -> None:
    config, flags = _parse_run(command, argv, "The whole method, from two image sets to a private synthetic set.", base=base)
    from privimage_fast.pipeline import Run
    from privimage_fast.report import summary_table
    from privimage_fast.stages.folder import RunError

    run = Run(config)
    if flags.resume and not run.folder.config.exists():  # after a slip in --out a second run would be paid for
        raise RunError(
            f"{run.folder.path} holds no run to go on with; give the --out of the one that was begun, or leave --resume out to "
            "begin one there"
        )
    run.check_new(resume=flags.resume or flags.dry_run)
    if flags.dry_run and run.folder.begun:
        if flags.resume:
            run.check_reopened()
        else:
            print(f"note: {run.folder.path} already holds a run: this one needs another --out", file=sys.stderr)
    plan = None
    if flags.dry_run or not flags.resume:
        print("planning: steps are tried on made-up images", file=sys.stderr)
        plan = run.plan()
    if plan is not None:
        print(plan.table())
    if flags.dry_run:
        assert plan is not None
        print(
            "\nLayers of a micro-batch, and the way in which each one's per-image gradients are had (T·K: positions of all rows "
            f"of an image):\n{plan.step.table()}\n\nnothing was spent, and nothing written"
        )
        return
    with run.opened(resume=flags.resume):
        if plan is not None:
            run.write_plan(plan)
        page = run.all()
    print(summary_table(run.folder.path))
    print(
        f"\nsynthetic images  {run.folder.synthetic}"
        f"\nsheet             {run.folder.samples / 'after.png'}"
        f"\nreport            {page}"
    )


def _demo(argv: list[str]) -> None:
    from importlib.resources import files

    def text(name: str) -> str:
        return (files("privimage_fast") / name).read_text()

    base = text("demo.yaml")
    config, _ = _parse_run("demo", argv, "", base=base)
    if config.model.family == "gan":  # the same data, other settings; what the user gives stands above both
        base += "\n---\n" + text("demo-gan.yaml")
    _run(argv, command="demo", base=base)


def _stage(stage: str, argv: list[str]) -> None:
    config, flags = _parse_run(stage, argv, f"The stage `{stage}` of a run.")
    from privimage_fast.pipeline import Run
    from privimage_fast.report import outdated_figures
    from privimage_fast.stages.folder import CHARGED_STAGES, RunError

    run = Run(config)
    if stage == "report":
        print(run.report())
        return
    if stage == "query" and flags.dry_run:
        print(run.question())
        return
    if stage == "finetune" and flags.dry_run:
        plan = run.plan()
        print(f"{plan.table()}\n\n{plan.step.table()}")
        return
    with run.opened(resume=True):
        try:
            result = getattr(run, stage)()
        finally:
            if stage in (*CHARGED_STAGES, "sample", "evaluate") and (run.folder.path / "report.html").exists():
                run.report()  # an earlier page would show another ε, other images or figures than the folder holds
    if stage == "evaluate":
        if result is None:
            raise RunError("there is nothing to evaluate against: set data.test, or data.holdout before the run")
        for metric in result["metrics"]:
            value = "n/a" if metric["value"] is None else f"{metric['value']:.4f}"
            value += f" ± {metric['spread']:.4f}" if metric["spread"] is not None else ""
            print(f"{metric['name']:<48} {value:>10}  {'private' if metric['private'] else 'NOT private'}")
    if stage == "sample":
        print(f"{len(result)} images in {run.folder.synthetic}")
        if note := outdated_figures(run.folder.path):
            print(f"note: {note}")
    if stage == "label" and result is None:
        print("label.steps is 0 (or privacy.train false): images keep the labels that they are drawn for, and nothing is charged")
        return
    print(f"{stage}: done in {run.folder.path}")


def _compare(argv: list[str]) -> None:
    import fnmatch

    what = (
        "Runs a grid of variants, settings and seeds; goes on where it was left; writes one table, plots and a sheet of images."
    )
    parser = argparse.ArgumentParser("privimage compare", description=what, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", required=True, help="base, variants, seeds and grids; see docs/evaluation.md")
    parser.add_argument("--out", metavar="DIR", help="in place of the file's")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="runs whose name fits, e.g. 'dpdm*seed=0'")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time, which share the cores (1)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their rough time, and stop")
    parser.add_argument("--table", action="store_true", help="write table, plots and sheet from what is there, and stop")
    a = parser.parse_args(argv)
    from privimage_fast.compare import Cell, GridError, load_comparison, run_comparison, write_results
    from privimage_fast.compare.estimate import describe
    from privimage_fast.compare.sources import check_sources
    from privimage_fast.stages.folder import RunError

    if a.jobs < 1:
        raise GridError(f"--jobs must be ≥ 1, found {a.jobs}")
    comparison = load_comparison(a.config, out=a.out)

    def wanted(cell: Cell) -> bool:
        return fnmatch.fnmatch(cell.name, a.only)

    if not any(map(wanted, comparison.cells)):
        raise GridError(f"--only {a.only!r} fits no run; there are {', '.join(c.name for c in comparison.cells[:6])}, …")
    if not a.table:
        check_sources(comparison, a.config, wanted)
    if a.dry_run:
        print(describe(comparison, wanted))
        return
    outcomes = [] if a.table else run_comparison(comparison, wanted=wanted, jobs=a.jobs)
    table = write_results(comparison, outcomes)
    print(table.read_text(encoding="utf-8"))
    print(f"written to {table.parent}")
    if failed := [o.cell.name for o in outcomes if o.state == "failed"]:
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed ({', '.join(failed)}); the same command tries them again")


def _keys(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("privimage keys", description="Configuration keys, their defaults and their meaning.")
    parser.add_argument("section", nargs="*", help="of these sections only: data, privacy, query …")
    a = parser.parse_args(argv)
    from privimage_fast.config import documented_yaml

    print(documented_yaml(a.section), end="")


# ------------------------------------------------------------------------------------------------------ without data


def _budget(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("privimage budget", description="ε of a plan, or σ for an ε. Reads no data, spends nothing.")
    parser.add_argument("--population", type=int, required=True, help="N, images in the sensitive set (public)")
    parser.add_argument("--batch-size", type=float, required=True, help="expected batch size; q = batch size / N")
    parser.add_argument("--steps", type=int, help="noised steps")
    parser.add_argument("--epochs", type=float, help="in place of --steps: expected passes over the set")
    parser.add_argument("--delta", type=float, help="δ; 1/(N ln N) if left out")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--epsilon", type=float, help="target ε: answers σ")
    goal.add_argument("--noise-multiplier", type=float, help="σ: answers ε")
    parser.add_argument("--query-noise-multiplier", type=float, help="σ₁ of one semantic query")
    parser.add_argument("--means-noise-multiplier", type=float, help="σ₂ of the class means")
    parser.add_argument("--means-rounds", type=int, default=1, help="how often they are asked for (1)")
    parser.add_argument("--label-noise-multiplier", type=float, help="σ₃ of a step of the layer that labels images")
    parser.add_argument("--label-steps", type=int, help="how many (100)")
    a = parser.parse_args(argv)
    from privimage_fast.dp import accounting as acc
    from privimage_fast.report import epsilon_text

    if a.population < 2 or not 0 < a.batch_size <= a.population:
        raise acc.BudgetError(f"expected 0 < batch size ≤ population, found {a.batch_size:g} and {a.population}")
    if (a.steps is None) == (a.epochs is None):
        raise acc.BudgetError("give one of --steps and --epochs")
    rate = a.batch_size / a.population
    steps = a.steps if a.steps is not None else max(1, round(a.epochs / rate))
    delta = a.delta if a.delta is not None else acc.default_delta(a.population)
    asked = {"σ₁": a.query_noise_multiplier, "σ₂": a.means_noise_multiplier, "σ₃": a.label_noise_multiplier}
    if a.means_rounds < 1 or (a.means_rounds > 1 and a.means_noise_multiplier is None):
        raise acc.BudgetError(f"--means-rounds must be ≥ 1, and needs --means-noise-multiplier; found {a.means_rounds}")
    steps_given, label_steps = a.label_steps is not None, 100 if a.label_steps is None else a.label_steps
    if label_steps < 1 or (steps_given and a.label_noise_multiplier is None):
        raise acc.BudgetError(f"--label-steps must be ≥ 1, and needs --label-noise-multiplier; found {a.label_steps}")
    queries: list[acc.Event] = [
        acc.GaussianEvent(sigma)
        for sigma in (a.query_noise_multiplier, *[a.means_noise_multiplier] * a.means_rounds) if sigma is not None
    ]  # fmt: skip
    if a.label_noise_multiplier is not None:
        queries.append(acc.DPSGDEvent(a.label_noise_multiplier, 1.0, label_steps))
    sigma = a.noise_multiplier
    if sigma is None:
        sigma = acc.solve_noise_multiplier(
            target_epsilon=a.epsilon, delta=delta, sample_rate=rate, steps=steps, prior_events=queries
        )
    training = acc.DPSGDEvent(sigma, rate, steps)
    checks = acc.cross_check([*queries, training], delta)
    print(f"q {rate:.6g}   steps {steps}   σ {sigma:.4f}   δ {delta:.4g}   adjacency {acc.ADJACENCY}   unit {acc.UNIT}")
    print(f"ε {epsilon_text(checks['pld'])}  (PLD, pessimistic: the figure that is reported)")
    for name in ("prv", "rdp"):
        shown = "n/a" if checks[name] is None else epsilon_text(checks[name])
        print(f"  {shown}  ({name.upper()} of Opacus, a cross-check)")
    if queries:
        words = {"σ₁": "the query", "σ₂": "the class means", "σ₃": "the labels"}
        rounds = f", {a.means_rounds} rounds" if a.means_rounds > 1 else ""
        times = {"σ₁": "", "σ₂": rounds, "σ₃": f", {label_steps} steps"}
        named = " and ".join(
            f"{words[name]} ({name} {sigma:g}{times[name]})" for name, sigma in asked.items() if sigma is not None
        )
        print(f"without {named} the same σ costs ε {epsilon_text(acc.epsilon([training], delta))}")
        if a.epsilon is not None:
            alone = acc.solve_noise_multiplier(target_epsilon=a.epsilon, delta=delta, sample_rate=rate, steps=steps)
            both = " and ".join(words[name] for name, sigma in asked.items() if sigma is not None)
            print(f"without {both}, σ {alone:.4f} would do for ε {a.epsilon:g}")


def _data(argv: list[str]) -> None:
    if argv[:1] == ["prepare"]:
        _prepare(argv[1:])
        return
    what = "Looks at an image set, or converts it. `privimage data prepare --help`: well-known sets."
    parser = argparse.ArgumentParser("privimage data", description=what)
    parser.add_argument("source", help="folder of class folders, zip, npz, IDX, or embedded:mnist|digits|letters|…")
    parser.add_argument("--resolution", type=int, default=32, help="pixels of a side that images are brought to (32)")
    parser.add_argument(
        "--channels", type=int, default=3, choices=(1, 3), help="1 grey, 3 colour, to which they are converted (3)"
    )
    parser.add_argument("--format", default="auto", help="auto, folder, zip, npz or idx")
    parser.add_argument("--skip-bad", action="store_true", help="list and skip unreadable images")
    parser.add_argument("--to", metavar="PATH", help="write it: PATH.npz, PATH.zip, or a folder")
    parser.add_argument("--sheet", metavar="PNG", help="write a picture of the first images of each class")
    a = parser.parse_args(argv)
    from privimage_fast import data

    images = data.open_image_set(a.source, resolution=a.resolution, channels=a.channels, format=a.format, skip_bad=a.skip_bad)
    print(f"{len(images)} images, {a.resolution}×{a.resolution}×{a.channels}, {images.n_classes} classes")
    for name, count in zip(images.label_names, images.class_counts(), strict=True):
        print(f"  {name:<20} {count}")
    for skipped in images.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    if a.to:
        save = {".npz": data.save_npz, ".zip": data.save_zip}.get(Path(a.to).suffix, data.save_folder)
        print(f"written to {save(images, a.to)}")
    if a.sheet:
        data.class_sheet(images).save(a.sheet, format="PNG")
        print(f"written to {a.sheet}")


def _prepare(argv: list[str]) -> None:
    from privimage_fast.data import class_sheet, save_npz
    from privimage_fast.data.prepare import RECIPES, SPLITS, Wish, prepare

    what = "A well-known public data set as npz, from files you have or have installed, or from the network."
    files = "\n".join(f"  {name:<14} {recipe.files}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        "privimage data prepare", description=what, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"what --from takes:\n{files}",
    )  # fmt: skip
    parser.add_argument("name", choices=tuple(RECIPES))
    parser.add_argument("--from", dest="source", metavar="PATH", type=Path, help="file or folder; see below")
    parser.add_argument("--to", metavar="NPZ", type=Path, required=True, help="the file to write")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--channels", type=int, choices=(1, 3), help="the set's own if left out")
    parser.add_argument("--per-class", type=int, metavar="N", help="the first N images of each class only")
    parser.add_argument("--download", action="store_true", help="fetch the files; each is checked against its known checksum")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where fetched files are kept (~/.cache/privimage-fast)")
    parser.add_argument("--variants", type=int, default=1, help="letters: images of each letter in each typeface")
    parser.add_argument("--alphabet", default="A-Za-z", help="letters: which")
    parser.add_argument("--labels", choices=("category", "subcategory"), default="subcategory", help="emoji: which labels")
    parser.add_argument("--sheet", metavar="PNG", help="also write a picture of the first images of each class")
    a = parser.parse_args(argv)
    wish = Wish(a.split, a.resolution, a.variants, a.alphabet, a.labels)
    images = prepare(
        a.name, a.source, wish=wish, channels=a.channels, per_class=a.per_class, download=a.download, cache=a.cache
    )  # fmt: skip
    print(f"{len(images)} images, {images.resolution}×{images.resolution}×{images.channels}, {images.n_classes} classes")
    if images.skipped:
        print(f"{len(images.skipped)} pictures could not be read and were left out", file=sys.stderr)
    print(f"written to {save_npz(images, a.to)}")
    if a.sheet:
        class_sheet(images).save(a.sheet, format="PNG")
        print(f"written to {a.sheet}")


def _doctor(argv: list[str]) -> None:
    argparse.ArgumentParser("privimage doctor", description="What was built, and what runs.").parse_args(argv)
    import platform

    import torch

    from privimage_fast import __version__, ops

    info = ops.build_info()
    rows = [
        ("privimage-fast", f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}"),
        ("CPU kernels", f"{info.isa} in use ({', '.join(info.isa_compiled)} built)" if info.native
         else f"none: {info.native_reason}; every op runs in plain torch, correct and slower"),
        ("threads", f"{info.threads}, " + (f"OpenMP from {info.openmp_runtime}" if info.openmp else "no OpenMP, kernels serial")),
        ("CUDA kernels", f"built for {', '.join(info.cuda_archs)} ({info.cuda_status})" if info.cuda_built
         else f"not built: {info.cuda_status}"),
        ("CUDA device", info.cuda_device or "none found by torch"),
    ]  # fmt: skip
    for where in sorted(set(info.reference_ops.values())):
        names = [name for name, place in sorted(info.reference_ops.items()) if place == where]
        for row, few in enumerate(names[i : i + 4] for i in range(0, len(names), 4)):
            rows.append((f"plain torch for {where}" if row == 0 else "", ", ".join(few)))
    for name, value in rows:
        print(f"{name:<32} {value}")


if __name__ == "__main__":
    sys.exit(main())
