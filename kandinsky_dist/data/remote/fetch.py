"""Byte ranges of http, https and s3 objects, whole objects, and lists of them."""

import os
import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.remote.object_stream import POLICY, ObjectStream, Patience, Policy
from kandinsky_dist.data.remote.transports import (
    HttpTransport,
    S3Transport,
    Transient,
    Transport,
    bucket_and_key,
    redacted,
)
from kandinsky_dist.errors import DataError

Result = TypeVar("Result")


class Fetcher:
    """Gets objects for many threads. Connections are made when needed, and anew in another process.

    Args:
        policy: how patient to be.
    """

    def __init__(self, policy: Policy = POLICY) -> None:
        self.policy = policy
        self._renew()
        _fetchers.add(self)

    def fetch(
        self,
        location: str,
        start: int,
        size: int,
        *,
        expected_bytes: int | None = None,
        etag: str | None = None,
    ) -> bytes:
        """Bytes [start, start + size) of an object.

        Args:
            location: http, https or s3.
            start: first byte.
            size: number of bytes.
            expected_bytes: length of the whole object when it was indexed.
            etag: of its version when it was indexed; None or "" if that is not known.

        Raises:
            DataError: they cannot be had, or the object was replaced.
        """
        if size == 0:
            return b""
        with self.open_stream(location, start, size, expected_bytes=expected_bytes, etag=etag) as stream:
            return stream.read()

    def open_stream(
        self,
        location: str,
        start: int = 0,
        size: int | None = None,
        *,
        expected_bytes: int | None = None,
        etag: str | None = None,
    ) -> ObjectStream:
        """The same from front to back, in pieces; raises as `fetch` does. For one thread."""
        return ObjectStream(
            self._transport(location), location, self.policy, start, size, expected_bytes, etag
        )

    def fetch_whole(self, location: str) -> bytes:
        """All bytes of an object; raises as `fetch` does."""
        with self.open_stream(location) as stream:
            return stream.read()

    def list_tars(self, location: str, page_size: int = 1000) -> list[str]:
        """Locations of the tars right below a folder of a bucket, sorted; so many names a request.

        Raises:
            DataError: it cannot be listed.
        """
        if not location.startswith("s3://"):
            raise DataError(
                f"{redacted(location)}: a web server's folders cannot be listed; name the tars with "
                "a {first..last} pattern or in a list file"
            )
        bucket, prefix = bucket_and_key(location)
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        transport = self._transport(location)
        assert isinstance(transport, S3Transport)
        found: list[str] = []
        arguments: dict[str, Any] = {
            "Bucket": bucket,
            "Prefix": prefix,
            "Delimiter": "/",
            "MaxKeys": page_size,
        }
        while True:
            page = self._retried(location, lambda: transport.call(location, "list_objects_v2", **arguments))
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            found += [f"s3://{bucket}/{key}" for key in keys if key.endswith(".tar")]
            if not page.get("IsTruncated"):
                return sorted(found)
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _retried(self, location: str, call: Callable[[], Result]) -> Result:
        patience = Patience(location, self.policy)
        while True:
            try:
                return call()
            except Transient as error:
                patience.fail(error)

    def _transport(self, location: str) -> Transport:
        assert is_remote(location)
        kind = S3Transport if location.startswith("s3://") else HttpTransport
        with self._lock:
            if kind not in self._transports:
                self._transports[kind] = kind(self.policy.connect_seconds, self.policy.window_seconds)
            return self._transports[kind]

    def _renew(self) -> None:
        self._lock = Lock()
        self._transports: dict[type, Transport] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


_fetchers: "weakref.WeakSet[Fetcher]" = weakref.WeakSet()


def forget_connections() -> None:
    """Makes every fetcher of this process connect anew, by the settings that then hold."""
    for fetcher in list(_fetchers):
        fetcher._renew()


# A forked process must neither write to its parent's connections nor wait for locks of threads it lacks.
os.register_at_fork(after_in_child=forget_connections)

_default = Fetcher()
fetch_whole = _default.fetch_whole
list_tars = _default.list_tars
open_stream = _default.open_stream
