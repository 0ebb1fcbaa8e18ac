"""Ray's client of the Jobs API, with what it lacks: limits of time, the token when it is asked for, and errors with their kind.

This module uses private parts of Ray's client, whose requests wait forever; ``tests/contracts/test_ray_jobs.py`` covers them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from importlib import metadata
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import ray
import requests
from packaging.specifiers import SpecifierSet
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from raysft import __version__
from raysft.environment import environment
from raysft.errors import RequestError, one_line
from raysft.submit.address import EXAMPLE, why_no_answer
from raysft.submit.token import HOW, find_token, token_asked_for

Answer = TypeVar("Answer")
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
"""Limits for a connection and for each part of an answer."""
LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""They tell the names of the packages that are uploaded."""


class Unreachable(Exception):
    """The cluster did not respond, or said that it cannot answer now. Its text is the reason."""


class UnknownJob(Exception):
    """The cluster has no such job."""


class JobTaken(Exception):
    """A submission id is in use."""


def own_job() -> str | None:
    """Return the submission id of the job that this process was started as; None if it is not a job."""
    given = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return (given.get("metadata") or {}).get(JOB_ID_METADATA_KEY)


class Jobs:
    """The jobs of one cluster.

    The methods raise ``Unreachable``, ``UnknownJob``, or RequestError if the cluster refuses this machine.
    """

    def __init__(self, url: str) -> None:
        """Connect.

        Args:
            url: the dashboard's address, as ``dashboard_url`` returns it.

        Raises:
            RequestError: no Ray cluster that this raysft can use answers there, or it refuses the token.
        """
        self.url = url
        try:
            with environment(RAY_API_SERVER_ADDRESS=url):  # Ray would prefer what the environment says to an argument
                self._client = _Client(url)
            self._refuse_other_versions()
        except Unreachable as error:
            raise RequestError(why_no_answer(url, str(error))) from None

    def _refuse_other_versions(self) -> None:
        named, mine = f"--to {self.url}", ray.__version__
        found = self._client.get("/api/version").get("ray_version", "")
        if found.split(".")[:2] != mine.split(".")[:2]:
            raise RequestError(
                f"{named}: the cluster runs Ray {found or 'of an unknown version'}, but raysft {__version__} needs "
                f"{'.'.join(mine.split('.')[:2])}; use an image with raysft {__version__} on the cluster"
            )
        python = self._client.get("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion")
        needed = metadata.metadata("raysft")["Requires-Python"]
        if python and needed and python not in SpecifierSet(needed):
            raise RequestError(
                f"{named}: the cluster runs Python {python}, but raysft {__version__} needs {needed}; use an image with such "
                "a Python on the cluster"
            )

    def all(self) -> list[JobDetails]:
        """Return all jobs that were submitted to the cluster, in no order."""
        return [job for job in _understood(self._client.list_jobs) if job.submission_id]

    def details(self, job: str) -> JobDetails:
        """Return what the cluster knows about a job."""
        return _understood(lambda: self._client.get_job_info(quote(job, safe="")))

    def log(self, job: str) -> str:
        """Return all that a job has printed so far."""
        return _understood(lambda: self._client.get_job_logs(quote(job, safe="")))

    async def tail(self, job: str) -> AsyncGenerator[str, None]:
        """Yield all that a job has printed, from the beginning, and then what it prints, until the connection ends."""
        try:
            tail: Any = self._client.tail_job_logs(quote(job, safe=""))  # a generator, which its type does not say
            async with aclosing(tail) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (aiohttp.ClientError, OSError, RuntimeError, TimeoutError) as error:
            raise Unreachable(one_line(error)) from None

    def submit(self, job: str, entrypoint: str, runtime_env: dict[str, Any], about: dict[str, str]) -> None:
        """Start a job.

        Raises:
            JobTaken: there is a job of this name.
        """
        options: dict[str, Any] = {"entrypoint": entrypoint, "runtime_env": runtime_env, "metadata": dict(about)}
        _understood(lambda: self._client.submit_job(submission_id=job, **options))

    def stop(self, job: str) -> bool:
        """Ask a job to end; False if it does not run."""
        return _understood(lambda: self._client.stop_job(quote(job, safe="")))


def _understood(request: Callable[[], Answer]) -> Answer:
    """Make a request whose answer may be that of something else than a dashboard, such as the login page of a proxy.

    Raises:
        Unreachable: it is; the dashboard may answer the next time.
    """
    try:
        return request()
    except RequestError:  # which is a ValueError
        raise
    except (TypeError, ValueError) as error:
        raise Unreachable(f"the response is not from a dashboard: {one_line(error)}") from None


class _Client(JobSubmissionClient):
    _began = False
    """True once the headers of requests are ours."""

    def __init__(self, url: str) -> None:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._url, self._token = url, find_token() if _mode() != "disabled" else None
        if token_asked_for() and self._token is None:
            raise RequestError(f"RAY_AUTH_MODE=token, but no token is set; {HOW}")
        authority = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
        try:
            super().__init__(url, verify=authority or True)
        except FileNotFoundError:
            raise RequestError(f"SSL_CERT_FILE={authority}: no such file; correct it, or unset it") from None

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token[0]}"} if self._token else {}

    def get(self, endpoint: str) -> dict[str, Any]:
        """Return the object that an endpoint answers with."""
        answer = self._do_request("GET", endpoint)
        try:
            content = answer.json() if answer.status_code == 200 else None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise self._not_ray(answer)
        return content

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, ANSWER_SECONDS))
        try:
            return super()._do_request(method, endpoint, **options)
        except AuthenticationError as error:
            if self._token and "Authorization" not in self._headers:
                self._headers |= self._authorization()  # also those of the web sockets
                return self._do_request(method, endpoint, **options)
            raise RequestError(f"--to {self._url}: {self._refused(error)}") from None
        except requests.exceptions.RequestException as error:
            raise Unreachable(str(error)) from None

    def _refused(self, error: AuthenticationError) -> str:
        if self._token is None:
            off = "RAY_AUTH_MODE=disabled forbids sending one; unset it, and " if _mode() == "disabled" else ""
            return f"the cluster requires an access token, but none is set; {off}{HOW}"
        return f"the cluster rejects the access token of {self._token[1]} ({one_line(error)}); {HOW}"

    def _check_connection_and_version_with_url(self, *arguments: Any, **options: Any) -> None:
        """Check nothing, as ``Jobs`` does it: Ray's way takes every server that answers in JSON for a cluster."""
        if not self._began:
            # In place of Ray's headers, which in a process that has joined a cluster hold the token of that one.
            self._headers, self._began = self._authorization() if token_asked_for() else {}, True
        self.get("/api/version")

    def _raise_error(self, r: requests.Response) -> None:
        last = r.text.strip().splitlines()[-1] if r.text.strip() else r.reason
        if r.status_code == 404 and "does not exist" in r.text:
            raise UnknownJob(one_line(last))
        if "already exists" in r.text:
            raise JobTaken(one_line(last))
        if r.status_code >= 500 or r.status_code in (408, 429):
            raise Unreachable(f"{r.status_code}, {one_line(last)}")
        if r.status_code in (404, 405):
            raise self._not_ray(r)
        raise RequestError(f"--to {self._url}: the cluster refuses the request ({r.status_code}: {one_line(last)})")

    def _not_ray(self, answer: requests.Response) -> Exception:
        """The error for an answer that no dashboard gives."""
        if answer.status_code >= 500:
            return Unreachable(f"{answer.status_code}, {answer.reason}")
        if re.search("https", answer.text, re.IGNORECASE) and answer.status_code == 400:
            return Unreachable("sent to HTTPS port")
        return RequestError(
            f"--to {self._url}: an HTTP server answers ({answer.status_code}), but it is not the dashboard of a Ray cluster; "
            f"use {EXAMPLE}"
        )


def _mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "").lower()
