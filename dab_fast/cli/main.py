"""dab-fast demo | selftest | bench, or python -m dab_fast: results on stdout, progress and errors on stderr.

Exit code 0: all is well; 1: a check failed; 2: the command line or a file cannot be used, said in one line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dab_fast.cli.inputs import InputError, check_folder, check_output, choose_device, choose_dtype

if TYPE_CHECKING:
    from rich.table import Table

    from dab_fast.cli.demo import Comparison

app = typer.Typer(
    help="The DAB-DETR decoder as fast as the hardware allows, without changing its answers.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    app()


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """What the user can mend ends with exit code 2 and one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(command, f"{error.name} is not installed: pip install 'dab_fast[demo]'")
    except InputError as error:
        _fail(command, str(error))


def _fail(command: str, message: str) -> None:
    typer.echo(f"dab-fast {command}: {message}", err=True)
    raise typer.Exit(2)


@app.command()
def demo(
    image: Annotated[Path | None, typer.Argument(help="A photo; by default one that scikit-image ships.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A directory written by save_pretrained, or any file that dab_fast.load_checkpoint reads (.pth, "
            ".safetensors); without it the weights are random."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 and float16 by autocast")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    output: Annotated[Path, typer.Option(help="The picture to write: .png, .jpg, .pdf or .svg")] = Path(
        "dab_fast_demo.png"
    ),
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Time torch.compile too, and on a CPU ONNX Runtime and OpenVINO if installed."),
    ] = False,
    wreck: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run DAB-DETR-R50 and its accelerated copy on a photo: the same boxes? how many calls? how long?"""
    with _one_line_errors("demo"):
        from dab_fast.cli import demo as what

        chosen_device, chosen_dtype = choose_device(device), choose_dtype(dtype)
        check_output(output)
        path = image or what.default_image()
        photo = what.read_image(path)
        _say("building the model")
        if checkpoint is not None:
            model = what.load_checkpoint(checkpoint)
            weights = f"checkpoint {checkpoint.resolve().name}"
        else:
            model = what.random_model(what.resnet50_config(), what.to_pixel_values(photo))
            weights = "random weights, every parameter drawn (seed 0)"
        from dab_fast.cli.picture import draw

    comparison, original, accelerated = what.run(
        photo,
        path.name,
        model,
        weights,
        device=chosen_device,
        dtype=chosen_dtype,
        wreck=wreck,
        with_peers=peers,
        say=_say,
    )
    draw(output, photo, comparison, original, accelerated, model.config.id2label if checkpoint else None)
    if as_json:
        typer.echo(json.dumps(_as_json(comparison, output)))
    else:
        _print_comparison(comparison, output)
    raise typer.Exit(1 if comparison.failures else 0)


@app.command()
def selftest(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Compare every op, on every backend that runs here, with float64: outputs and gradients."""
    with _one_line_errors("selftest"):
        from dab_fast.validation import run

        chosen = choose_device(device)
    raise typer.Exit(0 if run(chosen, typer.echo) else 1)


@app.command()
def bench(
    full: Annotated[bool, typer.Option("--full", help="Every shape and dtype, not a set of five minutes.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name contains this, such as 'decoder inference'.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    csv: Annotated[Path | None, typer.Option(help="A file to add the rows to.")] = None,
    seconds: Annotated[float, typer.Option(help="Of timed rounds per case.")] = 10.0,
) -> None:
    """Time the decoder, the model and the ops on this machine, beside their peers."""
    with _one_line_errors("bench"):
        from dab_fast.bench import bench as run

        chosen = choose_device(device)
        if csv is not None:
            check_folder("--csv", csv)
    raise typer.Exit(run(full, only, str(chosen), csv, seconds, typer.echo))


def _say(line: str) -> None:
    typer.echo(f"{line} …", err=True)


def _as_json(comparison: Comparison, picture: Path) -> dict[str, Any]:
    c = comparison
    return dataclasses.asdict(c) | {
        "allowed_box_difference_px": c.allowed_box_difference_px,
        "allowed_logit_difference": c.allowed_logit_difference,
        "busy": c.busy,
        "passed": not c.failures,
        "failures": c.failures,
        "picture": str(picture),
    }


def _print_comparison(comparison: Comparison, picture: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(comparison))
    console.print(_table_of_parts(comparison))
    for failure in comparison.failures:
        console.print(f"[bold red]FAIL[/] {failure}", highlight=False)
    if not comparison.failures:
        console.print(f"[bold green]PASS[/] {comparison.verdict}", highlight=False)
    if comparison.busy:
        console.print(
            f"[yellow]busy machine[/] {comparison.rounds} rounds whose times vary by a factor of "
            f"{comparison.times_vary:.1f}: they say little",
            highlight=False,
        )
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    c = comparison
    where = f"{c.image} at {c.size[0]} × {c.size[1]} ({c.tokens} tokens), {c.device}, {c.dtype}"
    table = Table(
        title=f"DAB-DETR, {c.weights}\n{where}",
        caption=f"differences: {c.compared}",
        title_style="bold",
        caption_style="dim",
    )
    table.add_column("")
    for column in ("original", "accelerated", ""):
        table.add_column(column, justify="right")
    table.add_row(
        "largest box difference",
        f"{c.original_box_error_px:.2g} px" if c.half else "",
        f"{c.max_box_difference_px:.2g} px",
        f"allowed {c.allowed_box_difference_px:.2g} px",
    )
    table.add_row(
        "largest logit difference",
        f"{c.original_logit_error:.2g}" if c.half else "",
        f"{c.max_logit_difference:.2g}",
        f"allowed {c.allowed_logit_difference:.2g}",
    )
    table.add_row("a box moves by (median)", "", f"{c.median_box_move_px:.0f} px", "from its anchor")
    return table


def _table_of_parts(comparison: Comparison) -> Table:
    from rich.table import Table

    c = comparison
    images, width, height = c.step_size
    table = Table(
        title="by parts",
        caption="times: medians of calls in turn; difference: the largest, in units of the largest number\n"
        f"training step: {images} images of {width} × {height}, forward, loss and backward",
        title_style="bold",
        caption_style="dim",
    )
    table.add_column("")
    for column in ("ms", "as fast", "ATen calls", "difference"):
        table.add_column(column, justify="right")

    def gain(ratio: float) -> str:
        return "(busy)" if c.busy else f"{ratio:.2f} ×"

    for name, part in c.parts.items():
        kernels = f" + {part.own_kernels.accelerated:.0f}" if part.own_kernels.accelerated else ""
        table.add_row(
            name,
            f"{part.ms.original:.0f} → {part.ms.accelerated:.0f}",
            gain(part.ms.ratio),
            f"{part.aten_calls.original:.0f} → {part.aten_calls.accelerated:.0f}{kernels}",
            f"{part.difference:.1e}",
        )
    original = c.parts["whole model"].ms.original
    for name, peer in c.peers.items():
        table.add_row(name, f"{peer.ms:.0f}", gain(original / peer.ms), "", f"{peer.max_box_difference:.1e}")
    return table
