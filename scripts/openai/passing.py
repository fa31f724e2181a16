"""The one place through which every count and time of the endpoint passes.

Each worker has one Passing. Its methods are called on the loop, some once per token, so they must be very cheap and
never wait. Here they do nothing (METRICS=off). metrics.py has an object with the same methods that counts, and a worker
replaces `here` with it.
"""

from __future__ import annotations


class Passing:
    """Times are seconds."""

    def answered(self, route: str, status: int) -> None:
        """An answer is written. route: the template of its path; status 499: its client left."""

    def asked(self, tokens: int) -> None:
        """A question with so many tokens goes to the engine."""

    def placed(self, seconds: float) -> None:
        """From the arrival of a request to its place in the engine."""

    def first_token(self, seconds: float, tokens: int) -> None:
        """From the arrival of a request to its first token, or to the first tokens if several come at once."""

    def token(self, seconds: float, tokens: int) -> None:
        """From the previous token to this one, or these, of the same answer."""

    def finished(self, reason: str) -> None:
        """An answer came to its end. reason: OpenAI's word for it."""

    def whole(self, seconds: float) -> None:
        """From the arrival of a request to the end of its answer."""


here = Passing()
