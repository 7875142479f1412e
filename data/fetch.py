"""Bring a file over HTTP: resumed, retried, checked, and bounded in time and size.

What has come of a file is NAME.part, beside its place, and NAME.part.etag holds the server's name
for that version of it. They stay when a connection is cut, after Ctrl-C or a kill, so that the next
try, or process, asks for the rest only. NAME itself appears whole and checked, or not at all.
"""

import contextlib
import email.utils
import http.client
import os
import queue
import random
import re
import ssl
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib import request
from urllib.parse import quote, urljoin, urlsplit

from tqdm import tqdm


@dataclass(frozen=True)
class Limits:
    """What bounds a download. Times are in seconds, sizes in bytes."""

    parallel: int = 4  # files at a time
    tries: int = 5  # of a file, the first one included
    wait: float = 0.5  # before the second try; doubled with each
    max_wait: float = 120  # that a server may ask for
    timeout: float = 20  # for an answer, and for the next bytes
    min_speed: float = 1000  # bytes a second, over every `timeout` seconds
    max_bytes: int = 1 << 28  # of a file
    redirects: int = 5  # one after the other


class Failure(Exception):
    """Why there is no file. `retry`: asking again, after `after` seconds or more, may help."""

    def __init__(self, reason: str, *, retry: bool = False, after: float = 0):
        super().__init__(reason)
        self.retry, self.after = retry, after


class Unreachable(Failure):
    """No answer came at all."""


class Stopped(Exception):
    """Somebody has set `Fetcher.stop`."""


# ---------------------------------------------------------------------------- answers

# Without urllib's own handling of redirects (it reads their bodies to the end, however long), of
# errors, and of ftp: and file: addresses.
OPENER = request.OpenerDirector()
OPENER.add_handler(request.ProxyHandler())
OPENER.add_handler(request.HTTPHandler())
OPENER.add_handler(request.HTTPSHandler())
OPENER.add_handler(request.UnknownHandler())


def open_url(url: str, headers: dict[str, str], limits: Limits) -> http.client.HTTPResponse:
    """The answer to a GET, whatever its status, redirects followed; never from https to http."""
    for _ in range(limits.redirects + 1):
        answer = OPENER.open(request.Request(url, headers=headers), timeout=limits.timeout)
        target = answer.headers.get("Location")
        if answer.status not in (301, 302, 303, 307, 308) or target is None:
            return answer
        answer.close()
        target = urljoin(url, quote(target, safe=string.punctuation, encoding="latin-1"))
        if urlsplit(target).scheme not in ("https", urlsplit(url).scheme):
            raise Failure(f"redirected to {target[:200]}, which is not followed")
        url = target
    raise Failure(f"redirected more than {limits.redirects} times")


def failure(error: Exception) -> Failure:
    """What an exception from the network means."""
    if isinstance(error, Failure):
        return error
    cause = getattr(error, "reason", error)  # urllib's errors hold the one that matters
    text = str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
    text = "".join(filter(str.isprintable, text))[:200]  # some quote the server
    hopeless = isinstance(cause, ssl.SSLCertVerificationError | http.client.InvalidURL)
    network = isinstance(error, OSError | http.client.HTTPException)
    return Failure(text, retry=network and not hopeless)


def refusal(answer: http.client.HTTPResponse) -> Failure:
    """What a status that brings no file means."""
    text = f"HTTP {answer.status} {http.client.responses.get(answer.status, '')}".rstrip()
    again = answer.status in (408, 425, 429) or answer.status >= 500
    after = retry_after(answer.headers.get("Retry-After", ""))
    return Failure(f"{text}, wait {after:.0f} s" if after else text, retry=again, after=after)


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks to wait: a number or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch("[0-9]+", text):
        return float(text)
    try:
        return max(0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0


def version(answer: http.client.HTTPResponse) -> str:
    """The server's name for this version of a file, fit for If-Range (RFC 9110, 13.1.5), or ""."""
    etag = answer.headers.get("ETag", "")
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")  # W/: weak


def placement(
    answer: http.client.HTTPResponse, length: int | None, have: int
) -> tuple[int | None, int | None]:
    """Where in the file an answer's body starts, and the file's size, in bytes; None: unknown.

    All but the first `have` bytes was asked for, and the body has `length`. Failure for a status
    that brings nothing.
    """
    span = answer.headers.get("Content-Range", "")
    if answer.status == 200:
        return 0, length
    if answer.status == 206:
        match = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+)", span)
        return (int(match[1]), int(match[2])) if match else (None, None)
    if answer.status == 416 and have:  # there is no rest: all has come, or the file has changed
        return (have, have) if span == f"bytes */{have}" else (None, None)
    raise refusal(answer)


# ---------------------------------------------------------------------------- files


class Fetcher:
    """Brings files, from several threads if wanted; `stop.set()` makes all of them end."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.stop = threading.Event()
        self.unreachable: set[str] = set()  # folders' addresses, given up

    def fetch(
        self, url: str, path: Path, check: Callable[[Path], str], *, exact: bool, force: bool
    ) -> None:
        """Put the file at `url` at `path`; raises Failure, whose line names the two, or Stopped.

        Args:
            check: says what is wrong with a whole file, "" for nothing.
            exact: whether `check` finds any wrong byte. If not, the server must say how long the
                file is, and a part is only gone on with if it says of what version.
            force: whether to overwrite what has appeared at `path` meanwhile.
        """
        part, etag = (path.with_name(f"{path.name}.part{end}") for end in ("", ".etag"))
        try:
            with tqdm(desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                self._insist(url, lambda: self._attempt(url, part, etag, check, exact, bar), bar)
            if os.path.lexists(path) and not force:
                raise Failure(f"{path}: has appeared during the download, and is kept")
            os.replace(part, path)
        except OSError as error:  # of the disk: those of the network have become Failures
            place = error.filename2 or error.filename or part
            raise Failure(f"{place}: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                if not (part.exists() and part.stat().st_size):
                    part.unlink(missing_ok=True)
                    etag.unlink(missing_ok=True)

    def _insist(self, url: str, attempt: Callable[[], None], bar: tqdm) -> None:
        """Try until it succeeds, with longer and longer waits."""
        base = url.rpartition("/")[0]
        for number in range(self.limits.tries):
            if base in self.unreachable:
                raise Failure(f"{url}: {base} does not answer", retry=True)
            try:
                return attempt()
            except Failure as error:
                last = number + 1 == self.limits.tries or error.after > self.limits.max_wait
                if last and isinstance(error, Unreachable):
                    self.unreachable.add(base)
                if last or not error.retry:
                    raise Failure(f"{url}: {error}", retry=error.retry) from error
                wait = max(error.after, self.limits.wait * 2**number * random.uniform(0.5, 1.5))
                bar.set_postfix_str(f"again in {wait:.0f} s: {error}"[:60])
            if self.stop.wait(wait):
                raise Stopped

    def _attempt(
        self, url: str, part: Path, etag: Path, check: Callable, exact: bool, bar: tqdm
    ) -> None:
        """One try at making `part` the whole and right file."""
        with open(part, "ab") as file:
            known = etag.read_text(encoding="utf-8", errors="replace") if etag.exists() else ""
            known = re.sub("[^ -~]", "", known)  # a crash may leave what is no header
            have = file.tell() if known or exact else 0
            headers = {"Range": f"bytes={have}-"} if have else {}
            if have and known:
                headers["If-Range"] = known
            answer, length, body = self._ask(url, headers)
            start, size = placement(answer, length, have)
            if start == 0:
                file.truncate(0)
                etag.write_text(version(answer), encoding="utf-8")
            elif start != have or (known and version(answer) not in ("", known)):
                file.truncate(0)
                raise Failure("the file has changed, or its rest is not to be had", retry=True)
            if size is None and not exact:
                raise Failure("the server does not say how long it is, so it could be cut off")
            bar.reset(size)
            bar.n = bar.initial = start
            bar.set_postfix_str("")
            self._append(body, file, start, size, bar)
            os.fsync(file.fileno())
        if wrong := check(part):
            part.unlink()  # a part of something else, or an end that came too soon, can be mended
            raise Failure(f"not the file expected: {wrong}", retry=start > 0 or size is None)

    def _append(
        self, body: Iterator[bytes], file: BinaryIO, end: int, size: int | None, bar: tqdm
    ) -> None:
        """Write a body to the end of a file that has `end` bytes, and will have `size` if known."""
        limit = self.limits.max_bytes if size is None else size
        if limit > self.limits.max_bytes:
            raise Failure(f"{size} bytes long, more than {self.limits.max_bytes}")
        while end != size and (chunk := next(body, b"")):
            end += len(chunk)
            if end > limit:
                file.truncate(0)
                raise Failure(f"longer than {limit} bytes")
            file.write(chunk)
            file.flush()  # for whoever goes on after a kill
            bar.update(len(chunk))
        if size is not None and end < size:
            raise Failure(f"cut off after {end} of {size} bytes", retry=True)

    def _ask(
        self, url: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, int | None, Iterator[bytes]]:
        """Send a request: the answer, the length of its body where it says, and the body's chunks.

        A thread of its own waits for the network. Where that hangs in what has no timeout (the
        look-up of a name, an endless header), the thread is left behind and holds up nobody.
        """
        items: queue.Queue = queue.Queue(maxsize=16)

        def work() -> None:
            try:
                with open_url(url, headers, self.limits) as answer:
                    items.put((answer, answer.length))
                    while chunk := answer.read1(1 << 16):
                        items.put(chunk)
                items.put(b"")
            except Exception as error:
                items.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return *self._take(items), self._body(items)
        except Failure as error:
            if not error.retry:
                raise
            raise Unreachable(str(error), retry=True) from error

    def _take(self, items: queue.Queue) -> Any:
        """What a request's thread found next; Failure where that is an error, or comes too late."""
        deadline = time.monotonic() + self.limits.timeout
        while time.monotonic() < deadline:
            if self.stop.is_set():
                raise Stopped
            with contextlib.suppress(queue.Empty):
                item = items.get(timeout=0.1)
                if isinstance(item, Exception):
                    raise failure(item) from item
                return item
        raise Failure(f"nothing came for {self.limits.timeout:g} s", retry=True)

    def _body(self, items: queue.Queue) -> Iterator[bytes]:
        """The chunks of a body; Failure where they come too slowly."""
        since, count = time.monotonic(), 0
        while chunk := self._take(items):
            yield chunk
            count += len(chunk)
            seconds = time.monotonic() - since
            if seconds > self.limits.timeout:
                if count < self.limits.min_speed * seconds:
                    raise Failure(f"slower than {self.limits.min_speed:g} bytes/s", retry=True)
                since, count = time.monotonic(), 0
