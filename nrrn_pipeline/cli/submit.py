"""nrrn submit: a run that a batch system carries out, checked here before anything is queued."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any

import typer

from nrrn_pipeline.cli.lazy import loaded
from nrrn_pipeline.cli.options import WORDS, parse_options
from nrrn_pipeline.cli.terminal import err, out
from nrrn_pipeline.cluster.sbatch import ArrayJob, render, submit
from nrrn_pipeline.cost import bytes_text, counted, worker_bytes
from nrrn_pipeline.errors import InputError
from nrrn_pipeline.members import Share
from nrrn_pipeline.places import absolute, options_text
from nrrn_pipeline.planning import DenoisePlan
from nrrn_pipeline.preparing import make_plan
from nrrn_pipeline.run import check_output
from nrrn_pipeline.shipped import located

ALONE = "the tasks of an array share the work by themselves; for a Dask cluster of jobs use nrrn denoise --cluster"
ONE = "an array is for one run; for slices to come submit nrrn denoise --follow --every 0 as a job each night"
UNFIT = {
    "cluster": ALONE,
    "keys": ALONE,
    "workers": ALONE,
    "shard_of": "each task gets its own",
    "overwrite": "a task that begins late would delete what others did: delete the output first",
    "follow": ONE,
    "every": ONE,
    "settle": ONE,
}

submit_app = typer.Typer(no_args_is_help=True, help="Runs as jobs of a batch system.")


@submit_app.callback()
def submitting() -> None:
    """Runs as jobs of a batch system."""  # without this a single command would have no name


@submit_app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="SRC DST (--weights W | --method NAME) --array N --time H:M:S [any option of nrrn denoise]",
)
def slurm(
    context: typer.Context,
    array: Annotated[int, typer.Option(metavar="N", help="Tasks that share the work.")],
    time: Annotated[str, typer.Option(metavar="H:M:S", help="Of a task; then it is queued again, and goes on.")],
    gpus: Annotated[int, typer.Option(help="Of a task: 0 or 1.")] = 0,
    cpus: Annotated[int | None, typer.Option(help="Of a task.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of a task, such as 16G.")] = None,
    at_most: Annotated[int | None, typer.Option(help="Tasks that run at a time.")] = None,
    partition: Annotated[str | None, typer.Option(help="Where to queue.")] = None,
    account: Annotated[str | None, typer.Option(help="Whom to charge.")] = None,
    name: Annotated[str, typer.Option(help="Of the job, its logs and its script.")] = "nrrn",
    logs: Annotated[str, typer.Option(help="Folder for what the tasks print, and the script.")] = "nrrn-logs",
    prologue: Annotated[list[str] | None, typer.Option(help="A line of shell before the run; may be repeated.")] = None,
    directive: Annotated[list[str] | None, typer.Option(help="An option of sbatch; may be repeated.")] = None,
    stop_before: Annotated[
        int | None,
        typer.Option(metavar="S", help="Begin nothing in the last S seconds (a tenth, 300 at most)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
) -> None:
    """Denoise SRC into DST by a job array of Slurm. Interrupted? Submit the same again: it goes on where it was.

    All that nrrn denoise would refuse is refused before anything is queued.

    Example: nrrn submit slurm raw.zarr clean.zarr --weights lab.safetensors --array 64 --gpus 1 --time 2:00:00
    """
    job = ArrayJob(
        tasks=array,
        walltime=time,
        logs=absolute(logs),
        at_most=at_most,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
        partition=partition,
        account=account,
        name=name,
        prologue=tuple(prologue or ()),
        directives=tuple(directive or ()),
        stop_before=stop_before,
    )
    with _words_of_denoise(context.args, job) as (made, words):
        if len(made.slabs) < array:
            err.print(
                f"nrrn: note: {counted(array, 'task')} for {counted(len(made.slabs), 'slab')}: some will but wait"
            )
        script = render(job, words)
        if dry_run:
            print(script, end="")  # not by rich, which would take :words: for pictures
            return
        number, path = _submitted(job, script)
        out.print(f"job {number}: {counted(array, 'task')} for {counted(len(made.slabs), 'slab')}, as {path} says")
        out.print(f"to watch: nrrn status {made.group_url}; squeue --jobs {number}")
        out.print(f"to stop: scancel {number}; what is done is kept: submit the same again to go on")


@contextmanager
def _words_of_denoise(given: list[str], job: ArrayJob) -> Iterator[tuple[DenoisePlan, list[str]]]:
    """What nrrn denoise would make of the words, and words that say the same to it anywhere.

    Within the block the storage options among them are in force. Raises InputError where denoise would, and for what
    does not go with an array.
    """
    command = loaded("denoise")
    with command.make_context("nrrn submit slurm", list(given)) as context:
        options = [
            option
            for option in command.params
            if getattr(context.get_parameter_source(option.name or ""), "name", "") == "COMMANDLINE"
        ]
        for option in options:
            if why := UNFIT.get(option.name or ""):
                raise InputError(f"{option.opts[0]} does not go with a job array: {why}")
        values = context.params
        words = ["denoise", absolute(values["source"]), absolute(values["output"])]
        if values["weights"] is not None:
            words += ["--weights", located(values["weights"])]
        for option in options:
            value = values[option.name or ""]
            if isinstance(value, bool):
                words.append((option.opts if value else option.secondary_opts)[0])
            elif option.name not in ("source", "output", "weights", "storage_options"):
                words += [option.opts[0], str(value)]
        if storage_options := options_text():
            words += ["--storage-options", storage_options]
        yield _plan_of(values, job), words


def _plan_of(values: dict[str, Any], job: ArrayJob) -> DenoisePlan:
    """The plan of what the tasks will do together. Raises InputError if that cannot be, or a task cannot hold it."""
    asked = parse_options(**{name: values[name] for name in WORDS})
    options = replace(asked, share=Share(0, job.tasks))
    here = replace(options, device="auto")  # there may be a GPU where the tasks run, and none here
    made = make_plan(values["source"], values["output"], values["weights"], here)
    check_output(made)
    needed, given = worker_bytes(made, options.slabs_each), job.memory_bytes
    if given is not None and needed > given:
        raise InputError(f"--memory {job.memory} cannot hold a task, which takes {bytes_text(needed)}: give more")
    return made


def _submitted(job: ArrayJob, script: str) -> tuple[str, str]:
    """The job's number, and where its script is kept, beside the logs."""
    there = os.path.isdir(job.logs)
    try:
        os.makedirs(job.logs, exist_ok=True)  # without it Slurm would end each task at once, and say nothing
        number = submit(script)
        path = os.path.join(job.logs, f"{job.name}-{number}.sbatch")
        with open(path, "w", encoding="utf-8") as file:
            file.write(script)
    except OSError as error:
        raise InputError(f"--logs {job.logs} cannot be written to ({error.strerror}): give another") from error
    except InputError:
        if not there:
            with suppress(OSError):
                os.rmdir(job.logs)
        raise
    return number, path
