"""The one exception that is the user's to fix."""


class UserError(Exception):
    """Input that cannot be served. The message is one line that names the option, the value and
    what would be right; the command line prints it and exits with code 2."""
