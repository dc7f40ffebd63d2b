# SPDX-License-Identifier: Apache-2.0
"""The commands and their options. Each returns the job that it is; nothing is done here, nor imported for it."""

import os
from typing import Annotated

import typer

from tuckctl import __version__
from tuckctl.cli.operands import parse_there
from tuckctl.cli.options import (
    Adopt,
    Busy,
    Except,
    Job,
    Json,
    LogFormat,
    LogLevel,
    Namespace,
    Receivers,
    Recover,
    Target,
    Timeout,
    Timings,
    TuckMethod,
)
from tuckctl.cli.streams import say

_COMMANDS = "tuckctl.commands"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Replace a live overlay mount, and nobody sees the moment.",
    epilog="See tuckctl(8).",
)


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer calls it
    if value:
        raise typer.Exit(0 if say(f"tuckctl {__version__}\n") else 1)


def _drawn(*, timings: bool) -> str:
    return "timed_transaction" if timings else "transaction"


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
def swap(
    operands: Annotated[list[str], typer.Argument(metavar="TARGET IMAGE... | TARGET=IMAGE", show_default=False)],
    *,
    busy: Busy = "lazy",
    timeout: Timeout = 30.0,
    base: Annotated[
        str | None, typer.Option(metavar="under|none|DIR", help="what lies at the bottom; as before, at first: under")
    ] = None,
    options: Annotated[str | None, typer.Option(metavar="FLAGS", help="mount flags, as in fstab(5)")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="use image files where they lie, keep no copy")] = False,
    adopt: Adopt = False,
    sha256: Annotated[
        list[str] | None, typer.Option(metavar="HEX", help="an image's digest; one for each image, in their order")
    ] = None,
    keep: Annotated[int, typer.Option(metavar="N", help="generations kept, besides those in use")] = 5,
    recover: Recover = False,
    tuck_method: TuckMethod = "auto",
    receivers: Receivers = "converge",
    excepted: Except = None,
    namespace: Namespace = None,
    timings: Timings = False,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Replace a target's content by images. The first image is topmost."""
    targets = parse_there([os.fsencode(operand) for operand in operands], namespace)
    chosen = {
        "busy": busy,
        "timeout": timeout,
        "base": base,
        "options": options,
        "in_place": in_place,
        "adopt": adopt,
        "sha256": sha256 or (),
        "keep": keep,
        "recover": recover,
        "tuck_method": tuck_method,
        "receivers": receivers,
        "except_": excepted or (),
        "namespace": namespace,
    }
    return Job(
        "swap",
        _COMMANDS,
        (targets,),
        chosen,
        json,
        log_format,
        log_level,
        _drawn(timings=timings),
        heeds=True,
        progress=True,
    )


@app.command()
def status(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", show_default=False)] = None,
    *,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Show what is live on a target, or on all, and who sees it."""
    return Job("status", _COMMANDS, (target,), {}, json, log_format, log_level, "status")


@app.command()
def history(target: Target, *, json: Json = False, log_format: LogFormat = "", log_level: LogLevel = "") -> Job:
    """List a target's generations, the newest first."""
    return Job("history", _COMMANDS, (target,), {}, json, log_format, log_level, "history")


@app.command()
def holders(target: Target, *, json: Json = False, log_format: LogFormat = "", log_level: LogLevel = "") -> Job:
    """List who still uses a replaced overlay, and what to restart."""
    return Job("holders", _COMMANDS, (target,), {}, json, log_format, log_level, "holders")


@app.command()
def doctor(
    path: Annotated[str | None, typer.Argument(metavar="[PATH]", show_default=False)] = None,
    *,
    fix: Annotated[
        bool, typer.Option("--fix", help="make automount triggers live that are cut off in some namespace")
    ] = False,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Show what this kernel can do, and what stands in the way of a swap at a path."""
    return Job("doctor", _COMMANDS, (path,), {"fix": fix}, json, log_format, log_level, "doctor")


@app.command()
def rollback(
    target: Target,
    *,
    to: Annotated[
        int | None, typer.Option(metavar="GENERATION", help="which one; without it, the one that was live before")
    ] = None,
    busy: Busy = "lazy",
    timeout: Timeout = 30.0,
    receivers: Receivers = "converge",
    excepted: Except = None,
    namespace: Namespace = None,
    recover: Recover = False,
    tuck_method: TuckMethod = "auto",
    timings: Timings = False,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Go back to the generation before. Twice is back again."""
    chosen = {
        "to": to,
        "recover": recover,
        "tuck_method": tuck_method,
        "busy": busy,
        "timeout": timeout,
        "receivers": receivers,
        "except_": excepted or (),
        "namespace": namespace,
    }
    return Job(
        "rollback",
        _COMMANDS,
        (target,),
        chosen,
        json,
        log_format,
        log_level,
        _drawn(timings=timings),
        heeds=True,
        progress=True,
    )


@app.command()
def recover(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", show_default=False)] = None,
    *,
    undo: Annotated[bool, typer.Option("--undo", help="undo it, also where it could be finished")] = False,
    busy: Busy = "lazy",
    timeout: Timeout = 30.0,
    receivers: Receivers = "converge",
    excepted: Except = None,
    namespace: Namespace = None,
    timings: Timings = False,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Finish, or undo, what was interrupted: on a target, or on all."""
    chosen = {
        "undo": undo,
        "busy": busy,
        "timeout": timeout,
        "receivers": receivers,
        "except_": excepted or (),
        "namespace": namespace,
    }
    return Job("recover", _COMMANDS, (target,), chosen, json, log_format, log_level, _drawn(timings=timings))


@app.command()
def detach(
    target: Target,
    *,
    busy: Busy = "lazy",
    timeout: Timeout = 30.0,
    adopt: Adopt = False,
    receivers: Receivers = "converge",
    excepted: Except = None,
    namespace: Namespace = None,
    recover: Recover = False,
    timings: Timings = False,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Take the overlay off, back to base."""
    chosen = {
        "busy": busy,
        "timeout": timeout,
        "adopt": adopt,
        "receivers": receivers,
        "except_": excepted or (),
        "namespace": namespace,
        "recover": recover,
    }
    return Job("detach", _COMMANDS, (target,), chosen, json, log_format, log_level, _drawn(timings=timings), heeds=True)


@app.command()
def boot(*, json: Json = False, log_format: LogFormat = "", log_level: LogLevel = "") -> Job:
    """Mount every target's current generation, as after a reboot."""
    return Job("boot", _COMMANDS, (), {}, json, log_format, log_level, "boot", heeds=True)


@app.command()
def gc(
    *,
    keep: Annotated[int, typer.Option(metavar="N", help="generations kept of each target, besides those in use")] = 5,
    json: Json = False,
    log_format: LogFormat = "",
    log_level: LogLevel = "",
) -> Job:
    """Drop generations and kept images that nothing needs."""
    return Job("gc", _COMMANDS, (), {"keep": keep}, json, log_format, log_level, "gc", heeds=True)


@app.command()
def demo(*, json: Json = False, log_format: LogFormat = "", log_level: LogLevel = "") -> Job:
    """Swap for real in namespaces of its own, beside unmount-and-mount. Needs no root."""
    return Job("demo", "tuckctl.demonstration", (), {}, json, log_format, log_level, "demo", heeds=True, progress=True)
