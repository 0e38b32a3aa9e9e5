"""`RetryPolicy`: when is a failed request tried again, and for how long?"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import ssl
import time

from azure.core.exceptions import AzureError, IncompleteReadError, ServiceRequestError, ServiceResponseError
from azure.core.pipeline import PipelineRequest, PipelineResponse
from azure.core.pipeline.policies import HTTPPolicy
from azure.core.rest import HttpRequest, HttpResponse

from azure_torch_ckpt.transport.buffers import Cancel
from azure_torch_ckpt.transport.throttle import Throttle

__all__ = ["COPY_SOURCE", "DAMAGED", "NOT_SUPPORTED", "PASSING_STATUS", "RetryPolicy", "error_code"]

_log = logging.getLogger(__name__)

# https://learn.microsoft.com/rest/api/storageservices/common-rest-api-error-codes: time-outs and a busy server pass.
PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_BUSY_STATUS = frozenset({429, 503})
DAMAGED = frozenset({"Crc64Mismatch", "Md5Mismatch"})
"""Error codes of a 400 for a body that was damaged on the way
(https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes). Sending it again most likely
succeeds."""
NOT_SUPPORTED = "FeatureNotSupported"
"""Error code of Azurite for a request that it does not support. Its status is 500, and a retry does not help."""
COPY_SOURCE = "CannotVerifyCopySource"
"""Error code for a source that the service cannot read. The status is that of the service's own request, or 500 if that
had no answer; then the service has waited for long already."""
# Answers to old versions of the protocol, and answers of gateways in front of the service, lack the header.
_CODE = re.compile(rb"<Code>\s*(\w{1,100})\s*</Code>|\"code\"\s*:\s*\"(\w{1,100})\"", re.ASCII | re.IGNORECASE)
_CODE_WITHIN = 4096
_FIRST_DELAY = 0.2
_LONGEST_DELAY = 20.0
# A name that does not resolve, a port without a server, and a body that arrives damaged again and again (its memory
# changed after the checksum) seldom recover: a job should not wait for minutes.
_SELDOM_RECOVERS_SECONDS = 20.0


class RetryPolicy(HTTPPolicy[HttpRequest, HttpResponse]):
    """Exponential backoff with jitter, beginning with a fraction of a second, limited by time and not by count.

    ``Retry-After`` is honoured. A request's body is sent again from its start, and a response's body is received again
    from its start. A request that was cancelled (``cancel=``) is not tried again.

    Args:
        seconds: no attempt starts later than this after the first attempt.
        throttle: holds requests back while the service is busy.
    """

    def __init__(self, seconds: float, throttle: Throttle) -> None:
        super().__init__()
        self._seconds = seconds
        self._throttle = throttle

    def send(self, request: PipelineRequest[HttpRequest]) -> PipelineResponse[HttpRequest, HttpResponse]:
        cancel: Cancel = request.context.options.get("cancel") or Cancel()
        started = time.monotonic()
        attempt = 0
        while True:
            response: PipelineResponse[HttpRequest, HttpResponse] | None = None
            failure: AzureError | None = None
            limit = self._seconds
            try:
                with self._throttle.permit() as permit:
                    response = self.next.send(request)
                    status = response.http_response.status_code
                    permit.busy = status in _BUSY_STATUS
                    permit.good = status < 400
                reason = f"status {status}"
                if status < 400:
                    return response
                code = error_code(response.http_response)
                if code in DAMAGED or (code == COPY_SOURCE and status in _BUSY_STATUS):
                    limit = min(limit, _SELDOM_RECOVERS_SECONDS)
                elif status not in PASSING_STATUS or code in (NOT_SUPPORTED, COPY_SOURCE):
                    return response
            except (ServiceRequestError, ServiceResponseError, IncompleteReadError) as error:
                if isinstance(error.inner_exception, ssl.SSLCertVerificationError):
                    raise
                if isinstance(error, ServiceRequestError):
                    limit = min(limit, _SELDOM_RECOVERS_SECONDS)
                reason, failure = str(error), error
            delay = _delay(attempt, response)
            if cancel.cancelled or time.monotonic() + delay - started > limit:
                if failure is not None:
                    raise failure
                assert response is not None
                return response
            attempt += 1
            _log.info(
                "%s request failed (%s); attempt %d follows in %.2f s",
                request.http_request.method,
                reason,
                attempt + 1,
                delay,
            )
            self._throttle.count_retry()
            cancel.wait(delay)


def error_code(response: HttpResponse) -> str | None:
    """Return the service's error code, from the header or else from the body (XML or JSON); None without one."""
    code = response.headers.get("x-ms-error-code")
    if code:
        return str(code)
    found = _CODE.search(response.content[:_CODE_WITHIN])
    return None if found is None else (found[1] or found[2]).decode()


def _delay(attempt: int, response: PipelineResponse[HttpRequest, HttpResponse] | None) -> float:
    delay = min(_FIRST_DELAY * 2.0**attempt, _LONGEST_DELAY) * random.uniform(0.5, 1.5)
    if response is not None:
        delay = max(delay, _retry_after(response.http_response.headers.get("Retry-After")))
    return delay


def _retry_after(value: str | None) -> float:
    """Return the seconds that a Retry-After header asks for: a number or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return 0.0
    if value.isdecimal():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
