"""What a user can cause, and what a user should know."""


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, exit code 2, no traceback."""


class RfpruneWarning(UserWarning):
    """Something the user should know about a run that goes on; collected in the report."""
