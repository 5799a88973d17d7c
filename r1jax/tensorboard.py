"""TensorBoard event files, one process's steps in each.

The records are tensorboardX's, its SummaryWriter is not used: that hands events to a thread, which
dies on a full disk, and the call after then waits for it for ever. (pyright is told to look away
where protobuf makes names at import.)
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path


def new_file(folder: Path, *, purge_step: int) -> tuple[Path, bytes]:
    """A path for events of steps >= `purge_step`, and what the file begins with.

    The beginning tells TensorBoard to forget those steps of the folder's older files: they were
    run by a process that was killed, and are run again. TensorBoard reads files in name order.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

    path = folder / f"events.out.tfevents.{len(list(folder.glob('events.*'))):06d}"
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    start = SessionLog(status=SessionLog.START)
    purge = Event(wall_time=time.time(), step=purge_step, session_log=start)
    return path, _framed(version.SerializeToString()) + _framed(purge.SerializeToString())


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """The record of one step's numbers, which TensorBoard keeps in single precision."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

    entries = [Summary.Value(tag=name, simple_value=float(x)) for name, x in values.items()]
    event = Event(wall_time=time.time(), step=step, summary=Summary(value=entries))
    return _framed(event.SerializeToString())


def _framed(data: bytes) -> bytes:
    """One TFRecord: length, checksum of the length, data, checksum of the data."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]
