"""The one exception for what a user can put right: the command line prints its sentence and exits with status 2."""


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value, what is wrong with it, and the way out."""
