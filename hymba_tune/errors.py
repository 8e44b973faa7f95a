"""The one exception that means: the user can fix this. The command line prints it and exits with code 2."""


class UserError(Exception):
    """A message of one or two lines: the field or file:line, the value found there, and what to do about it."""
