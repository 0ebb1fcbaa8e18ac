"""The private parts of Ray's client of the Jobs API that ``raysft/submit/jobs_internals.py`` changes."""

import inspect

import requests
from ray._private.runtime_env import constants, packaging
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import common, job_supervisor, sdk
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from raysft.submit import jobs_internals
from tests.contracts.contract import Contract

RAY = Contract("ray", "raysft/submit/jobs_internals.py")


def test_every_request_goes_through_one_function_that_takes_a_timeout():
    request = RAY.name(JobSubmissionClient, "_do_request")
    RAY.parameters(request, ("method", "endpoint", "data", "json_data", "timeout"))
    RAY.source(JobSubmissionClient, "**kwargs,\n        )\n\n        # Check for authentication", "_do_request")
    for module in (dashboard_sdk, sdk):
        # Only there: a request elsewhere would have no limit.
        assert inspect.getsource(module).count("= requests.request(") == (module is dashboard_sdk)
        for other in ("requests.get(", "requests.post(", "requests.put(", "requests.Session("):
            assert other not in inspect.getsource(module)


def test_headers_are_shared_by_requests_and_web_sockets():
    RAY.source(JobSubmissionClient, "headers=self._headers,\n            verify=self._verify", "_headers")
    RAY.source(JobSubmissionClient, 'logs/tail",\n                headers=self._headers', "_headers")


def test_a_refused_token_and_other_errors_are_told_apart():
    RAY.source(JobSubmissionClient, "raise AuthenticationError(formatted_error)", "_do_request")
    RAY.positional(RAY.name(JobSubmissionClient, "_raise_error"), 2)
    RAY.positional(RAY.name(JobSubmissionClient, "_check_connection_and_version_with_url"), 3)
    RAY.source(JobSubmissionClient, "self._check_connection_and_version_with_url(min_version", "versions")
    assert issubclass(AuthenticationError, Exception)
    assert issubclass(requests.exceptions.SSLError, requests.exceptions.RequestException)


def test_the_environment_names_a_dashboard_before_an_argument_does(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://second:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:1")
    assert get_address_for_submission_client("http://argument:1") == "http://first:1"


def test_modules_log_the_names_of_packages_under_their_own_names():
    loggers = (RAY.name(dashboard_sdk, "logger"), RAY.name(sdk, "logger"), RAY.name(packaging, "default_logger"))
    assert tuple(logger.name for logger in loggers) == jobs_internals.LOGGERS


def test_a_job_finds_its_own_name_in_its_environment(monkeypatch):
    metadata = '{"runtime_env": {}, "metadata": {"job_submission_id": "mine", "job_name": "mine"}}'
    monkeypatch.setenv(RAY.name(constants, "RAY_JOB_CONFIG_JSON_ENV_VAR"), metadata)
    assert RAY.name(common, "JOB_ID_METADATA_KEY") == "job_submission_id"
    assert jobs_internals.own_job() == "mine"
    RAY.source(job_supervisor.JobSupervisor, "{JOB_ID_METADATA_KEY: job_id", "metadata")
    RAY.source(job_supervisor.JobSupervisor, '"metadata": self._metadata', "metadata")


def test_a_jobs_details_have_what_is_shown():
    assert {"submission_id", "status", "message", "metadata", "driver_exit_code", "start_time", "end_time"} <= set(
        getattr(JobDetails, "model_fields", None) or JobDetails.__fields__
    )
