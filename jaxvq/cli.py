"""The command `jaxvq plan | quantize | inspect | dequantize`."""

import argparse
import csv
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from jaxvq._stream import dequantize_file, inspect_file, plan_file, plan_report, quantize_file
from jaxvq.methods import METHODS, method_from_json
from jaxvq.metrics import Report
from jaxvq.spec import Rule, Spec
from jaxvq.storage import CheckpointReader

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

EPILOG = """
The input is any safetensors file, whatever framework wrote it. A tensor named `...weight` has its output features on
axis 0 (PyTorch), `...kernel` on the last axis (Flax), `...embedding` on axis 0; --out-axis says otherwise.
PyTorch's ConvTranspose `...weight` is [in, out, ...]: it needs `out_axis` 1 in a rule of a --spec file.
Interrupt a long run, and the same command goes on from where it was.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 after an error, 130 after an interrupt.

    Args:
      argv: the arguments; None takes them from the command line.
    """
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except KeyboardInterrupt:
        target = getattr(args, "output", None)
        kept = target is not None and Path(f"{target}.partial").exists()
        hint = f"; run the same command again to go on from {target}.partial" if kept else ""
        print(f"jaxvq: interrupted{hint}", file=sys.stderr, flush=True)
        if argv is None:  # JAX may still be computing, and crashes when Python tidies up around it
            os._exit(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        print(f"jaxvq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def plan(args: argparse.Namespace) -> None:
    """Prints what `quantize` would do."""
    with CheckpointReader(args.input) as source:
        report = plan_report(plan_file(source, _spec(args)))
    _print_report(report, args, f"plan for {args.input}", {})


def quantize(args: argparse.Namespace) -> None:
    """Quantizes a checkpoint and prints the report."""
    _refuse_same(args)
    with CheckpointReader(args.input) as source:
        report = quantize_file(source, args.output, _spec(args), seed=args.seed, force=args.force, progress=_progress)
    _print_report(report, args, args.output, {"file": args.output})


def inspect(args: argparse.Namespace) -> None:
    """Prints what a file holds."""
    with CheckpointReader(args.input) as source:
        facts = {
            "file": args.input,
            "format": "jaxvq" if source.is_jaxvq else "safetensors",
            "file_nbytes": source.file_nbytes,
            "header_nbytes": source.header_nbytes,
            "metadata": source.metadata,
        }
        if source.is_jaxvq:
            title = f"{args.input}: {source.file_nbytes:,} bytes, {source.header_nbytes:,} of them header"
            _print_report(inspect_file(source, progress=_progress), args, title, facts)
        else:
            _print_tensors(source, args, facts)


def dequantize(args: argparse.Namespace) -> None:
    """Writes a plain checkpoint."""
    _refuse_same(args)
    with CheckpointReader(args.input) as source:
        dequantize_file(source, args.output, force=args.force, progress=_progress)
    if args.json:
        print(json.dumps({"file": args.output, "nbytes": Path(args.output).stat().st_size}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxvq", description="Codebook quantization of checkpoints.", epilog=EPILOG)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command, output, spec in ((plan, False, True), (quantize, True, True), (inspect, False, False)):
        sub = _add_command(commands, command, output=output)
        form = sub.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="print JSON instead of a table")
        form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
        if spec:
            _add_spec(sub)
    sub = _add_command(commands, dequantize, output=True)
    sub.add_argument("--json", action="store_true", help="print the file's name and bytes as JSON")
    return parser


def _add_command(commands: Any, command: Any, *, output: bool) -> argparse.ArgumentParser:
    summary = command.__doc__
    sub = commands.add_parser(command.__name__, help=summary, description=summary, epilog=EPILOG)
    sub.set_defaults(command=command)
    sub.add_argument("input", help="a safetensors file")
    if output:
        sub.add_argument("-o", "--output", required=True, help="the file to write")
        sub.add_argument("--force", action="store_true", help="replace the output if it exists")
    return sub


def _add_spec(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("what to do")
    group.add_argument("--spec", metavar="FILE.json", help="rules and methods from a file, in place of the options")
    names = {method.__name__.lower(): method.__name__ for method in METHODS}
    group.add_argument(
        "--method", type=lambda name: names.get(name.lower(), name), choices=list(names.values()), help="default KMeans"
    )
    group.add_argument("--bits", type=int, help="bits per code")
    group.add_argument("--k", type=int, help="codebook entries")
    group.add_argument("--per", type=_per, help="tensor, channel, or a group size")
    group.add_argument("--dim", type=int, help="values per vector")
    group.add_argument("--stages", type=int, help="codebooks that are added up")
    group.add_argument("--fraction", type=float, help="centroids per output feature (RowVQ)")
    group.add_argument("--codebooks", help="shared or subspace (Product)")
    group.add_argument("--codebook-dtype", help="float32, bfloat16 or int8")
    group.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="names that stay float (regex)")
    group.add_argument(
        "--out-axis", type=int, metavar="N", help="axis of output features of every tensor whose rule names none"
    )
    group.add_argument("--seed", type=int, default=0, help="the random seed, from 0 to 2**63 - 1 (default 0)")


def _per(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _spec(args: argparse.Namespace) -> Spec:
    """The spec that the options or the file ask for."""
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"`--seed` must be from 0 to 2**63 - 1, got {args.seed}; choose another")
    names = ("method", "bits", "k", "per", "dim", "stages", "fraction", "codebooks", "codebook_dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.spec is None:
        spec = Spec(default=method_from_json({"method": "KMeans", **given}))
    elif given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ValueError(f"`--spec` cannot be joined with `{option}`; write the method in the file")
    else:
        spec = _read_spec(args.spec)
    keep = tuple(Rule(pattern, None) for pattern in args.keep)
    out_axis = spec.out_axis if args.out_axis is None else args.out_axis
    return dataclasses.replace(spec, rules=keep + spec.rules, out_axis=out_axis)


def _read_spec(path: str) -> Spec:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; name the JSON file of a spec")
    try:
        return Spec.from_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be the JSON text of a spec, got bytes that are no text; see --help") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse_same(args: argparse.Namespace) -> None:
    if Path(args.input).resolve() == Path(args.output).resolve():
        raise ValueError(f"{args.output}: `--output` must be another file than the input; choose another name")


def _progress(items: Sequence[Any], text: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, text, console=console, transient=True, disable=not console.is_terminal)


def _print_report(report: Report, args: argparse.Namespace, title: str, facts: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({**facts, **report.to_json()}, indent=2))
    elif args.csv:
        print(report.to_csv(), end="")
    elif sys.stdout.isatty():
        Console().print(report.table(escape(title)))
    else:
        print(f"{title}\n{report}")


def _print_tensors(source: CheckpointReader, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    tensors = source.container.tensors.values()
    if args.json:
        rows = [{"path": t.name, "dtype": t.code, "shape": list(t.shape), "nbytes": t.nbytes} for t in tensors]
        print(json.dumps({**facts, "tensors": rows}, indent=2))
        return
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("path", "dtype", "shape", "nbytes"))
        writer.writerows((t.name, t.code, "x".join(map(str, t.shape)), t.nbytes) for t in tensors)
        return
    table = Table("name", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for tensor in tensors:
        table.add_row(escape(tensor.name), "x".join(map(str, tensor.shape)), tensor.code, f"{tensor.nbytes:,}")
    print(f"{args.input}: not a jaxvq file, a safetensors file of {len(tensors)} tensors")
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


if __name__ == "__main__":
    sys.exit(main())
