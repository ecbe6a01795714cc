"""The one error class that is the user's to mend: printed without a stack trace, exit code 2."""


class UserError(ValueError):
    """A mistake in a config, an input or an environment, told in one sentence with its remedy."""
