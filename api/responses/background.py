"""BackgroundResponses: responses that no client waits for; a few at a time, and none after the server stops."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence

from api.responses.progress import OVER
from api.responses.replay import last_event
from api.responses.schemas import ErrorEvent, ResponseObject, ResponsesEvent, ResponseStateEvent
from api.responses.stored import OpenResponse
from errors import APIError, InvalidRequest, Overloaded, RateLimited, RequestTimeout, Unavailable
from server.observer import count_for_model
from setting_values import ApiKey
from telemetry import logs, request_record
from telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)


class Job:
    """A response in the background, with its events for those who follow it, if it was asked for as a stream."""

    def __init__(self, opened: OpenResponse, client: str, is_streamed: bool) -> None:
        self.opened, self.progress, self.client = opened, opened.progress, client
        self._is_streamed = is_streamed
        self.error: APIError | None = None
        self.task: asyncio.Task[None] | None = None
        self._events: list[ResponsesEvent] = []
        self._is_done = False
        self._grown = asyncio.Event()

    @property
    def response(self) -> ResponseObject:
        return self.progress.response

    def fail(self, error: APIError) -> None:
        self.error = error
        self.progress.fail(error)

    def add(self, event: ResponsesEvent) -> None:
        if self._is_streamed:
            self._events.append(event)
            self._wake()

    def end(self) -> None:
        self._is_done = True
        self._wake()

    def _wake(self) -> None:
        """Tells all who follow that there is something new."""
        self._grown.set()
        self._grown = asyncio.Event()

    async def follow(self, after: int = -1) -> AsyncGenerator[ResponsesEvent]:
        """Yields the events behind the one with the number `after`, and waits for more.

        The last one always tells how the response ended. Raises what ended it before its first event, and
        InvalidRequest if the events are not kept.
        """
        if not self._is_streamed:
            raise InvalidRequest(
                "The events of a response in the background are kept only if it was asked for with stream: poll it "
                "until it is over.",
                param="stream",
            )
        number = after + 1
        last: ResponsesEvent | None = None
        is_done = False
        while not is_done:
            is_done, grown = self._is_done, self._grown
            for event in self._events[number:]:
                number, last = number + 1, event
                yield event
            if not is_done:
                await grown.wait()
        if self.error is not None and not self._events:
            raise self.error
        if not (isinstance(last, ResponseStateEvent) and last.response.status in OVER):
            for event in self._ending():
                yield event.numbered(number)
                number += 1

    def _ending(self) -> Iterator[ResponsesEvent]:
        """Yields the events of a response that ended without one of its own, or before those that a client knows."""
        if self.error is not None:
            yield ErrorEvent(message=self.error.message, code=self.error.code, param=self.error.param)
        yield last_event(self.response)


class BackgroundResponses:
    def __init__(self, max_jobs: int, max_size: int, keys: Sequence[ApiKey]) -> None:
        """max_size: the bytes that the inputs of all may have together."""
        self._max_jobs, self._max_size = max_jobs, max_size
        self._concurrent = {key.name: key.concurrent for key in keys}
        self._jobs: dict[str, Job] = {}

    async def start(
        self,
        opened: OpenResponse,
        events: AsyncGenerator[ResponsesEvent],
        *,
        seconds: float | None,
        is_streamed: bool,
    ) -> Job:
        """Begins to make a response; `events` are those that `opened` keeps.

        Raises RateLimited or Overloaded if too many are being made, and Unavailable if it cannot be stored.
        seconds: None for no limit.
        """
        record = request_record.current()
        self._check_room(record.client, opened.size)
        job = Job(opened, record.client, is_streamed)
        self._jobs[job.response.id] = job
        try:
            await opened.store_begun()
            if job.error is not None:  # the server is shutting down
                raise job.error
        except BaseException:
            job.progress.cancel()  # no one has its id
            del self._jobs[job.response.id]
            await opened.forget()
            raise
        own = RequestRecord(request_id=record.request_id, client=record.client)
        job.task = asyncio.create_task(self._run(job, events, seconds, own))
        return job

    def find(self, response_id: str) -> Job | None:
        """Returns the job of a response that is still being made, if the key of this request has asked for it."""
        job = self._jobs.get(response_id)
        return job if job is not None and job.client == request_record.current().client else None

    async def cancel(self, job: Job) -> ResponseObject:
        """Ends a job, and returns its response."""
        job.progress.cancel()
        await self._end([job])
        return job.response

    async def close(self) -> None:
        """Ends all jobs: their responses fail."""
        await asyncio.sleep(0)  # so that those that have just been started can end
        jobs = list(self._jobs.values())
        for job in jobs:
            job.fail(Unavailable("The server is shutting down."))
        await self._end(jobs)

    async def _end(self, jobs: Sequence[Job]) -> None:
        tasks = [job.task for job in jobs if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _expire(self, job: Job, seconds: float) -> None:
        job.fail(RequestTimeout(f"The answer took longer than the limit of {seconds:g} seconds."))
        assert job.task is not None
        job.task.cancel()

    def _check_room(self, client: str, size: int) -> None:
        most = self._concurrent.get(client)
        if most is not None and sum(job.client == client for job in self._jobs.values()) >= most:
            raise RateLimited(
                f"This API key allows {most} responses in the background at a time; try again when one has finished.",
                retry_after=1,
            )
        is_too_large = sum(job.opened.size for job in self._jobs.values()) + size > self._max_size
        if len(self._jobs) >= self._max_jobs or is_too_large:
            raise Overloaded(
                f"{len(self._jobs)} responses are being made in the background, which leaves no room for another one: "
                "try again later, or ask without background.",
                retry_after=5,
            )

    async def _run(
        self, job: Job, events: AsyncGenerator[ResponsesEvent], seconds: float | None, record: RequestRecord
    ) -> None:
        request_record.begin(record)
        timer = seconds and asyncio.get_running_loop().call_later(seconds, self._expire, job, seconds)
        try:
            async for event in events:
                job.add(event)
        except asyncio.CancelledError:
            pass  # whoever cancelled the task has said in the job's progress why
        except APIError as error:
            job.fail(error)
        except Exception:
            log.exception("a response in the background failed")
            job.fail(APIError("The server failed; the error is in its log."))
        finally:
            if timer:
                timer.cancel()
            await events.aclose()
            await job.opened.store_if_over()  # where it ended before its events began
            del self._jobs[job.response.id]
            job.end()
            self._report(job, record)

    def _report(self, job: Job, record: RequestRecord) -> None:
        record.error = None if job.error is None else job.error.code or job.error.type
        if record.metrics is not None:
            count_for_model(record, record.metrics, record.error)
        logs.write(record, "POST", "/v1/responses", 200 if job.error is None else job.error.status)
