"""What a user can cause, and what a user should know."""


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, exit code 2, no traceback.

    `on_one_process`: of several processes this one has met it first; else all meet it alike.
    """

    on_one_process = False


class OtherProcessError(Exception):
    """Another process of this run has failed, and said why: exit code 2, in silence."""


class RfpruneWarning(UserWarning):
    """Something the user should know about a run that goes on; collected in the report."""
