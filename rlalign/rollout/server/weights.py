"""The routes through which a job's weights come, and the files of those that are in use."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

from starlette.requests import Request

from rlalign.rollout.channels.files import ADAPTER_CONFIG
from rlalign.rollout.engine import WeightsLost
from rlalign.rollout.server.bodies import WeightsBody
from rlalign.rollout.server.doors import TooLarge
from rlalign.rollout.server.engine_host import EngineHost
from rlalign.rollout.server.engine_process import EngineLost
from rlalign.rollout.server.jobs import Job, JobTable
from rlalign.rollout.server.sequences import Refused
from rlalign.rollout.vllm_weights import ADAPTER_FILE
from rlalign.types import PolicyVersion

WEIGHT_FILE = re.compile(rf"[0-9]{{6}}\.safetensors|{re.escape(ADAPTER_FILE)}|{ADAPTER_CONFIG}")


class WeightRoutes:
    """`spool` holds a folder for each job; an upload may have `max_bytes` in all."""

    def __init__(self, host: EngineHost, jobs: JobTable, spool: Path, max_bytes: int) -> None:
        self._host, self._jobs, self._spool, self._max_bytes = host, jobs, spool, max_bytes
        self._numbers = itertools.count()  # of folders that were taken in

    async def upload(self, request: Request) -> Any:
        """Take one file of an update that is announced later. What was uploaded for another version
        and never announced goes."""
        job = self._jobs.renew(request.path_params["job"])
        version, name = request.path_params["version"], request.path_params["file"]
        if not WEIGHT_FILE.fullmatch(name) or not re.fullmatch(r"0|[1-9][0-9]{0,15}", version):
            raise Refused(
                f"{version}/{name} is no file of weights: VERSION/000000.safetensors and so on, or "
                f"VERSION/{ADAPTER_FILE} and VERSION/{ADAPTER_CONFIG}"
            )
        async with job.uploading:
            size = await self._receive(request, job, self._spool / job.id / version, name)
        self._jobs.renew(job.id)
        return {"file": name, "bytes": size}

    async def _receive(self, request: Request, job: Job, folder: Path, name: str) -> int:
        for other in self._spool.joinpath(job.id).iterdir():
            if other.name.isdigit() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / name
        size = before = _size(folder, path)
        try:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self._max_bytes:
                        raise TooLarge(
                            f"an update may have {self._max_bytes} bytes (max_weights_mib)"
                        )
                    file.write(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return size - before

    async def update(self, request: Request) -> Any:
        """Have the engine load what was announced; the receipt."""
        self._jobs.get(request.path_params["job"])
        body = WeightsBody.model_validate_json(await request.body())
        # The body may have taken its time: look for the job again.
        job = self._jobs.renew(request.path_params["job"])
        source, folder = self._source(job, body, request), None
        if "path" in source:
            folder = Path(source["path"])
        try:
            host, lora = self._host, job.kind == "lora"
            update = host.update_adapter if lora else host.update_weights
            digest = await update(job.id, source, body.version, body.in_flight)
        except BaseException as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, EngineLost) and not self._host.failure:  # another is on its way
                raise WeightsLost(f"{error}: send them again") from error
            raise
        self._jobs.renew(job.id)  # or it is over, and what it left is about to go
        job.version = PolicyVersion(body.version, digest)
        self._replace(job, folder)
        return {"version": body.version, "digest": digest}

    def _source(self, job: Job, body: WeightsBody, request: Request) -> dict[str, Any]:
        if body.channel == "files":
            return {"channel": "files", "path": str(self._take_in(job, body.version))}
        if job.kind == "lora":
            raise Refused(f"adapters come as files, not through {body.channel!r}")
        source = body.model_dump(include={"channel"} | body.fields_of_channel)
        if body.channel == "group":
            source["host"] = request.client.host if request.client else "127.0.0.1"
        return source

    def _take_in(self, job: Job, version: int) -> Path:
        """The folder that the client wrote for `version`, out of the client's way: what it writes
        from now on is another update, and this one can be read again when the engine died."""
        sent = self._spool / job.id / str(version)
        if sent.is_symlink() or not sent.is_dir():
            raise Refused(f"there is no folder {sent} with the weights of version {version}")
        files = list(sent.iterdir())
        strange = [file.name for file in files if file.is_symlink() or not file.is_file()]
        if strange:
            raise Refused(f"{sent} holds something that is no plain file: {strange[0]!r}")
        if not any(file.suffix == ".safetensors" for file in files):
            raise Refused(f"{sent} holds no safetensors files of version {version}")
        return sent.rename(sent.with_name(f"taken-{next(self._numbers)}"))

    def _replace(self, job: Job, folder: Path | None) -> None:
        """Delete what no sequence needs any more: vLLM may read an adapter again while one runs."""
        if job.folder is not None:
            job.replaced.append((job.folder, self._host.next_number))
        job.folder, replaced, job.replaced = folder, job.replaced, []
        needed = self._host.oldest(job.id) if job.kind == "lora" else self._host.next_number
        for old, before in replaced:
            if before <= needed:
                shutil.rmtree(old, ignore_errors=True)
            else:
                job.replaced.append((old, before))


def _size(folder: Path, without: Path) -> int:
    sizes = 0
    for file in set(folder.iterdir()) - {without}:
        with contextlib.suppress(FileNotFoundError):
            sizes += file.stat().st_size
    return sizes
