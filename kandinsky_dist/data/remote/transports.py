"""One request to a server that keeps objects, over HTTP or S3: its answer, or why there is none."""

import re
import ssl
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol
from urllib.parse import unquote

import urllib3

from kandinsky_dist.errors import DataError
from kandinsky_dist.optional import require

MAX_CONNECTIONS = 64
"""Kept open to one host by a process."""
AGAIN = "and give the same command again"
_MAX_ERROR_BYTES = 4096
_TRANSIENT_STATUSES = frozenset((408, 429))
_TRANSIENT_CODES = frozenset(("RequestTimeout", "SlowDown", "Throttling"))
"""Names of S3 errors that come with other statuses and yet are gone a moment later."""
_EXPIRED_CODES = frozenset(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"))
_ACCESS_CODES = frozenset(("AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"))
_MISSING_CODES = frozenset(("NoSuchKey", "NoSuchBucket"))


class Transient(Exception):  # noqa: N818 (a state of the server, not an error of ours)
    """A request that may well succeed if it is made again.

    Attributes:
        retry_after_seconds: what the server asked to wait; 0 if it did not say.
    """

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class MissingObjectError(DataError):
    """The server says that there is no such object."""


@dataclass
class Answer:
    """The head of a successful answer, and the body still to come.

    Attributes:
        status: 200 for a whole object, 206 for a part of one.
        content_range: what the header of that name says, or "".
        content_length: bytes of the body, None where the server does not say.
        etag: of the object's version, without quotes, or "".
    """

    status: int
    content_range: str
    content_length: int | None
    etag: str
    _body: Any

    def read(self, limit: int) -> bytes:
        """What has arrived, at most `limit` bytes; b"" at the end.

        Raises:
            Transient: the connection broke or was silent for too long.
        """
        try:
            return self._body.read1(limit) or b""
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(f"the connection broke: {_cause(error)}") from error

    def finish(self) -> None:
        """Hands the connection back, to be used again. For bodies that were read to their end."""
        self._body.drain_conn()
        self._body.release_conn()

    def abort(self) -> None:
        """Closes the connection."""
        self._body.close()


class Transport(Protocol):
    """Connections of one process; for several threads."""

    def ask(self, location: str, start: int, end: int | None) -> Answer:
        """Asks for bytes [start, end) of an object; for all that follow `start` if `end` is None.

        Raises:
            Transient: no answer, or one that may be better next time.
            DataError: an answer that will not change.
        """
        ...


class HttpTransport:
    """http:// and https:// locations.

    Args:
        connect_seconds: for a connection to be made.
        silence_seconds: longest wait for the next byte.
    """

    def __init__(self, connect_seconds: float, silence_seconds: float) -> None:
        self._pool = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            timeout=urllib3.Timeout(connect=connect_seconds, read=silence_seconds),
            # Redirects are followed; retries are the caller's.
            retries=urllib3.Retry(total=None, connect=0, read=0, redirect=5, status=0, other=0),
        )

    def ask(self, location: str, start: int, end: int | None) -> Answer:
        """See `Transport.ask`."""
        headers = {"Accept-Encoding": "identity"}
        if wanted := range_header(start, end):
            headers["Range"] = wanted
        try:
            credentials = urllib3.util.parse_url(location).auth
            if credentials:
                headers |= urllib3.make_headers(basic_auth=unquote(credentials))
            # A body is not decoded: offsets are those of the object as it is stored.
            response = self._pool.request(
                "GET", location, headers=headers, preload_content=False, decode_content=False
            )
        except urllib3.exceptions.LocationValueError as error:
            raise DataError(
                f"{redacted(location)} is not a URL ({redacted(str(error))}); correct it"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            reason = _cause(error)
            if isinstance(_root(error), ssl.SSLCertVerificationError):
                raise DataError(
                    f"{redacted(location)}: the server's certificate is not trusted ({reason}); install its "
                    f"authority, or set SSL_CERT_FILE, {AGAIN}"
                ) from error
            raise Transient(f"no answer: {reason}") from error
        if response.status in (200, 206):
            return _answer(response.status, response.headers, response)
        try:
            text = response.read(_MAX_ERROR_BYTES).decode("utf-8", "replace")
        except (urllib3.exceptions.HTTPError, OSError):
            text = ""
        response.close()
        code, message = (_tag(text, "Code"), _tag(text, "Message"))
        raise refusal(location, response.status, code or (response.reason or ""), message, response.headers)


class S3Transport:
    """s3://bucket/key locations, with the endpoint, region and credentials that boto3 finds.

    Args:
        connect_seconds: for a connection to be made.
        silence_seconds: longest wait for the next byte.
    """

    def __init__(self, connect_seconds: float, silence_seconds: float) -> None:
        boto3 = require("boto3", extra="s3", why="an s3:// location")
        self._errors: Any = require("botocore.exceptions", extra="s3", why="an s3:// location")
        config: Any = require("botocore.config", extra="s3", why="an s3:// location")
        self._config = config.Config(
            max_pool_connections=MAX_CONNECTIONS,
            connect_timeout=connect_seconds,
            read_timeout=silence_seconds,
            retries={"total_max_attempts": 1, "mode": "standard"},  # retries are the caller's
            # Parts are checked by the CRC of each member; servers other than Amazon's may not know this.
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
        )
        self._boto3: Any = boto3
        self._lock = Lock()
        self._client = self._connect()

    def ask(self, location: str, start: int, end: int | None) -> Answer:
        """See `Transport.ask`."""
        bucket, key = bucket_and_key(location)
        wanted = range_header(start, end)
        reply = self.call(
            location, "get_object", Bucket=bucket, Key=key, **({"Range": wanted} if wanted else {})
        )
        head = reply["ResponseMetadata"]
        # Entering gives urllib3's response itself, whose read1 returns what has arrived.
        return _answer(head["HTTPStatusCode"], head["HTTPHeaders"], reply["Body"].__enter__())

    def call(self, location: str, operation: str, **arguments: Any) -> Any:
        """One call of S3's interface; raises as `Transport.ask` does."""
        try:
            return self._call(operation, arguments)
        except self._errors.ClientError as error:
            about, head = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
            raise refusal(
                location,
                int(head.get("HTTPStatusCode", 400)),
                about.get("Code", ""),
                about.get("Message", ""),
                head.get("HTTPHeaders", {}),
            ) from error
        except self._errors.SSLError as error:
            raise DataError(
                f"{redacted(location)}: no trusted connection ({redacted(str(error))}); set "
                f"AWS_CA_BUNDLE {AGAIN}"
            ) from error
        except (self._errors.ConnectionError, self._errors.HTTPClientError) as error:
            raise Transient(f"no answer: {redacted(str(error))}") from error
        except (self._errors.BotoCoreError, ValueError) as error:
            raise DataError(
                f"{redacted(location)}: {redacted(str(error))}; set up the credentials, region or endpoint "
                f"as for the aws command {AGAIN}"
            ) from error

    def _call(self, operation: str, arguments: dict[str, Any]) -> Any:
        client = self._client
        try:
            return getattr(client, operation)(**arguments)
        except self._errors.ClientError as error:
            if error.response.get("Error", {}).get("Code") not in _EXPIRED_CODES:
                raise
        with self._lock:
            if self._client is client:
                self._client = self._connect()  # whoever renews a credentials file need not stop the run
        return getattr(self._client, operation)(**arguments)

    def _connect(self) -> Any:
        # A session of one's own: the default one is shared by threads that make clients, unsafely.
        try:
            return self._boto3.session.Session().client("s3", config=self._config)
        except (self._errors.BotoCoreError, ValueError) as error:
            raise DataError(f"S3 cannot be used: {redacted(str(error))}; correct the AWS settings") from error


def refusal(location: str, status: int, code: str, message: str, headers: Any) -> Exception:
    """What an answer that is not a success amounts to: a `Transient` or a `DataError`, to be raised."""
    said = redacted(" ".join(f"{status} {code} {message}".split()))
    if status >= 500 or status in _TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        seconds = headers.get("Retry-After") or headers.get("retry-after") or ""
        return Transient(f"the server answered {said}", float(seconds) if seconds.isdecimal() else 0.0)
    if status in (401, 403) or code in _EXPIRED_CODES or code in _ACCESS_CODES:
        remedy = f"renew the credentials or the signed URL {AGAIN}"
    elif status in (404, 410) or code in _MISSING_CODES:
        remedy = f"put it back or correct the location, {AGAIN}"
        return MissingObjectError(f"{redacted(location)}: the server answered {said}; {remedy}")
    elif status == 416:
        remedy = "it is shorter than it was when it was indexed; index again"
    else:
        remedy = f"correct the location or the settings {AGAIN}"
    return DataError(f"{redacted(location)}: the server answered {said}; {remedy}")


def range_header(start: int, end: int | None) -> str:
    """Value of the header Range for bytes [start, end); "" for a whole object."""
    if end is not None:
        return f"bytes={start}-{end - 1}"
    return f"bytes={start}-" if start else ""


def bucket_and_key(location: str) -> tuple[str, str]:
    """Parts of an s3:// location."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{redacted(location)} names no bucket; write s3://bucket/key")
    return bucket, key


def redacted(text: str) -> str:
    """Text for a message: on one line, URLs without what may be secret in them."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "", text)
    return " ".join(re.sub(r"\?[^\s'\"<>)]+", "?...", text).split())


def _answer(status: int, headers: Any, body: Any) -> Answer:
    """Reads a head; names of headers are written in small letters by botocore, in any by urllib3."""
    length = headers.get("content-length") or ""
    etag = (headers.get("etag") or "").removeprefix("W/").strip('"')
    content_length = int(length) if length.isdecimal() else None
    return Answer(status, headers.get("content-range") or "", content_length, etag, body)


def _root(error: BaseException) -> BaseException:
    """What an error came from: urllib3 keeps that in `reason`, in the arguments or as the cause."""
    seen: BaseException = error
    for _ in range(8):
        reason = getattr(seen, "reason", None)
        inner = reason if isinstance(reason, BaseException) else seen.__cause__ or seen.__context__
        if inner is None:
            break
        seen = inner
    return seen


def _cause(error: BaseException) -> str:
    """The root of an error in a few words, without URLs."""
    root = _root(error)
    text = root.strerror or str(root) if isinstance(root, OSError) else str(root)
    return redacted(f"{type(root).__name__} ({text})" if text else type(root).__name__)


def _tag(text: str, name: str) -> str:
    """Content of an XML element of an S3 error; "" where there is none."""
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found[1] if found else ""
