"""The command line: each command calls one public function and prints what it says.

Only the command that runs imports what it needs, so that `eclosion --help` costs no torch.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eclosion.errors import ConfigError, Interrupted, UserError
from eclosion.redaction import CleanedStream

__all__ = ["main"]

app = typer.Typer(
    help="Train image diffusion models in runs that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` tells of errors
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML, JSON or TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as train.batch_size=32 or data.crop=random.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AllowPipe = Annotated[
    bool, typer.Option("--allow-pipe", help="Run the commands of pipe: URLs; only for configs that you trust.")
]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Leave out keys that are unknown, with a note, instead of refusing them.")
]
Device = Literal["auto", "cpu", "cuda", "mps"]
# What the command line's library ends with after Ctrl-C.
INTERRUPTED = 130
# Commands that keep what is finished when they are stopped; `train` says so itself.
GO_ON = ("embed", "evaluate", "shard", "stats")


def main() -> None:
    """Run a command; ends the process with its exit code.

    0 is success, 2 a wrong setting, 3 wrong data, 4 a problem of the machine, 5 too little memory, 130 and 143
    a run that a signal stopped after it was saved, and 1 everything else.
    """
    with redirect_stdout(CleanedStream(sys.stdout)), redirect_stderr(CleanedStream(sys.stderr)):
        _main()


def _main() -> None:
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        app(arguments, prog_name="eclosion")
    except UserError as error:
        _tell(error, debug)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED and arguments and arguments[0] in GO_ON:
            _to_stderr("stopped. The same command goes on where it was.")
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001  (told, with the traceback on demand)
        _tell_bug(error, debug)
        sys.exit(1)


def _tell(error: UserError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    prefix = "" if isinstance(error, Interrupted) else "error: "
    for problem in [*problems, *getattr(error, "__notes__", [])]:
        _to_stderr(f"{prefix}{problem}")


def _tell_bug(error: Exception, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    said = " ".join(str(error).split())
    _to_stderr(f"error: {type(error).__name__}: {said}")
    for note in getattr(error, "__notes__", []):
        _to_stderr(f"  {note}")
    _to_stderr(
        "This is a bug in eclosion. The traceback is in the run's error.log if there is a run, and shown with --debug."
    )


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _to_stderr(f"note: {message}" if category is UserWarning else f"warning: {message}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _print(result: Any, show: Callable[[Any], None], *, json_wanted: bool) -> None:
    if json_wanted:
        from eclosion.cli.terminal import as_json

        print(as_json(result))
    else:
        show(result)


def _show_version(wanted: bool) -> None:
    if wanted:
        from eclosion import __version__

        print(__version__)
        raise typer.Exit


def _pipes(allowed: bool) -> AbstractContextManager[None]:
    if not allowed:
        return nullcontext()
    from eclosion.data.remote import pipes_allowed

    return pipes_allowed()


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; `main` has seen --debug already, wherever it stands."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("eclosion-demo"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; fewer are faster and show less.")] = None,
) -> None:
    """Train on built-in butterflies, about three and a half minutes on two cores, and draw samples beside real ones."""
    from eclosion.demonstration import demo

    picture = demo(output, steps=steps)
    print(f"Samples beside real images: {picture}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("config.yaml"),
    recipe: Annotated[str, typer.Option(help="What it is for; `--recipe list` shows all.")] = "folder",
) -> None:
    """Write a commented config to start from."""
    from eclosion.inspection.recipes import recipes, write_config

    if recipe == "list":
        for name, text in recipes().items():
            print(f"{name:12} {text.partition(chr(10))[0].lstrip('# ')}")
        return
    print(f"Wrote {write_config(path, recipe=recipe)}. Next: eclosion check {path}")


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    lenient: Lenient = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Show what a config would do, and everything that is wrong with it, without training."""
    from eclosion.cli.terminal import print_check
    from eclosion.inspection.checking import check

    with _pipes(allow_pipe):
        found = check(config, overrides or [], lenient=lenient)
    _print(found, print_check, json_wanted=as_json)
    for problem in found.problems:
        _tell(problem, debug=False)
    if found.problems:
        raise typer.Exit(found.problems[0].exit_code)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on from the newest checkpoint, start anew, or from one.")
    ] = "auto",
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the duration, batch size or optimizer changed.")
    ] = False,
    lenient: Lenient = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Train, or go on where the run stands. Ctrl-C saves and stops; a second one stops at once."""
    from eclosion.training.run import train

    with _pipes(allow_pipe):
        folder = train(config, overrides or [], resume=resume, accept_changes=accept_changes, lenient=lenient)
    if os.environ.get("RANK", "0") == "0":  # once, not by every process of torchrun
        print(f"Run folder: {folder}")


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint in it.")],
    num_images: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", "--num-images", min=1, help="How many; else one for each embedding or image given, or 16."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on this, on i and on what it is made from.")] = 0,
    embeddings: Annotated[
        Path | None, typer.Option(help="Make images from these: a .npy file, one embedding per row.")
    ] = None,
    text_encodings: Annotated[
        Path | None, typer.Option(help="Text that goes with the embeddings: a .npy file, rows x tokens x dim.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Make images from those in a folder, and captions beside them, through the run's encoder."),
    ] = None,
    from_data: Annotated[
        Literal["train", "val", "test"] | None, typer.Option(help="Make images from the first samples of the data.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `eclosion list samplers`; the run's own if not given.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Network calls per image; one number, or one per network.")
    ] = None,
    guidance_scale: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X...]", help="How strongly images follow their condition; one number, or one per network."
        ),
    ] = None,
    first: Annotated[
        str | None, typer.Option(metavar="NETWORK", help="Begin with this network of a cascade, on small --images.")
    ] = None,
    last: Annotated[str | None, typer.Option(metavar="NETWORK", help="End with this network of a cascade.")] = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="latest|best|STEP", help="Which checkpoint of the run; checkpoint.best says what best is."
        ),
    ] = "latest",
    out: Annotated[Path | None, typer.Option(help="Where images go; a folder inside the run's if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
) -> None:
    """Make images with a trained run, and a grid that shows them below what they were made from."""
    from eclosion.cli.terminal import sampling_bar
    from eclosion.sampling import sample

    with sampling_bar() as on_step:
        folder = sample(
            run,
            num_images=num_images,
            seed=seed,
            embeddings=embeddings,
            text_encodings=text_encodings,
            images=images,
            from_data=from_data,
            sampler=sampler,
            num_inference_steps=_numbers(steps, int, "--steps"),
            guidance_scale=_numbers(guidance_scale, float, "--guidance-scale"),
            first=first,
            last=last,
            checkpoint=checkpoint,
            out=out,
            batch_size=batch_size,
            device=device,
            on_step=on_step,
        )
    count = num_images or sum(path.stem.isdigit() for path in folder.glob("*.png"))
    print(f"{count} images and grid.png: {folder}")


def _numbers(text: str | None, kind: Callable[[str], Any], option: str) -> Any:
    """One number, or a list of those between commas; None if there is no text."""
    if text is None:
        return None
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        example = "20 or 20,10" if kind is int else "2 or 2,1"
        raise ConfigError(f"{option} is {text!r}, and must be numbers such as {example}.") from None
    return numbers if len(numbers) > 1 else numbers[0]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    pipeline: Annotated[
        Literal["ddpm", "ddim", "unclip"] | None, typer.Option(help="Which pipeline; the task's first if left out.")
    ] = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="latest|best|STEP", help="Which checkpoint of the run; checkpoint.best says what best is."
        ),
    ] = "latest",
) -> None:
    """Write a diffusers pipeline, load it again and compare."""
    from eclosion.exporting import export

    print(f"Pipeline: {export(run, out, pipeline=pipeline, checkpoint=checkpoint)}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run folder, one checkpoint in it, or the folder of a pipeline.")],
    repo: Annotated[str, typer.Argument(help="owner/name, or name for one of your own; made if it is not there.")],
    kind: Annotated[
        Literal["pipeline", "checkpoint", "model"],
        typer.Option(help="For diffusers; to go on training from; or the averaged weights alone."),
    ] = "pipeline",
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; private if not given.")] = False,
    pipeline: Annotated[
        Literal["ddpm", "ddim", "unclip"] | None, typer.Option(help="Which pipeline; the task's first if left out.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|STEP", help="Which checkpoint of the run.")
    ] = "latest",
    token_file: Annotated[
        Path | None, typer.Option(help="A file of mode 0600 with the token, for when HF_TOKEN is not set.")
    ] = None,
) -> None:
    """Send a trained run to the Hugging Face hub, in one commit, and see that it is there and who may see it."""
    from eclosion.pushing import push

    pushed = push(
        run,
        repo,
        kind=kind,
        private=not public,
        pipeline=pipeline,
        checkpoint=checkpoint,
        token_path=token_file,
    )
    print(f"{'Public' if public else 'Private'}: {pushed.url}, commit {pushed.commit}")


@app.command("import")
def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT.pth... OUT", help="What DALLE2-pytorch saved, and the run folder."),
    ],
    config: Annotated[
        Path | None, typer.Option(help="The JSON file it was trained with; the one in the checkpoint if not given.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.batch_size=32; repeatable.")
    ] = None,
    compat: Annotated[bool, typer.Option(help="Give the original's numbers also where they were wrong.")] = True,
    lenient: Lenient = False,
) -> None:
    """Make a run folder from decoder checkpoints of DALLE2-pytorch, to train on, sample from and export."""
    from eclosion.importing import import_checkpoint

    *checkpoints, out = paths
    made = import_checkpoint(checkpoints, out, config=config, overrides=settings or [], compat=compat, lenient=lenient)
    for note in made.notes:
        _to_stderr(f"note: {note}")
    print(f"{len(made.networks)} networks at step {made.step}: {made.folder}")


@data_app.command("show")
def data_show(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("data.png"),
    num_images: Annotated[int, typer.Option("-n", "--num-images", min=1, help="How many images.")] = 24,
    allow_pipe: AllowPipe = False,
) -> None:
    """Draw a labelled grid of what the network will see."""
    from eclosion.inspection.data_sheet import show_data

    with _pipes(allow_pipe):
        print(f"Wrote {show_data(config, overrides or [], out=out, num_images=num_images)}")


@app.command()
def index(
    config: Annotated[str, typer.Argument(metavar="CONFIG-or-URL", help="A config, or shards such as a/{}.tar.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Look through tar shards ahead of time, and say what they hold and what is wrong with them."""
    from eclosion.cli.terminal import counting_bar, print_index
    from eclosion.inspection.indexing import index

    with _pipes(allow_pipe), counting_bar("indexing") as on_shard:
        found = index(config, overrides or [], on_shard=on_shard)
    _print(found, print_index, json_wanted=as_json)
    if found.problems:
        raise typer.Exit(3)


@app.command()
def shard(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A config, a folder of images, or a source's name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Overrides = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard.")] = 1000,
    image_embeddings: Annotated[
        Path | None, typer.Option(help="A .npy file, one row per sample, or a folder of such.")
    ] = None,
    text_embeddings: Annotated[Path | None, typer.Option(help="The same; samples x tokens x dim.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out samples that cannot be read.")] = False,
    num_workers: Annotated[int, typer.Option(min=1, help="Shards that are written at a time.")] = 2,
    allow_pipe: AllowPipe = False,
) -> None:
    """Write webdataset shards from any source, with arrays of embeddings. Interrupted, it goes on where it was."""
    from eclosion.cli.terminal import counting_bar
    from eclosion.inspection.named_source import source_of
    from eclosion.sharding import shard

    with _pipes(allow_pipe), counting_bar("writing") as on_shard:
        written = shard(
            source_of(source, overrides or [], otherwise="folder", option="root"),
            out,
            samples_per_shard=samples_per_shard,
            image_embeddings=image_embeddings,
            text_embeddings=text_embeddings,
            skip_bad=skip_bad,
            num_workers=num_workers,
            on_shard=on_shard,
        )
    print(f"{written.num_samples:,} samples in {written.num_shards:,} shards: {written.folder}")
    for reason, count in written.skipped.items():
        print(f"left out: {count:,} {reason}")


@app.command()
def embed(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A config, a folder of images, shards such as a/{}.tar, or a name.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Overrides = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="A name, with options as in clip,model=ViT-B/32; or a YAML file; else the config's."),
    ] = None,
    rows_per_array: Annotated[int, typer.Option(min=1, help="Rows in each array, if the source is no shards.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the encoder at once.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the samples that may be left without embedding.")
    ] = 0.0,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads that read and resize images.")] = 2,
    allow_pipe: AllowPipe = False,
) -> None:
    """Write the embedding of every image, in arrays that shards pair with. Interrupted, it goes on where it was."""
    from eclosion.cli.terminal import counting_bar
    from eclosion.inspection.named_source import encoder_of, source_or_shards
    from eclosion.sharding.embedding import embed

    with _pipes(allow_pipe), counting_bar("embedding") as on_image:
        written = embed(
            source_or_shards(source, overrides or []),
            out,
            encoder=encoder_of(encoder, source, overrides or []),
            rows_per_array=rows_per_array,
            batch_size=batch_size,
            device=device,
            max_bad_fraction=max_bad_fraction,
            num_workers=num_workers,
            on_image=on_image,
        )
    rows = f"{written.num_rows:,} rows in {written.num_arrays:,} arrays"
    print(f"{written.num_embedded:,} embeddings of {written.dim:,} numbers, {rows}: {written.folder}")
    print(f"mean length {written.mean_norm:.4g}; encoder {written.fingerprint}")
    for reason, count in written.skipped.items():
        print(f"without embedding: {count:,} {reason}")


@app.command()
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT", help="A run folder, one of its checkpoints, a pipeline folder, or a folder of images."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|FOLDER|STATS|RUN",
            help="A config, a source's name, a folder of images, a file of `eclosion stats`, or as WHAT; else the "
            "run's own data.",
        ),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="DATA|FOLDER", help="What was trained on, for memorisation.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE...],...", help="Such as kid,fid; the run's own, or kid, if not given."
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", "--num-images", min=1, help="How many; 1000 are made if not given, else all there are."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE...]",
            help="See `eclosion list encoders`; else the run's, or efficientnet_lite0.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Image i depends on this, on i and on what it is made from.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="See `eclosion list samplers`; the run's own if not given.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Network calls per image; one number, or one per network.")
    ] = None,
    guidance_scale: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X...]", help="How strongly images follow their condition; one number, or one per network."
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|STEP", help="Which checkpoint of the run WHAT.")
    ] = "latest",
    split: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="The part of the data to compare with, and to follow; the config's own, or val."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width that images of folders and data are brought to.")
    ] = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|RUN",
            help="What images are made from that follow captions or embeddings; else the run's own data, or --against.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images made at once; the run's own, or 16, if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where results.json and pictures go; the run's folder if not given.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    as_json: AsJson = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Score images against others: how alike they are, and how far the number can be trusted."""
    from eclosion.cli.terminal import phases_bar, print_evaluation
    from eclosion.evaluation.evaluating import evaluate
    from eclosion.inspection.named_source import shards_or_text
    from eclosion.training.evaluating import evaluation_workers

    leads = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    bar = phases_bar() if leads else nullcontext((None, None))
    with _pipes(allow_pipe), evaluation_workers(device) as (workers, own_device), bar as (on_phase, on_image):
        found = evaluate(
            shards_or_text(what),
            against=shards_or_text(against),
            train=shards_or_text(train),
            metrics=metrics,
            num_images=num_images,
            extractor=extractor,
            seed=seed,
            sampler=sampler,
            num_inference_steps=_numbers(steps, int, "--steps"),
            guidance_scale=_numbers(guidance_scale, float, "--guidance-scale"),
            checkpoint=checkpoint,
            split=split,
            image_size=image_size,
            conditions=shards_or_text(conditions),
            batch_size=batch_size,
            out=out,
            device=own_device,
            workers=workers,
            on_image=on_image,
            on_phase=on_phase,
        )
    if leads:
        _print(found, print_evaluation, json_wanted=as_json)


@app.command()
def stats(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A config, a folder of images, shards such as a/{}.tar, or a name.")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write, such as stats.safetensors.")],
    overrides: Overrides = None,
    extractor: Annotated[
        str, typer.Option(help="An encoder, with options as in clip,model=ViT-B/32; or a YAML file.")
    ] = "efficientnet_lite0",
    num_images: Annotated[
        int | None, typer.Option("-n", "--n", "--num-images", min=2, help="How many, chosen at random; else all.")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None, typer.Option(help="The part of the data; else what SOURCE names.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Bring images to this size first; else a config's, or that of the files.")
    ] = None,
    num_kept: Annotated[int, typer.Option(min=1, help="Images whose features themselves are kept.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the extractor at once.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    allow_pipe: AllowPipe = False,
) -> None:
    """Write the features of a set of images into one file, to compare others with. Interrupted, it goes on."""
    from eclosion.cli.terminal import counting_bar
    from eclosion.evaluation.statistics import read_statistics
    from eclosion.evaluation.stats import stats
    from eclosion.inspection.named_source import encoder_of, source_or_config

    with _pipes(allow_pipe), counting_bar("looking at images") as on_image:
        path = stats(
            source_or_config(source, overrides or []),
            out,
            extractor=encoder_of(extractor, source, overrides or []),
            num_images=num_images,
            split=split,
            image_size=image_size,
            num_kept=num_kept,
            seed=seed,
            batch_size=batch_size,
            device=device,
            on_image=on_image,
        )
    _, facts = read_statistics(path, "out")
    print(f"{facts.num_images:,} images, features of {facts.num_kept:,} with {facts.dim:,} numbers each: {path}")
    print(f"extractor {facts.extractor.get('name')}, weights {facts.weights}, resize {facts.resize}")


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(help="A run folder that no process writes to.")],
    log: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE...],...",
            help="Such as wandb,project=birds,tensorboard; the run's own if not given.",
        ),
    ] = None,
) -> None:
    """Send what loggers do not know yet of a run: after a service was down, or to one that it never had."""
    from eclosion.tracking.syncing import sync

    for done in sync(run, log=log):
        where = f": {done.url}" if done.url else ""
        print(
            f"{done.logger} knows {run} up to step {done.step}{where}"
            if done.step >= 0
            else f"{run} has no numbers yet"
        )


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path(), as_json: AsJson = False) -> None:
    """List the runs below a folder with their state, step and loss."""
    from eclosion.cli.terminal import print_runs
    from eclosion.inspection.runs import list_runs

    _print(list_runs(folder), partial(print_runs, folder=folder), json_wanted=as_json)


@app.command()
def doctor(
    self_test: Annotated[bool, typer.Option(help="Train, resume and compare for five seconds.")] = True,
) -> None:
    """Look at this machine and installation, and try out training."""
    from eclosion.cli.terminal import print_diagnosis
    from eclosion.diagnosis import doctor

    found = doctor(self_test=self_test)
    print_diagnosis(found)
    if not found.healthy:
        raise typer.Exit(4)


@app.command("list")
def list_(table: Annotated[str | None, typer.Argument(help="Such as samplers; all if not given.")] = None) -> None:
    """List the parts that a config can name, with their options."""
    from eclosion.cli.terminal import print_parts
    from eclosion.inspection.parts import list_parts

    print_parts(list_parts(table))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Argument(help="The file to write; else it is printed.")] = None,
) -> None:
    """Write the JSON Schema of configs, for editors."""
    from eclosion.config.json_schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"Wrote {out}. Name it in a YAML config's first line: # yaml-language-server: $schema={out}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the page of a run, report.html."""
    from eclosion.report import write_report
    from eclosion.rundir import RunDir

    folder = RunDir(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run} is no run folder: it has no {folder.config.name}. `eclosion runs` lists runs.")
    print(f"Wrote {write_report(run)}")
