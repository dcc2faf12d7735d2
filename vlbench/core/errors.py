"""The kinds of bad news that vlbench tells a user, and nothing else.

``UserError`` ends a command with one clear line, and so does ``RunError``, with another exit status; ``BadExample``
describes one broken example, which a training run counts and an evaluation refuses. Anything else that is raised is
a defect of ours and shows its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do next."""


class RunError(UserError):
    """The words of the call were right and the run failed: a loss that is not finite, too many bad examples.

    The command line ends with status 1, where it has 2 for any other ``UserError``: a script may try again with other
    settings, and need not look for a spelling mistake.
    """


class BadExample(UserError):
    """One example that cannot be used.

    Args:
        kind: a short stable slug that reports count by, for instance ``"truncated image"``.
        where: the file, or file and member, that holds the example.
        reason: one sentence for a person.
    """

    def __init__(self, kind: str, where: str, reason: str) -> None:
        super().__init__(f"{where}: {kind}: {reason}")
        self.kind = kind
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadExample], tuple[str, str, str]]:
        # Loader processes send their exceptions home by pickle, which would otherwise call __init__ with one string.
        return (BadExample, (self.kind, self.where, self.reason))
