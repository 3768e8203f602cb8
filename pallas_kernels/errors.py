"""The one error by which an implementation declines a call that another may take."""


class Unsupported(NotImplementedError):
    """This implementation cannot serve this call; the message says why and what would do.

    Raise it for a limit of the implementation (platform, dtype, size), never for a mistake of
    the caller: that is a ValueError and ends the call whatever else is in the table.
    """
