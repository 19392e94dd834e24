"""The one exception that stands for a mistake of the user."""


class UserError(ValueError):
    """A wrong config, checkpoint or dataset; its one-line message names value, rule and fix.

    Recipes print the message without a traceback and exit with status 2.
    """
