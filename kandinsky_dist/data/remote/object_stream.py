"""An object of a server from front to back, asked for again until it is there or cannot be had."""

import io
import random
import re
import time
from dataclasses import dataclass

from kandinsky_dist.data.remote.transports import AGAIN, Answer, Transient, Transport, redacted
from kandinsky_dist.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How patient one is with a server.

    Attributes:
        attempts: requests in a row that bring nothing, before giving up.
        base_seconds, cap_seconds: before the n-th repetition a random time up to min(cap, base x 2^n).
        connect_seconds: for a connection to be made.
        window_seconds, window_bytes: a connection that brings less than so much in so long is given up and
            the rest asked for on another. Also the longest silence.
    """

    attempts: int = 10
    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    connect_seconds: float = 10.0
    window_seconds: float = 20.0
    window_bytes: int = 64 * 1024


POLICY = Policy()
"""Rides out about a minute of a dead server; whoever then gives up does so with a checkpoint."""
_PIECE_BYTES = 256 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# Not the program's generator, whose state is a run's; and not one that forked workers would share.
_jitter = random.SystemRandom()


class Patience:
    """Counts failures in a row and waits between them."""

    def __init__(self, location: str, policy: Policy) -> None:
        self._location = location
        self._policy = policy
        self._num_failures = 0

    def succeed(self) -> None:
        """Something came: the next failure is the first again."""
        self._num_failures = 0

    def fail(self, error: Transient) -> None:
        """Waits before the next attempt.

        Raises:
            DataError: there have been too many.
        """
        self._num_failures += 1
        if self._num_failures >= self._policy.attempts:
            raise DataError(
                f"{redacted(self._location)}: gave up after {self._num_failures} attempts ({error}); "
                f"see to the network and the server, {AGAIN}"
            ) from error
        longest = min(self._policy.cap_seconds, self._policy.base_seconds * 2 ** (self._num_failures - 1))
        time.sleep(max(_jitter.uniform(0, longest), min(error.retry_after_seconds, self._policy.cap_seconds)))


class ObjectStream:
    """An object, or a part of one, from front to back; connections that break are replaced inside.

    Attributes:
        num_bytes: of the whole object.
        etag: of its version, or "" where the server has none.

    Args:
        transport: asks the server.
        location: of the object.
        policy: how patient to be.
        start: first byte.
        size: number of bytes; None for all that follow.
        expected_bytes: length of the whole object if it is known.
        etag: of the version that is wanted; None or "" for any, but the same one to the end.

    Raises:
        DataError: it cannot be had, or is another version than the one wanted.
    """

    def __init__(
        self,
        transport: Transport,
        location: str,
        policy: Policy = POLICY,
        start: int = 0,
        size: int | None = None,
        expected_bytes: int | None = None,
        etag: str | None = None,
    ) -> None:
        self._transport = transport
        self._location = location
        self._policy = policy
        self._patience = Patience(location, policy)
        self._position = start
        self._end = None if size is None else start + size
        self._num_bytes = expected_bytes
        self.etag = etag or ""
        self._is_indexed = expected_bytes is not None or bool(self.etag)
        self._answer: Answer | None = None
        self._arrived_bytes, self._waited_seconds = 0, 0.0
        while self._answer is None and self._position != self._end:
            self._ask()

    @property
    def num_bytes(self) -> int:
        """Length of the whole object in bytes."""
        assert self._num_bytes is not None
        return self._num_bytes

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that are left if negative.

        Raises:
            DataError: they cannot be had.
        """
        assert self._end is not None
        left = self._end - self._position
        target = left if size < 0 else min(size, left)
        data = io.BytesIO()  # hands its content over without a copy
        while target > 0:
            piece = self._piece(min(target, _PIECE_BYTES))
            data.write(piece)
            target -= len(piece)
        return data.getvalue()

    def close(self) -> None:
        """Gives up what was not read."""
        if self._answer is not None:
            self._answer.abort()
            self._answer = None

    def __enter__(self) -> "ObjectStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _piece(self, limit: int) -> bytes:
        """At least one of the next bytes."""
        while True:
            if self._answer is None:
                self._ask()
                continue
            began = time.monotonic()
            try:
                piece = self._answer.read(limit)
                if not piece:
                    raise Transient(f"the body ended at byte {self._position}, before its end")
            except Transient as error:
                self.close()
                self._patience.fail(error)
                continue
            self._position += len(piece)
            self._account(len(piece), time.monotonic() - began)
            return piece

    def _account(self, num_bytes: int, seconds: float) -> None:
        """Ends a connection whose bytes were all read, or come too slowly."""
        assert self._answer is not None
        self._arrived_bytes += num_bytes
        self._waited_seconds += seconds
        if self._position == self._end:
            self._answer.finish()
            self._answer = None
        elif self._arrived_bytes >= self._policy.window_bytes:
            self._arrived_bytes, self._waited_seconds = 0, 0.0
            self._patience.succeed()
        elif self._waited_seconds > self._policy.window_seconds:
            self.close()
            self._patience.fail(
                Transient(f"only {self._arrived_bytes} bytes in {self._waited_seconds:.0f} seconds")
            )

    def _ask(self) -> None:
        """Opens a connection at the byte reached; on a passing failure waits and leaves it closed."""
        answer = None
        try:
            answer = self._transport.ask(self._location, self._position, self._end)
            self._accept(answer)
        except Transient as error:
            if answer is not None:
                answer.abort()
            self._patience.fail(error)
            return
        except BaseException:
            if answer is not None:
                answer.abort()
            raise
        self._arrived_bytes, self._waited_seconds = 0, 0.0
        if self._position == self._end:
            answer.finish()  # an empty object
        else:
            self._answer = answer

    def _accept(self, answer: Answer) -> None:
        """Makes sure that an answer is what was asked for."""
        where = redacted(self._location)
        total, first, length = answer.content_length, 0, answer.content_length
        if answer.status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.content_range)
            if found is None:
                raise Transient(f"Content-Range is {redacted(answer.content_range)!r}")
            first, length = int(found[1]), int(found[2]) + 1 - int(found[1])
            total = self._num_bytes if found[3] == "*" else int(found[3])
        if total is None or length is None:
            raise DataError(f"{where}: the server does not say how long it is; {_MOVE}")
        if self._num_bytes not in (None, total):
            raise DataError(f"{where} has {total} bytes instead of {self._num_bytes}: {self._replaced}")
        if self.etag and answer.etag and answer.etag != self.etag:
            raise DataError(f"{where} has the ETag {answer.etag} instead of {self.etag}: {self._replaced}")
        end = total if self._end is None else self._end
        if end > total:
            raise DataError(f"{where} has {total} bytes, asked for is byte {end - 1}; index again")
        if answer.status == 200 and (self._position, end) != (0, total):
            raise DataError(f"{where}: the server does not do ranges (it sent all {total} bytes); {_MOVE}")
        # Fewer bytes than asked for are taken, and the rest asked for afterwards.
        is_length_wrong = answer.content_length not in (None, length) or length > end - first
        if first != self._position or is_length_wrong or (length <= 0 and end > 0):
            raise Transient(
                f"asked for bytes {self._position}-{end - 1}, got {answer.content_range!r} "
                f"with {answer.content_length} bytes"
            )
        self._num_bytes, self._end = total, end
        self.etag = self.etag or answer.etag

    @property
    def _replaced(self) -> str:
        if self._is_indexed:
            return "it was replaced since it was indexed; index again"
        return f"it was replaced while it was read; wait until it is whole {AGAIN}"


_MOVE = "keep it on another server or copy it to a disk"
