"""What can go wrong, by whose fault, because that decides what happens next.

===============  ==========================  ===============  =========
class            meaning                     retried          exit code
===============  ==========================  ===============  =========
ConfigError      the configuration is wrong  never            2
DataError        the data is wrong           never            2
InfraError       a machine or service failed yes, it resumes  1
===============  ==========================  ===============  =========

The message of each is one line that says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all errors whose message is meant for the user as it stands."""

    exit_code = 1

    def __str__(self) -> str:
        # Names and values that are quoted may hold anything, and what libraries say often has several lines.
        return " ".join(super().__str__().split())


class ConfigError(PipelineError):
    """A setting is unknown, missing or cannot work."""

    exit_code = 2


class DataError(PipelineError):
    """The input cannot be used."""

    exit_code = 2


class InfraError(PipelineError):
    """A machine, disk or service failed; running again resumes where this run stopped."""


def interruption_behind(error: BaseException) -> BaseException | None:
    """Return the interrupt that an error comes from, ``None`` if it comes from none.

    An interrupt (KeyboardInterrupt, Prefect's TerminationSignal) that is raised while compiled code runs comes out of
    it as some other error, with the interrupt as its cause. A time-out has a cancelled coroutine behind it, which is no
    interrupt.
    """
    from asyncio import CancelledError

    seen: BaseException | None = error
    while seen is not None:
        if not isinstance(seen, Exception | CancelledError | GeneratorExit):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
