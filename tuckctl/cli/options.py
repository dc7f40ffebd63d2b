# SPDX-License-Identifier: Apache-2.0
"""The options that more than one command has, and what is asked for once they are read."""

from typing import Annotated, Any, NamedTuple

import typer

Target = Annotated[str, typer.Argument(metavar="TARGET", show_default=False)]
Busy = Annotated[
    str, typer.Option(metavar="lazy|wait|fail", help="old still in use: detach it; wait, then undo; undo at once")
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="deadline of waiting, for --busy and for locks")]
Adopt = Annotated[bool, typer.Option("--adopt", help="take over an overlay that tuckctl did not make")]
Receivers = Annotated[
    str, typer.Option(metavar="converge|require|report", help="who is not brought along: bring; undo all; leave")
]
Recover = Annotated[bool, typer.Option("--recover", help="put an interrupted transaction in order first")]
TuckMethod = Annotated[
    str, typer.Option(metavar="auto|beneath|peer", help="how new is put beneath old; auto: as the kernel allows")
]
Except = Annotated[
    list[str] | None,
    typer.Option("--except", metavar="WHO", help="a unit, container, pid or namespace that is to stay as it is"),
]
Namespace = Annotated[
    str | None, typer.Option(metavar="PID|FILE", help="act in the mount namespace of a process, or of an nsfs file")
]
Timings = Annotated[bool, typer.Option("--timings", help="tell how long each phase took")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
LogFormat = Annotated[str, typer.Option(metavar="console|json", show_default="console", help="how events are logged")]
LogLevel = Annotated[
    str, typer.Option(metavar="debug|info|warning|error", show_default="warning", help="which events are logged")
]


class Job(NamedTuple):
    """What a command line asks for: a function of a module, its arguments, and how its document is told."""

    command: str
    module: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    json: bool
    log_format: str
    log_level: str
    picture: str
    """The function in tuckctl.cli.pictures that draws the document for people."""
    heeds: bool = False
    """Whether it heeds a wish to stop (tuckctl.stop), where that is safe: then no signal breaks into it."""
    progress: bool = False
    """Whether the function tells of its progress."""
