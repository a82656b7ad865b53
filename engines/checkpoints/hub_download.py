"""Downloads a hub's files: with progress, resume and checksums; a file appears complete or not at all.

huggingface_hub neither resumes after the end of a process nor verifies checksums over HTTP. A file has a temporary name
until its checksum is verified.
"""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from engines.errors import CheckpointError

PARALLEL_FILES = 4  # files; published checkpoints have four large ones
MAX_VAIN_ATTEMPTS = 4  # in a row without a byte
RETRY_PAUSE_S = 1.0  # after the first one; grows with each further one
PROGRESS_INTERVAL_S = 5.0
RETRY_STATUSES = (408, 416, 429, 500, 502, 503, 504)  # statuses that another attempt may avoid

logger = logging.getLogger("engines.checkpoints")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit. `checksum`: SHA-256 in hex of a file in Git LFS, else Git's SHA-1."""

    name: str
    size: int
    checksum: str

    def matches(self, path: Path) -> bool:
        """Returns whether the content at `path` has the checksum."""
        with path.open("rb") as file:
            if len(self.checksum) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.checksum
            return hashlib.sha1(b"blob %d\0" % path.stat().st_size + file.read()).hexdigest() == self.checksum

    def has_full_size(self, path: Path) -> bool:
        """Compares the size alone, as only verified files get their final name."""
        return path.is_file() and path.stat().st_size == self.size


class _StoppedError(Exception):
    """Another file failed."""


class Download:
    """Downloads files of one commit into the folder `blobs`, each named by its checksum."""

    def __init__(self, hub_id: str, commit: str, blobs: Path, files: Sequence[HubFile]):
        self._hub_id, self._commit, self._blobs = hub_id, commit, blobs
        self._files = {file.checksum: file for file in files}.values()  # equal contents once
        self._failures: SimpleQueue[Exception] = SimpleQueue()
        self._lock = threading.Lock()
        self._total = sum(file.size for file in self._files)
        self._first = self._done = sum(_size(self._partial(file)) for file in self._files)
        self._began = self._reported = time.monotonic()

    def run(self) -> None:
        """Downloads all files. Raises CheckpointError, OSError of the disk, HfHubHTTPError of the hub."""
        if not self._files:
            return
        self._check_free_space()
        resumed = f"; {_amount(self._done)} are here from before" if self._done else ""
        logger.info(
            "%s: %d files, %s%s", f"downloading {self._hub_id}", len(self._files), _amount(self._total), resumed
        )
        queue: SimpleQueue[HubFile] = SimpleQueue()
        for file in sorted(self._files, key=lambda file: -file.size):
            queue.put(file)
        # Daemons, unlike the threads of a pool: a process that ends does not wait for gigabytes.
        threads = [threading.Thread(target=self._work, args=(queue,), daemon=True) for _ in range(PARALLEL_FILES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self._failures.empty():
            raise self._failures.get()
        logger.info("%s: %s downloaded and verified", self._hub_id, _amount(self._total))

    def _check_free_space(self) -> None:
        needed, free = self._total - self._done, shutil.disk_usage(self._blobs).free
        if free < needed:
            raise CheckpointError(
                f"model: {self._hub_id}: {_amount(needed)} more are needed in {self._blobs}, {_amount(free)} are free; "
                "make room, or set HF_HOME to a folder on another disk"
            )

    def _partial(self, file: HubFile) -> Path:
        return self._blobs / f"{file.checksum}.sana-sprint.incomplete"

    def _work(self, queue: SimpleQueue[HubFile]) -> None:
        try:
            while True:
                self._fetch(queue.get_nowait())
        except (Empty, _StoppedError):
            return
        except Exception as error:  # `run` raises it
            self._failures.put(error)

    def _fetch(self, file: HubFile) -> None:
        """Downloads one file; once more from its start if its checksum is wrong."""
        partial = self._partial(file)
        for _ in range(2):
            self._receive(file, partial)
            if file.matches(partial):
                partial.replace(self._blobs / file.checksum)
                return
            self._drop(partial)
            logger.warning("%s: %s came with a wrong checksum, and was removed", self._hub_id, file.name)
        raise CheckpointError(
            f"model: {self._hub_id}: {file.name} came twice with a wrong checksum, and was removed; look at what lies "
            "between here and the hub (HF_ENDPOINT, a proxy, the disk), and start again"
        )

    def _receive(self, file: HubFile, partial: Path) -> None:
        """Resumes `partial` until it has the file's size; retries broken connections."""
        from huggingface_hub.errors import HfHubHTTPError

        vain = 0
        partial.touch()
        while (before := _size(partial)) < file.size:
            reason = "the answer ended early"
            try:
                self._receive_once(file, partial)
            except _StoppedError:
                raise
            except HfHubHTTPError as error:
                if error.response.status_code not in RETRY_STATUSES:
                    raise
                if error.response.status_code == 416:  # the range starts behind the end: `partial` is of another file
                    self._drop(partial)
                    partial.touch()
                reason = str(error).partition("\n")[0]
            except OSError:  # of the disk
                raise
            except Exception as error:  # a broken connection, of any HTTP client of huggingface_hub
                reason = str(error).partition("\n")[0] or type(error).__name__
            done = _size(partial)
            if done >= file.size:
                break
            vain = 0 if done > before else vain + 1
            where = f"{self._hub_id}: {file.name} broke off at {_amount(done)} of {_amount(file.size)}: {reason}"
            if vain == MAX_VAIN_ATTEMPTS:
                raise CheckpointError(
                    f"model: {where}; {MAX_VAIN_ATTEMPTS} attempts brought nothing more; start again to go on"
                )
            logger.warning("%s; going on from there", where)
            time.sleep(RETRY_PAUSE_S * vain)
        if _size(partial) > file.size:
            self._drop(partial)
            partial.touch()

    def _receive_once(self, file: HubFile, partial: Path) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported without a declaration
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = build_hf_headers() | {
            "Accept-Encoding": "identity"
        }  # ranges of a compressed body are no ranges of the file
        begin = _size(partial)
        if begin:
            headers["Range"] = f"bytes={begin}-"
        url = hf_hub_url(self._hub_id, file.name, revision=self._commit)
        # The client follows redirects, and omits the token for another host.
        with (
            get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
            partial.open("ab") as out,
        ):
            hf_raise_for_status(response)
            if begin and response.status_code != 206:  # a server without ranges sends the whole file
                self._add(-begin)
                out.truncate(0)
            for chunk in response.iter_bytes():
                out.write(chunk)
                self._add(len(chunk))

    def _drop(self, partial: Path) -> None:
        self._add(-_size(partial))
        partial.unlink()

    def _add(self, count: int) -> None:
        if not self._failures.empty():
            raise _StoppedError
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._reported < PROGRESS_INTERVAL_S:
                return
            self._reported = now
            rate = max((self._done - self._first) / (now - self._began), 1.0)
            logger.info(
                "%s: %s of %s (%d %%), %s/s, %d s left",
                *(self._hub_id, _amount(self._done), _amount(self._total), 100 * self._done // self._total),
                *(_amount(rate), (self._total - self._done) / rate),
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _amount(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
