"""What passes by: every count and time that a measurement of the endpoint may want, at one place.

Each worker has one Passing. Its methods are called on the loop, some once for each token, so they must cost about nothing and never wait.
Here they do nothing; whoever exports metrics replaces `here` with an object of the same methods.
"""


class Passing:
    """Times are seconds."""

    def request(self, path: str) -> None:
        """A request's head has come."""

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Its answer is written; status 499: its client left."""

    def queued(self, answers: int) -> None:
        """So many answers of this worker wait for their turn in the engine now."""

    def first_token(self, seconds: float) -> None:
        """From the question to its first token, waiting included."""

    def token(self, seconds: float) -> None:
        """From the token before to this one, of the same answer."""

    def tokens(self, prompt: int, completion: int) -> None:
        """What a request has cost, at its end."""


here = Passing()
