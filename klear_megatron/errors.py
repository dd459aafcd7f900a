"""The one exception that is meant for the user rather than for a developer."""


class UserError(Exception):
    """Bad input: config, data row, checkpoint, server. The message says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
