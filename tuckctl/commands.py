# SPDX-License-Identifier: Apache-2.0
"""The commands as functions, by the same names and options.

They work from any thread, and change neither the process's working directory nor its namespaces nor
its signal handlers. They raise subclasses of TuckError, whose `result` is the document as far as it got.

Each imports what it needs when it is called: a question does not wait for what swaps are made with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from tuckctl.errors import UsageError
from tuckctl.frozen import replace

if TYPE_CHECKING:
    from tuckctl.images import Progress
    from tuckctl.results import Boot, Collected, Doctor, History, Holders, Status, TransactionResult

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_Path = TypeVar("_Path", str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", StrPath)
"""A mapping does not take other keys than those that it is declared with."""
Busy = Literal["lazy", "wait", "fail"]
Receivers = Literal["converge", "require", "report"]
TuckMethod = Literal["auto", "beneath", "peer"]


@overload
def swap(
    target: StrPath,
    images: Sequence[StrPath],
    *,
    busy: Busy = ...,
    timeout: float = ...,
    base: StrPath | None = ...,
    options: str | None = ...,
    in_place: bool = ...,
    adopt: bool = ...,
    sha256: Sequence[str] = ...,
    keep: int = ...,
    receivers: Receivers = ...,
    except_: Sequence[str] = ...,
    namespace: StrPath | int | None = ...,
    recover: bool = ...,
    tuck_method: TuckMethod = ...,
    progress: Progress | None = ...,
) -> TransactionResult: ...
@overload
def swap(
    target: Mapping[_Path, Sequence[StrPath]],
    *,
    busy: Busy = ...,
    timeout: float = ...,
    base: StrPath | None = ...,
    options: str | None = ...,
    in_place: bool = ...,
    adopt: bool = ...,
    sha256: Sequence[str] = ...,
    keep: int = ...,
    receivers: Receivers = ...,
    except_: Sequence[str] = ...,
    namespace: StrPath | int | None = ...,
    recover: bool = ...,
    tuck_method: TuckMethod = ...,
    progress: Progress | None = ...,
) -> TransactionResult: ...
def swap(
    target: StrPath | Mapping[_Path, Sequence[StrPath]],
    images: Sequence[StrPath] | None = None,
    *,
    busy: Busy = "lazy",
    timeout: float = 30.0,
    base: StrPath | None = None,
    options: str | None = None,
    in_place: bool = False,
    adopt: bool = False,
    sha256: Sequence[str] = (),
    keep: int = 5,
    receivers: Receivers = "converge",
    except_: Sequence[str] = (),
    namespace: StrPath | int | None = None,
    recover: bool = False,
    tuck_method: TuckMethod = "auto",
    progress: Progress | None = None,
) -> TransactionResult:
    """Replace a target's content by images over base, with no moment in which anything else is seen.

    Of several targets all are revealed, at one instant where that can be, or none.

    Args:
        target: a directory; or a mapping of directories, each to its images.
        images: files, block devices or directories, the topmost first.
        busy: what to do while old is in use: detach it and report its holders; wait until the
            deadline for a plain unmount, then undo; undo at once.
        timeout: seconds until the deadline of "wait" and of another transaction's lock.
        base: what lies at the bottom: "under" (what is under the target), "none", or a directory;
            None is as before, at first "under".
        options: mount flags as in fstab(5), on top of those before.
        in_place: use image files where they lie instead of keeping copies of them by content.
        adopt: take over an overlay that tuckctl did not make.
        sha256: the digests that the images must have, in their order; of several targets, one after the other.
        keep: how many generations are kept afterwards, besides those in use.
        receivers: what to do about one that propagation does not bring along: enter its namespace
            and bring it; undo everything, before the reveal; leave it and say so.
        except_: units, containers, pids, or mount namespaces (an inode, or a path to an nsfs file)
            that are to stay as they are.
        namespace: act in the mount namespace of this pid, or of this nsfs file: every path, but
            the working directory, is taken there.
        recover: put an interrupted transaction on the target in order first.
        tuck_method: put new beneath old by MOVE_MOUNT_BENEATH (Linux 6.5), or by propagation from a peer
            of the mount around the target; "auto" takes the first that the kernel has.
        progress: is told (what, bytes done, bytes in all) of long work.

    Raises:
        RefusedError: nothing was touched; ImageError: for an image; UndoneError: old is live again;
        PartialError: new is live, but not everywhere; LockedError: another transaction holds the target.

    """
    from tuckctl import transaction  # noqa: PLC0415 - as above
    from tuckctl.course import begin  # noqa: PLC0415
    from tuckctl.request import Request, shared_out  # noqa: PLC0415

    with begin("swap"):
        if isinstance(target, Mapping):
            if images is not None or not target:
                raise UsageError(
                    "no-target",
                    "a mapping names at least one target, each with its images",
                    'write {"/etc": ["etc.img"], "/usr": ["usr.img"]}',
                )
            wanted: dict[StrPath, Sequence[StrPath]] = dict(target.items())
        else:
            wanted = {target: images if images is not None else ()}
        for each in wanted.values():
            if isinstance(each, str | bytes):
                raise UsageError("no-image", "images is a sequence of paths, not one path", "write [path]")
            if not each:
                raise UsageError("no-image", "no image is named", "name at least one image")
        digests = shared_out(sha256, [len(each) for each in wanted.values()])
    request = Request(
        busy=busy,
        timeout=timeout,
        base=None if base is None else os.fsencode(base),
        options=options,
        in_place=in_place,
        adopt=adopt,
        keep=keep,
        receivers=receivers,
        excepted=tuple(except_),
        recover=recover,
        tuck_method=tuck_method,
        progress=progress,
    )
    asked = [
        (os.fsencode(path), replace(request, images=tuple(map(os.fsencode, each)), sha256=given))
        for (path, each), given in zip(wanted.items(), digests, strict=True)
    ]
    return transaction.swap(asked, namespace=_space(namespace))


def rollback(
    target: StrPath,
    *,
    to: int | None = None,
    busy: Busy = "lazy",
    timeout: float = 30.0,
    receivers: Receivers = "converge",
    except_: Sequence[str] = (),
    namespace: StrPath | int | None = None,
    recover: bool = False,
    tuck_method: TuckMethod = "auto",
    progress: Progress | None = None,
) -> TransactionResult:
    """Bring back the generation that was live before, or generation `to`, in the same way as a swap."""
    from tuckctl import transaction  # noqa: PLC0415 - as above
    from tuckctl.request import Request  # noqa: PLC0415

    request = Request(
        to=to,
        busy=busy,
        timeout=timeout,
        receivers=receivers,
        excepted=tuple(except_),
        recover=recover,
        tuck_method=tuck_method,
        progress=progress,
    )
    return transaction.rollback(os.fsencode(target), request, namespace=_space(namespace))


def detach(
    target: StrPath,
    *,
    busy: Busy = "lazy",
    timeout: float = 30.0,
    adopt: bool = False,
    receivers: Receivers = "converge",
    except_: Sequence[str] = (),
    namespace: StrPath | int | None = None,
    recover: bool = False,
) -> TransactionResult:
    """Take the overlay off a target, back to base."""
    from tuckctl import transaction  # noqa: PLC0415 - as above
    from tuckctl.request import Request  # noqa: PLC0415

    request = Request(
        busy=busy, timeout=timeout, adopt=adopt, receivers=receivers, excepted=tuple(except_), recover=recover
    )
    return transaction.detach(os.fsencode(target), request, namespace=_space(namespace))


def recover(
    target: StrPath | None = None,
    *,
    undo: bool = False,
    busy: Busy = "lazy",
    timeout: float = 30.0,
    receivers: Receivers = "converge",
    except_: Sequence[str] = (),
    namespace: StrPath | int | None = None,
) -> TransactionResult:
    """Finish what was interrupted on a target where everything had arrived, otherwise undo it.

    With `undo`, it is undone in any case: where it is finished already, by going back to the generation before.
    """
    from tuckctl import transaction  # noqa: PLC0415 - as above
    from tuckctl.request import Request  # noqa: PLC0415

    request = Request(busy=busy, timeout=timeout, receivers=receivers, excepted=tuple(except_))
    return transaction.recover(
        None if target is None else os.fsencode(target), request, undo=undo, namespace=_space(namespace)
    )


def boot() -> Boot:
    """Mount every target's current generation, as after a reboot; a target that is live is left alone.

    Where a generation cannot be mounted, the one before it is, and a warning says so.

    Raises:
        PartialError: some targets failed; its `result` tells of each. The others are live.

    """
    from tuckctl import booting  # noqa: PLC0415 - as above

    return booting.boot()


def gc(*, keep: int = 5) -> Collected:
    """Drop what nothing needs: generations beyond `keep` of each target, kept images, leftovers of killed writers."""
    from tuckctl import collection  # noqa: PLC0415 - as above

    return collection.gc(keep)


def namespace_file(namespace: StrPath | int) -> bytes:
    """Return the path of the nsfs file that is meant: a number is a pid."""
    name = b"%d" % namespace if isinstance(namespace, int) else os.fsencode(namespace)
    return b"/proc/%s/ns/mnt" % name if name.isdigit() else name


def _space(namespace: StrPath | int | None) -> bytes | None:
    return None if namespace is None else namespace_file(namespace)


def status(target: StrPath | None = None) -> Status:
    """Return the state of a target, or of every target on record, with its receivers."""
    from tuckctl import reports  # noqa: PLC0415 - as above

    return reports.status(None if target is None else os.fsencode(target))


def history(target: StrPath) -> History:
    """Return a target's recorded generations, newest first."""
    from tuckctl import reports  # noqa: PLC0415 - as above

    return reports.history(os.fsencode(target))


def holders(target: StrPath) -> Holders:
    """Return who still uses an overlay that was replaced on this target.

    Of a directory that is no target: who keeps something mounted at or below it in use, in whatever namespace.
    """
    from tuckctl import reports  # noqa: PLC0415 - as above

    return reports.holders(os.fsencode(target))


def doctor(path: StrPath | None = None, *, fix: bool = False) -> Doctor:
    """Return what this kernel can do and, for a path, what stands in the way of a swap there. Changes nothing.

    With `fix`, it changes one thing: an automount trigger at the path that is cut off from its automounter in some
    mount namespace, where a look ends in ELOOP, is replaced there by one that is not.

    Its `exit_code` is 0 when a swap would go through, 3 when not. Raises UsageError for `fix` without a path.
    """
    from tuckctl import diagnosis  # noqa: PLC0415 - as above

    return diagnosis.doctor(None if path is None else os.fsencode(path), fix=fix)
