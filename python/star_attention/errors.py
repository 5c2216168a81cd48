"""What is the user's to fix, and what ends a job."""


class UserError(Exception):
    """Input that cannot be served. The message is one line that names the option, the value and
    what would be right; the command line prints it and exits with code 2."""


class RankError(Exception):
    """A rank failed in the middle of its work, or is lost: the job cannot go on."""
